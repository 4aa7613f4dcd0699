"""Names of settings that are none here: those of other projects, those of libraries, those that look like ours."""

import functools
import re
from collections.abc import Collection, Iterable

_EPOCHS, _LR = "RCE_EPOCHS, GRPO_EPOCHS or V2_EPOCHS", "RCE_LR, GRPO_LR or V2_LR"
_CKPT = "SFT_CKPT (to train from) or LEVER_LM_CHECKPOINT_PATH (to evaluate)"
_GPUS, _FILES = "GPU_ID (0,1,2,3), or NPROC for processes", "OKVQA_PATH or VQAV2_PATH, the folder of these files"
_FRESH = "ONLINE_SAMPLES, or RL_BEAMS, RL_SAMPLES_LOW, RL_SAMPLES_HIGH and RL_RANDOM"

ELSEWHERE: dict[str, str] = {
    **dict.fromkeys(("LR", "LEARNING_RATE"), _LR),
    **dict.fromkeys(("EPOCH", "EPOCHS", "NUM_EPOCHS", "NUM_TRAIN_EPOCHS", "MAX_EPOCHS"), _EPOCHS),
    **dict.fromkeys(("MAX_GRAD_NORM", "GRADIENT_CLIP", "CLIP_GRAD_NORM"), "GRAD_CLIP"),
    **dict.fromkeys(("WARMUP_RATIO", "WARMUP", "NUM_WARMUP_STEPS"), "WARMUP_STEPS"),
    "VAL_RATIO": "VAL_FRACTION", "TRAIN_RATIO": "VAL_FRACTION",
    **dict.fromkeys(("SHOTS", "SHOT_NUM", "NUM_SHOTS", "NUM_SHOT", "ICD_NUM", "NUM_ICD"), "MAX_EVAL_SHOT"),
    **dict.fromkeys(("KL_TARGET_MIN", "KL_TARGET_MAX"), "KL_TARGET"),
    **dict.fromkeys(("KL_COEF", "KL_COEFF", "KL_LOSS_COEF", "KL_WEIGHT", "BETA"), "KL_BETA"),
    **dict.fromkeys(("BS", "BATCH", "MICRO_BATCH_SIZE", "TRAIN_BATCH_SIZE", "PER_DEVICE_TRAIN_BATCH_SIZE",
                     "GLOBAL_BATCH_SIZE", "GRADIENT_ACCUMULATION_STEPS", "ACCUMULATION_STEPS", "GRAD_ACCUM"),
                    "BATCH_SIZE"),
    "BATCH_SIZE_OVERRIDE": "TOKEN_BUDGET", "EVAL_BATCH_SIZE": "TOKEN_BUDGET",
    "GRPO_TEMP": "ONLINE_TEMPERATURE (GRPO_MODE=online), or RL_TEMP_LOW and RL_TEMP_HIGH",
    **dict.fromkeys(("TEMPERATURE", "TAU", "RCE_TEMP", "RCE_TEMPERATURE", "RCE_TAU"),
                    "RCE_TAU_START and RCE_TAU_END, ONLINE_TEMPERATURE, or RL_TEMP_LOW and RL_TEMP_HIGH"),
    **dict.fromkeys(("RETRIEVAL_NUM", "NUM_RETRIEVAL"), "MAX_EVAL_SHOT, CANDIDATE_NUM or RL_RANDOM"),
    **dict.fromkeys(("TOP_K", "TOPK", "TOP_M"), "MAX_EVAL_SHOT, CANDIDATE_NUM or BEAM_SIZE"),
    **dict.fromkeys(("NUM_GENERATIONS", "GROUP_SIZE", "ROLLOUT_N", "NUM_ROLLOUTS"), _FRESH),
    **dict.fromkeys(("MAX_TOKENS", "MAX_LENGTH", "MAX_COMPLETION_LENGTH"), "MAX_NEW_TOKENS"),
    **dict.fromkeys(("D_MODEL", "EMBED_DIM", "HIDDEN_SIZE"), "HIDDEN_DIM"),
    "USE_GRU": "GRU_STATE", "DISABLE_STOP": "STOP", "RANDOM_SEED": "SEED", "ENCODER_LAYERS": "NUM_LAYERS",
    **dict.fromkeys(("GPU", "GPUS", "GPU_IDS", "NUM_GPUS", "N_GPUS", "NGPUS"), _GPUS),
    **dict.fromkeys(("NUM_PROCESSES", "NUM_PROCS"), "NPROC"),
    **dict.fromkeys(("TEST_NUM", "TEST_NUMS", "NUM_TEST", "EVAL_NUM"), "TEST_DATA_NUM"),
    **dict.fromkeys(("MODEL", "MODEL_NAME", "VQA_MODEL", "MODEL_NAME_OR_PATH", "LVLM"), "BEAM_MODEL"),
    "SAMPLER_NAME": "SAMPLER", "DATASET_NAME": "DATASET",
    **dict.fromkeys(("DATA_PATH", "DATA_DIR"), "DATASET_PATH, OKVQA_PATH, VQAV2_PATH or COCO_PATH"),
    **dict.fromkeys(("TRAIN_QUES_PATH", "TRAIN_ANN_PATH", "VAL_QUES_PATH", "VAL_ANN_PATH"), _FILES),
    "RL_DATA": "RL_DATA_PATH", "BEAM_DATA": "BEAM_DATA_PATH",
    **dict.fromkeys(("QUERY_EMB", "IMG_EMB", "CAND_EMB"), "QUERY_EMB_PATH"),
    **dict.fromkeys(("CKPT", "CKPT_PATH", "CHECKPOINT", "RCE_CKPT", "GRPO_CKPT", "V3_CKPT", "RESUME_CKPT_PATH",
                     "RESUME_FROM_CHECKPOINT"), _CKPT),
    **dict.fromkeys(("V2_CKPT", "V2_CKPT_PATH"), "SFT_CKPT (to train from) or V2_CHECKPOINT_PATH (to compare with)"),
    **dict.fromkeys(("OUTPUT_PATH", "CKPT_DIR", "CHECKPOINT_DIR", "SAVE_DIR"), "RESULT_DIR or OUTPUT_DIR"),
    **dict.fromkeys(("EXPERIMENT", "EXPERIMENT_NAME", "EXP"), "EXP_NAME"),
}  # fmt: skip
"""What other projects call a setting that has another name here; their values are not taken over."""

