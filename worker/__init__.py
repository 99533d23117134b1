"""The worker: a process with MLX models that claims jobs from the queue and generates their text."""
