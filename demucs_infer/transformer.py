"""The transformer of Hybrid Transformer Demucs (Rouard et al., 2023, arXiv:2211.08553).

The spectral and the time branch pass through their own stack of layers, which attend by turns to
their own branch and to the other one. Sequences are `[B, T, C]` throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import LayerScale
from .errors import OptionError
from .utils import capture_init, signature_of


@dataclass(frozen=True)
class TransformerOptions:
    """Options of `CrossTransformerEncoder`.

    `dropout`, `weight_decay`, `lr` and `auto_sparsity` act in training only, `max_positions` and
    `cape_*` belong to embeddings, and `mask_*`, `*_window`, `sparsity` to sparse attention, that
    are not supported: they are accepted because checkpoints carry them.

    Raises `OptionError` for an option that changes the result and is not supported.
    """

    dim: int
    emb: str = "sin"
    hidden_scale: float = 4.0
    num_heads: int = 8
    num_layers: int = 6
    cross_first: bool = False
    dropout: float = 0.0
    max_positions: int = 1000
    norm_in: bool = True
    norm_in_group: bool | int = False
    group_norm: bool | int = False
    norm_first: bool = False
    norm_out: bool | int = False
    max_period: float = 10000.0
    weight_decay: float = 0.0
    lr: float | None = None
    layer_scale: bool = False
    gelu: bool = True
    sin_random_shift: int = 0
    weight_pos_embed: float = 1.0
    cape_mean_normalize: bool = True
    cape_augment: bool = True
    cape_glob_loc_scale: tuple[float, ...] = (5000.0, 1.0, 1.4)
    sparse_self_attn: bool = False
    sparse_cross_attn: bool = False
    mask_type: str = "diag"
    mask_random_seed: int = 42
    sparse_attn_window: int = 500
    global_window: int = 50
    auto_sparsity: bool = False
    sparsity: float = 0.95

    def __post_init__(self) -> None:
        if self.emb != "sin":
            raise OptionError(
                f"emb={self.emb!r} (the embedding of positions) is not supported: only 'sin' is"
            )
        for name in ("sparse_self_attn", "sparse_cross_attn", "sin_random_shift"):
            if getattr(self, name):
                raise OptionError(f"{name}={getattr(self, name)!r} is not supported")
        if self.dim % 4 or self.dim % self.num_heads:
            raise OptionError(
                f"dim={self.dim} must be a multiple of 4 and of num_heads={self.num_heads}"
            )


def sin_embedding(length: int, dim: int, max_period: float, device: torch.device) -> Tensor:
    """Positions in time, as `[T, C]`: cosines in the first half of the channels, then sines."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=device) / (half - 1)
    times = torch.arange(length, dtype=torch.float32, device=device)
    phase = times[:, None] / max_period**exponent
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def sin_embedding_2d(
    bins: int, frames: int, dim: int, max_period: float, device: torch.device
) -> Tensor:
    """Positions in time and frequency, as `[T * F, C]`.

    The first half of the channels holds the time and the second the frequency, each as sines on
    the even channels and cosines on the odd ones.
    """
    half = dim // 2
    channels = torch.arange(0, half, 2, dtype=torch.float32, device=device)
    rates = torch.exp(channels * -(math.log(max_period) / half))

    def interleaved(length: int) -> Tensor:
        times = torch.arange(length, dtype=torch.float32, device=device)
        phase = times[:, None] * rates
        return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(1)

    time = interleaved(frames)[:, None].expand(-1, bins, -1)
    frequency = interleaved(bins)[None].expand(frames, -1, -1)
    return torch.cat([time, frequency], dim=-1).flatten(0, 1)


def create_sin_embedding(
    length: int,
    dim: int,
    shift: int = 0,
    device: torch.device | str = "cpu",
    max_period: float = 10000,
) -> Tensor:
    """Positions in time from `shift` on, as `[T, 1, C]`."""
    table = sin_embedding(shift + length, dim, max_period, torch.device(device))
    return table[shift:, None]


def create_2d_sin_embedding(
    d_model: int,
    height: int,
    width: int,
    device: torch.device | str = "cpu",
    max_period: float = 10000,
) -> Tensor:
    """Positions in frequency (`height`) and time (`width`), as `[1, C, F, T]`.

    Raises `OptionError` if `d_model` is not a multiple of 4.
    """
    if d_model % 4:
        raise OptionError(f"d_model={d_model} must be a multiple of 4")
    table = sin_embedding_2d(height, width, d_model, max_period, torch.device(device))
    return table.unflatten(0, (width, height)).permute(2, 1, 0)[None]


