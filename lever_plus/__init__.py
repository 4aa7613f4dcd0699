"""Lever-Plus: choose in-context demonstrations for vision-language models."""
