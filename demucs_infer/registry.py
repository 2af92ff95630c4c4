"""The registry of released models, as data: what exists, and where it is published.

Reading it needs neither PyTorch nor a network.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

REMOTE_ROOT = Path(__file__).parent / "remote"


@lru_cache(maxsize=1)
def registry() -> dict[str, Any]:
    """The content of `remote/registry.yaml`: `root`, `checkpoints` and `bags`."""
    return dict(yaml.safe_load((REMOTE_ROOT / "registry.yaml").read_text(encoding="utf-8")))


def checkpoint_urls() -> dict[str, str]:
    """The address of each checkpoint, by signature."""
    root = registry()["root"]
    return {
        signature: f"{root}{entry['folder']}/{entry['file']}"
        for signature, entry in registry()["checkpoints"].items()
    }


def cache_folder() -> Path:
    """Where `demucs` keeps what it downloads, by way of PyTorch's hub."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    hub = os.environ.get("TORCH_HOME") or Path(cache) / "torch"
    return Path(hub).expanduser() / "hub" / "checkpoints"
