"""Demucs in the time domain (Défossez et al., 2019, arXiv:1911.13254), as of its third version.

A U-Net of strided convolutions over the samples, with residual branches, local attention and LSTMs
in its inner levels, on audio that is upsampled by two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import BLSTM, DConv, LayerScale, LocalState
from .resample import resample
from .utils import (
    capture_init,
    center_trim,
    check_architecture,
    pick_sources,
    run_network,
    signature_of,
    standardize,
)

__all__ = ["BLSTM", "DConv", "Demucs", "LayerScale", "LocalState", "rescale_conv", "rescale_module"]

EPSILON = 1e-5  # added to the deviation when the input is normalized


@dataclass(frozen=True)
class DemucsOptions:
    """Options of `Demucs`, with the names and defaults that checkpoints rely on.

    `samplerate` is in hertz and `segment` in seconds. `dconv_init` and `rescale` act in training
    only.

    Raises `OptionError` for a value that no model can have.
    """

    sources: Sequence[str]
    audio_channels: int = 2
    channels: int = 64
    growth: float = 2.0
    depth: int = 6
    rewrite: bool = True
    lstm_layers: int = 0
    kernel_size: int = 8
    stride: int = 4
    context: int = 1
    gelu: bool = True
    glu: bool = True
    norm_starts: int = 4
    norm_groups: int = 4
    dconv_mode: int = 1
    dconv_depth: int = 2
    dconv_comp: float = 4
    dconv_attn: int = 4
    dconv_lstm: int = 4
    dconv_init: float = 1e-4
    normalize: bool = True
    resample: bool = True
    rescale: float = 0.1
    samplerate: int = 44100
    segment: float = 40

    def __post_init__(self) -> None:
        check_architecture(self, "depth", "dconv_depth", "lstm_layers")


def _level(
    options: DemucsOptions, index: int, chin: int, channels: int
) -> tuple[nn.Sequential, nn.Sequential]:
    """Make the encoder and the decoder of a level, from `chin` channels outside to `channels`."""

    def norm(width: int) -> nn.Module:
        if index < options.norm_starts:
            return nn.Identity()
        return nn.GroupNorm(int(options.norm_groups), width)

    def activation() -> nn.Module:
        return nn.GELU() if options.gelu else nn.ReLU()

    def branch(wanted: int) -> list[nn.Module]:
        if not wanted:
            return []
        attn, lstm = index >= options.dconv_attn, index >= options.dconv_lstm
        depth, init = options.dconv_depth, options.dconv_init
        return [DConv(channels, options.dconv_comp, depth, init, attn=attn, lstm=lstm)]

    def rewrite(context: int) -> list[nn.Module]:
        if not options.rewrite:
            return []
        width = 2 * channels if options.glu else channels
        convolution = nn.Conv1d(channels, width, 2 * context + 1, padding=context)
        return [convolution, norm(width), nn.GLU(dim=1) if options.glu else nn.ReLU()]

    encoder = nn.Sequential(
        nn.Conv1d(chin, channels, options.kernel_size, options.stride),
        norm(channels),
        activation(),
        *branch(options.dconv_mode & 1),
        *rewrite(context=0),
    )
    chout = chin if index else chin * len(options.sources)
    decoder = nn.Sequential(
        *rewrite(options.context),
        *branch(options.dconv_mode & 2),
        nn.ConvTranspose1d(channels, chout, options.kernel_size, options.stride),
        *([norm(chout), activation()] if index else []),
    )
    return encoder, decoder


def rescale_module(module: nn.Module, reference: float) -> None:
    """Divide the weights of convolutions by the root of their deviation over `reference`."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d, nn.Conv2d, nn.ConvTranspose2d)):
            rescale_conv(layer, reference)


