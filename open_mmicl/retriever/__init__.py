"""Retrievers: zero, random, similarity, selector."""

from open_mmicl.retriever.base import RandomRetriever, Retriever, SelectorRetriever, SimilarityRetriever, ZeroRetriever

__all__ = ["RandomRetriever", "Retriever", "SelectorRetriever", "SimilarityRetriever", "ZeroRetriever"]
