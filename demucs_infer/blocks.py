"""Layers that the model families share.

Shapes: `[B, C, T]` in the time branch, `[B, C, F, T]` in the spectral branch (batch, channels, bins
of frequency, steps of time). The layers are those of Demucs (Défossez et al., 2019,
arXiv:1911.13254) and Hybrid Demucs (Défossez, 2021, arXiv:2111.03600). Class names, parameters and
defaults are those of `demucs`, because other programs build models from these classes. Attribute
names are the keys of the released state dicts; quantized ones rely on their order, too.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import OptionError
from .utils import unfold

LSTM_FRAME = 200  # steps
SELF_ATTENTION_SCORE = -100.0  # no step of LocalState attends to itself


class LayerScale(nn.Module):
    """One learnt gain per channel (Touvron et al., 2021, arXiv:2103.17239)."""

    def __init__(self, channels: int, init: float = 0, channel_last: bool = False) -> None:
        super().__init__()
        self.channel_last = channel_last
        self.scale = nn.Parameter(torch.full((channels,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.scale if self.channel_last else self.scale[:, None])


class ScaledEmbedding(nn.Module):
    """A learnt vector per frequency band, stored divided by `scale` (it then trains faster).

    `smooth` acts in training only: it makes the initial vectors of neighbours similar.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, scale: float = 10.0, smooth: bool = False
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_embeddings, embedding_dim)
        self.scale = scale

    @property
    def weight(self) -> Tensor:
        """The vectors of all bands, `[num_embeddings, embedding_dim]`."""
        return self.embedding.weight * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the vectors of the bands `x` `[N]`, as `[N, embedding_dim]`."""
        return self.embedding(x) * self.scale


class BLSTM(nn.Module):
    """A bidirectional LSTM and a projection, with a residual connection if `skip`.

    Inputs of more than `max_steps` steps are cut into frames that overlap by half.
    """

    def __init__(self, dim: int, layers: int = 1, max_steps: int | None = None, skip: bool = False):
        super().__init__()
        self.max_steps = max_steps
        self.skip = skip
        self.lstm = nn.LSTM(dim, dim, num_layers=layers, bidirectional=True)
        self.linear = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.max_steps is None or x.shape[-1] <= self.max_steps:
            y = self._run(x)
        else:
            frames = unfold(x, self.max_steps, self.max_steps // 2)  # [B, C, N, max_steps]
            batch, channels, count, width = frames.shape
            frames = self._run(frames.transpose(1, 2).reshape(-1, channels, width))
            y = self._join(frames.view(batch, count, channels, width))[..., : x.shape[-1]]
        return y + x if self.skip else y

    def _run(self, x: Tensor) -> Tensor:
        """Run the LSTM and the projection over `x` `[B, C, T]`."""
        return self.linear(self.lstm(x.permute(2, 0, 1))[0]).permute(1, 2, 0)

    @staticmethod
    def _join(frames: Tensor) -> Tensor:
        """Join the middle halves of `frames` `[B, N, C, width]`, and both ends, as `[B, C, T]`."""
        edge = frames.shape[-1] // 4
        middle = frames[..., edge:-edge].transpose(1, 2).flatten(2)
        return torch.cat([frames[:, 0, :, :edge], middle, frames[:, -1, :, -edge:]], dim=-1)


class LocalState(nn.Module):
    """Attention that a learnt penalty on distance keeps local (arXiv:2111.03600, section 3.3)."""

    def __init__(self, channels: int, heads: int = 4, nfreqs: int = 0, ndecay: int = 4) -> None:
        super().__init__()
        if channels % heads:
            raise OptionError(f"attention needs a multiple of {heads} channels, not {channels}")
        if nfreqs:
            raise OptionError(f"nfreqs={nfreqs} (attention by frequency) is not supported")
        self.heads = heads
        self.nfreqs = nfreqs
        self.ndecay = ndecay
        self.content = nn.Conv1d(channels, channels, 1)
        self.query = nn.Conv1d(channels, channels, 1)
        self.key = nn.Conv1d(channels, channels, 1)
        self.query_decay = nn.Conv1d(channels, heads * ndecay, 1)
        self.proj = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, decay, content = (
            layer(x).unflatten(1, (self.heads, -1))  # [B, H, C / H, T]
            for layer in (self.query, self.key, self.query_decay, self.content)
        )
        scores = key.transpose(2, 3) @ query / math.sqrt(key.shape[2])  # [B, H, T, T]
        steps = torch.arange(x.shape[2], device=x.device)
        distance = (steps[:, None] - steps).abs()
        # Each query has ndecay gates, which open penalties of 1, 2, … per step of distance.
        rates = torch.arange(1, self.ndecay + 1, device=x.device, dtype=x.dtype)
        penalty = torch.einsum("d,bhdt->bht", rates, decay.sigmoid() / 2) / math.sqrt(self.ndecay)
        scores = scores - distance.to(x.dtype) * penalty[:, :, None]
        weights = scores.masked_fill(distance == 0, SELF_ATTENTION_SCORE).softmax(dim=2)
        return x + self.proj((content @ weights).flatten(1, 2))


class DConv(nn.Module):
    """Residual branches of dilated convolutions through a bottleneck of `channels / compress`.

    Each of the `depth` branches doubles the dilation, unless `depth` is negative. An LSTM and local
    attention are optional. `dilate` has no effect, as in `demucs`.
    """

    def __init__(
        self,
        channels: int,
        compress: float = 4,
        depth: int = 2,
        init: float = 1e-4,
        norm: bool = True,
        attn: bool = False,
        heads: int = 4,
        ndecay: int = 4,
        lstm: bool = False,
        gelu: bool = True,
        kernel: int = 3,
        dilate: bool = True,
    ) -> None:
        super().__init__()
        self.channels, self.compress, self.depth = channels, compress, abs(depth)
        hidden = int(channels / compress)
        self.layers = nn.ModuleList()
        for index in range(self.depth):
            dilation = 2**index if depth > 0 else 1
            padding = dilation * (kernel // 2)
            layers: list[nn.Module] = [
                nn.Conv1d(channels, hidden, kernel, dilation=dilation, padding=padding),
                nn.GroupNorm(1, hidden) if norm else nn.Identity(),
                nn.GELU() if gelu else nn.ReLU(),
            ]
            if lstm:
                layers.append(BLSTM(hidden, layers=2, max_steps=LSTM_FRAME, skip=True))
            if attn:
                layers.append(LocalState(hidden, heads=heads, ndecay=ndecay))
            layers += [
                nn.Conv1d(hidden, 2 * channels, 1),
                nn.GroupNorm(1, 2 * channels) if norm else nn.Identity(),
                nn.GLU(1),
                LayerScale(channels, init),
            ]
            self.layers.append(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def dconv_per_bin(dconv: nn.Module, y: Tensor) -> Tensor:
    """Run `dconv` along the time of `y`, `[B, C, T]` or `[B, C, F, T]` (each bin by itself)."""
    if y.dim() == 3:
        return dconv(y)
    batch, channels, bins, frames = y.shape
    y = dconv(y.transpose(1, 2).reshape(-1, channels, frames))
    return y.view(batch, bins, channels, frames).transpose(1, 2)


def _group_norm(norm: bool, groups: int, channels: int) -> nn.Module:
    return nn.GroupNorm(int(groups), channels) if norm else nn.Identity()


class HEncLayer(nn.Module):
    """Encoder layer of one branch: strided convolution, residual branch, gated rewrite.

    Args:
        chin: channels of the input.
        chout: channels of the output.
        kernel_size: bins (`freq`) or steps that an output sees.
        stride: bins or steps from one output to the next.
        norm_groups: groups of the group norms.
        empty: have only the strided convolution: here the time branch joins the other one.
        freq: convolve along frequency, in the spectral branch; else along time.
        dconv: have the residual branch.
        norm: have group norms.
        context: neighbours on each side that the rewrite convolution sees.
        dconv_kw: options of the `DConv`.
        pad: pad by a quarter of the kernel at either end.
        rewrite: have the rewrite convolution.
    """

    def __init__(
        self,
        chin: int,
        chout: int,
        kernel_size: int = 8,
        stride: int = 4,
        norm_groups: int = 1,
        empty: bool = False,
        freq: bool = True,
        dconv: bool = True,
        norm: bool = True,
        context: int = 0,
        dconv_kw: Mapping[str, Any] = {},
        pad: bool = True,
        rewrite: bool = True,
    ) -> None:
        super().__init__()
        self.freq, self.kernel_size, self.stride = freq, kernel_size, stride
        self.empty, self.norm = empty, norm
        self.pad = kernel_size // 4 if pad else 0
        self.conv: nn.Module
        if freq:
            self.conv = nn.Conv2d(chin, chout, (kernel_size, 1), (stride, 1), (self.pad, 0))
        else:
            self.conv = nn.Conv1d(chin, chout, kernel_size, stride, self.pad)
        if empty:
            return
        self.norm1 = _group_norm(norm, norm_groups, chout)
        self.rewrite: nn.Module | None = None
        if rewrite:
            convolution = nn.Conv2d if freq else nn.Conv1d
            self.rewrite = convolution(chout, 2 * chout, 1 + 2 * context, padding=context)
            self.norm2 = _group_norm(norm, norm_groups, 2 * chout)
        self.dconv = DConv(chout, **dconv_kw) if dconv else None

    def forward(self, x: Tensor, inject: Tensor | None = None) -> Tensor:
        """Encode `x`; `inject` is added after the first convolution (the time branch joins)."""
        if not self.freq:
            x = x.flatten(1, -2)
            x = F.pad(x, (0, -x.shape[-1] % self.stride))
        y = self.conv(x)
        if self.empty:
            return y
        if inject is not None:
            y = y + (inject[:, :, None] if y.dim() == 4 else inject)
        y = F.gelu(self.norm1(y))
        if self.dconv is not None:
            y = dconv_per_bin(self.dconv, y)
        return y if self.rewrite is None else F.glu(self.norm2(self.rewrite(y)), dim=1)


class HDecLayer(nn.Module):
    """Decoder layer of one branch: gated rewrite, residual branch, transposed convolution.

    The arguments mirror those of `HEncLayer`. `last` leaves out the activation at the end;
    `context_freq=False` restricts the rewrite convolution to neighbours in time.
    """

    def __init__(
        self,
        chin: int,
        chout: int,
        last: bool = False,
        kernel_size: int = 8,
        stride: int = 4,
        norm_groups: int = 1,
        empty: bool = False,
        freq: bool = True,
        dconv: bool = True,
        norm: bool = True,
        context: int = 1,
        dconv_kw: Mapping[str, Any] = {},
        pad: bool = True,
        context_freq: bool = True,
        rewrite: bool = True,
    ) -> None:
        super().__init__()
        self.freq, self.kernel_size, self.stride = freq, kernel_size, stride
        self.chin, self.empty, self.last, self.norm = chin, empty, last, norm
        self.pad = kernel_size // 4 if pad else 0
        self.context_freq = context_freq
        self.conv_tr: nn.Module
        if freq:
            self.conv_tr = nn.ConvTranspose2d(chin, chout, (kernel_size, 1), (stride, 1))
        else:
            self.conv_tr = nn.ConvTranspose1d(chin, chout, kernel_size, stride)
        self.norm2 = _group_norm(norm, norm_groups, chout)
        if empty:
            return
        self.rewrite: nn.Module | None = None
        if rewrite:
            width, bins = 1 + 2 * context, context if context_freq else 0
            if freq:
                kernel = (1 + 2 * bins, width)
                self.rewrite = nn.Conv2d(chin, 2 * chin, kernel, padding=(bins, context))
            else:
                self.rewrite = nn.Conv1d(chin, 2 * chin, width, padding=context)
            self.norm1 = _group_norm(norm, norm_groups, 2 * chin)
        self.dconv = DConv(chin, **dconv_kw) if dconv else None

    def forward(self, x: Tensor, skip: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
        """Decode `x` plus the encoder's `skip`, to `length` steps in the time branch.

        Also return the input of the transposed convolution: an empty layer of the time branch
        starts from there.
        """
        y = self.rewritten(x, skip)
        return self.upsampled(y, length), y

    def rewritten(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """Run the layer up to its transposed convolution."""
        if self.freq and x.dim() == 3:
            x = x.unflatten(1, (self.chin, -1))
        if self.empty:
            return x
        y = x if skip is None else x + skip
        if self.rewrite is not None:
            y = F.glu(self.norm1(self.rewrite(y)), dim=1)
        return y if self.dconv is None else dconv_per_bin(self.dconv, y)

    def upsampled(self, y: Tensor, length: int) -> Tensor:
        """Run the transposed convolution, the norm and the activation."""
        z = self.norm2(self.conv_tr(y))
        size = z.shape[2] - 2 * self.pad if self.freq else length
        z = z[:, :, self.pad : self.pad + size]
        return z if self.last else F.gelu(z)


class MultiWrap(nn.Module):
    """A layer of the spectral branch with its own weights for each of several bands.

    `split_ratios` are the shares of the spectrum at which a band ends.

    An encoder's bands end where a whole number of strides fits, and overlap by
    `kernel_size - stride` bins, so that their outputs join to those of one layer:

        bins    |pad|----- band 0 -----|
                             |------- band 1 -------|pad|

    A decoder's bands are decoded one by one. Where two meet, the outputs of the transposed
    convolutions overlap by `kernel_size - stride` bins and are added, with the bias counted once.
    """

    empty = False
    layers: Any

    def __init__(self, layer: HEncLayer | HDecLayer, split_ratios: Sequence[float]) -> None:
        super().__init__()
        self.split_ratios = list(split_ratios)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in [*split_ratios, 1])
        self.conv = isinstance(layer, HEncLayer)
        self.last = getattr(layer, "last", False)
        for band in self.layers:  # padding and activation are for all bands together
            band.pad, band.last = 0, True
            if self.conv:
                band.conv.padding = (0, 0)

    def forward(self, x: Tensor, skip: Tensor | None = None, length: int | None = None) -> Any:
        """Encode `x`, or decode `x` plus `skip`: then the result is a pair, as of `HDecLayer`."""
        if self.conv:
            return self._encoded(x)
        assert skip is not None
        bands = [
            layer(x[:, :, start:stop], skip[:, :, start:stop], length)[0]
            for layer, (start, stop) in zip(self.layers, self._edges(x.shape[2]))
        ]
        return self._joined(bands), None

    def _encoded(self, x: Tensor) -> Tensor:
        bins = x.shape[2]
        kernel, stride = self.layers[0].kernel_size, self.layers[0].stride
        pad = kernel // 4
        x = F.pad(x, (0, 0, pad, pad))
        outputs, start = [], 0  # `start` counts bins of the padded spectrum
        for ratio, layer in zip([*self.split_ratios, 1], self.layers):
            stop = bins + 2 * pad
            if ratio != 1:
                steps = round((round(bins * ratio) + pad - start - kernel) / stride + 1)
                stop = start + (steps - 1) * stride + kernel
            outputs.append(layer(x[:, :, start:stop]))
            start = stop - kernel + stride
        return torch.cat(outputs, dim=2)

    def rewritten(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """Run a decoder's bands up to their transposed convolutions."""
        assert skip is not None
        bands = [
            layer.rewritten(x[:, :, start:stop], skip[:, :, start:stop])
            for layer, (start, stop) in zip(self.layers, self._edges(x.shape[2]))
        ]
        return torch.cat(bands, dim=2)

    def upsampled(self, y: Tensor, length: int = 0) -> Tensor:
        """Run the transposed convolutions of a decoder's bands and join their outputs."""
        bands = (
            layer.upsampled(y[:, :, start:stop], length)
            for layer, (start, stop) in zip(self.layers, self._edges(y.shape[2]))
        )
        return self._joined(bands)

    def _joined(self, bands: Iterable[Tensor]) -> Tensor:
        """Add the overlaps of a decoder's `bands`, and join them."""
        stride = self.layers[0].stride
        outputs: list[Tensor] = []
        for layer, band in zip(self.layers, bands):
            if outputs:
                overlap = outputs[-1][:, :, -stride:] + band[:, :, :stride]
                outputs[-1] = outputs[-1][:, :, :-stride]
                band = torch.cat(
                    [overlap - layer.conv_tr.bias[:, None, None], band[:, :, stride:]], dim=2
                )
            outputs.append(band)
        joined = torch.cat(outputs, dim=2)[:, :, stride // 2 : -(stride // 2)]
        return joined if self.last else F.gelu(joined)

    def _edges(self, bins: int) -> Iterable[tuple[int, int]]:
        """Return the first bin of each band, and the one behind its last."""
        return itertools.pairwise([0, *(round(bins * r) for r in [*self.split_ratios, 1])])
