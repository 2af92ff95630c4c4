"""Demucs in the time domain (Défossez et al., 2019, arXiv:1911.13254), as of its third version.

A U-Net of strided convolutions over the samples, with residual branches, local attention and LSTMs
in its inner levels, on audio that is upsampled by two.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import BLSTM, DConv, DConvOptions
from .engine.cpu_kernels import (
    Conv1d,
    ConvTranspose1d,
    GroupNorm,
    Reach,
    channels_last,
    in_tiles,
    is_watched,
)
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

STEP_BY_STEP = (nn.Identity, nn.GELU, nn.ReLU, nn.GLU)  # layers that see one step at a time
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


class _Level(nn.Sequential):
    """The layers of a level: a convolution and what follows it step by step go tile by tile.

    Convolutions are not padded: `Reach` does that, by `context`. Layers that somebody watches run
    whole.
    """

    context = 0

    def forward(self, x: Tensor) -> Tensor:
        layers: deque[Any] = deque(self)
        while layers:
            layer = layers.popleft()
            if not isinstance(layer, (Conv1d, ConvTranspose1d)):
                x = layer(x)
                continue
            chain = [layer]
            while layers and isinstance(layers[0], STEP_BY_STEP):
                chain.append(layers.popleft())
            transposed = isinstance(layer, ConvTranspose1d)
            pad = 0 if transposed else self.context
            reach = Reach(layer.kernel_size[0], layer.stride[0], pad, transposed)
            widest = None if any(map(is_watched, chain)) else layer.out_channels
            x = in_tiles(partial(_through, chain), [x], reach, widest)
        return x


def _through(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class _LevelLayers:
    """Makes the layers of one level, between `chin` channels outside and `channels` inside."""

    def __init__(self, options: DemucsOptions, index: int, chin: int, channels: int) -> None:
        self.options, self.index = options, index
        self.chin, self.channels = chin, channels

    def encoder(self) -> _Level:
        options, channels = self.options, self.channels
        layers = [
            Conv1d(self.chin, channels, options.kernel_size, options.stride),
            self._norm(channels),
            self._activation(),
        ]
        layers += self._dconv() if options.dconv_mode & 1 else []
        layers += self._rewrite(context=0) if options.rewrite else []
        return _Level(*layers)

    def decoder(self) -> _Level:
        options, channels = self.options, self.channels
        chout = self.chin if self.index else self.chin * len(options.sources)
        layers = self._rewrite(options.context) if options.rewrite else []
        layers += self._dconv() if options.dconv_mode & 2 else []
        layers.append(ConvTranspose1d(channels, chout, options.kernel_size, options.stride))
        layers += [self._norm(chout), self._activation()] if self.index else []
        level = _Level(*layers)
        level.context = options.context
        return level

    def _norm(self, channels: int) -> nn.Module:
        if self.index < self.options.norm_starts:
            return nn.Identity()
        return GroupNorm(int(self.options.norm_groups), channels)

    def _activation(self) -> nn.Module:
        return nn.GELU() if self.options.gelu else nn.ReLU()

    def _dconv(self) -> list[nn.Module]:
        options = self.options
        attn, lstm = self.index >= options.dconv_attn, self.index >= options.dconv_lstm
        return [
            DConv(
                self.channels,
                DConvOptions(
                    options.dconv_depth,
                    options.dconv_comp,
                    options.dconv_init,
                    attn=attn,
                    lstm=lstm,
                ),
            )
        ]

    def _rewrite(self, context: int) -> list[nn.Module]:
        """A convolution over `context` neighbours on each side, gated or rectified."""
        chout = 2 * self.channels if self.options.glu else self.channels
        return [
            Conv1d(self.channels, chout, 2 * context + 1),
            self._norm(chout),
            nn.GLU(dim=1) if self.options.glu else nn.ReLU(),
        ]


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

    takes_stems = True

    __signature__ = signature_of(DemucsOptions)

    @capture_init
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.options = options = DemucsOptions(*args, **kwargs)
        self.sources = list(options.sources)
        self.audio_channels = options.audio_channels
        self.samplerate = options.samplerate
        self.segment = options.segment
        levels, chin, channels = [], options.audio_channels, options.channels
        for index in range(options.depth):
            levels.append(_LevelLayers(options, index, chin, channels))
            chin, channels = channels, int(options.growth * channels)
        self.encoder = nn.ModuleList(level.encoder() for level in levels)
        self.decoder = nn.ModuleList(level.decoder() for level in reversed(levels))
        self.lstm = BLSTM(chin, options.lstm_layers) if options.lstm_layers else None

    def valid_length(self, length: int) -> int:
        """The smallest length, at least `length`, that the strides of all levels divide evenly."""
        options = self.options
        length *= 2 if options.resample else 1
        for _ in range(options.depth):
            length = max(1, math.ceil((length - options.kernel_size) / options.stride) + 1)
        for _ in range(options.depth):
            length = (length - 1) * options.stride + options.kernel_size
        return math.ceil(length / 2) if options.resample else length

    def forward(
        self, mix: Tensor, stems: Sequence[int] | None = None, *, network: Any = None
    ) -> Tensor:
        """Separate `mix` `[B, C, T]` into `[B, S, C, T]`: all sources, or those of `stems`.

        `network` is what runs it instead of `network`, see `engines`.
        """
        length = mix.shape[-1]
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
        """From normalized, resampled audio `[B, C, T]` to that of all sources, `[B, S C, T]`."""
        x, skips = channels_last(x), []
        for encoder in self.encoder:
            x = encoder(x)
            skips.append(x)
        if self.lstm is not None:
            x = self.lstm(x)
        for decoder in self.decoder:
            x = x + center_trim(skips.pop(), x)
            x = decoder(x)
        return (x,)

    def exact_layers(self) -> list[nn.Module]:
        """The output, which stays in float32 in half precision: nothing averages its rounding."""
        (*_, last) = self.decoder[-1].children()
        return [last]

    def _normalized(self, mix: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """`mix` by the mean and deviation of its mono sum, as `[B, 1, 1, 1]` each."""
        if not self.options.normalize:
            return mix, 0.0, 1.0
        _, mean, std = standardize(mix.mean(dim=1, keepdim=True), EPSILON)
        return (mix - mean) / (EPSILON + std), mean[:, None], std[:, None]

    def current_names(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """`state` with the names of older checkpoints brought up to date.

        They were saved when a level had no normalization: what followed it has moved by one.
        """
        own, renamed = self.state_dict(), dict(state)
        for name in state:
            part, level, position, *rest = [*name.split("."), "", "", ""]
            moved = ".".join([part, level, "3", *filter(None, rest)])
            if position == "2" and name not in own and moved in own and moved not in state:
                renamed[moved] = renamed.pop(name)
        return renamed

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights, of older checkpoints too; the caller's dictionary is left alone."""
        return super().load_state_dict(self.current_names(state_dict), *args, **kwargs)
