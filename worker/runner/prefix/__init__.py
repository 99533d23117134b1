"""Reuse of KV segments: the prefix cache in memory, and its store on disk."""
