"""In-context learning with vision-language models: prompts, engine, answer cache, metrics."""
