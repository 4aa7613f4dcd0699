"""One settings dataclass per stage."""
