"""``--help``: every setting of some stages once, those often used first, at most 100 columns wide.

python -m lever_plus.settings.help STAGE …
"""

import dataclasses
import functools
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from lever_plus import config
from lever_plus.settings.registry import STAGE_SETTINGS

WIDTH = 100
wrapped = functools.partial(textwrap.fill, width=WIDTH, break_long_words=False, break_on_hyphens=False)
_STAGE = {
    "run": "experiment", "compare": "experiment", "pack": "inference", "reproduce": "inference",
    "lmms_eval": "inference",
}  # fmt: skip
"""The stage whose settings a command reads, where its module has another name."""


def table(classes: Sequence[type]) -> str:
    """The settings of some classes in two groups; a setting that several have stands once, as the first has it."""
    fields: dict[str, dataclasses.Field[Any]] = {}
    for cls in classes:
        for field in dataclasses.fields(cls):
            fields.setdefault(config.env_name(field.name), field)
    often = [name for name, field in fields.items() if field.metadata["often"]]
    groups = {"Often used": often, "Expert": [name for name in fields if name not in often]}
    return "\n\n".join("\n".join([f"{title}:", *(row(fields[n]) for n in of)]) for title, of in groups.items() if of)


def row(field: dataclasses.Field[Any]) -> str:
    """One setting: name, default, meaning, what is allowed."""
    default = int(field.default) if isinstance(field.default, bool) else field.default
    unit = f", {field.metadata['unit']}" if field.metadata["unit"] else ""
    head = f"  {config.env_name(field.name):<24} {str(default) or chr(34) * 2:<13} "
    allowed = "" if config.allowed(field) == "text" else f" [{config.allowed(field)}{unit}]"
    text, indent = config.explained(field) + allowed, " " * 41
    if len(head) > 41:  # a long default
        return f"{head.rstrip()}\n{wrapped(text, initial_indent=indent, subsequent_indent=indent)}"
    return wrapped(text, initial_indent=head, subsequent_indent=indent)


def main(argv: Sequence[str]) -> int:
    """Entry point; the words are modules of stages, such as lever_plus.stages.train_v3."""
    last = [word.rsplit(".", 1)[-1] for word in argv]
    names = [_STAGE.get(word, word) for word in last]
    print("\nSettings (environment variables; defaults named above win over those below)\n")
    print(table([STAGE_SETTINGS[name] for name in names]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
