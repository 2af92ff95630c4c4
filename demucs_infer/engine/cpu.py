"""Fast layers for networks on a CPU.

`fast_copy` swaps the layers of a model for subclasses with fast `forward` methods. The plain layers
compute the same; each trick states its gain.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks import (
    BLSTM,
    DConv,
    HDecLayer,
    HEncLayer,
    LayerScale,
    LocalState,
    MultiWrap,
    ScaledEmbedding,
    dconv_per_bin,
)
from ..compat import autocast_on_cpu, has_tiles
from ..demucs import Demucs
from ..hdemucs import EPSILON, HybridUNet
from ..transformer import (
    Attention,
    CrossLayer,
    CrossTransformerEncoder,
    SelfLayer,
    SequenceGroupNorm,
    TransformerLayer,
)
from ..utils import run_network, standardize
from .machine import onednn_is_faster
from .model import changes_type

# Of the largest result in a tile; each further tile makes all threads wait for the slowest. On an
# EPYC with AVX2, a window of htdemucs adds 344 MB to the peak, and with tiles of 16 MB 403 MB.
TILE_BYTES = 2**23
NORM_STEPS = 2048  # PyTorch's norm sums so many float32 values exactly enough
PIECE = 2**12  # values whose sum in float32 is as good as exact
FLATNESS = 10  # above this ratio of |mean| to std, E[x²] - E[x]² cancels: use Welford's algorithm
ATTENTION_ROWS = 896  # queries at once, so that their scores stay in the cache
FRAMES_AT_ONCE = 64  # of a spectrum on its way to samples, so that they stay in the cache


def fast_copy(model: nn.Module) -> nn.Module:
    """Return a copy of `model` for eager inference on a CPU, with fast layers.

    The copy shares the parameters, and is made when a run begins, so that changes to the model are
    seen. Layers with hooks or of other classes than those in the tables at the end of this file
    stay as they are. A model of another family, with hooks or in training is returned itself.
    """
    kind = type(model)
    mixin = next((fast for family, fast in MODELS.items() if isinstance(model, family)), None)
    if mixin is None or has_hooks(model) or any(part.training for part in model.modules()):
        return model
    # oneDNN's tensors do not take part in autocast. Hooks on all modules see each call of a layer.
    all_hooks = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
    if autocast_on_cpu() or any(all_hooks):
        return model
    copied = _with_fast_layers(model, {**LAYERS, **(PRODUCTS if onednn_is_faster() else {})})
    copied.__class__ = type(f"Fast{kind.__name__}", (mixin, kind), {})
    if isinstance(copied, FastHybridUNet):
        copied.find_parts(kind)
    return copied


def has_hooks(layer: nn.Module) -> bool:
    """Return True if `layer` has forward hooks, or its own `forward`, or is compiled."""
    hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
    own = vars(layer).keys() & {"forward", "_compiled_call_impl"}
    return bool(own) or any(hook is not changes_type for hook in hooks)


def is_known(layer: nn.Module) -> bool:
    """Return True if `layer`, apart from its parts, is as the networks here make it.

    Programs replace the `forward` of classes, weights by tensors that compute in their own way, and
    layers by others of PyTorch: a convolution by two of a lower rank, or one with other options.
    """
    options, kind = vars(layer), type(layer)
    usual = not isinstance(options.get("padding"), str)
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d)):
        usual = {*layer.padding, *layer.output_padding} == {0} and {*layer.dilation} == {1}
    return (
        usual
        and KNOWN.get(kind) is kind.forward
        and not has_hooks(layer)
        and all(options.get(name, value) == value for name, value in OPTIONS.items())
        and all(type(child) in PARTS.get(kind, KNOWN) for child in layer.children())
        and all(type(weight) is nn.Parameter for weight in layer.parameters(recurse=False))
    )


def _with_fast_layers(layer: nn.Module, table: Mapping[type, type]) -> nn.Module:
    # `copy.copy` lets an LSTM rebuild its list of weights, which breaks other threads' copies.
    copied = type(layer).__new__(type(layer))
    vars(copied).update(vars(layer))
    copied._modules = {
        name: child if child is None else fast_layer(child, table)
        for name, child in layer._modules.items()
    }
    return copied


def fast_layer(layer: nn.Module, table: Mapping[type, type] | None = None) -> nn.Module:
    """Return a shallow copy of `layer` with a fast class of `table` (default: `LAYERS`).

    It keeps its own class if a layer within it has hooks or is unknown, because a fast layer may
    call the layers in it in pieces, or not at all.
    """
    table = LAYERS if table is None else table
    if type(layer) not in KNOWN or has_hooks(layer):
        return layer
    copied = _with_fast_layers(layer, table)
    if all(map(is_known, layer.modules())):
        copied.__class__ = table.get(type(layer), type(layer))
    return copied


def channels_last(x: Tensor) -> Tensor:
    """Return `x` `[B, C, F, T]` or `[B, C, T]` with its channels side by side in memory.

    Convolutions, norms and gates then read contiguous memory, residual branches see each bin as a
    row without a copy, and the transformer its tokens. Results are laid out like `x`.
    """
    image = x if x.dim() == 4 else x.unsqueeze(2)
    image = image.contiguous(memory_format=torch.channels_last)
    return image if x.dim() == 4 else image.squeeze(2)


# Tiles of layers along frequency or time.


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
        """Return the rows of the result for `rows` rows."""
        if self.transposed:
            return (rows - 1) * self.stride + self.kernel - 2 * self.pad
        return (rows + 2 * self.pad - self.kernel) // self.stride + 1

    def of(
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor], start: int, stop: int
    ) -> Tensor:
        """Return rows `start` to `stop` of the result of `function`."""
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
    """Return rows `start` to `stop` of `x` `[B, C, F, T]` or `[B, C, T]`, with zeros outside."""
    above, below = max(0, -start), max(0, stop - x.shape[2])
    inside = x[:, :, max(0, start) : min(stop, x.shape[2])]
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
    channels of the largest intermediate result; None is for a layer that needs all rows at once.
    `count` is the number of rows of the result, if it is not `reach.count`. No intermediate result
    is kept whole, and each layer finds the result of the one before it in the cache.
    """
    x = inputs[0]
    count = reach.count(x.shape[2]) if count is None else count
    row_bytes = (widest or 0) * x[:, 0, 0].numel() * x.element_size()
    tiles = math.ceil(count / max(1, TILE_BYTES // row_bytes)) if row_bytes else 1
    if tiles == 1:
        return reach.of(function, inputs, 0, count)
    edges = [count * index // tiles for index in range(tiles + 1)]
    first = reach.of(function, inputs, *edges[:2])
    # The tiles are written where they belong: joining them would take their memory twice.
    whole = first.new_empty((*first.shape[:2], count, *first.shape[3:]))
    if first.stride(1) == 1:
        whole = whole.view(len(whole), *whole.shape[2:], -1).movedim(-1, 1)
    whole[:, :, : edges[1]] = first
    for start, stop in itertools.pairwise(edges[1:]):
        whole[:, :, start:stop] = reach.of(function, inputs, start, stop)
    return whole


def _unpadded(layer: Any, x: Tensor) -> Tensor:
    """Run a convolution without its padding along the rows of `x`, which `Reach` has added."""
    if x.dim() == 4:
        padding = (0, layer.padding[1])
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, padding, layer.dilation)
    return _conv1d(layer, x, 0)


def _conv1d(layer: Any, x: Tensor, padding: int) -> Tensor:
    """Run a convolution on `x` `[B, C, T]` as on an image, which leaves channels last."""
    x, weight = x.unsqueeze(2), layer.weight.unsqueeze(2)
    stride, dilation = (1, *layer.stride), (1, *layer.dilation)
    return F.conv2d(x, weight, layer.bias, stride, (0, padding), dilation).squeeze(2)


def _gated(y: Tensor, rewrite: Any, norm: Any) -> Tensor:
    return y if rewrite is None else F.glu(norm(_unpadded(rewrite, y)), dim=1)


def _reach(layer: Any) -> Reach:
    """Return the reach of a convolution along rows; None has only its own row."""
    if layer is None:
        return Reach(1)
    kernel = (layer.kernel_size[0] - 1) * layer.dilation[0] + 1
    return Reach(kernel, layer.stride[0], layer.padding[0])


def _has_norms(layer: nn.Module) -> bool:
    return any(isinstance(part, nn.GroupNorm) for part in layer.children())


class FastHEncLayer(HEncLayer):
    """Runs in tiles, unless there are norms.

    Without tiles here and in `FastHDecLayer`, a window of htdemucs takes 1.02 times the processor
    time, and 586 instead of 338 MB (EPYC with AVX2).
    """

    def forward(self, x: Tensor, inject: Tensor | None = None) -> Tensor:
        x = x if self.freq else x.flatten(1, -2)
        convolution: Any = self.conv
        strided = _reach(convolution)
        count = strided.count(x.shape[2] + (0 if self.freq else -x.shape[2] % self.stride))
        widest = None if _has_norms(self) else 2 * convolution.out_channels

        def convolve(part: Tensor) -> Tensor:
            y = _unpadded(convolution, part)
            if self.empty:
                return y
            if inject is not None:
                y = y + (inject[:, :, None] if y.dim() == 4 else inject)
            return F.gelu(self.norm1(y))

        if self.empty:
            return in_tiles(convolve, [x], strided, widest, count)
        branch = functools.partial(_branch, self.dconv)
        norm2 = getattr(self, "norm2", None)
        halo = _reach(self.rewrite)
        if self.freq and halo.kernel == 1:  # bins do not see each other after the convolution
            return in_tiles(
                lambda part: _gated(branch(convolve(part)), self.rewrite, norm2),
                [x], strided, widest, count,
            )  # fmt: skip
        y = branch(in_tiles(convolve, [x], strided, widest, count))
        if self.rewrite is None:
            return y
        return in_tiles(lambda part: _gated(part, self.rewrite, norm2), [y], halo, widest)


def _branch(dconv: nn.Module | None, y: Tensor) -> Tensor:
    return y if dconv is None else dconv_per_bin(dconv, y)


class FastHDecLayer(HDecLayer):
    """Runs in tiles, unless there are norms. If `deferred`, `upsampled` is left to the caller."""

    deferred = False

    def forward(self, x: Tensor, skip: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
        y = self.rewritten(x, skip)
        return (y if self.deferred else self.upsampled(y, length)), y

    def rewritten(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """Return the input of the transposed convolution."""
        if self.freq and x.dim() == 3:
            x = x.unflatten(1, (self.chin, -1))
        if self.empty:
            return x
        inputs, norm1 = [x] if skip is None else [x, skip], getattr(self, "norm1", None)
        widest = None if _has_norms(self) else 2 * self.chin

        def gate(*parts: Tensor) -> Tensor:
            y = parts[0] if len(parts) == 1 else parts[0] + parts[1]
            y = _gated(y, self.rewrite, norm1)
            return _branch(self.dconv, y) if self.freq else y

        y = in_tiles(gate, inputs, _reach(self.rewrite), widest)
        return y if self.freq else _branch(self.dconv, y)

    def upsampled(self, y: Tensor, length: int) -> Tensor:
        """Return the transposed convolution of `y`, a sound cut to `length` steps."""
        convolution: Any = self.conv_tr

        def upsample(part: Tensor) -> Tensor:
            z = self.norm2(convolution(part))
            return z if self.last else F.gelu(z)

        reach = Reach(convolution.kernel_size[0], convolution.stride[0], self.pad, transposed=True)
        widest = None if _has_norms(self) else convolution.out_channels
        z = in_tiles(upsample, [y], reach, widest)
        return z if self.freq else z[..., :length]


class FastMultiWrap(MultiWrap):
    """If `deferred`, `upsampled` is left to the caller."""

    deferred = False

    def forward(self, x: Tensor, skip: Tensor | None = None, length: int | None = None) -> Any:
        if self.deferred:
            return self.rewritten(x, skip), None
        return super().forward(x, skip, length)


class FastSequential(nn.Sequential):
    """Runs a convolution and the layers after it that see one step at a time in tiles.

    Without it, a window of mdx in time takes 1.05 times the processor time (EPYC with AVX2).
    """

    def forward(self, x: Tensor) -> Tensor:
        layers: deque[Any] = deque(self)
        while layers:
            layer = layers.popleft()
            transposed = isinstance(layer, nn.ConvTranspose1d)
            if not transposed and not (isinstance(layer, nn.Conv1d) and layer.dilation == (1,)):
                x = layer(x)
                continue
            chain: list[Any] = [layer if transposed else functools.partial(_unpadded, layer)]
            while layers and isinstance(layers[0], (nn.Identity, nn.GELU, nn.ReLU, nn.GLU)):
                chain.append(layers.popleft())
            reach = replace(_reach(layer), transposed=transposed)
            x = in_tiles(functools.partial(_through, chain), [x], reach, layer.out_channels)
        return x


def _through(layers: Iterable[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


# Layers that leave channels last.


class FastConv1d(nn.Conv1d):
    """Leaves channels last in `[B, C, T]`: PyTorch does so with images only."""

    def forward(self, x: Tensor) -> Tensor:
        return _conv1d(self, x, self.padding[0])  # type: ignore[arg-type]


class FastConvTranspose1d(nn.ConvTranspose1d):
    """A convolution whose channels are the steps between those of `x` (arXiv:1609.05158).

    oneDNN compiles a transposed convolution for each length: 20 ms to 2 s on an EPYC with AVX2, for
    a run of 7 ms. Without it, later windows of htdemucs take 1.07 to 1.09 times the
    processor time.
    """

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = channels_last(x)
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
    """Return True if PyTorch's norm of `x` `[B, C, T]` would be its inexact one of float32."""
    if x.dtype != torch.float32 or x.is_contiguous():
        return False
    return x.unsqueeze(2).is_contiguous(memory_format=torch.channels_last)


class FastGroupNorm(nn.GroupNorm):
    """Leaves channels last in `[B, C, T]`, too, and is exact for any length.

    Without it, htdemucs takes 1.10 to 1.12 times the processor time (EPYC with AVX2).
    """

    def forward(self, x: Tensor) -> Tensor:
        if _is_channels_last(x.flatten(2)):
            return self._of_rows(x)
        # In three dimensions: of one channel, an image would be taken for channels last.
        one = x.dim() == 3 and x.is_contiguous()
        image = x.unsqueeze(2) if x.dim() == 3 and not one else x
        return nn.GroupNorm.forward(self, image).view_as(x)

    def _of_rows(self, x: Tensor) -> Tensor:
        """Normalize `x`, of which the channels of a step are a row in memory."""
        rows = x.flatten(2).transpose(1, 2)
        normalized = self._at_once if rows.shape[1] <= NORM_STEPS else self._in_pieces
        y, flatness = normalized(rows)
        # Convolutions judge the layout by the stride of a batch of one, too, which may be any.
        y = y.as_strided(x.shape, x.stride())
        if flatness.abs().max() > FLATNESS:  # in the silent gaps of a track
            flat = (flatness.abs() > FLATNESS).any(1)
            y[flat] = nn.GroupNorm.forward(self, x[flat].contiguous())
        return y

    def _at_once(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize `rows` `[B, T, C]` by PyTorch's kernel; also return mean / std `[B, G]`.

        It adds the values of a channel one by one in float32: 1e-4 off for 400,000 steps.
        """
        batch, steps, channels = rows.shape
        strides = (channels * steps, 1, channels * steps, channels)
        image = rows.as_strided((batch, channels, 1, steps), strides)
        shape = (*image.shape[:2], steps, self.num_groups, self.eps)
        y, mean, reciprocal = torch.native_group_norm(image, self.weight, self.bias, *shape)
        return y, mean * reciprocal

    def _in_pieces(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Do the same with the sums of short pieces added in float64: 1e-6 off."""
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
    """Return `rows` `[B, T, ...]` as `[B, N, steps, ...]`, and the rest as `[B, 1, n, ...]`."""
    whole = rows.shape[1] // steps * steps
    return [rows[:, :whole].unflatten(1, (-1, steps)), rows[:, None, whole:]]


class FastDConv(DConv):
    """Makes the norm and the gain at a branch's end part of its last product of matrices."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            parts: list[Any] = list(layer.children())
            inner, end = parts[:-4], parts[-4:]
            steps = x.shape[0] * x.shape[2]
            if _is_channels_last(x) and _is_gated_norm(end) and steps >= 8 * x.shape[1]:
                x = _plus_gated_norm(x, _through(inner, x), end[0], end[1], end[3].scale)
            else:
                x = x + layer(x)
        return x


def _is_gated_norm(layers: Sequence[Any]) -> bool:
    """Return True for a pointwise convolution, a norm of one group, a GLU and a gain."""
    if [type(layer) for layer in layers] != [FastConv1d, FastGroupNorm, nn.GLU, LayerScale]:
        return False
    convolution, norm, *_ = layers
    pointwise = convolution.kernel_size == convolution.stride == (1,)
    return pointwise and convolution.bias is not None and norm.num_groups == 1


def _plus_gated_norm(x: Tensor, hidden: Tensor, layer: Any, norm: Any, gain: Tensor) -> Tensor:
    """Return `x` `[B, C, T]` plus the end of a residual branch, from its `hidden` `[B, H, T]` on.

    There `layer` maps each step h to z = W h + b of 2 C channels; a norm of one group, a GLU and
    a gain follow. The mean m and the covariance V of h give the norm's moments:

        mean z = mean(W m + b)          variance z = mean(diag(W V W')) + variance(W m + b)

    So z is never whole, and never read for its moments: without this, a window of mdx in time takes
    1.17 times the processor time, and one of htdemucs 1.08 times (EPYC with AVX2).
    """
    rows, before = hidden.transpose(1, 2), x.transpose(1, 2)
    weight = layer.weight.squeeze(2).double()  # [2 C, H]
    pieces = [piece.sum(1).double() for piece in rows.split(PIECE, 1)]
    mean = torch.stack(pieces).sum(0) / rows.shape[1]
    centered = (rows - mean[:, None].to(x.dtype)).split(PIECE, 1)
    products = [(piece.transpose(1, 2) @ piece).double() for piece in centered]
    covariance = torch.stack(products).sum(0) / rows.shape[1]
    means = F.linear(mean, weight, layer.bias.double())
    variance = (covariance * (weight.t() @ weight)).sum((1, 2)) / len(weight)
    variance = (variance + means.var(1, correction=0) + norm.eps)[:, None]
    ends = torch.cat([gain, torch.ones_like(gain)])  # the gain goes through the gate
    factor = ends * norm.weight * variance.rsqrt()  # [B, 2 C]
    offset = factor * (layer.bias - means.mean(1, keepdim=True)) + ends * norm.bias
    weights = (factor[:, :, None] * weight).transpose(1, 2).to(x.dtype)  # [B, H, 2 C]
    after = torch.empty_like(before)
    wholes = (before, after, rows, offset[:, None].to(x.dtype), weights)
    step_bytes = len(weight) * x.element_size()
    items = max(1, TILE_BYTES // (step_bytes * rows.shape[1]))
    for *parts, bias, product in zip(*(whole.split(items) for whole in wholes)):
        steps = max(1, TILE_BYTES // (step_bytes * len(bias)))
        for old, new, part in zip(*(whole.split(steps, 1) for whole in parts)):
            torch.add(old, F.glu(torch.baddbmm(bias, part, product), 2), out=new)
    return after.transpose(1, 2)


class FastBLSTM(BLSTM):
    """Gives the weights to the LSTM's function.

    `nn.LSTM.forward` may rewrite its list of weights, so that threads would disturb each other.
    """

    def _run(self, x: Tensor) -> Tensor:
        x, lstm = x.permute(2, 0, 1), self.lstm
        weights: list[Tensor] = [p for layer in lstm.all_weights for p in layer]
        state = x.new_zeros(2 * lstm.num_layers, x.shape[1], lstm.hidden_size)
        y = torch.lstm(x, (state, state), weights, True, lstm.num_layers, 0.0, False, True, False)
        return self.linear(y[0]).permute(1, 2, 0)


# Products of matrices by oneDNN, where `onednn_is_faster`.


def _by_onednn(x: Tensor) -> Tensor:
    """Return `x` as oneDNN's tensor, if it is of float32.

    Linear layers, activations and softmax turn such a tensor into another one.
    """
    return x.to_mkldnn() if x.dtype == torch.float32 else x


def _dense(x: Tensor) -> Tensor:
    return x.to_dense() if x.is_mkldnn else x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `F.linear(x, weight, bias)` by oneDNN."""
    return _dense(F.linear(_by_onednn(x), weight, bias))


class FastAttention(Attention):
    """Attends head by head, by oneDNN: 50 instead of 79 ms on an EPYC with AVX-512."""

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        weight, bias, dim = self.in_proj_weight, self.in_proj_bias, x.shape[-1]
        memory = x if memory is None else memory
        query = linear(x, weight[:dim], bias[:dim]) / math.sqrt(dim // self.num_heads)
        key, value = linear(memory, weight[dim:], bias[dim:]).chunk(2, -1)
        heads = (
            rearrange(y, "b t (h c) -> b h t c", h=self.num_heads) for y in (query, key, value)
        )
        mixed = rearrange(self._mixed(*heads), "b h t c -> b t (h c)")
        return linear(mixed, self.out_proj.weight, self.out_proj.bias)

    def _mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the values `[B, H, U, C]`, mixed for each query `[B, H, T, C]`."""
        if query.dtype == torch.bfloat16:
            if has_tiles():
                return F.scaled_dot_product_attention(query, key, value, scale=1.0)
            # float32 by oneDNN is faster by a third on processors without tiles.
            return self._mixed(query.float(), key.float(), value.float()).to(query.dtype)
        mixed = torch.empty_like(query)
        for item, head in itertools.product(*map(range, query.shape[:2])):
            keys, values = key[item, head].contiguous(), value[item, head].t().contiguous()
            for start in range(0, query.shape[2], ATTENTION_ROWS):
                part = slice(start, start + ATTENTION_ROWS)
                scores = F.linear(_by_onednn(query[item, head, part].contiguous()), keys)
                mixed[item, head, part] = _dense(F.linear(scores.softmax(-1), values))
        return mixed


class FastSelfLayer(SelfLayer):
    """The feed-forward block by oneDNN, which has few activations."""

    def feed_forward(self, x: Tensor) -> Tensor:
        if self.activation not in (F.gelu, F.relu):
            return TransformerLayer.feed_forward(self, x)
        return self.gamma_2(_dense(self.linear2(self.activation(self.linear1(_by_onednn(x))))))


class FastCrossLayer(CrossLayer):
    """The feed-forward block by oneDNN."""

    feed_forward = FastSelfLayer.feed_forward  # type: ignore[assignment]


# Models, and the tables of fast classes.


class FastDemucs(Demucs):
    """Works with channels last."""

    def network(self, x: Tensor) -> tuple[Tensor]:
        return super().network(channels_last(x))


class FastHybridUNet(HybridUNet):
    """Works with channels last, and never has the spectra of all sources whole.

    If `in_parts`, the outermost decoder leaves its transposed convolution to `forward`, which makes
    the spectra some frames at a time. Without that, a window of hdemucs_mmi adds 2688 instead of
    1209 MB to the peak, and one of htdemucs 537 instead of 338 MB.
    """

    in_parts = False

    def find_parts(self, kind: type) -> None:
        """Set `in_parts` for a model of class `kind`, unless a program replaced one of its steps.

        A norm in the outermost decoder and the iterative Wiener filter need all frames at once.
        """
        last: Any = self.decoder[-1]
        original = all(getattr(kind, name) is step for name, step in STEPS.items())
        whole = self.wiener_iters > 0 and not self.cac
        fast = isinstance(last, (FastHDecLayer, FastMultiWrap))
        fast &= not any(_has_norms(part) for part in last.modules() if isinstance(part, HDecLayer))
        if original and not vars(self).keys() & STEPS and fast and not whole:
            self.in_parts = last.deferred = True

    def network(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        return super().network(channels_last(x), channels_last(xt))

    def _bottom(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        x, xt = super()._bottom(x, xt)
        return channels_last(x), channels_last(xt)

    def forward(self, mix: Tensor, **options: Any) -> Tensor:
        if not self.in_parts:  # perhaps a program's own `forward`
            return super().forward(mix, **options)
        length, stems = mix.shape[-1], options.get("stems")
        upsampled: Any = self.decoder[-1].upsampled
        mix = F.pad(mix, (0, self._padded_length(length) - length))
        z = self._spec(mix)
        x, mean, std = (y[:, None] for y in standardize(self._magnitude(z), EPSILON))
        frames = x.shape[-1]  # a program's spectrum may have another shape
        # Complex parts do not need the mixture's phase: its spectrum is let go.
        mixed: Any = itertools.repeat(None) if self.cac else z.split(FRAMES_AT_ONCE, -1)
        del z
        xt, mean_t, std_t = standardize(mix, EPSILON)
        x, xt = run_network(self.network, self, x[:, 0], xt)
        dtype = next(self.decoder[-1].parameters()).dtype  # of the transposed convolution
        split = x.split(FRAMES_AT_ONCE, -1)
        parts = (upsampled(part.to(dtype), 0).to(x.dtype) for part in split)
        spectra = (
            self._mask(z, torch.addcmul(mean, self._by_source(part, stems), std))
            for z, part in zip(mixed, parts)
        )
        start = 0 if self.hybrid_old else self.hop_length // 2 * 3
        x = istft_of_parts(spectra, self.hop_length, frames, start, mix.shape[-1])
        x.add_(mean_t[:, None]).addcmul_(self._by_source(xt, stems), std_t[:, None])
        return x[..., :length]


def istft_of_parts(
    parts: Iterable[Tensor], hop_length: int, frames: int, start: int, length: int
) -> Tensor:
    """Inverse STFT of `frames` frames between two silent ones at either end, as `[*, length]`.

    `parts` are their spectra `[*, F, n]`, one after the other. A frame has four hops; bins that
    are missing at its top are zero. Sample 0 is where the first frame starts, and the result begins
    at `start`:

        silence  |=======|                                       |=======|
                   |=======|                                   |=======|
        parts        |=======|                               |=======|
                       |=======|        ...                |=======|
        samples      0   |------------ length ------------|
                       start

    A frame is the inverse FFT times the window `w`, and their sum is divided by the envelope that
    two windows leave, one in each direction:

        x[t] = sum_i w[t - i hop] ifft(z_i)[t - i hop]  /  sum_i w[t - i hop]^2

    Silent frames add nothing to the sum above, only to the one below, so they are never made:
    their part in the samples that are kept is in the envelope alone.
    """
    total = window = torch.empty(0, dtype=torch.float32, device="cpu")
    first = 0
    for part in parts:
        if not first:
            window = torch.hann_window(4 * hop_length, dtype=part.real.dtype, device=part.device)
            total = window.new_zeros(*part.shape[:-2], frames + 3, hop_length)
        waves = torch.fft.irfft(part.transpose(-1, -2), 4 * hop_length, norm="ortho")
        _overlap_add(total[..., first:, :], waves * window)
        first += part.shape[-1]
    envelope = window.new_zeros(frames + 7, hop_length)
    _overlap_add(envelope, (window**2).expand(frames + 4, -1))
    stop = start + length
    return total.flatten(-2)[..., start:stop].div_(envelope[2:].flatten()[start:stop])


def _overlap_add(total: Tensor, frames: Tensor) -> None:
    """Add `frames` `[*, N, L]`, a hop apart, to `total` `[*, M, hop]` from its first hop on."""
    blocks = frames.unflatten(-1, (-1, total.shape[-1]))  # [*, N, L / hop, hop]
    for part in range(blocks.shape[-2]):
        total[..., part : part + frames.shape[-2], :] += blocks[..., part, :]


MODELS = {HybridUNet: FastHybridUNet, Demucs: FastDemucs}
# The steps that `FastHybridUNet.forward` does in another way, so that replaced ones are noticed.
STEPS = {name: getattr(HybridUNet, name) for name in ("forward", "network", "_mask", "_ispec")}
LAYERS: dict[type, type] = {
    nn.Conv1d: FastConv1d,
    nn.ConvTranspose1d: FastConvTranspose1d,
    nn.GroupNorm: FastGroupNorm,
    nn.Sequential: FastSequential,
    BLSTM: FastBLSTM,
    DConv: FastDConv,
    HEncLayer: FastHEncLayer,
    HDecLayer: FastHDecLayer,
    MultiWrap: FastMultiWrap,
}
PRODUCTS: dict[type, type] = {
    Attention: FastAttention,
    SelfLayer: FastSelfLayer,
    CrossLayer: FastCrossLayer,
}
# Classes of layers with their own `forward`, which programs may replace.
KNOWN: dict[type, Any] = {
    kind: kind.forward  # type: ignore[attr-defined]
    for kind in (
        *LAYERS, *PRODUCTS, CrossTransformerEncoder, LayerScale, LocalState, ScaledEmbedding,
        SequenceGroupNorm,
        nn.Conv2d, nn.ConvTranspose2d, nn.Embedding, nn.GELU, nn.GLU, nn.Identity, nn.LayerNorm,
        nn.Linear, nn.LSTM, nn.ModuleList, nn.ReLU,
    )
}  # fmt: skip
# The only values that some options of PyTorch's layers have in these networks.
OPTIONS = {
    "affine": True, "batch_first": False, "bias": True, "bidirectional": True, "dim": 1,
    "groups": 1, "padding_mode": "zeros", "proj_size": 0,
}  # fmt: skip
IN_BRANCH = {
    nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.GroupNorm, nn.Identity, DConv
}  # fmt: skip
IN_TRANSFORMER = {Attention, nn.Linear, nn.LayerNorm, SequenceGroupNorm, LayerScale, nn.Identity}
# Classes of the parts of layers, whose attributes the fast layers read (default: any in `KNOWN`).
PARTS: dict[type, set[type]] = {
    HEncLayer: IN_BRANCH, HDecLayer: IN_BRANCH, Attention: {nn.Linear}, BLSTM: {nn.LSTM, nn.Linear},
    SelfLayer: IN_TRANSFORMER, CrossLayer: IN_TRANSFORMER,
}  # fmt: skip
