"""A worker process as a whole: its models, their loading and unloading, and remote control."""
