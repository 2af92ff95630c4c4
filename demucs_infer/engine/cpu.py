"""Fast layers for networks on a CPU.

`fast_copy` swaps the layers of a model for subclasses with fast `forward` methods. The plain layers
compute the same; each trick states its gain. Figures are ratios of processor time for a window, as
medians of alternating runs by one thread of an AMD EPYC with AVX2, unless others are named.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .. import blocks, transformer
from ..compat import autocast_on_cpu, has_tiles
from ..demucs import Demucs
from ..hdemucs import EPSILON, HybridUNet
from ..utils import run_network, standardize
from .machine import onednn_is_faster
from .model import changes_type

TILE_BYTES = 2**22  # of the largest result in a tile; every further tile makes threads wait
PIECE = 2**12  # values whose sum in float32 is as good as exact
FLATNESS = 10  # above this ratio of |mean| to std, E[x²] - E[x]² cancels: use Welford's algorithm
ATTENTION_ROWS = 896  # queries at once, so that their scores stay in the cache
FRAMES_AT_ONCE = 64  # of a spectrum on its way to samples, so that they stay in the cache


def fast_copy(model: nn.Module) -> nn.Module:
    """Return a copy of `model` for eager inference on a CPU, with fast layers.

    The copy shares the parameters, and is made when a run begins, so that changes to the model are
    seen. Layers with hooks or of other classes than those in the tables at the end of this file
    stay as they are. A model of another family, with hooks or in training is returned itself, and
    so is any model under autocast, which oneDNN's tensors do not support.
    """
    kind = type(model)
    mixin = next((fast for family, fast in MODELS.items() if isinstance(model, family)), None)
    training = any(part.training for part in model.modules())
    if mixin is None or training or has_hooks(model) or autocast_on_cpu():
        return model
    copied = _with_fast_layers(model, LAYERS | (PRODUCTS if onednn_is_faster() else {}))
    if mixin is FastHybridUNet and _can_defer(copied, kind):
        mixin = DeferringHybridUNet
        vars(copied.decoder[-1])["deferred"] = True  # type: ignore[index]
    copied.__class__ = type(f"Fast{kind.__name__}", (mixin, kind), {})
    return copied


def has_hooks(layer: nn.Module) -> bool:
    """Return True if `layer` has forward hooks, or a `forward` set on the instance."""
    hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
    return "forward" in vars(layer) or any(hook is not changes_type for hook in hooks)


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

    It keeps its own class if a layer within it has hooks or is of an unknown class, because a fast
    layer may call the layers in it in pieces, or not at all.
    """
    table = LAYERS if table is None else table
    if type(layer) not in KNOWN or has_hooks(layer):
        return layer
    copied = _with_fast_layers(layer, table)
    if all(type(part) in KNOWN and not has_hooks(part) for part in layer.modules()):
        copied.__class__ = table.get(type(layer), type(layer))
    return copied


# Layers with channels last: the channels of a step are side by side in memory. Convolutions, norms
# and gates then read one piece, residual branches see each bin as a row without a copy, and the
# transformer its tokens. Without that, a window of htdemucs takes 1.04 to 1.12 times as long.


def channels_last(x: Tensor) -> Tensor:
    """Return `x` `[B, C, F, T]` or `[B, C, T]` with channels last in memory."""
    image = x if x.dim() == 4 else x.unsqueeze(2)
    image = image.contiguous(memory_format=torch.channels_last)
    return image if x.dim() == 4 else image.squeeze(2)


class FastConv1d(nn.Conv1d):
    """Leaves channels last in `[B, C, T]`: PyTorch does so with images only."""

    def forward(self, x: Tensor) -> Tensor:
        stride, padding, dilation = (1, *self.stride), (0, *self.padding), (1, *self.dilation)
        image, weight = x.unsqueeze(2), self.weight.unsqueeze(2)
        return F.conv2d(image, weight, self.bias, stride, padding, dilation).squeeze(2)  # type: ignore[arg-type]


