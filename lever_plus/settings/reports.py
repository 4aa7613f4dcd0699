"""The words of REPORT_TO. No torch."""

import importlib.util

from open_mmicl.errors import UsageError

TRACKERS = ("tensorboard", "wandb", "trackio")


def trackers(report_to: str) -> list[str]:
    """The trackers that are named, in order; ``none``: [].

    Raises:
        UsageError: an unknown word, or one whose package is not installed.
    """
    words = report_to.replace(",", " ").split()
    if words == ["none"]:
        return []
    unknown = [word for word in words if word not in TRACKERS]
    if unknown or not words:
        raise UsageError(f"REPORT_TO={report_to} is not allowed: none, or {', '.join(TRACKERS)} (several with commas)")
    for word in words:
        if importlib.util.find_spec(word) is None:
            raise UsageError(f"REPORT_TO={report_to}: {word} is not installed (pip install {word}), or take it out")
    return list(dict.fromkeys(words))