class SequenceGroupNorm(nn.GroupNorm):
    """Group normalization of `[B, T, C]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention with the parameters of `nn.MultiheadAttention`."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """Attend from `x` `[B, T, C]` to `memory` `[B, U, C]`, or to itself."""
        weight, bias, dim = self.in_proj_weight, self.in_proj_bias, x.shape[-1]
        if memory is None:
            query, key, value = F.linear(x, weight, bias).chunk(3, -1)
        else:
            query = F.linear(x, weight[:dim], bias[:dim])
            key, value = F.linear(memory, weight[dim:], bias[dim:]).chunk(2, -1)
        query, key, value = (
            rearrange(part, "b t (h c) -> b h t c", h=self.num_heads)
            for part in (query, key, value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(rearrange(mixed, "b h t c -> b t (h c)"))


class TransformerLayer(nn.Module):
    """Base of the self-attention and the cross-attention layer."""

    attention: str  # the name of the attention, which comes first in the order of parameters
    norm1: nn.Module
    norm2: nn.Module
    norm3: nn.Module  # of the cross layer only

    def __init__(self, options: TransformerOptions, norms: int) -> None:
        super().__init__()
        dim, hidden = options.dim, int(options.dim * options.hidden_scale)
        self.norm_first = options.norm_first
        self.activation = F.gelu if options.gelu else F.relu
        self.add_module(self.attention, Attention(dim, options.num_heads))
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        for index in range(1, norms + 1):
            self.add_module(f"norm{index}", self._norm(options))
        self.norm_out: nn.Module = nn.Identity()
        if options.norm_first and options.norm_out:
            self.norm_out = SequenceGroupNorm(int(options.norm_out), dim)
        self.gamma_1, self.gamma_2 = (
            LayerScale(dim, 1e-4, channel_last=True) if options.layer_scale else nn.Identity()
            for _ in range(2)
        )

    @staticmethod
    def _norm(options: TransformerOptions) -> nn.Module:
        if options.group_norm:
            return SequenceGroupNorm(int(options.group_norm), options.dim)
        return nn.LayerNorm(options.dim)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Return `x` `[B, T, C]` after two linear layers and a gain."""
        return self.gamma_2(self.linear2(self.activation(self.linear1(x))))


class SelfLayer(TransformerLayer):
    """Layer in which a branch attends to itself."""

    attention = "self_attn"
    self_attn: nn.Module

    def __init__(self, options: TransformerOptions) -> None:
        super().__init__(options, norms=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.gamma_1(self.self_attn(self.norm1(x)))
            return self.norm_out(x + self.feed_forward(self.norm2(x)))
        x = self.norm1(x + self.gamma_1(self.self_attn(x)))
        return self.norm2(x + self.feed_forward(x))


class CrossLayer(TransformerLayer):
    """Layer in which a branch attends to the other one."""

    attention = "cross_attn"
    cross_attn: nn.Module

    def __init__(self, options: TransformerOptions) -> None:
        super().__init__(options, norms=3)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.gamma_1(self.cross_attn(self.norm1(x), self.norm2(other)))
            return self.norm_out(x + self.feed_forward(self.norm3(x)))
        x = self.norm1(x + self.gamma_1(self.cross_attn(x, other)))
        return self.norm2(x + self.feed_forward(x))


class CrossTransformerEncoder(nn.Module):
    """Layers over a spectral branch `[B, C, F, T1]` and a time branch `[B, C, T2]` in parallel.

    Takes the options of `TransformerOptions`, and returns both branches in their shapes.
    """

    __signature__ = signature_of(TransformerOptions)

    @capture_init
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()
        self.options = options = TransformerOptions(*args, **kwargs)  # type: ignore[arg-type]
        self.num_layers, self.max_period = options.num_layers, options.max_period
        self.weight_pos_embed = options.weight_pos_embed
        self.classic_parity = 1 if options.cross_first else 0  # of the self-attention layers
        self.norm_in, self.norm_in_t = self._norm_in(), self._norm_in()
        self.layers, self.layers_t = (
            nn.ModuleList(
                (SelfLayer if index % 2 == self.classic_parity else CrossLayer)(options)
                for index in range(self.num_layers)
            )
            for _ in range(2)
        )

    def _norm_in(self) -> nn.Module:
        if self.options.norm_in:
            return nn.LayerNorm(self.options.dim)
        if self.options.norm_in_group:
            return SequenceGroupNorm(int(self.options.norm_in_group), self.options.dim)
        return nn.Identity()

    def forward(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        _, dim, bins, frames = x.shape
        place = sin_embedding_2d(bins, frames, dim, self.max_period, x.device).to(x.dtype)
        time = sin_embedding(xt.shape[-1], dim, self.max_period, x.device).to(x.dtype)
        x = self.norm_in(rearrange(x, "b c f t -> b (t f) c")) + self.weight_pos_embed * place
        xt = self.norm_in_t(rearrange(xt, "b c t -> b t c")) + self.weight_pos_embed * time
        for index, (layer, layer_t) in enumerate(zip(self.layers, self.layers_t)):
            if index % 2 == self.classic_parity:
                x, xt = layer(x), layer_t(xt)
            else:
                x, xt = layer(x, xt), layer_t(xt, x)
        x = rearrange(x, "b (t f) c -> b c f t", f=bins)
        return x, rearrange(xt, "b t c -> b c t")
