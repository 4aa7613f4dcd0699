"""In-context learning with vision-language models: prompts, engine, answer cache, metrics."""

__version__ = "0.1.0"
