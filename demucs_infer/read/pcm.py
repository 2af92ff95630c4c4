"""Convert samples: types, channels, rates, and levels beyond full scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import OptionError
from ..resample import resample

CLAMP_LIMIT = 0.99
RESCALE_MARGIN = 1.01
I16_MAX = 2**15 - 1
I24_MAX = 2**23 - 1
I32_MAX = 2**31 - 1
MAX_SAMPLE = 1e6  # of full scale: louder samples overflow in a model


def i16_pcm(wav: Tensor) -> Tensor:
    """Return `wav` as int16: clipped to ±1, times 2^15 - 1, truncated. Integers are returned."""
    return (wav.clamp(-1, 1) * I16_MAX).short() if wav.is_floating_point() else wav


def f32_pcm(wav: Tensor) -> Tensor:
    """Return int16 `wav` as floating point between -1 and 1. Floats stay as they are."""
    return wav if wav.is_floating_point() else wav.float() / I16_MAX


def as_dtype_pcm(wav: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `f32_pcm(wav)` if `dtype` is floating point, else `i16_pcm(wav)`."""
    return f32_pcm(wav) if dtype.is_floating_point else i16_pcm(wav)


def i24_pcm(wav: Tensor) -> Tensor:
    """Return the upper 24 bits of int32: `wav` clipped to ±1, times 2^23 - 1, truncated."""
    return (wav.clamp(-1, 1).double() * I24_MAX).int() * 256


def as_samples(wav: Tensor | np.ndarray[Any, Any]) -> Tensor:
    """Return samples of numpy or PyTorch, in int16, int32 or floating point, as float32.

    Raises `OptionError` for other types.
    """
    if isinstance(wav, np.ndarray):
        wav = torch.from_numpy(np.array(wav, dtype=wav.dtype.newbyteorder("="), order="C"))
    if wav.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return wav.float()
    if wav.dtype == torch.int16:
        return f32_pcm(wav)
    if wav.dtype == torch.int32:
        return (wav.double() / I32_MAX).float()
    raise OptionError(f"samples must be floating point, int16 or int32, not {wav.dtype}")


def strange_samples(wav: Tensor) -> str | None:
    """Return why `wav` cannot be music, or None."""
    if not wav.isfinite().all():
        return "not finite (NaN or Inf)"
    if wav.numel() and wav.abs().max() > MAX_SAMPLE:
        return f"louder than {MAX_SAMPLE:.0e} of full scale"
    return None


def rescale_divisor(peak: float) -> float:
    """Return the divisor that brings samples with this peak to 0.99 at most."""
    return max(RESCALE_MARGIN * peak, 1)


def _rescale(wav: Tensor) -> Tensor:
    return wav / rescale_divisor(wav.abs().max().item()) if wav.numel() else wav


CLIP_MODES: dict[str, Callable[[Tensor], Tensor]] = {
    "rescale": _rescale,
    # `Output` gives it all stems of a track at once.
    "rescale-all": _rescale,
    "clamp": lambda wav: wav.clamp(-CLAMP_LIMIT, CLAMP_LIMIT),
    "tanh": torch.tanh,
    "none": lambda wav: wav,
}
RESCALING = ("rescale", "rescale-all")


def prevent_clip(wav: Tensor, mode: str | None = "rescale") -> Tensor:
    """Bring `wav` into the range of ±1.

    `rescale` divides all samples so that the peak is 0.99 at most, `clamp` cuts at ±0.99, `tanh`
    bends, and `none` (or `None`) does nothing. For a single stem, `rescale-all` is `rescale`.
    """
    if mode not in CLIP_MODES and mode is not None:
        raise OptionError(f"clip mode {mode!r} is unknown: choose among {', '.join(CLIP_MODES)}")
    return CLIP_MODES[mode or "none"](wav)


def convert_audio_channels(wav: Tensor, channels: int = 2) -> Tensor:
    """Convert `wav` `[*, C, T]` to `[*, channels, T]`.

    Mono is repeated. Of more channels than wanted, the first ones are taken, or their mean if one
    is wanted. Raises `OptionError` for too few channels.
    """
    *_, present, _ = wav.shape
    if present == channels:
        return wav
    if channels == 1:
        return wav.mean(dim=-2, keepdim=True)
    if present == 1:
        return wav.expand(*wav.shape[:-2], channels, -1)
    if present > channels:
        return wav[..., :channels, :]
    raise OptionError(f"cannot make {channels} channels of {present}")


def convert_audio(wav: Tensor, from_samplerate: int, to_samplerate: int, channels: int) -> Tensor:
    """Convert `wav` `[*, C, T]` to `channels` channels at `to_samplerate` hertz."""
    return resample(convert_audio_channels(wav, channels), from_samplerate, to_samplerate)
