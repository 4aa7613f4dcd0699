"""Settings that every stage shares, and those of every stage that asks the LVLM."""

import re
from dataclasses import dataclass

from lever_plus.config import INPUT, LARGEST_SEED, PLACE, SPEED, TOLD, setting
from lever_plus.registries import SAMPLERS
from lever_plus.settings import word_lists
from open_mmicl.errors import UsageError, plain

_GPUS = re.compile(r"\s*[0-9]{1,4}(\s*,\s*[0-9]{1,4})*\s*,?\s*")


@dataclass(frozen=True)
class SharedSettings:
    """Where things are, which data, which model, which machine."""

    dataset: str = setting(
        "auto",
        "data set: a file of configs/dataset, or auto (okvqa_local where found, else mini_okvqa)",
        is_name=True,
        affects=INPUT,
        often=True,
    )
    sampler: str = setting(
        "rand_sampler",
        "which items of the train split are in a query's pool",
        choices=SAMPLERS,
        affects=INPUT,
        often=True,
    )
    beam_model: str = setting(
        "qwen2.5_vl_3B", "the LVLM: a file of configs/infer_model", is_name=True, affects=INPUT, often=True
    )
    lever_lm: str = setting(
        "query_img_text_icd_img_text",
        "what the selector sees of query and candidates: image and text",
        choices=("query_img_text_icd_img_text", "query_img_icd_img", "query_text_icd_text"),
        affects="items v2.lora",
    )
    gpu_id: str = setting(
        "0", "GPU to use, or several separated by commas; CUDA_VISIBLE_DEVICES wins", affects=SPEED, often=True
    )
    device: str = setting("auto", "auto: the GPU where there is one", choices=("auto", "cpu", "cuda"), affects=SPEED)
    nproc: int = setting(1, "processes that share the work (torchrun ranks)", lo=1, hi=256, affects=SPEED, often=True)
    seed: int = setting(42, "seed of every random choice", lo=0, hi=LARGEST_SEED, affects="v2 rl_data v3", often=True)
    result_dir: str = setting("results", "folder of all results", affects=PLACE, often=True)
    data_seed: int = setting(
        0,
        "seed of what is not training: anchors, pools, evaluated queries; keep it when SEED varies",
        lo=0,
        hi=LARGEST_SEED,
        affects="beam_data v2 rl_data v3 v3.answers inference",
    )
    candidate_num: int = setting(
        64,
        "candidates in each query's pool",
        lo=2,
        hi=100_000,
        affects="beam_data v2.pools rl_data v3.answers inference",
    )
    exp_name: str = setting(
        "", "name of the experiment: own v3 folder, own record", is_name=True, affects=PLACE, often=True
    )
    record_lang: str = setting(
        "auto",
        "language of records and reports; auto: zh where LANG begins with zh, else en",
        choices=("auto", "zh", "en"),
        affects="record",
        often=True,
    )
    dataset_path: str = setting(
        "",
        "folder of the data set's files, where its YAML names no variable of its own or that one is not set",
        affects=INPUT,
        often=True,
    )
    okvqa_path: str = setting("", "folder of OK-VQA's questions and annotations JSON", affects=INPUT, often=True)
    vqav2_path: str = setting("", "folder of VQAv2's questions and annotations JSON", affects=INPUT, often=True)
    coco_path: str = setting(
        "", "folder that holds train2014/ and val2014/ (or mscoco2014/ with both)", affects=INPUT, often=True
    )
    mini_okvqa_path: str = setting("", "folder of the embedded benchmark's files (made where missing)", affects=INPUT)
    clip_path: str = setting(
        "",
        "CLIP model: local folder or name; empty: the data set's, else openai/clip-vit-base-patch32",
        affects=INPUT,
        often=True,
    )
    embedding: str = setting(
        "auto",
        "what the selector sees of an item, as channels: clip_image, clip_text, lvlm (the LVLM's hidden state before "
        "it answers), and of candidates answer (as the LVLM embeds it) or answer_clip; or one item embedding of CLIP's "
        "image and question, their mean or side by side (concat); auto: clip_image clip_text lvlm answer, or mean "
        "where item embeddings or a v2 checkpoint were brought",
        affects=INPUT,
        often=True,
    )
    lvlm_layers: str = setting(
        "-1",
        "layers of the channel lvlm, separated by spaces: 0 the embeddings, -1 after the last layer and its norm",
        affects="states",
    )
    lvlm_pool: str = setting(
        "last",
        "channel lvlm: at the prompt's last token, or the mean over its image's",
        choices=("last", "image"),
        affects="states",
    )
    v2_mode: str = setting(
        "frozen",
        "the supervised selector. frozen: trained on beams; labels: on whether each candidate's own answer would be "
        "right, from the annotations alone, without LVLM prompts; lora: on beams, training CLIP by LoRA as well; "
        "v1: as frozen, and the selector has no cross-attention",
        choices=("frozen", "labels", "lora", "v1"),
        affects="v2",
        often=True,
    )
    lever_plugins: str = setting(
        "",
        "Python files of your own choices: losses, rewards, scorers, samplers … (docs/extending.md), separated by :",
        affects=INPUT,
    )
    val_fraction: float = setting(
        0.1,
        "share of the train-split queries held out (by image) for model selection",
        lo=0,
        hi=0.5,
        affects="v2 v3 inference",
    )

    def __post_init__(self) -> None:
        if not _GPUS.fullmatch(self.gpu_id):
            raise UsageError(
                f"GPU_ID={plain(self.gpu_id, 80)} is not allowed: the number of a GPU, or several with commas (0,1)"
            )
        word_lists.check_words(self.embedding)
        word_lists.layers(self.lvlm_layers)

    @property
    def item_embeddings(self) -> str:
        """The file of item embeddings that the user names; "" where the stage reads the standard ones."""
        return ""

    @property
    def own_clip(self) -> str:
        """The selector whose own CLIP makes the embeddings; "" for the data set's CLIP."""
        return ""


