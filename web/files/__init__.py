"""Files that API keys upload for batches, and the result files of batches: on disk, below FILES_DIR."""
