"""``interface: openai``: no model on this machine. :class:`open_mmicl.server.engine.ServerEngine` asks the server."""

from open_mmicl.errors import UsageError
from open_mmicl.interface.config import INTERFACES, InferModelConfig


@INTERFACES.add("openai", "any OpenAI-compatible server (docs/servers.md)")
def refuse(config: InferModelConfig, device: str, precision: str) -> None:
    """There is nothing to load.

    Raises:
        UsageError: always.
    """
    raise UsageError(f"{config.name}: the model is on a server (interface: openai); this needs it on this machine")
