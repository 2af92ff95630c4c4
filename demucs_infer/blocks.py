"""The layers that the model families share.

Shapes: `[B, C, T]` in the time branch, `[B, C, F, T]` in the spectral branch. Attribute names are
the keys of the released state dicts; quantized ones rely on the order of the attributes, too. The
layers are those of Demucs (Défossez et al., 2019, arXiv:1911.13254) and Hybrid Demucs (Défossez,
2021, arXiv:2111.03600).
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .engine.cpu_kernels import (
    Conv1d,
    ConvTranspose1d,
    GroupNorm,
    Reach,
    gated_residual,
    in_tiles,
    is_folded,
    is_watched,
    rows_at_once,
)
from .errors import OptionError
from .utils import unfold

LSTM_FRAME = 200  # steps: longer inputs go through the LSTM in overlapping frames
SELF_ATTENTION_SCORE = -100.0  # in LocalState no step attends to itself


class LayerScale(nn.Module):
    """One learnt gain per channel (Touvron et al., 2021, arXiv:2103.17239)."""

    def __init__(self, channels: int, init: float = 0.0, channel_last: bool = False) -> None:
        super().__init__()
        self.channel_last = channel_last
        self.scale = nn.Parameter(torch.full((channels,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.scale if self.channel_last else self.scale[:, None])


class ScaledEmbedding(nn.Module):
    """A learnt vector per frequency band, stored divided by `scale` (it then trains faster)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, scale: float = 10.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_embeddings, embedding_dim)
        self.scale = scale

    def forward(self) -> Tensor:
        """Return all vectors, as `[num_embeddings, embedding_dim]`."""
        return self.embedding.weight * self.scale


class BLSTM(nn.Module):
    """Bidirectional LSTM with a residual connection; long inputs in half-overlapping frames."""

    def __init__(self, dim: int, layers: int = 1, max_steps: int | None = None, skip: bool = False):
        super().__init__()
        self.max_steps = max_steps
        self.skip = skip
        self.lstm = nn.LSTM(dim, dim, num_layers=layers, bidirectional=True)
        self.linear = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        framed = self.max_steps is not None and x.shape[-1] > self.max_steps
        y = self._in_frames(x, self.max_steps or 0) if framed else self._run(x)
        return y + x if self.skip else y

    def _in_frames(self, x: Tensor, width: int) -> Tensor:
        """Run `x` `[B, C, T]` frame by frame and keep the middle half of each."""
        batch, channels, length = x.shape
        stride = width // 2
        frames = unfold(x, width, stride)  # [B, C, N, width]
        count = frames.shape[2]
        frames = frames.transpose(1, 2).reshape(-1, channels, width)
        frames = self._run(frames).view(batch, count, channels, width)
        edge = stride // 2
        middle = frames[..., edge:-edge].permute(0, 2, 1, 3).reshape(batch, channels, -1)
        joined = torch.cat([frames[:, 0, :, :edge], middle, frames[:, -1, :, -edge:]], dim=-1)
        return joined[..., :length]

    def _run(self, x: Tensor) -> Tensor:
        """LSTM and projection of `x` `[B, C, T]`.

        `nn.LSTM.forward` rewrites its list of weights, so two threads would disturb each other:
        the functional form is given the parameters instead.
        """
        x = x.permute(2, 0, 1)
        weights: list[Tensor] = [p for layer in self.lstm.all_weights for p in layer]
        state = x.new_zeros(2 * self.lstm.num_layers, x.shape[1], self.lstm.hidden_size)
        y = torch.lstm(
            x, (state, state), weights, True, self.lstm.num_layers, 0.0, False, True, False
        )[0]
        return self.linear(y).permute(1, 2, 0)