@torch.no_grad()
def rescale_conv(conv: Any, reference: float) -> None:
    """Rescale one convolution as `rescale_module` does."""
    scale = (conv.weight.std() / reference) ** 0.5
    for parameter in filter(lambda p: p is not None, (conv.weight, conv.bias)):
        parameter.div_(scale)


class Demucs(nn.Module):
    """Demucs in the time domain.

    Takes the options of `DemucsOptions`. Callable on `[B, C, T]` at `samplerate`, of any length;
    returns `[B, S, C, T]`.
    """

    __signature__ = signature_of(DemucsOptions)

    @capture_init
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.options = options = DemucsOptions(*args, **kwargs)
        self.sources = list(options.sources)
        self.audio_channels = options.audio_channels
        self.samplerate = options.samplerate
        self.segment = options.segment
        self.depth = options.depth
        # Only programs read these.
        for name in "channels context kernel_size stride normalize resample".split():
            setattr(self, name, getattr(options, name))
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        chin, channels = options.audio_channels, options.channels
        for index in range(options.depth):
            encoder, decoder = _level(options, index, chin, channels)
            self.encoder.append(encoder)
            self.decoder.insert(0, decoder)
            chin, channels = channels, int(options.growth * channels)
        self.lstm = BLSTM(chin, options.lstm_layers) if options.lstm_layers else None

    def valid_length(self, length: int) -> int:
        """Return the smallest length, at least `length`, that all levels divide evenly."""
        options = self.options
        length *= 2 if options.resample else 1
        for _ in range(options.depth):
            length = max(1, math.ceil((length - options.kernel_size) / options.stride) + 1)
        for _ in range(options.depth):
            length = (length - 1) * options.stride + options.kernel_size
        return math.ceil(length / 2) if options.resample else length

    def forward(
        self, mix: Tensor, *, stems: Sequence[int] | None = None, network: Any = None
    ) -> Tensor:
        """Separate `mix` `[B, C, T]` into all sources, or those of `stems`, `[B, S, C, T]`.

        `network` runs instead of `self.network`.
        """
        length = int(mix.shape[-1])  # a tensor while the model is traced
        delta = self.valid_length(length) - length
        x, mean, std = self._normalized(mix)
        x = F.pad(x, (delta // 2, delta - delta // 2))
        if self.options.resample:
            x = resample(x, 1, 2)
        (x,) = run_network(network or self.network, self, x)
        x = pick_sources(x.unflatten(1, (len(self.sources), self.audio_channels)), stems)
        if self.options.resample:
            x = resample(x, 2, 1)
        return center_trim(x, length) * std + mean

    def network(self, x: Tensor) -> tuple[Tensor]:
        """Turn normalized, resampled audio `[B, C, T]` into that of all sources, `[B, S C, T]`."""
        skips = []
        for encode in self.encoder:
            x = encode(x)
            skips.append(x)
        if self.lstm is not None:
            x = self.lstm(x)
        for decode in self.decoder:
            x = decode(x + center_trim(skips.pop(), x))
        return (x,)

    def _normalized(self, mix: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Normalize `mix` by its mono mean and deviation, which are `[B, 1, 1, 1]`."""
        if not self.options.normalize:
            return mix, 0.0, 1.0
        _, mean, std = standardize(mix.mean(dim=1, keepdim=True), EPSILON)
        return (mix - mean) / (EPSILON + std), mean[:, None], std[:, None]

    def current_names(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return `state` with current names for the parameters of older checkpoints.

        Levels had no normalization then, so the layers that follow it have moved by one.
        """
        own, renamed = self.state_dict(), dict(state)
        for name in state:
            part, level, position, *rest = [*name.split("."), "", "", ""]
            moved = ".".join([part, level, "3", *filter(None, rest)])
            if position == "2" and name not in own and moved in own and moved not in state:
                renamed[moved] = renamed.pop(name)
        return renamed

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights, also under older names. The caller's dictionary is not changed."""
        return super().load_state_dict(self.current_names(state_dict), *args, **kwargs)
