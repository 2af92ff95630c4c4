"""Layout of tensors in memory, tiles and blocks: what makes networks fast on CPUs.

The layers compute the same without any of this; each function says what it gains. Seconds were
measured on two cores with AVX-512, for a window of 7.8 s of htdemucs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat import autocast_on_cpu, has_tiles, is_compiling, is_tracing
from .processor import onednn_is_faster

TILE_BYTES = 2**24  # of the widest result within a tile; each more makes all threads wait
NORM_STEPS = 2048  # whose sum in float32 is exact enough
PIECE = 2**12  # values whose sum in float32 is as good as exact
FLATNESS = 10  # mean over deviation from which on a difference of squares has lost its digits
ATTENTION_ROWS = 896  # queries at once, so that their scores stay in the cache


def eager_on_cpu(x: Tensor) -> bool:
    """`x` is worked on now, and here: not recorded for another engine, nor on another device."""
    # The question about compiling comes first: the other one would end what is being compiled.
    return not is_compiling() and x.device.type == "cpu" and not is_tracing()


def is_watched(layer: nn.Module) -> bool:
    """Whether somebody wants to see what goes into `layer` or comes out of it."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def rows_at_once(x: Tensor, row_bytes: int, rows: int) -> int:
    """How many of `rows` are worked on at once: as many as fit into a tile, on a CPU."""
    return min(rows, max(1, TILE_BYTES // row_bytes)) if eager_on_cpu(x) else rows


def channels_last(x: Tensor) -> Tensor:
    """`x` `[B, C, F, T]` or `[B, C, T]`, on a CPU with its channels side by side in memory.

    Convolutions, norms and gates then read what they need in one piece (within a tile, the
    outermost 3x3 convolution takes 30 instead of 36 ms, its 1x1 one 4 instead of 8), the residual
    branches see each bin as a row without a copy, and the transformer its tokens. What is computed
    from such a tensor is laid out like it.
    """
    if x.device.type != "cpu":
        return x
    image = x if x.dim() == 4 else x.unsqueeze(2)
    image = image.contiguous(memory_format=torch.channels_last)
    return image if x.dim() == 4 else image.squeeze(2)


class Conv1d(nn.Conv1d):
    """`nn.Conv1d` of `[B, C, T]` that leaves channels last: PyTorch does so with images only."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(
            x.unsqueeze(2),
            self.weight.unsqueeze(2),
            self.bias,
            (1, *self.stride),
            (0, *self.padding),  # type: ignore[arg-type]
            (1, *self.dilation),
        ).squeeze(2)


class ConvTranspose1d(nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` of `[B, C, T]` that leaves channels last."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if eager_on_cpu(x):
            return self._as_convolution(channels_last(x))
        x, weight = x.unsqueeze(2), self.weight.unsqueeze(2)
        return F.conv_transpose2d(x, weight, self.bias, (1, *self.stride)).squeeze(2)

    def _as_convolution(self, x: Tensor) -> Tensor:
        """The same by a convolution, of which the channels are the steps between those of `x`.

        See Shi et al., 2016 (arXiv:1609.05158). oneDNN compiles a transposed convolution anew for
        each length: 20 ms to 2 s on an EPYC with AVX2, for what then takes 7 ms.
        """
        (stride,), (kernel,) = self.stride, self.kernel_size
        taps = -(-kernel // stride)  # steps of `x` that one of the result sees
        weight = F.pad(self.weight, (0, taps * stride - kernel))
        weight = weight.unflatten(2, (taps, stride)).flip(2)  # [C, C', taps, stride]
        weight = weight.permute(3, 1, 0, 2).flatten(0, 1).unsqueeze(2)
        bias = None if self.bias is None else self.bias.repeat(stride)
        y = F.conv2d(x.unsqueeze(2), weight, bias, padding=(0, taps - 1))
        steps = y.squeeze(2).transpose(1, 2).reshape(len(y), -1, self.out_channels)
        return steps.transpose(1, 2)[..., : (x.shape[2] - 1) * stride + kernel]


def _is_channels_last(x: Tensor) -> bool:
    """Tell if PyTorch's norm of `x` `[B, C, T]` in float32 would be the one for channels last."""
    if x.dtype != torch.float32 or x.is_contiguous() or not eager_on_cpu(x):
        return False
    return x.unsqueeze(2).is_contiguous(memory_format=torch.channels_last)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` that leaves channels last in `[B, C, T]` too, and is exact for any length."""

    def forward(self, x: Tensor) -> Tensor:
        if _is_channels_last(x.flatten(2)):
            return self._of_rows(x)
        # In three dimensions: of one channel, an image would be taken for channels last.
        one = x.dim() == 3 and x.is_contiguous()
        image = x.unsqueeze(2) if x.dim() == 3 and not one else x
        return super().forward(image).view_as(x)

    def _of_rows(self, x: Tensor) -> Tensor:
        """Normalize `x`, of which the channels of a step are a row in memory."""
        rows = x.flatten(2).transpose(1, 2)
        normalized = self._at_once if rows.shape[1] <= NORM_STEPS else self._in_pieces
        y, flatness = normalized(rows)
        # Convolutions judge the layout by the stride of a batch of one, too, which may be any.
        y = y.as_strided(x.shape, x.stride())
        # A difference of squares has no digits left in the silent gaps of a track.
        if flatness.abs().max() > FLATNESS:
            flat = (flatness.abs() > FLATNESS).any(1)
            y[flat] = super().forward(x[flat].contiguous())  # by Welford's formula
        return y

    def _at_once(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize `rows` `[B, T, C]` by PyTorch's kernel; with mean over deviation, `[B, G]`.

        It adds the values of a channel one by one in float32: 1e-4 off for 400,000 steps.
        """
        batch, steps, channels = rows.shape
        strides = (channels * steps, 1, channels * steps, channels)
        image = rows.as_strided((batch, channels, 1, steps), strides)
        shape = (*image.shape[:2], steps, self.num_groups, self.eps)
        y, mean, reciprocal = torch.native_group_norm(image, self.weight, self.bias, *shape)
        return y, mean * reciprocal

    def _in_pieces(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """As `_at_once`, with the sums of short pieces added in float64: 1e-6 off."""
        groups = rows.unflatten(2, (self.num_groups, -1))  # [B, T, G, C / G]
        count = groups.shape[1] * groups.shape[3]
        pieces = _pieces(groups, max(1, PIECE // groups.shape[3]))
        sums = [piece.sum((2, 4)) for piece in pieces]
        norms = [torch.linalg.vector_norm(piece, dim=(2, 4)) for piece in pieces]
        mean = torch.cat(sums, 1).double().sum(1) / count
        square = torch.cat(norms, 1).double().square().sum(1) / count
        deviation = (square - mean**2).clamp_min(0).add(self.eps).sqrt()
        gain = self.weight.view(self.num_groups, -1) / deviation[..., None]  # [B, G, C / G]
        offset = self.bias.view(self.num_groups, -1) - mean[..., None] * gain
        gain, offset = (part.flatten(1)[:, None].to(rows.dtype) for part in (gain, offset))
        return torch.addcmul(offset, rows, gain), mean / deviation


def _pieces(rows: Tensor, steps: int = PIECE) -> list[Tensor]:
    """`rows` `[B, T, ...]` as `[B, N, steps, ...]`, and what is left as `[B, 1, n, ...]`."""
    whole = rows.shape[1] // steps * steps
    return [rows[:, :whole].unflatten(1, (-1, steps)), rows[:, None, whole:]]


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[B, C]` and covariance `[B, C, C]` of `rows` `[B, T, C]`, in float64."""
    pieces = [piece for part in rows.split(16 * PIECE, 1) for piece in _pieces(part)]
    sums = [piece.sum(2) for piece in pieces]
    mean = torch.cat(sums, 1).double().sum(1) / rows.shape[1]
    center = mean[:, None, None].to(rows.dtype)
    products = [_products(piece - center) for piece in pieces]
    return mean, torch.cat(products, 1).double().sum(1) / rows.shape[1]


def _products(x: Tensor) -> Tensor:
    return x.transpose(-1, -2) @ x


def is_folded(x: Tensor, hidden: int) -> bool:
    """Whether `gated_residual` is faster for `x` `[B, C, T]` and a branch of `hidden` channels."""
    enough = x.shape[0] * x.shape[2] >= 8 * hidden  # else its own products are not small
    return enough and _is_channels_last(x) and not torch.is_grad_enabled()


def gated_residual(
    x: Tensor, hidden: Tensor, convolution: nn.Conv1d, norm: nn.GroupNorm, scale: Tensor
) -> Tensor:
    """Add to `x` `[B, C, T]` what a branch makes of `hidden`, which ends in a norm and a gate.

    `convolution` takes each step h to z = W h + b of 2 C channels; then come `norm`, which is of
    one group, a GLU, and a gain `scale` of each channel. What the norm needs follows from the mean
    m and the covariance V of h, which has an eighth of the channels of z, or a quarter:

        mean z = mean(W m + b)          variance z = mean(diag(W V W')) + variance(W m + b)

    Norm and gain are then part of a product of matrices, which goes block by block of steps: z is
    never whole, and never read for its moments.
    """
    rows = hidden.transpose(1, 2)  # [B, T, H]
    weight = convolution.weight.squeeze(2)  # [2 C, H]
    bias = weight.new_zeros(len(weight)) if convolution.bias is None else convolution.bias
    mean, covariance = _moments(rows)
    within = (covariance * (weight.t() @ weight)).sum((1, 2)) / len(weight)
    means = F.linear(mean, weight.double(), bias.double())
    between, center = torch.var_mean(means, 1, correction=0)
    inverse = (within + between + norm.eps).rsqrt()
    # What differs between the items goes with the steps: (z - mean z) / deviation is a product of
    # [h / deviation, 1 / deviation, mean z / deviation]. The norm's bias is a column, too: of its
    # own, it would be a pass over all.
    ends = torch.stack([inverse, inverse * center, torch.ones_like(inverse)], 1)[:, None]
    ends = ends.to(x.dtype).expand(-1, rows.shape[1], -1)
    gain = norm.weight[:, None]
    columns = [gain * weight, gain * bias[:, None], -gain, norm.bias[:, None]]
    product = torch.cat([scale, torch.ones_like(scale)])[:, None] * torch.cat(columns, 1)
    before = x.transpose(1, 2).flatten(0, 1)
    after = torch.empty_like(before)
    wholes = [rows.flatten(0, 1), ends.flatten(0, 1), before, after]
    count = rows_at_once(x, len(product) * x.element_size(), len(before))
    for part, end, old, new in zip(*(whole.split(count) for whole in wholes)):
        steps = torch.cat([part * end[:, :1], end], 1)
        torch.add(old, F.glu(F.linear(steps, product), 1), out=new)
    return after.unflatten(0, rows.shape[:2]).transpose(1, 2)


@dataclass(frozen=True)
class Reach:
    """The rows (bins, or steps) that a row of the result of a convolution depends on.

    Row `i` sees `kernel` rows from `i * stride - pad` on, with zeros outside:

        read      |0 0|. . . . . . . . . . . .|0 0|      kernel 4, stride 2, pad 2
        result      |___0___|___2___|                    (rows 0 and 2; row 1 overlaps both)

    `transposed`: the other way round, each row that is read reaches `kernel` rows of the result,
    from `i * stride` on, and `pad` rows at either end of the result are cut off.
    """

    kernel: int
    stride: int = 1
    pad: int = 0
    transposed: bool = False

    def count(self, rows: int) -> int:
        """Rows of the result for `rows` rows."""
        if self.transposed:
            return (rows - 1) * self.stride + self.kernel - 2 * self.pad
        return (rows + 2 * self.pad - self.kernel) // self.stride + 1

    def of(
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor], start: int, stop: int
    ) -> Tensor:
        """Rows `start` to `stop` of the result of `function`."""
        if not self.transposed:
            first = start * self.stride - self.pad
            last = (stop - 1) * self.stride + self.kernel - self.pad
            return function(*(_rows(x, first, last) for x in inputs))
        start, stop = start + self.pad, stop + self.pad
        first = max(0, (start - self.kernel) // self.stride + 1)
        last = min(inputs[0].shape[2], (stop - 1) // self.stride + 1)
        whole = function(*(x[:, :, first:last] for x in inputs))
        return whole[:, :, start - first * self.stride : stop - first * self.stride]


def _rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` of `x` `[B, C, F, T]` or `[B, C, T]`, with zeros outside of it."""
    rows = x.shape[2]
    above, below = max(0, -start), max(0, stop - rows)
    inside = x[:, :, max(0, start) : min(stop, rows)]
    if not above and not below:
        return inside
    if x.dim() == 4:
        return F.pad(inside, (0, 0, above, below))
    return F.pad(inside.unsqueeze(2), (above, below)).squeeze(2)  # leaves channels last


def in_tiles(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    reach: Reach,
    widest: int | None,
    count: int | None = None,
) -> Tensor:
    """Apply `function`, a layer along frequency or time, to `inputs`, tile by tile of rows.

    They are `[B, C, F, T]` with bins as rows, or `[B, C, T]` with steps. `widest` is the number of
    channels of the largest result on the way; None is for a layer that needs all rows at once.
    `count` is the number of rows of the result, if it is not what `reach` tells. On a CPU none of
    the results on the way is kept whole, and what one layer leaves in the cache the next one finds
    there.
    """
    x = inputs[0]
    count = reach.count(x.shape[2]) if count is None else count
    row_bytes = (widest or 0) * x[:, 0, 0].numel() * x.element_size()
    rows = count if widest is None else rows_at_once(x, row_bytes, count)
    if rows == count:
        return reach.of(function, inputs, 0, count)
    tiles = math.ceil(count / rows)
    edges = [count * index // tiles for index in range(tiles + 1)]
    first = reach.of(function, inputs, *edges[:2])
    # Joined at the end, the tiles would take the room of the whole twice.
    whole = first.new_empty((*first.shape[:2], count, *first.shape[3:]))
    if first.stride(1) == 1:
        whole = whole.view(len(whole), *whole.shape[2:], -1).movedim(-1, 1)
    whole[:, :, : edges[1]] = first
    for start, stop in itertools.pairwise(edges[1:]):
        whole[:, :, start:stop] = reach.of(function, inputs, start, stop)
    return whole


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, by oneDNN where that makes products of matrices faster.

    PyTorch leaves float32 products to MKL. By oneDNN the transformer takes 0.67 instead of 1.17 s
    on an EPYC with AVX-512.
    """
    return _unpacked(F.linear(_packed(x), weight, bias))


def feed_forward(
    x: Tensor, inner: nn.Module, activation: Callable[[Tensor], Tensor], outer: nn.Module
) -> Tensor:
    """`outer(activation(inner(x)))` of two linear layers, by oneDNN like `linear`.

    Layers that are no plain ones any more, such as quantized ones, run as they are.
    """
    plain = type(inner) is type(outer) is nn.Linear
    return _unpacked(outer(activation(inner(_packed(x) if plain else x))))


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` of a linear layer, by oneDNN like `linear` if it is a plain one."""
    return linear(x, layer.weight, layer.bias) if type(layer) is nn.Linear else layer(x)


def _packed(x: Tensor) -> Tensor:
    """`x` as oneDNN's tensor where products are faster so. What linear layers, activations and
    softmax make of one is one, too.
    """
    return x.to_mkldnn() if _onednn(x) else x


def _unpacked(x: Tensor) -> Tensor:
    return x.to_dense() if x.is_mkldnn else x


def _onednn(x: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    return (
        x.dtype == dtype
        and onednn_is_faster()
        and eager_on_cpu(x)
        and not torch.is_grad_enabled()
        and not autocast_on_cpu()
    )


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention of `[B, H, T, C]`; by oneDNN, if faster, 50 instead of 79 ms.

    In float32 that is faster than PyTorch's bfloat16, too (by a third), where there are no tiles.
    """
    if _onednn(query, torch.bfloat16) and not has_tiles():
        return attention(query.float(), key.float(), value.float()).to(query.dtype)
    if not _onednn(query):
        return F.scaled_dot_product_attention(query, key, value)
    mixed = torch.empty_like(query)
    query = query / math.sqrt(query.shape[-1])
    for item in range(query.shape[0]):
        for head in range(query.shape[1]):
            keys, values = key[item, head].contiguous(), value[item, head].t().contiguous()
            for start in range(0, query.shape[2], ATTENTION_ROWS):
                part = slice(start, start + ATTENTION_ROWS)
                scores = F.linear(_packed(query[item, head, part].contiguous()), keys)
                mixed[item, head, part] = _unpacked(F.linear(scores.softmax(-1), values))
    return mixed
