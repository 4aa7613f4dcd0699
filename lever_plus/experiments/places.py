"""Where the files that a finished run names are: metrics.json and samples.jsonl hold the paths of the folder that the
run was made in, and results are copied, moved and sent.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

OF_RUNS = "icl_inference"
"""The folder of a data set's results that holds its runs (:func:`lever_plus.paths.inference_dir`)."""


@dataclass(frozen=True)
class Places:
    """From the data set's folder that a run was made in to the one that it is in; both None where that is not known."""

    before: Path | None = None
    now: Path | None = None

    @classmethod
    def of_run(cls, folder: Path, metrics: dict[str, Any]) -> "Places":
        """Those of the inference folder that holds ``metrics``; nothing is moved where it lies in no results folder."""
        made_in = metrics.get("run", {}).get("settings", {}).get("RESULT_DIR")
        folder = Path(folder).absolute()
        if not isinstance(made_in, str) or not made_in or folder.parent.name != OF_RUNS:
            return cls()
        return cls(Path(made_in) / metrics["dataset"], folder.parent.parent)

    def here(self, named: str) -> str:
        """Where the file of this name is now.

        One of the results that the run was made in is looked for beside the run, and there alone: that folder may by
        now hold other files. Any other (images of a data set, a checkpoint that the user named) is where it was.
        """
        if self.before is None or self.now is None:
            return named
        path = Path(named)
        for before, now in ((self.before, self.now), (self.before.parent, self.now.parent)):
            if path.is_relative_to(before) and ".." not in path.parts:
                return str(now / path.relative_to(before))
        return named
