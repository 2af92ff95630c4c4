"""Checkpoints as files: the registry, downloads, and readers of their formats."""
