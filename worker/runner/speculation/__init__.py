"""Speculative decoding: proposers of draft tokens, their acceptance rate, and their verification by the model."""
