"""ICL inference: v3, v2 and the baselines answer the same queries with 1 to MAX_EVAL_SHOT demonstrations.

Every method picks from the query's own pool. Writes results/<data set>/icl_inference/<run>/ with
metrics.json, samples.jsonl (one line per answer) and the official result files. The v3 checkpoint is the
best by the validation metric (CHECKPOINT_PHASE, LEVER_LM_CHECKPOINT_PATH).
"""

from pathlib import Path
from typing import Any

from lever_plus import cli, io, paths, provenance
from lever_plus.cli import log
from lever_plus.data import channel_names
from lever_plus.data import methods as methods_table
from lever_plus.data.methods import chosen as chosen_methods
from lever_plus.devices import select_gpu
from lever_plus.settings.inference import InferenceSettings
from lever_plus.stages import adaptive, lvlm, recipes, work
from lever_plus.stages.checkpoint_choice import choose_v3
from lever_plus.stages.cost import print_plan
from open_mmicl.lazy import lazy

evaluation = lazy("lever_plus.stages.evaluation")


def run_name(settings: InferenceSettings) -> str:
    """Folder of this run under icl_inference."""
    if settings.run_name:
        return settings.run_name
    count = "all" if settings.test_data_num < 0 else str(settings.test_data_num)
    split = "" if settings.eval_split == "val" else f"_{settings.eval_split}"
    exp = f"_{settings.exp_name}" if settings.exp_name else ""
    first = chosen_methods(settings)[0]
    model = paths.model_slug(paths.lvlm_name(settings))
    return f"{first}_{paths.sampler_class(settings.sampler)}_{model}{exp}{split}_{count}"


def output_dir(settings: InferenceSettings) -> Path:
    """Where this run's files go."""
    return paths.inference_dir(settings, run_name(settings))


def run(settings: InferenceSettings, dry_run: bool) -> int:
    """Evaluate, or say that it is done."""
    methods, output = chosen_methods(settings), output_dir(settings) / "metrics.json"
    if dry_run:

        def made_of() -> provenance.Recipe:
            return recipe(settings, find_selectors(settings, methods)[0])

        if recipes.dry_run_done(settings, output, made_of, "inference"):
            return 0
        print_plan(settings, work.inference(settings, methods), output_dir(settings))
        if any(methods_table.decides(method) for method in methods):
            log.info(adaptive.price(settings, methods))
        return 0
    selectors, chosen = find_selectors(settings, methods)
    made_from = recipe(settings, selectors)
    if recipes.skip_if_done(output, made_from, "inference"):
        return 0
    select_gpu(settings.device, settings.gpu_id)  # before torch is imported

    return evaluation.evaluate(settings, methods, selectors, chosen, output, made_from)


def is_done(settings: InferenceSettings) -> bool:
    """Whether the metrics are there and made from exactly this. No torch."""
    selectors, _ = find_selectors(settings, chosen_methods(settings))
    return provenance.status(output_dir(settings) / "metrics.json", recipe(settings, selectors)) == "current"


def find_selectors(settings: InferenceSettings, methods: list[str]) -> tuple[dict[str, Path], dict[str, Any]]:
    """The checkpoint of each selector among the methods, and how v3's was chosen ({} without v3).

    Raises:
        MissingInputError: a checkpoint is not there; names the command that makes it.
    """
    chosen = choose_v3(settings) if "v3" in methods else {}
    adaptive.check(settings, methods, chosen.get("path", ""))
    selectors = {"v3": Path(chosen["path"])} if chosen else {}
    supervised = {"v2": settings.v2_checkpoint_path or paths.v2_checkpoint(settings),
                  "v1": paths.v2_checkpoint(settings, "v1"), "v2_lora": paths.v2_checkpoint(settings, "v2_lora"),
                  "label": paths.label_checkpoint(settings)}  # fmt: skip
    make = {"v2": "bash scripts/train_lever_lm.sh", "label": "python -m lever_plus.pipeline label"}
    for method, path in supervised.items():
        if method not in methods:
            continue
        how = make.get(method, f"bash scripts/train_lever_lm.sh … {method}")
        selectors[method] = io.existing(path, f"{method} checkpoint", how)
    return selectors, chosen


def recipe(settings: InferenceSettings, selectors: dict[str, Path]) -> provenance.Recipe:
    """What the metrics are made from."""
    splits = ("train",) if settings.eval_split == "train_val" else ("train", "val")
    files = {
        **selectors,
        **channel_names.train_files(settings),
        **lvlm.feature_files(settings, *splits),
    }
    if settings.eval_split == "val":
        if channel_names.names(settings):
            files |= channel_names.files(settings, "val", candidates=False)
        else:
            files["query_embeddings"] = channel_names.query_embeddings_file(settings)
    steps, inputs = ("inference",), lvlm.prompt_inputs(settings, splits)
    if "v2_lora" in selectors:
        files["lora_embeddings"] = paths.candidate_embeddings(settings, "v2_lora")
    if any(methods_table.decides(method) for method in chosen_methods(settings)):
        steps, inputs = (*steps, "adaptive"), {**inputs, "adaptive": True}
    return recipes.recipe(settings, steps, files, inputs)


if __name__ == "__main__":
    raise SystemExit(cli.stage_main(InferenceSettings, run, __doc__))
