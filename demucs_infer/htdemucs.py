"""Hybrid Transformer Demucs (Rouard, Massa and Défossez, 2023, arXiv:2211.08553).

The U-Net of `hdemucs` with a transformer across both branches at the bottom:

    encoder ── 1x1 ─┐                              ┌─ 1x1 ── decoder
                    ├─ CrossTransformerEncoder ────┤
    tencoder ─ 1x1 ─┘                              └─ 1x1 ── tdecoder
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from .errors import OptionError
from .hdemucs import HybridUNet
from .transformer import CrossTransformerEncoder
from .utils import capture_init, check_architecture, signature_of

NEVER = 1_000_000  # a level that no network reaches


@dataclass(frozen=True)
class HTDemucsOptions:
    """Options of `HTDemucs`, with the names and defaults that checkpoints rely on.

    `samplerate` is in hertz and `segment` in seconds; `t_*` belong to the transformer. `end_iters`,
    `emb_smooth`, `dconv_init`, `rescale`, `t_dropout`, `t_weight_decay` and `t_lr` act in training
    only. The defaults of `t_cape_*`, `t_mask_*` and the like stand here because checkpoints carry
    them; `TransformerOptions` refuses the options that would use them.

    Raises `OptionError` for an option that changes the result and is not supported.
    """

    # The residual branches are plain convolutions and the transform pads with a reflection.
    dconv_attn: ClassVar[int] = NEVER
    dconv_lstm: ClassVar[int] = NEVER

    sources: Sequence[str]
    audio_channels: int = 2
    channels: int = 48
    channels_time: int | None = None
    growth: float = 2
    nfft: int = 4096
    wiener_iters: int = 0
    end_iters: int = 0
    wiener_residual: bool = False
    cac: bool = True
    depth: int = 4
    rewrite: bool = True
    multi_freqs: Sequence[float] | None = None
    multi_freqs_depth: int = 3
    freq_emb: float = 0.2
    emb_scale: float = 10
    emb_smooth: bool = True
    kernel_size: int = 8
    time_stride: int = 2
    stride: int = 4
    context: int = 1
    context_enc: int = 0
    norm_starts: int = 4
    norm_groups: int = 4
    dconv_mode: int = 1
    dconv_depth: int = 2
    dconv_comp: float = 8
    dconv_init: float = 1e-3
    bottom_channels: int = 0
    t_layers: int = 5
    t_emb: str = "sin"
    t_hidden_scale: float = 4.0
    t_heads: int = 8
    t_dropout: float = 0.0
    t_max_positions: int = 10000
    t_norm_in: bool = True
    t_norm_in_group: bool | int = False
    t_group_norm: bool | int = False
    t_norm_first: bool = True
    t_norm_out: bool | int = True
    t_max_period: float = 10000.0
    t_weight_decay: float = 0.0
    t_lr: float | None = None
    t_layer_scale: bool = True
    t_gelu: bool = True
    t_weight_pos_embed: float = 1.0
    t_sin_random_shift: int = 0
    t_cape_mean_normalize: bool = True
    t_cape_augment: bool = True
    t_cape_glob_loc_scale: Sequence[float] = (5000.0, 1.0, 1.4)
    t_sparse_self_attn: bool = False
    t_sparse_cross_attn: bool = False
    t_mask_type: str = "diag"
    t_mask_random_seed: int = 42
    t_sparse_attn_window: int = 500
    t_global_window: int = 100
    t_sparsity: float = 0.95
    t_auto_sparsity: bool = False
    t_cross_first: bool = False
    rescale: float = 0.1
    samplerate: int = 44100
    segment: float = 10
    use_train_segment: bool = True

    def __post_init__(self) -> None:
        check_architecture(self, "depth", "dconv_depth", "t_layers")
        if self.wiener_residual:
            raise OptionError("wiener_residual=True is not supported")

    def transformer(self, dim: int) -> CrossTransformerEncoder:
        """The transformer over `dim` channels that these options describe."""
        return CrossTransformerEncoder(
            dim,
            emb=self.t_emb,
            hidden_scale=self.t_hidden_scale,
            num_heads=self.t_heads,
            num_layers=self.t_layers,
            cross_first=self.t_cross_first,
            norm_in=self.t_norm_in,
            norm_in_group=self.t_norm_in_group,
            group_norm=self.t_group_norm,
            norm_first=self.t_norm_first,
            norm_out=self.t_norm_out,
            max_period=self.t_max_period,
            layer_scale=self.t_layer_scale,
            gelu=self.t_gelu,
            sin_random_shift=self.t_sin_random_shift,
            weight_pos_embed=self.t_weight_pos_embed,
            sparse_self_attn=self.t_sparse_self_attn,
            sparse_cross_attn=self.t_sparse_cross_attn,
        )


class HTDemucs(HybridUNet):
    """Hybrid Transformer Demucs.

    Takes the options of `HTDemucsOptions`. Callable on `[B, C, T]` at `samplerate`, of at most
    `segment` seconds (except in training, shorter windows are padded with zeros on the right);
    returns `[B, S, C, T]`.
    """

    channel_upsampler: nn.Module
    channel_upsampler_t: nn.Module
    channel_downsampler: nn.Module
    channel_downsampler_t: nn.Module

    __signature__ = signature_of(HTDemucsOptions)

    @capture_init
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        options = HTDemucsOptions(*args, **kwargs)
        super().__init__(options)
        self.use_train_segment = options.use_train_segment
        width = int(options.channels * options.growth ** (options.depth - 1))
        self.crosstransformer: CrossTransformerEncoder | None = None
        self.bottom_channels = options.bottom_channels
        if self.bottom_channels:
            for suffix in ("", "_t"):
                up, down = (width, self.bottom_channels), (self.bottom_channels, width)
                self.add_module(f"channel_upsampler{suffix}", nn.Conv1d(*up, 1))
                self.add_module(f"channel_downsampler{suffix}", nn.Conv1d(*down, 1))
        if options.t_layers > 0:
            self.crosstransformer = options.transformer(self.bottom_channels or width)

    @property
    def max_segment(self) -> float:
        """The longest window in seconds: that of the training."""
        return self.segment

    def valid_length(self, length: int) -> int:
        """The length in samples at which a window of `length` is best run.

        Raises `OptionError` for a window longer than the training's.
        """
        if not self.use_train_segment:
            return length
        training_length = int(self.segment * self.samplerate)
        if length > training_length:
            raise OptionError(
                f"a window of {length} samples is longer than the model's {training_length}"
                f" ({float(self.segment):g} s)"
            )
        return training_length

    def consume_random(self, draw: Any = random) -> None:
        """Make the reference's draw for a window (a shift of 0, out of 0 to 0) from `draw`.

        The same seed then gives the same offsets to the passes that follow.
        """
        if self.crosstransformer is not None:
            draw.randrange(1)

    def _padded_length(self, length: int) -> int:
        return length if self.training else self.valid_length(length)

    def _bottom(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        if self.crosstransformer is None:
            return x, xt
        if not self.bottom_channels:
            return self.crosstransformer(x, xt)
        bins = x.shape[2]
        x = self.channel_upsampler(x.flatten(2)).unflatten(2, (bins, -1))
        x, xt = self.crosstransformer(x, self.channel_upsampler_t(xt))
        x = self.channel_downsampler(x.flatten(2)).unflatten(2, (bins, -1))
        return x, self.channel_downsampler_t(xt)
