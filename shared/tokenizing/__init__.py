"""Chat templates and tokenizers, run in helper processes with a time limit and a memory limit."""