_EACH_EPOCH = "every epoch ends with validation and a checkpoint (KEEP_CHECKPOINTS says how many stay)"
_EACH_STEP = "every step is logged"
_SEARCH = "the LVLM's answers are searched (NUM_BEAMS), not sampled"
NOTHING: dict[str, str] = {
    **dict.fromkeys(("ADV_CLIP", "ADVANTAGE_CLIP"), "advantages are not clipped; ADVANTAGE_SCALE says their scale"),
    "REWARD_CLIP": "REWARD_MODE=plan clips its rewards to -5..5, other modes do not",
    **dict.fromkeys(("EVAL_STEPS", "EVAL_INTERVAL", "EVAL_EVERY", "EVAL_FREQ", "SAVE_STEPS", "SAVE_INTERVAL",
                     "SAVE_EVERY", "SAVE_FREQ", "SAVE_TOTAL_LIMIT", "TEST_FREQ"), _EACH_EPOCH),
    **dict.fromkeys(("LOG_INTERVAL", "LOG_STEPS", "LOG_EVERY", "LOG_FREQ", "LOGGING_STEPS"), _EACH_STEP),
    **dict.fromkeys(("NUM_WORKERS", "N_WORKERS", "WORKERS", "DATALOADER_NUM_WORKERS"),
                    "there are no loading processes; NPROC processes share the work"),
    "TOP_P": _SEARCH, "DO_SAMPLE": _SEARCH, "REPETITION_PENALTY": _SEARCH,
    "OPTIMIZER": "the optimiser is AdamW", "LABEL_SMOOTHING": "RCE's targets are weights already",
    **dict.fromkeys(("USE_STEP_EMB", "NO_STEP_EMB"), "the v4 variants are not supported"),
    **dict.fromkeys(("ENTROPY_COEF", "ENTROPY_COEFF"), "GRPO's loss has no entropy bonus; KL_BETA weighs its KL"),
    "KARPATHY_COCO_PATH": "captioning is not supported",
}  # fmt: skip
"""What other projects have a setting for and this one does not, and what it does."""

_OF_LIBRARIES = (
    "HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "TOKENIZERS_", "CUDA_", "CUBLAS_", "CUDNN_", "NCCL_",
    "GLOO_", "UCX_", "TORCH_", "TORCHELASTIC_", "TORCHINDUCTOR_", "PYTORCH_", "PYTHON", "OMP_", "GOMP_", "KMP_", "MKL_",
    "OPENBLAS_", "DS_", "DEEPSPEED_", "ACCELERATE_", "WANDB_", "TRACKIO_", "TENSORBOARD_", "LD_", "LC_", "XDG_",
    "SLURM_", "PBS_", "OMPI_", "MASTER_", "PET_", "TRITON_", "XLA_", "NVIDIA_", "VLLM_", "CONDA_", "VIRTUAL_ENV",
    "PIP_", "UV_", "SSL_", "REQUESTS_", "CURL_", "AWS_", "GIT_", "GITHUB_", "CI_", "RUNNER_", "DOCKER_", "COMPOSE_",
    "KUBERNETES_", "COLAB_", "KAGGLE_", "JUPYTER_", "MPL", "TERM_", "HYPOTHESIS_", "PYTEST_",
)  # fmt: skip
"""How names begin that libraries and programs read."""
RELIED_ON = (
    "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "TRACKIO_PROJECT",
    "TRANSFORMERS_OFFLINE", "WANDB_PROJECT",
)  # fmt: skip
"""Names of libraries on which a run depends: one misspelt would change what is run, and where."""
_EXACT = frozenset((
    "TEMP", "TMP", "TMPDIR", "TEMPDIR", "PATH", "MANPATH", "HOME", "LANG", "LANGUAGE", "TERM", "TERMINFO", "EDITOR",
    "NO_COLOR", "FORCE_COLOR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
    "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "NODE_RANK", "MAX_JOBS", "USER", "SHELL", "TZ", "COLUMNS", "LINES",
    "INIT_CWD", "INPUTRC", "HOSTNAME", "NAME", "LOGNAME", "CI", "PROMPT_COMMAND",
))  # fmt: skip
_SECRET = ("_PROXY", "_TOKEN", "_KEY", "_SECRET", "_PASSWORD")