@dataclass(frozen=True)
class BeamNames(SharedSettings):
    """What names a beam data file and the v2 checkpoint trained on it, and whether policies may stop."""

    sample_num: int = setting(
        800,
        "anchor queries of the beam search; configs/dataset/*.yaml sets it per data set",
        lo=1,
        affects="beam_data",
        often=True,
    )
    beam_size: int = setting(5, "beams kept", lo=1, hi=64, affects="beam_data")
    max_shot: int = setting(2, "demonstrations in a beam", lo=1, hi=8, affects="beam_data")
    construct_order: str = setting(
        "left",
        "a new demonstration goes before (left) or after (right) those there",
        choices=("left", "right"),
        affects="beam_data",
    )
    stop: bool = setting(
        False,
        "the policy may stop before the last shot, at none too (set it for every step): RL data hold pointers of 0 to "
        "RL_SHOT picks, beam data the InfoScore of each step",
        affects="beam_data v2 rl_data v3",
        before=False,
    )


@dataclass(frozen=True)
class LvlmSettings(SharedSettings):
    """Settings of the stages that ask the LVLM."""

    engine: str = setting(
        "fast", "fast engine, or the naive path it is measured against", choices=("fast", "naive"), affects=INPUT
    )
    precision: str = setting(
        "auto",
        "LVLM data type; auto: the model configuration's",
        choices=("auto", "fp32", "bf16", "fp16"),
        affects=INPUT,
    )
    device_map: str = setting(
        "",
        "auto: spread the LVLM over the visible GPUs (accelerate), for models larger than one; "
        "empty: the model configuration's",
        choices=("", "auto"),
        affects=SPEED,
    )
    token_budget: int = setting(
        0, "tokens in one forward pass; 0: the model configuration's", unit="tokens", lo=0, affects=SPEED
    )
    image_cache_mb: int = setting(
        0,
        "memory for visual features; 0: the model configuration's, else what is free",
        unit="MiB",
        lo=0,
        affects=SPEED,
    )
    answer_cache: str = setting(
        "", "SQLite file of answers and scores; empty: <result dir>/<data set>/cache/answers.sqlite", affects=PLACE
    )
    prompt_order: str = setting(
        "best_last",
        "best_last: the first pick comes last, next to the query",
        choices=("best_last", "best_first"),
        affects="rl_data v3.answers inference",
    )
    assume: str = setting(
        "",
        "with --dry-run: the sizes of OK-VQA or VQAv2 without their files",
        choices=("", "okvqa", "vqav2"),
        affects=TOLD,
    )
    max_new_tokens: int = setting(
        5, "length of a generated answer", unit="tokens", lo=1, hi=1024, affects="rl_data v3.answers inference"
    )
    num_beams: int = setting(
        3, "beams of the answer's generation; 1: greedy", lo=1, hi=64, affects="rl_data v3.answers inference"
    )
    length_penalty: float = setting(
        0.0, "length penalty of the answer's generation", affects="rl_data v3.answers inference"
    )
