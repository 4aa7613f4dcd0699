"""Comparisons with what people would use instead."""
