"""The name under which the first hybrid checkpoints were saved."""

from .hdemucs import HDemucs

WDemucs = HDemucs

__all__ = ["WDemucs"]
