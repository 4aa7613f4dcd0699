"""How many processes and threads share a stage's work on this machine. No torch import."""

from collections.abc import Mapping

from lever_plus import paths
from lever_plus.devices import cores
from lever_plus.settings.loading import load
from lever_plus.settings.registry import STAGE_SETTINGS
from lever_plus.settings.selector import TrainV3Settings
from lever_plus.settings.shared import SharedSettings
from lever_plus.stages import flops
from open_mmicl import memory
from open_mmicl.interface.config import InferModelConfig

SPARE_BYTES = 1 << 30  # of a process besides weights and caches: Python, torch, a forward pass


def processes(settings: SharedSettings, env: Mapping[str, str]) -> dict[str, int]:
    """Processes for each kind of sharing: NPROC where it is set; else one per GPU that was asked for.

    With DEVICE_MAP=auto one process asks the LVLM, on all of those GPUs. Without a GPU the cores share the prompts, a
    process of one thread each, as many as the memory holds: the answers do not depend on the number of processes, and
    threads that wait for one another at every product are ten times slower where anything else runs. Training keeps
    to one, on the CPU also with NPROC: a selector is too small to gain from a second, whose sums round otherwise, and
    so files are the same whatever NPROC is. Where there is something to share (ZeRO, CLIP's gradients, prompts asked
    while training) NPROC counts.
    """
    if env.get("NPROC"):
        on_cpu = not env.get("CUDA_VISIBLE_DEVICES", "").strip()
        return {"prompts": settings.nproc, "training": 1 if on_cpu and _is_small(env) else settings.nproc, "": 1}
    visible = [gpu for gpu in env["CUDA_VISIBLE_DEVICES"].split(",") if gpu.strip()]
    if visible:
        spread = load(STAGE_SETTINGS["generate_data"], {}, env).device_map == "auto"
        return {"prompts": 1 if spread else len(visible), "training": 1, "": 1}
    return {"prompts": max(1, min(cores(), models_in_memory(settings, env))), "training": 1, "": 1}


def _is_small(env: Mapping[str, str]) -> bool:
    """Whether training is a selector's alone, in whole on each process."""
    s = load(TrainV3Settings, {}, env)
    asks = s.is_online or s.checkpoint_metric == "answers"
    return s.zero_stage == 0 and s.v2_mode != "lora" and not asks


def models_in_memory(settings: SharedSettings, env: Mapping[str, str]) -> int:
    """How many processes of the LVLM the free memory takes, each with its caches; 1 where its size is not known."""
    model = InferModelConfig.load(paths.infer_model_yaml(settings))
    there = flops.architecture(model)
    if model.interface == "openai" or there is None:
        return 1
    precision = load(STAGE_SETTINGS["generate_data"], {}, env).precision
    width = flops.BYTES.get(model.dtype if precision == "auto" else precision, 4)
    caches = (model.image_cache_mb + model.kv_cache_mb) << 20  # without a limit images take what the others leave
    return memory.host_free() // int(there.weights * width + caches + SPARE_BYTES)


def threads_of(shares: Mapping[str, int], env: Mapping[str, str]) -> dict[str, str]:
    """Threads of the processes that ask the LVLM: one, unless the user says otherwise or idle cores are left because
    the memory holds no further process.
    """
    idle = cores() // shares["prompts"]
    if idle < 2 or any(env.get(name) for name in ("NPROC", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")):
        return {}
    return {"OMP_NUM_THREADS": str(idle)}