_OF_THE_FIELD = frozenset(
    "RCE GRPO PPO DPO DPP GSPO RLHF RLOO RL SFT KL REWARD REWARDS ADVANTAGE ADV ICD ICDS ICL LVLM VLM INFOSCORE LEVER "
    "LEVERPLUS OKVQA VQAV VQA BEAM BEAMS SHOT SHOTS LORA".split()
)
"""Words that hardly any other program has in a name."""
_OF_TRAINING = frozenset(
    "ACCUM ACCUMULATION ADAM ADAMW ANN ATTENTION BASE BASELINE BATCHES CAND CANDIDATES CAPTION CHECK CLAMP CLIPPED "
    "COEF COEFF COEFFICIENT CONFIG COSINE COUNT D DEVICES DISABLE DTYPE EARLY EMBED ENABLE ENTROPY EPOCH EPSILON "
    "EVERY FACTOR FEATURE FILE FILES FINAL FOLDER FP FREEZE FREQ FREQUENCY FULL GAMMA GENERATION GENERATIONS GPUS "
    "GRADIENT GROUP HARD HEAD HEADS ICDS IDX INPUT INTERVAL ITEMS ITERATIONS ITERS K L LAMBDA LAST LAYER LEARNING "
    "LIMIT LINEAR LOAD LOG LOGGING LOGPROB LOSS M MARGIN METHOD METRIC METRICS MODELS MOMENTUM N NEG NEGATIVE NO "
    "NOISE NORMALIZE NUMBER OPTIMIZER P PARAM PARAMS PER POLICY POS PREDICTION PREFIX PROCESSES PT QUALITY QUANTIZE "
    "QUES QUESTION QUESTIONS RATE RATIO RATIOS REDUCTION REFINE REL RELEVANCE RESUME RETRIEVAL RETRIEVER ROLLOUT "
    "ROLLOUTS SAMPLING SAVE SCHEDULER SCRATCH SELECTOR SHARD SHARDS SHUFFLE SIM SIMILARITY SLOT SMOOTHING SOFT STD "
    "STEP STOPPING STRATEGY STRENGTH STRICT SUFFIX TASK TEXT THREADS THRESHOLD TOP TOPIC TOPICS TOTAL TRAIN TRAINING "
    "TRAJECTORY TYPE UNFREEZE USE VALIDATION VALUE VERSION WEIGHTS WORKERS".split()
)
"""Words of settings that machine learning has names for; a name made of them alone was meant for a training."""


def of_a_library(name: str) -> bool:
    """Whether a library or program reads a variable of this name: a ``.env`` may hold it."""
    upper = name.upper()
    if upper in _EXACT or upper.startswith(_OF_LIBRARIES):
        return True
    return upper.endswith(_SECRET) and not words_of(upper) & _OF_THE_FIELD


def words_of(name: str) -> frozenset[str]:
    """The words of a name, in capitals, without numbers behind them: V2_LR -> {V, LR}."""
    return frozenset(word.rstrip("0123456789") or "0" for word in name.upper().split("_") if word)


def looks_like_a_setting(name: str, ours: Collection[str]) -> bool:
    """Whether a name, of no library, was probably meant for a training such as ours: it holds a word of the field, or
    several words that all are words of settings. ``ours``: the names of our settings.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or of_a_library(name):
        return False
    words = words_of(name)
    return bool(words & _OF_THE_FIELD) or ("_" in name.strip("_") and words <= _vocabulary(frozenset(ours)))


def same_words(name: str, ours: Iterable[str]) -> str | None:
    """Our setting whose words a name has in another order, or with other words of settings around them; of several,
    the one with most. None where there is none of two words or more.
    """
    names = sorted(ours)
    words = words_of(name)
    if not (words & _OF_THE_FIELD or words <= _vocabulary(frozenset(names))):
        return None
    found = [one for one in names if len(words_of(one)) > 1 and words_of(one) <= words]
    return max(found, key=lambda one: len(words_of(one)), default=None)


@functools.cache
def _vocabulary(ours: frozenset[str]) -> frozenset[str]:
    """The words that names of settings are made of."""
    return frozenset().union(_OF_TRAINING, _OF_THE_FIELD, *map(words_of, ours))
