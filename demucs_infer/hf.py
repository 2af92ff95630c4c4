"""Models on the hub of Hugging Face, under the names of `demucs.hf`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .hub.hf import DEFAULT_NAMESPACE, SCHEME
from .hub.hf import repository_name as hf_repo_name
from .pretrained import get_model

if TYPE_CHECKING:
    from torch import nn

__all__ = ["DEFAULT_NAMESPACE", "get_hf_model", "hf_repo_name", "load_safetensors_model"]


def load_safetensors_model(path: str | os.PathLike[str]) -> nn.Module:
    """Build the model of a `.safetensors` file, quantized or not. Raises `ModelLoadingError`."""
    from .states import load_model

    return load_model(path)


def get_hf_model(name: str) -> Any:
    """Build the bag `[NAMESPACE/]NAME[@REVISION]` on the hub. Raises `ModelLoadingError`."""
    return get_model(f"{SCHEME}{name}")
