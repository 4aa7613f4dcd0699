"""The pointer selector and its files."""

from lever_plus.selectors.pointer import PointerSelector, SelectorConfig

__all__ = ["PointerSelector", "SelectorConfig"]
