"""LoRA adapters that each row selects: rows with different adapters share the passes of one model."""
