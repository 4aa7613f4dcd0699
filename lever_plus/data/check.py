"""What is there and what is missing of a data set.

    python -m lever_plus.data.dataset check okvqa_local

lists what is missing, with counts and the first names; exit code 3 where something is.
"""

import os
import sys
from collections import Counter

import numpy as np

from lever_plus import cli, paths
from lever_plus.data import catalog
from lever_plus.data.dataset import find_images, load_split
from lever_plus.data.texts import SHOWN, findings
from lever_plus.settings import names
from lever_plus.settings.loading import load
from lever_plus.settings.shared import SharedSettings
from open_mmicl.errors import MissingInputError, UsageError
from open_mmicl.interface.config import InferModelConfig
from open_mmicl.interface.text_rules import TextRules
from open_mmicl.lazy import lazy

loading = lazy("open_mmicl.interface.loading")


def check(settings: SharedSettings) -> tuple[list[str], bool]:
    """What is there and what is missing of the settings' data set.

    Returns: (lines to print, whether nothing is missing).

    Raises:
        DamagedInputError: a JSON file is damaged.
    """
    dataset = paths.dataset(settings)
    rules, which = _text_rules(settings)
    lines, complete = [f"texts: {which}"], True
    for split in catalog.SPLITS:
        try:
            dataset.files(split)
        except MissingInputError:
            lines += [f"{split}: missing {path}" for path in dataset.expected(split)]
            if split in dataset.merged:
                lines.append(f"{split}: or the merged file {dataset.merged[split]}")
            if dataset.generator:
                lines.append(f"{split}: made by DATASET={dataset.key} python -m lever_plus.pipeline dataset")
            elif dataset.path_variable:
                lines.append(f"{split}: set {dataset.path_variable} (now {dataset.root})")
            complete = False
            continue
        found = load_split(dataset, split)
        images = np.unique(found.image_ids)
        lines.append(f"{split}: {len(found)} questions, {len(images)} images, fingerprint {found.fingerprint[:12]}")
        if dataset.reader != catalog.OFFICIAL:
            lines.append(f"{split}: {found.answers_line()}")
        if found.groups is not None:
            counts = ", ".join(f"{name} {number}" for name, number in sorted(Counter(found.groups.tolist()).items()))
            asked = f"; {len(found.query_rows)} may be queries of training" if split == "train" else ""
            lines.append(f"{split}: groups: {counts}{asked}")
        lines += [f"{split}: {found_text.line()}" for found_text in findings(found, rules)]
        missing, empty = found.missing_images()
        for files, problem in ((missing, "missing"), (empty, "empty files")):
            if files:
                complete = False
                more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
                lines.append(
                    f"{split}: {len(files)} of {len(images)} images {problem}: {', '.join(files[:SHOWN])}{more}"
                )
        if missing:
            folders = " or ".join(str(folder) for folder in dataset.image_dirs[split])
            lines.append(f"{split}: looked in {folders}; {find_images(dataset)}")
    if complete:
        lines.append("complete")
    return lines, complete


def _text_rules(settings: SharedSettings) -> tuple[TextRules | None, str]:
    """(what the model's tokenizer makes of texts, how that is told); None where the model is not on this machine."""
    try:
        config = InferModelConfig.load(paths.infer_model_yaml(settings))
        folder = config.local_dir()
    except MissingInputError as error:
        return None, f"control tokens not looked for, {error}"
    if folder is None:
        return None, f"control tokens not looked for: {config.name} is no folder on this machine"

    return TextRules(loading.load_tokenizer(folder)), f"checked with the tokenizer of {config.name}"


def main(argv: list[str] | None = None) -> int:
    """``check [DATASET] [NAME=value …]``."""
    words = sys.argv[1:] if argv is None else argv

    def body() -> int:
        if not words or words[0] in ("-h", "--help"):
            print(
                f"{__doc__.strip()}\n\nusage: python -m lever_plus.data.dataset check [{' | '.join(catalog.names())}]"
            )
            return 0
        if words[0] != "check":
            raise UsageError(f"unknown command {words[0]!r}; there is: check")
        rest = words[1:]
        named = {"DATASET": rest.pop(0)} if rest and "=" not in rest[0] and not rest[0].startswith("-") else {}
        values, _, _ = cli.parse_options(SharedSettings, rest)
        names.tell([SharedSettings], {**os.environ, **values})
        settings = load(SharedSettings, {**values, **named})
        lines, complete = check(settings)
        print("\n".join(lines), flush=True)
        if not complete:
            raise MissingInputError(f"{settings.dataset}: something is missing: see above, and what to do")
        return 0

    return cli.guard(body)


if __name__ == "__main__":
    raise SystemExit(main())
