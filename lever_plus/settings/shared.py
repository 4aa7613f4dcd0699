"""Settings that every stage shares, and those of every stage that asks the LVLM."""

from dataclasses import dataclass

from lever_plus.config import LARGEST_SEED, setting

SAMPLERS = {
    "rand_sampler": "RandSampler",
    "text_sim_sampler": "TextSimSampler",
    "img_sim_sampler": "ImgSimSampler",
    "mix_sampler": "MixSampler",
    "channel_sim_sampler": "ChannelSimSampler",
}
_SAMPLER_WORDS = (*SAMPLERS, *SAMPLERS.values())


@dataclass(frozen=True)
class SharedSettings:
    """Where things are, which data, which model, which machine."""

    dataset: str = setting(
        "auto", "data set: a file of configs/dataset, or auto (okvqa_local where found, else mini_okvqa)", is_name=True
    )
    sampler: str = setting(
        "rand_sampler",
        "candidate sampler: at random; or from the whole train split the items of the most similar questions, images, "
        "both by halves, or of all that the selector sees of a query (channel_sim_sampler)",
        choices=_SAMPLER_WORDS,
    )
    beam_model: str = setting("qwen2.5_vl_3B", "the LVLM: a file of configs/infer_model", is_name=True)
    lever_lm: str = setting(
        "query_img_text_icd_img_text",
        "what the selector sees of query and candidates: image and text",
        choices=("query_img_text_icd_img_text", "query_img_icd_img", "query_text_icd_text"),
    )
    gpu_id: str = setting("0", "GPU to use, or several with commas; CUDA_VISIBLE_DEVICES wins over it")
    device: str = setting("auto", "auto: the GPU where there is one", choices=("auto", "cpu", "cuda"))
    nproc: int = setting(1, "processes that share the work (torchrun ranks)", lo=1, hi=256)
    seed: int = setting(42, "seed of every random choice", lo=0, hi=LARGEST_SEED)
    result_dir: str = setting("results", "folder of all results")
    data_seed: int = setting(
        0,
        "seed of what is not training: anchors, pools, evaluated queries; keep it when SEED varies",
        lo=0,
        hi=LARGEST_SEED,
    )
    candidate_num: int = setting(64, "candidates in each query's pool", lo=2, hi=100_000)
    exp_name: str = setting("", "name of the experiment: own v3 folder, own record", is_name=True)
    record_lang: str = setting(
        "auto",
        "language of records and reports; auto: zh where LANG begins with zh, else en",
        choices=("auto", "zh", "en"),
    )
    dataset_path: str = setting(
        "", "folder of the data set's files, where its YAML names no variable of its own or that one is not set"
    )
    okvqa_path: str = setting("", "folder of OK-VQA's questions and annotations JSON")
    vqav2_path: str = setting("", "folder of VQAv2's questions and annotations JSON")
    coco_path: str = setting("", "folder that holds train2014/ and val2014/ (or mscoco2014/ with both)")
    mini_okvqa_path: str = setting("", "folder of the embedded benchmark's files (made where missing)")
    clip_path: str = setting(
        "", "CLIP model: local folder or name; empty: the data set's, else openai/clip-vit-base-patch32"
    )
    embedding: str = setting(
        "auto",
        "what the selector sees of an item, as channels: clip_image, clip_text, lvlm (the LVLM's hidden state before "
        "it answers), and of candidates answer (as the LVLM embeds it) or answer_clip; or one item embedding of CLIP's "
        "image and question, their mean or side by side (concat); auto: clip_image clip_text lvlm answer, or mean "
        "where item embeddings or a v2 checkpoint were brought",
    )
    lvlm_layers: str = setting(
        "-1", "layers of the channel lvlm, with spaces between: 0 the embeddings, -1 behind the last layer and its norm"
    )
    lvlm_pool: str = setting(
        "last", "channel lvlm: at the prompt's last token, or the mean over its image's", choices=("last", "image")
    )
    v2_mode: str = setting(
        "frozen",
        "the supervised selector. frozen: trained on beams; labels: on whether each candidate's own answer would be "
        "right, from the annotations alone, without LVLM prompts; lora: on beams, CLIP with LoRA trained along; "
        "v1: as frozen, and the selector has no cross-attention",
        choices=("frozen", "labels", "lora", "v1"),
    )
    lever_plugins: str = setting(
        "", "Python files of your own losses, rewards, scorers, rivals, interfaces (docs/extending.md), : between them"
    )
    val_fraction: float = setting(
        0.1, "share of the train-split queries held out (by image) for model selection", lo=0, hi=0.5
    )

    def __post_init__(self) -> None:
        from lever_plus.data import channel_names  # it knows the paths, which know these settings

        channel_names.check_words(self.embedding)
        channel_names.layers(self.lvlm_layers)


@dataclass(frozen=True)
class LvlmSettings(SharedSettings):
    """Settings of the stages that ask the LVLM."""

    engine: str = setting("fast", "fast engine, or the naive path it is measured against", choices=("fast", "naive"))
    precision: str = setting(
        "auto", "LVLM data type; auto: the model configuration's", choices=("auto", "fp32", "bf16", "fp16")
    )
    device_map: str = setting(
        "",
        "auto: spread the LVLM over the visible GPUs (accelerate), for models larger than one; "
        "empty: the model configuration's",
        choices=("", "auto"),
    )
    token_budget: int = setting(0, "tokens in one forward pass; 0: the model configuration's", unit="tokens", lo=0)
    image_cache_mb: int = setting(
        0, "memory for visual features; 0: the model configuration's, else what is free", unit="MiB", lo=0
    )
    answer_cache: str = setting(
        "", "SQLite file of answers and scores; empty: <result dir>/<data set>/cache/answers.sqlite"
    )
    prompt_order: str = setting(
        "best_last", "best_last: the first pick stands next to the query", choices=("best_last", "best_first")
    )
    assume: str = setting(
        "", "with --dry-run: the sizes of OK-VQA or VQAv2 without their files", choices=("", "okvqa", "vqav2")
    )
    max_new_tokens: int = setting(5, "length of a generated answer", unit="tokens", lo=1, hi=1024)
    num_beams: int = setting(3, "beams of the answer's generation; 1: greedy", lo=1, hi=64)
    length_penalty: float = setting(0.0, "length penalty of the answer's generation")
