"""The LVLM on an OpenAI-compatible server (docs/servers.md): nothing here imports torch, and nothing else this."""