class FastConvTranspose1d(nn.ConvTranspose1d):
    """A convolution whose channels are the steps between those of `x` (arXiv:1609.05158).

    oneDNN compiles a transposed convolution for each length, which takes 20 ms to 2 s, for a layer
    of 7 ms. Without this class, later windows of htdemucs take 1.02 to 1.09 times as long.
    """

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        (stride,), (kernel,) = self.stride, self.kernel_size
        taps = -(-kernel // stride)  # steps of `x` that one of the result sees
        weight = F.pad(self.weight, (0, taps * stride - kernel))
        weight = weight.unflatten(2, (taps, stride)).flip(2)  # [C, C', taps, stride]
        weight = weight.permute(3, 1, 0, 2).flatten(0, 1).unsqueeze(2)
        bias = None if self.bias is None else self.bias.repeat(stride)
        y = F.conv2d(channels_last(x).unsqueeze(2), weight, bias, padding=(0, taps - 1))
        steps = y.squeeze(2).transpose(1, 2).reshape(len(y), -1, self.out_channels)
        return steps.transpose(1, 2)[..., : (x.shape[2] - 1) * stride + kernel]


def _is_channels_last(x: Tensor) -> bool:
    """Return True if `x` `[B, C, T]` has channels last, and a contiguous order would differ."""
    image = x.unsqueeze(2)
    return not x.is_contiguous() and image.is_contiguous(memory_format=torch.channels_last)


class FastGroupNorm(nn.GroupNorm):
    """Leaves channels last, too, and is exact for any length.

    PyTorch's norm adds the values of a channel one by one in float32: 1e-4 off for 400 000 steps.
    Here the sums of short pieces are added in float64: 1e-6 off. Without this class, a window of
    htdemucs takes 1.08 to 1.12 times as long.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or not _is_channels_last(x.flatten(2)):
            if x.dim() > 3 or x.is_contiguous():
                return super().forward(x)
            return super().forward(x.unsqueeze(2)).squeeze(2)
        rows = x.flatten(2).transpose(1, 2).unflatten(2, (self.num_groups, -1))  # [B, T, G, C / G]
        steps = max(1, PIECE // rows.shape[3])
        whole = rows.shape[1] // steps * steps
        pieces = (rows[:, :whole].unflatten(1, (-1, steps)), rows[:, None, whole:])
        count = rows.shape[1] * rows.shape[3]
        sums = torch.cat([piece.sum((2, 4)) for piece in pieces], 1)
        norms = torch.cat([torch.linalg.vector_norm(piece, dim=(2, 4)) for piece in pieces], 1)
        mean = sums.double().sum(1) / count  # [B, G]
        square = norms.double().square().sum(1) / count
        deviation = (square - mean**2).clamp_min(0).add(self.eps).sqrt()
        gain = self.weight.view(self.num_groups, -1) / deviation[..., None]  # [B, G, C / G]
        offset = self.bias.view(self.num_groups, -1) - mean[..., None] * gain
        y = torch.addcmul(offset[:, None].to(x.dtype), rows, gain[:, None].to(x.dtype))
        y = y.flatten(2).transpose(1, 2).view_as(x)
        flat = mean.abs() > FLATNESS * deviation
        if flat.any():  # in the silent gaps of a track
            flat = flat.any(1)
            y[flat] = super().forward(x[flat].contiguous())
        return y


# Layers in tiles. Of 4 MB, a window of htdemucs adds 367 to 386 MB to the peak; of 16 MB, 454.


def gated_in_tiles(y: Tensor, rewrite: Any) -> Tensor:
    """Return `glu(rewrite(y))`, some bins or steps of `y` (its third dimension) at a time."""
    rows, halo = y.shape[2], rewrite.padding[0]
    count = max(1, TILE_BYTES // (2 * y[:, :, 0].numel() * y.element_size()))
    if count >= rows:
        return F.glu(rewrite(y), dim=1)
    gated = torch.empty_like(y)
    for start in range(0, rows, count):
        stop, first = min(start + count, rows), max(0, start - halo)
        # The padding of the convolution replaces real rows at the ends of a tile: cut them off.
        part = F.glu(rewrite(y[:, :, first : stop + halo]), dim=1)
        gated[:, :, start:stop] = part[:, :, start - first : stop - first]
    return gated


class FastHEncLayer(blocks.HEncLayer):
    """Runs its gate in tiles, unless it has norms."""

    def gated(self, y: Tensor) -> Tensor:
        return super().gated(y) if self.norm else gated_in_tiles(y, self.rewrite)


class FastHDecLayer(blocks.HDecLayer):
    """Runs its gate in tiles, unless it has norms. `deferred` leaves `upsampled` to the caller."""

    deferred = False

    def forward(self, x: Tensor, skip: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
        y = self.rewritten(x, skip)
        return (y if self.deferred else self.upsampled(y, length)), y

    def gated(self, y: Tensor) -> Tensor:
        return super().gated(y) if self.norm else gated_in_tiles(y, self.rewrite)


class FastMultiWrap(blocks.MultiWrap):
    """`deferred` leaves `upsampled` to the caller."""

    deferred = False

    def forward(self, x: Tensor, skip: Tensor | None = None, length: int | None = None) -> Any:
        if self.deferred:
            return self.rewritten(x, skip), None
        return super().forward(x, skip, length)


class FastSequential(nn.Sequential):
    """Applies GELU in place, unless it comes first: a window of mdx in time takes 134 MB less."""

    def forward(self, x: Tensor) -> Tensor:
        given = x
        for layer in self:
            in_place = type(layer) is nn.GELU and x is not given
            x = torch.ops.aten.gelu_(x) if in_place else layer(x)
        return x


class FastDConv(blocks.DConv):
    """Runs short items in tiles. For a long one, the end of a branch is one product of matrices."""

    def forward(self, x: Tensor) -> Tensor:
        item_bytes = 2 * x[0].numel() * x.element_size()
        is_long = item_bytes > TILE_BYTES and x.dtype == torch.float32 and _is_channels_last(x)
        run, count = self._of_long if is_long else super().forward, max(1, TILE_BYTES // item_bytes)
        if count >= len(x):
            return run(x)
        whole = torch.empty_like(x)
        for part, result in zip(x.split(count), whole.split(count)):
            result.copy_(run(part))
        return whole

    def _of_long(self, x: Tensor) -> Tensor:
        """Run the branches on `x` `[1, C, T]`.

        At the end of a branch, a convolution maps each step h to z = W h + b of 2 C channels; a
        norm of one group, a GLU and a gain follow. The mean m and the covariance V of h are enough
        for the norm:

            mean z = mean(W m + b)          variance z = mean(diag(W V W')) + variance(W m + b)

        So z is never whole: without it, a window of the time model of mdx took 1.07 times as long
        and 1837 instead of 1123 MB.
        """
        given = x
        for layer in self.layers:
            parts: list[Any] = list(layer.children())
            *inner, convolution, norm, _, gain = parts
            if not isinstance(norm, nn.GroupNorm):
                x = x + layer(x)
                continue
            hidden = FastSequential(*inner)(x)[0].t()
            mean = hidden.mean(0)
            weight, bias = convolution.weight.squeeze(2).double(), convolution.bias.double()
            centered = F.pad(hidden - mean, (0, 0, 0, -len(hidden) % PIECE))
            centered = centered.unflatten(0, (-1, PIECE))
            covariance = (centered.transpose(1, 2) @ centered).double().sum(0) / len(hidden)
            del centered
            means = weight @ mean.double() + bias
            variance = ((weight @ covariance) * weight).sum(1).mean() + means.var(correction=0)
            # The gain goes through the gate.
            factor = torch.cat([gain.scale, torch.ones_like(gain.scale)])
            offset = factor * norm.bias
            factor = factor * norm.weight / (variance + norm.eps).sqrt()
            offset = (offset + factor * (bias - means.mean())).to(x.dtype)
            weight = (factor[:, None] * weight).to(x.dtype)
            result = torch.empty_like(x) if x is given else x
            wholes, count = (x[0].t(), result[0].t(), hidden), TILE_BYTES // (4 * len(weight))
            for old, new, part in zip(*(whole.split(count) for whole in wholes)):
                torch.add(old, F.glu(F.linear(part, weight, offset)), out=new)
            del hidden, wholes, old, new, part
            x = result
        return x


class FastLocalState(blocks.LocalState):
    """Scores as many queries at once as fit into a tile."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, decay, content = (
            layer(x).unflatten(1, (self.heads, -1))
            for layer in (self.query, self.key, self.query_decay, self.content)
        )
        count = max(1, TILE_BYTES // (len(x) * self.heads * x.shape[2] * x.element_size()))
        steps = torch.arange(x.shape[2], device=x.device)
        parts = zip(query.split(count, 3), decay.split(count, 3), steps.split(count))
        mixed = [self.attend(part, key, content, gates, steps) for part, gates, steps in parts]
        return x + self.proj(torch.cat(mixed, dim=3).flatten(1, 2))


class FastBLSTM(blocks.BLSTM):
    """Passes the weights to the LSTM's function.

    `nn.LSTM.forward` may rewrite its list of weights, so that threads would disturb each other.
    """

    def _run(self, x: Tensor) -> Tensor:
        x, lstm = x.permute(2, 0, 1), self.lstm
        weights: list[Tensor] = [p for layer in lstm.all_weights for p in layer]
        state = x.new_zeros(2 * lstm.num_layers, x.shape[1], lstm.hidden_size)
        y = torch.lstm(x, (state, state), weights, True, lstm.num_layers, 0.0, False, True, False)
        return self.linear(y[0]).permute(1, 2, 0)


# Products of matrices by oneDNN, where `onednn_is_faster`: on an EPYC with AVX-512, the transformer
# of htdemucs takes 0.67 instead of 1.17 s of a window of 1.7 s.


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


class FastAttention(transformer.Attention):
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
            parts = zip(
                query[item, head].split(ATTENTION_ROWS), mixed[item, head].split(ATTENTION_ROWS)
            )
            for part, result in parts:
                scores = F.linear(_by_onednn(part.contiguous()), keys)
                result.copy_(_dense(F.linear(scores.softmax(-1), values)))
        return mixed


class FastSelfLayer(transformer.SelfLayer):
    """The feed-forward block by oneDNN."""

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.gamma_2(_dense(self.linear2(self.activation(self.linear1(_by_onednn(x))))))


class FastCrossLayer(transformer.CrossLayer):
    """The feed-forward block by oneDNN."""

    feed_forward = FastSelfLayer.feed_forward  # type: ignore[assignment]


# Models, and the tables of fast layers.


class FastDemucs(Demucs):
    """Works with channels last."""

    def network(self, x: Tensor) -> tuple[Tensor]:
        return super().network(channels_last(x))


class FastHybridUNet(HybridUNet):
    """Works with channels last."""

    def network(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        return super().network(channels_last(x), channels_last(xt))

    def _bottom(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        x, xt = super()._bottom(x, xt)
        return channels_last(x), channels_last(xt)


class DeferringHybridUNet(FastHybridUNet):
    """Never has the spectra of all sources whole.

    The outermost decoder leaves its transposed convolution to `forward`, which makes the spectra
    some frames at a time. Without it, a window of htdemucs takes 564 instead of 402 MB.
    """

    def forward(self, mix: Tensor, **options: Any) -> Tensor:
        length, stems = mix.shape[-1], options.get("stems")
        upsampled: Any = self.decoder[-1].upsampled
        mix = F.pad(mix, (0, self._padded_length(length) - length))
        z = self._spec(mix)
        x, mean, std = (y[:, None] for y in standardize(self._magnitude(z), EPSILON))
        frames = z.shape[-1]
        # Complex parts do not need the mixture's phase: free its spectrum.
        mixed: Any = itertools.repeat(None) if self.cac else z.split(FRAMES_AT_ONCE, -1)
        del z
        xt, mean_t, std_t = standardize(mix, EPSILON)
        x, xt = run_network(self.network, self, x[:, 0], xt)
        parts = (upsampled(part, 0) for part in x.split(FRAMES_AT_ONCE, -1))
        spectra = (
            self._mask(z, torch.addcmul(mean, self._by_source(part, stems), std))
            for z, part in zip(mixed, parts)
        )
        start = 0 if self.hybrid_old else self.hop_length // 2 * 3
        x = istft_of_parts(spectra, self.hop_length, frames, start, mix.shape[-1])
        x.add_(mean_t[:, None]).addcmul_(self._by_source(xt, stems), std_t[:, None])
        return x[..., :length]


def _can_defer(model: Any, kind: type) -> bool:
    """Return True if `DeferringHybridUNet` fits `model` of class `kind`.

    A program may have replaced one of its steps, and a norm in the outermost decoder and the
    iterative Wiener filter need all frames at once.
    """
    replaced = any(name in vars(model) or getattr(kind, name) is not STEPS[name] for name in STEPS)
    last, whole = model.decoder[-1], model.wiener_iters > 0 and not model.cac
    return hasattr(last, "deferred") and not (replaced or whole or getattr(last, "norm", False))


def istft_of_parts(
    parts: Iterable[Tensor], hop_length: int, frames: int, start: int, length: int
) -> Tensor:
    """Inverse STFT of `frames` frames between two silent ones at either end, as `[*, length]`.

    `parts` are their spectra `[*, F, n]`, one after the other; missing bins at the top are zero. A
    frame has four hops. Sample 0 is where the first frame starts, and the result begins at `start`:

        silence  |=======|                                       |=======|
                   |=======|                                   |=======|
        parts        |=======|                               |=======|
                       |=======|        ...                |=======|
        samples      0   |------------ length ------------|
                       start

    A frame is the inverse FFT times the window `w`. The sum of the frames is divided by the
    envelope that two windows leave, one in each direction:

        x[t] = sum_i w[t - i hop] ifft(z_i)[t - i hop]  /  sum_i w[t - i hop]^2

    Silent frames add to the sum below alone, so they are never made.
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
    for index, part in enumerate(frames.split(total.shape[-1], -1)):
        total[..., index : index + frames.shape[-2], :] += part


MODELS = {HybridUNet: FastHybridUNet, Demucs: FastDemucs}
# The steps that `DeferringHybridUNet` does in another way.
STEPS = {name: getattr(HybridUNet, name) for name in ("forward", "network", "_mask", "_ispec")}
LAYERS: dict[type, type] = {
    fast.__bases__[0]: fast
    for fast in (
        *(FastConv1d, FastConvTranspose1d, FastGroupNorm, FastSequential, FastBLSTM),
        *(FastLocalState, FastDConv, FastHEncLayer, FastHDecLayer, FastMultiWrap),
    )
}
PRODUCTS: dict[type, type] = {
    fast.__bases__[0]: fast for fast in (FastAttention, FastSelfLayer, FastCrossLayer)
}
KNOWN = {
    *LAYERS, *PRODUCTS, blocks.LayerScale, blocks.ScaledEmbedding, nn.Conv2d, nn.ConvTranspose2d,
    nn.Embedding, nn.GELU, nn.GLU, nn.Identity, nn.LayerNorm, nn.Linear, nn.LSTM, nn.ModuleList,
    nn.ReLU, transformer.CrossTransformerEncoder, transformer.SequenceGroupNorm,
}  # fmt: skip
