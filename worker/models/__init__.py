"""Model folders: loading weights, and proving and publishing tokenizers."""
