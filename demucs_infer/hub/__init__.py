"""What works on checkpoints as files: the registry, downloads, and what a file holds."""
