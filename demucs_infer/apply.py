"""The engine's public face: a model is applied to a mixture. The work is done in `engine`."""

from .engine.bag import BagOfModels, as_bag, check_segment
from .engine.overlap_add import OverlapAdd, fade, window_share
from .engine.plan import (
    MAX_SHIFT,
    ApplyOptions,
    Pass,
    Step,
    Window,
    plan_passes,
    plan_steps,
    plan_windows,
)
from .engine.run import apply_model, separate_blocks
from .engine.source import Source, TensorChunk, tensor_chunk

__all__ = [
    "MAX_SHIFT",
    "ApplyOptions",
    "BagOfModels",
    "OverlapAdd",
    "Pass",
    "Source",
    "Step",
    "TensorChunk",
    "Window",
    "apply_model",
    "as_bag",
    "check_segment",
    "fade",
    "plan_passes",
    "plan_steps",
    "plan_windows",
    "separate_blocks",
    "tensor_chunk",
    "window_share",
]
