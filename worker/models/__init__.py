"""The models of a worker process: loading and switching them, and publishing their tokenizers."""