class LocalState(nn.Module):
    """Attention that a learnt penalty on distance keeps local (arXiv:2111.03600, section 3.3)."""

    def __init__(self, channels: int, heads: int = 4, ndecay: int = 4) -> None:
        super().__init__()
        if channels % heads:
            raise OptionError(f"attention needs a multiple of {heads} channels, not {channels}")
        self.heads = heads
        self.ndecay = ndecay
        self.content = Conv1d(channels, channels, 1)
        self.query = Conv1d(channels, channels, 1)
        self.key = Conv1d(channels, channels, 1)
        self.query_decay = Conv1d(channels, heads * ndecay, 1)
        self.proj = Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, length = x.shape
        query, key, content = (
            layer(x).view(batch, self.heads, channels // self.heads, length)
            for layer in (self.query, self.key, self.content)
        )
        decay = self._decay(x)
        count = rows_at_once(x, batch * self.heads * length * x.element_size(), length)
        mixed = [
            content @ self._weights(key, query[..., first : first + count], decay, first)
            for first in range(0, length, count)
        ]
        return x + self.proj(torch.cat(mixed, dim=-1).reshape(batch, channels, length))

    def _weights(self, key: Tensor, query: Tensor, decay: Tensor, first: int) -> Tensor:
        """Weights `[B, H, T of the key, n]` for the `n` queries from step `first` on.

        Each query's column sums to one.
        """
        scores = key.transpose(2, 3) @ query / math.sqrt(key.shape[2])
        steps = torch.arange(key.shape[3], device=key.device, dtype=key.dtype)
        asking = slice(first, first + query.shape[3])
        distance = (steps[:, None] - steps[asking]).abs()
        scores = scores - distance * decay[:, :, None, asking]
        return scores.masked_fill(distance == 0, SELF_ATTENTION_SCORE).softmax(dim=2)

    def _decay(self, x: Tensor) -> Tensor:
        """Penalty `[B, H, T]` of each query per step of distance."""
        rates = torch.arange(1, self.ndecay + 1, device=x.device, dtype=x.dtype)
        gates = self.query_decay(x).view(x.shape[0], self.heads, self.ndecay, -1).sigmoid() / 2
        return torch.einsum("n,bhnt->bht", rates, gates) / math.sqrt(self.ndecay)


class DConvOptions(NamedTuple):
    """Options of a `DConv`, beside its number of channels."""

    depth: int = 2
    comp: float = 4
    init: float = 1e-4
    norm: bool = True
    attn: bool = False
    lstm: bool = False
    gelu: bool = True
    kernel: int = 3


class DConv(nn.Module):
    """Residual branch of dilated convolutions through a bottleneck of `channels / comp`.

    Each of the `depth` steps doubles the dilation; an LSTM and local attention are optional.
    """

    def __init__(self, channels: int, options: DConvOptions) -> None:
        super().__init__()
        hidden = int(channels / options.comp)
        dilations = [2**i if options.depth > 0 else 1 for i in range(abs(options.depth))]
        self.layers = nn.ModuleList(
            self._step(channels, hidden, dilation, options) for dilation in dilations
        )

    @staticmethod
    def _step(channels: int, hidden: int, dilation: int, options: DConvOptions) -> nn.Sequential:
        padding = dilation * (options.kernel // 2)
        layers: list[nn.Module] = [
            Conv1d(channels, hidden, options.kernel, dilation=dilation, padding=padding),
            GroupNorm(1, hidden) if options.norm else nn.Identity(),
            nn.GELU() if options.gelu else nn.ReLU(),
        ]
        if options.lstm:
            layers.append(BLSTM(hidden, layers=2, max_steps=LSTM_FRAME, skip=True))
        if options.attn:
            layers.append(LocalState(hidden))
        layers += [
            Conv1d(hidden, 2 * channels, 1),
            GroupNorm(1, 2 * channels) if options.norm else nn.Identity(),
            nn.GLU(1),
            LayerScale(channels, options.init),
        ]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = _residual(x, layer)
        return x


def _residual(x: Tensor, branch: nn.Module) -> Tensor:
    """Add to `x` `[B, C, T]` what `branch` makes of it; layer by layer, if somebody watches one."""
    last: list[Any] = list(branch.children())[-4:]
    built = [type(layer) for layer in last] == [Conv1d, GroupNorm, nn.GLU, LayerScale]
    if type(branch) is nn.Sequential and built and not any(map(is_watched, [branch, *last])):
        convolution, norm, _, gain = last
        if is_folded(x, convolution.in_channels):
            return gated_residual(x, branch[:-4](x), convolution, norm, gain.scale)
    return x + branch(x)


def dconv_per_bin(dconv: nn.Module, y: Tensor) -> Tensor:
    """Run `dconv` along the time of `y`, `[B, C, T]` or `[B, C, F, T]` (each bin on its own)."""
    if y.dim() == 3:
        return dconv(y)
    batch, channels, bins, frames = y.shape
    y = y.transpose(1, 2).reshape(-1, channels, frames)
    return dconv(y).view(batch, bins, channels, frames).transpose(1, 2)


class LayerOptions(NamedTuple):
    """The geometry of one encoder or decoder layer."""

    kernel_size: int = 8
    stride: int = 4
    freq: bool = True  # convolves along frequency, in the spectral branch
    pad: bool = True
    norm: bool = True
    norm_groups: int = 4
    context: int = 0  # neighbours on each side that the rewrite convolution sees
    context_freq: bool = True  # ... along frequency too
    rewrite: bool = True
    empty: bool = False  # only the strided convolution: this is where the branches meet
    dconv: DConvOptions | None = None

    def group_norm(self, channels: int) -> nn.Module:
        return GroupNorm(int(self.norm_groups), channels) if self.norm else nn.Identity()

    @property
    def padding(self) -> int:
        return self.kernel_size // 4 if self.pad else 0

    @property
    def halo(self) -> int:
        """Bins, or steps of the time branch, that the rewrite convolution sees on each side."""
        return self.context if self.rewrite and (self.context_freq or not self.freq) else 0

    def rewrite_convolution(self, channels: int) -> nn.Module:
        """The gated convolution over the neighbours, from `channels` to twice as many."""
        width = 2 * self.context + 1
        if not self.freq:
            return Conv1d(channels, 2 * channels, width)
        kernel = (2 * self.halo + 1, width)
        return nn.Conv2d(channels, 2 * channels, kernel, padding=(0, self.context))


class HEncLayer(nn.Module):
    """Strided convolution, residual branch, gated rewrite: halves the detail of one branch.

    Convolutions are not padded along the axis on which the layer works: `Reach` does that.
    """

    def __init__(self, chin: int, chout: int, options: LayerOptions) -> None:
        super().__init__()
        kernel, stride = options.kernel_size, options.stride
        self.freq, self.kernel_size, self.stride = options.freq, kernel, stride
        self.empty, self.pad, self.halo = options.empty, options.padding, options.halo
        self.widest = None if options.norm else 2 * chout  # channels in a tile
        self.conv: nn.Module
        if options.freq:
            self.conv = nn.Conv2d(chin, chout, (kernel, 1), (stride, 1))
        else:
            self.conv = Conv1d(chin, chout, kernel, stride)
        self.rewrite: nn.Module | None = None
        self.dconv: nn.Module | None = None
        if self.empty:
            return
        self.norm1 = options.group_norm(chout)
        if options.rewrite:
            self.rewrite = options.rewrite_convolution(chout)
            self.norm2 = options.group_norm(2 * chout)
        if options.dconv is not None:
            self.dconv = DConv(chout, options.dconv)

    def forward(self, x: Tensor, inject: Tensor | None = None) -> Tensor:
        """Encode `x`; `inject` is added after the first convolution (the other branch joins)."""
        x = x if self.freq else x.flatten(1, -2)
        strided = Reach(self.kernel_size, self.stride, self.pad)
        count = strided.count(x.shape[2] + (0 if self.freq else -x.shape[2] % self.stride))
        convolve = functools.partial(self._convolve, inject=inject)
        if self.freq and not self.halo:  # bins do not see each other after the convolution

            def whole(part: Tensor) -> Tensor:
                return self._gate(self._branch(convolve(part)))

            return in_tiles(whole, [x], strided, self.widest, count)
        y = self._branch(in_tiles(convolve, [x], strided, self.widest, count))
        if self.rewrite is None:
            return y
        return in_tiles(self._gate, [y], Reach(2 * self.halo + 1, pad=self.halo), self.widest)

    def _convolve(self, x: Tensor, inject: Tensor | None) -> Tensor:
        y = self.conv(x)
        if self.empty:
            return y
        if inject is not None:
            y = y + (inject[:, :, None] if y.dim() == 4 else inject)
        return F.gelu(self.norm1(y))

    def _branch(self, y: Tensor) -> Tensor:
        return y if self.dconv is None else dconv_per_bin(self.dconv, y)

    def _gate(self, y: Tensor) -> Tensor:
        return y if self.rewrite is None else F.glu(self.norm2(self.rewrite(y)), dim=1)


class HDecLayer(nn.Module):
    """The mirror image of `HEncLayer`: gated rewrite, residual branch, transposed convolution."""

    def __init__(self, chin: int, chout: int, options: LayerOptions, last: bool = False) -> None:
        super().__init__()
        kernel, stride, self.pad = options.kernel_size, options.stride, options.padding
        self.freq, self.kernel_size, self.stride = options.freq, kernel, stride
        self.chin, self.empty, self.last, self.halo = chin, options.empty, last, options.halo
        # Channels in a tile, of either half of the layer.
        self.widest: int | None = None if options.norm else 2 * chin
        self.widest_out: int | None = None if options.norm else chout
        self.conv_tr: nn.Module
        if options.freq:
            self.conv_tr = nn.ConvTranspose2d(chin, chout, (kernel, 1), (stride, 1))
        else:
            self.conv_tr = ConvTranspose1d(chin, chout, kernel, stride)
        self.norm2 = options.group_norm(chout)
        if self.empty:
            return
        self.rewrite: nn.Module | None = None
        if options.rewrite:
            self.rewrite = options.rewrite_convolution(chin)
            self.norm1 = options.group_norm(2 * chin)
        self.dconv = None if options.dconv is None else DConv(chin, options.dconv)

    def forward(self, x: Tensor, skip: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
        """Decode `x` plus the encoder's `skip` to `length` steps in the time branch.

        Also returns what the last convolution saw: an empty layer of the other branch starts there.
        """
        before = self.rewritten(x, skip)
        y = self.spread(before)
        return (y if self.freq else y[..., :length]), before

    def rewritten(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """The layer up to its transposed convolution."""
        if self.freq and x.dim() == 3:
            x = x.view(x.shape[0], self.chin, -1, x.shape[-1])
        if self.empty:
            return x
        inputs = [x] if skip is None else [x, skip]
        neighbours = Reach(2 * self.halo + 1, pad=self.halo)
        if self.freq:
            return in_tiles(
                lambda *parts: self._branch(self._gate(*parts)), inputs, neighbours, self.widest
            )
        return self._branch(in_tiles(self._gate, inputs, neighbours, self.widest))

    def _gate(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = x if skip is None else x + skip
        return y if self.rewrite is None else F.glu(self.norm1(self.rewrite(y)), dim=1)

    def _branch(self, y: Tensor) -> Tensor:
        return y if self.dconv is None else dconv_per_bin(self.dconv, y)

    def spread(self, y: Tensor) -> Tensor:
        """The transposed convolution and what follows it: half of the detail comes back."""
        reach = Reach(self.kernel_size, self.stride, self.pad, transposed=True)
        return in_tiles(self._transpose, [y], reach, self.widest_out)

    def _transpose(self, y: Tensor) -> Tensor:
        z = self.norm2(self.conv_tr(y))
        return z if self.last else F.gelu(z)


class MultiEncoder(nn.Module):
    """An encoder layer with its own weights for each of several bands of frequency.

    `split_ratios` are the shares of the spectrum at which a band ends. A band is moved to where a
    whole number of strides fits, and overlaps the next by `kernel_size - stride` bins, so that the
    outputs join to what one layer over all bins would give:

        bins    |pad|----- band 0 -----|
                             |------- band 1 -------|pad|
    """

    empty = False
    layers: Any

    def __init__(self, layer: HEncLayer, split_ratios: Sequence[float]) -> None:
        super().__init__()
        self.split_ratios = [*split_ratios, 1.0]
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in self.split_ratios)
        for band in self.layers:
            band.pad = 0

    def forward(self, x: Tensor, inject: Tensor | None = None) -> Tensor:
        bins = x.shape[2]
        kernel, stride = self.layers[0].kernel_size, self.layers[0].stride
        pad = kernel // 4
        x = F.pad(x, (0, 0, pad, pad))
        outputs, start = [], 0  # `start` counts bins of the padded spectrum
        for ratio, layer in zip(self.split_ratios, self.layers):
            stop = bins + 2 * pad
            if ratio != 1:
                steps = round((round(bins * ratio) + pad - start - kernel) / stride + 1)
                stop = start + (steps - 1) * stride + kernel
            outputs.append(layer(x[:, :, start:stop]))
            start = stop - kernel + stride
        return torch.cat(outputs, dim=2)


class MultiDecoder(nn.Module):
    """A decoder layer with its own weights for each of several bands of frequency.

    Each band is decoded by itself; where two meet, the transposed convolutions overlap by
    `kernel_size - stride` bins and are added, with the bias counted once.
    """

    empty = False
    layers: Any

    def __init__(self, layer: HDecLayer, split_ratios: Sequence[float]) -> None:
        super().__init__()
        self.last = layer.last
        self.split_ratios = [*split_ratios, 1.0]
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in self.split_ratios)

    def forward(self, x: Tensor, skip: Tensor, length: int) -> tuple[Tensor, None]:
        return self.spread(self.rewritten(x, skip)), None

    def rewritten(self, x: Tensor, skip: Tensor) -> Tensor:
        """The layer up to its transposed convolutions."""
        edges = self._edges(x.shape[2])
        bands = [
            layer.rewritten(x[:, :, start:stop], skip[:, :, start:stop])
            for layer, (start, stop) in zip(self.layers, edges)
        ]
        return torch.cat(bands, dim=2)

    def spread(self, y: Tensor) -> Tensor:
        """The transposed convolutions and what follows them."""
        stride = self.layers[0].stride
        outputs: list[Tensor] = []
        for layer, (start, stop) in zip(self.layers, self._edges(y.shape[2])):
            band = layer.norm2(layer.conv_tr(y[:, :, start:stop]))
            if outputs:
                bias = layer.conv_tr.bias[:, None, None]
                outputs[-1][:, :, -stride:] += band[:, :, :stride] - bias
                band = band[:, :, stride:]
            outputs.append(band)
        joined = torch.cat(outputs, dim=2)[:, :, stride // 2 : -(stride // 2)]
        return joined if self.last else F.gelu(joined)

    def _edges(self, bins: int) -> Iterable[tuple[int, int]]:
        """The first bin of each band, and the one behind its last."""
        return itertools.pairwise([0, *(round(bins * ratio) for ratio in self.split_ratios)])
