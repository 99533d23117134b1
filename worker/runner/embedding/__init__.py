"""Embedding models and rerankers: one forward pass over a batch of inputs, without a cache."""
