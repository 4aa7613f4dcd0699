"""Lever-Plus: choose in-context demonstrations for vision-language models."""

__version__ = "0.1.0"
