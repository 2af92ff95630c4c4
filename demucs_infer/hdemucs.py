"""Hybrid Demucs (Défossez, 2021, arXiv:2111.03600), and the U-Net that its successor shares.

Two encoders read the same window, one its spectrum `[B, C, F, T]`, one its samples `[B, C, T]`;
two decoders with skip connections turn the bottom's outputs into sources, which are added:

    mix ─┬─ STFT ─ encoder ─┬─ bottom ─┬─ decoder ─ inverse STFT ─┬─ sources
         └──────── tencoder ┘          └─ tdecoder ───────────────┘
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import HDecLayer, HEncLayer, MultiWrap, ScaledEmbedding
from .errors import MissingDependencyError, OptionError
from .spec import (
    channels_as_complex,
    complex_as_channels,
    ispectro,
    pad1d,
    phase_of,
    spectro,
)
from .utils import (
    capture_init,
    check_architecture,
    pick_sources,
    run_network,
    signature_of,
    standardize,
)

__all__ = ["HDecLayer", "HDemucs", "HEncLayer", "MultiWrap", "ScaledEmbedding", "pad1d"]

EPSILON = 1e-5  # added to the deviation when an input is normalized
WIENER_FRAMES = 300  # frames that one call of the iterative Wiener filter sees


@dataclass(frozen=True)
class HDemucsOptions:
    """Options of `HDemucs`, with the names and defaults that checkpoints rely on.

    `samplerate` is in hertz and `segment` in seconds. `end_iters`, `emb_smooth`, `dconv_init` and
    `rescale` act in training only.

    Raises `OptionError` for an option that changes the result and is not supported.
    """

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
    depth: int = 6
    rewrite: bool = True
    hybrid: bool = True
    hybrid_old: bool = False
    multi_freqs: Sequence[float] | None = None
    multi_freqs_depth: int = 2
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
    dconv_comp: float = 4
    dconv_attn: int = 4
    dconv_lstm: int = 4
    dconv_init: float = 1e-4
    rescale: float = 0.1
    samplerate: int = 44100
    segment: float = 40

    def __post_init__(self) -> None:
        check_architecture(self, "depth", "dconv_depth")
        if not self.hybrid:
            raise OptionError("hybrid=False (a network without time branch) is not supported")
        if self.wiener_residual:
            raise OptionError("wiener_residual=True is not supported")


class HybridUNet(nn.Module):
    """The U-Net over spectrum and samples; a subclass defines its bottom.

    `forward` is a transform (STFT and normalization), the network proper (`network`: real tensors
    in and out, of a fixed shape for a fixed window) and the inverse transform. Programs replace the
    steps `_spec`, `_magnitude`, `_mask` and `_ispec` on a model or on its class.
    """

    def __init__(self, options: Any) -> None:
        super().__init__()
        if options.nfft % 4:
            raise OptionError(f"nfft={options.nfft} must be a multiple of 4")
        if options.multi_freqs and options.norm_starts < options.multi_freqs_depth:
            raise OptionError("multi_freqs needs levels without normalization (norm_starts)")
        self.options = options
        self.sources = list(options.sources)
        self.audio_channels = options.audio_channels
        self.samplerate = options.samplerate
        self.segment = options.segment
        self.depth = options.depth
        self.nfft = options.nfft
        self.hop_length = options.nfft // 4
        self.cac = options.cac
        self.wiener_iters = options.wiener_iters
        # Only programs read these.
        for name in "channels context kernel_size stride end_iters wiener_residual".split():
            setattr(self, name, getattr(options, name))
        # The first hybrid models were trained with zeros around the window, and are not realigned.
        self.hybrid_old = getattr(options, "hybrid_old", False)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        self.tencoder, self.tdecoder = nn.ModuleList(), nn.ModuleList()
        self.freq_emb: ScaledEmbedding | None = None
        chin, chin_t = (2 if self.cac else 1) * self.audio_channels, self.audio_channels
        chout, chout_t = options.channels, options.channels_time or options.channels
        bins = self.nfft // 2
        for index in range(self.depth):
            kernel, stride = options.kernel_size, options.stride
            spectral = bins > 1
            merges = spectral and bins <= kernel  # into one bin, where the time branch joins
            if merges:
                chout = chout_t = max(chout, chout_t)
                kernel = bins
            elif not spectral:
                kernel, stride = 2 * options.time_stride, options.time_stride
            common = {
                "norm": index >= options.norm_starts,
                "norm_groups": options.norm_groups,
                "rewrite": options.rewrite,
                "dconv_kw": {
                    "compress": options.dconv_comp,
                    "depth": options.dconv_depth,
                    "init": options.dconv_init,
                    "attn": index >= options.dconv_attn,
                    "lstm": index >= options.dconv_lstm,
                },
            }
            encodes = common | {"context": options.context_enc, "dconv": options.dconv_mode & 1}
            decodes = common | {"context": options.context, "dconv": options.dconv_mode & 2}
            place = {"kernel_size": kernel, "stride": stride, "freq": spectral, "pad": not merges}
            place_t = {"kernel_size": options.kernel_size, "stride": options.stride, "freq": False}
            outputs = 1 if index else len(self.sources)
            ratios = options.multi_freqs if index < options.multi_freqs_depth else ()
            encoder: Any = HEncLayer(chin, chout, **encodes, **place)
            decodes |= {"last": index == 0}
            decoder: Any = HDecLayer(
                chout, outputs * chin, **decodes, **place, context_freq=not ratios
            )
            if ratios:
                encoder, decoder = MultiWrap(encoder, ratios), MultiWrap(decoder, ratios)
            self.encoder.append(encoder)
            self.decoder.insert(0, decoder)
            if spectral:
                place_t |= {"empty": merges}
                self.tencoder.append(HEncLayer(chin_t, chout_t, **encodes, **place_t))
                decoder = HDecLayer(chout_t, outputs * chin_t, **decodes, **place_t)
                self.tdecoder.insert(0, decoder)
            if index == 0 and options.freq_emb:
                self.freq_emb = ScaledEmbedding(bins // stride, chout, options.emb_scale)
                self.freq_emb_scale = options.freq_emb
            chin, chin_t = chout, chout_t
            chout, chout_t = int(options.growth * chout), int(options.growth * chout_t)
            bins = 1 if merges or not spectral else bins // stride

    def forward(
        self, mix: Tensor, *, stems: Sequence[int] | None = None, network: Any = None
    ) -> Tensor:
        """Separate `mix` `[B, C, T]` into all sources, or those of `stems`, `[B, S, C, T]`.

        The transforms keep the type of `mix`; the network works in that of its parameters.
        `network` runs instead of `self.network`.
        """
        length = mix.shape[-1]
        mix = F.pad(mix, (0, self._padded_length(length) - length))
        z = self._spec(mix)
        x, mean, std = standardize(self._magnitude(z).to(mix.device), EPSILON)
        xt, mean_t, std_t = standardize(mix, EPSILON)
        x, xt = run_network(network or self.network, self, x, xt)
        m = self._by_source(x) * std[:, None] + mean[:, None]
        z = pick_sources(self._mask(z, m.cpu() if m.device.type == "mps" else m), stems)
        x = self._ispec(z, mix.shape[-1]).to(mix.device)
        xt = self._by_source(xt, stems) * std_t[:, None] + mean_t[:, None]
        return (x + xt)[..., :length]

    def _padded_length(self, length: int) -> int:
        """Return the length to which `forward` pads a window, with zeros on the right."""
        return length

    def _by_source(self, x: Tensor, stems: Sequence[int] | None = None) -> Tensor:
        """Return the network's `x` `[B, S C, ...]` as `[B, S, C, ...]`, of `stems` alone."""
        return pick_sources(x.unflatten(1, (len(self.sources), -1)), stems)

    def network(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        """Turn normalized spectrum `[B, C', F, N]` and samples `[B, C, T]` into the sources'.

        The outputs are `[B, S C', F, N]` and `[B, S C, T]`.
        """
        skips, skips_t = [], []
        lengths, lengths_t = [], []
        for index, encode in enumerate(self.encoder):
            lengths.append(x.shape[-1])
            inject = None
            if index < len(self.tencoder):
                lengths_t.append(xt.shape[-1])
                xt = self.tencoder[index](xt)
                if self.tencoder[index].empty:
                    inject = xt
                else:
                    skips_t.append(xt)
            x = encode(x, inject)
            if index == 0 and self.freq_emb is not None:
                bins = torch.arange(x.shape[2], device=x.device)
                x = x + self.freq_emb_scale * self.freq_emb(bins).t()[:, :, None]
            skips.append(x)
        x, xt = self._bottom(x, xt)
        merged = len(self.decoder) - len(self.tdecoder)  # levels that both branches share
        for index, decode in enumerate(self.decoder):
            x, before = decode(x, skips.pop(), lengths.pop())
            if index < merged:
                continue
            tdecode = self.tdecoder[index - merged]
            if tdecode.empty:
                xt, _ = tdecode(before[:, :, 0], None, lengths_t.pop())
            else:
                xt, _ = tdecode(xt, skips_t.pop(), lengths_t.pop())
        return x, xt

    def _bottom(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the outputs of the last encoders into the inputs of the first decoders."""
        raise NotImplementedError

    def _spec(self, x: Tensor) -> Tensor:
        """Return the spectrum `[B, C, nfft / 2, ceil(T / hop)]` of `x` `[B, C, T]`.

        The padding makes frame `i` start at sample `i * hop`, less 3/2 hop. Two frames at each end,
        which reach beyond it, and the top bin are dropped:

            |-- 3/2 hop --|------------ T ------------|-- to a hop --|-- 3/2 hop --|
        """
        hop, length = self.hop_length, x.shape[-1]
        frames = math.ceil(length / hop)
        left = hop // 2 * 3
        padding = (left, (frames + 3) * hop - left - length)
        x = x.cpu() if x.device.type == "mps" else x  # which lacks some complex operations
        x = pad1d(x, padding, "constant" if self.hybrid_old else "reflect")
        return spectro(x, self.nfft, hop)[..., :-1, 2 : 2 + frames]

    def _ispec(self, z: Tensor, length: int | None = None, scale: int = 0) -> Tensor:
        """Return the samples `[..., length]` of `z` `[..., nfft / 2, N]`; undoes `_spec`.

        A `scale` of n is for a spectrum with a 4^n-th of the bins, and of the hop.
        """
        hop = self.hop_length // 4**scale
        start = 0 if self.hybrid_old else hop // 2 * 3
        length = z.shape[-1] * hop if length is None else length
        return ispectro(F.pad(z, (2, 2, 0, 1)), hop, start + length)[..., start:]

    def _magnitude(self, z: Tensor) -> Tensor:
        """Return the network's input: a spectrum's complex parts as channels, or magnitudes."""
        return complex_as_channels(z) if self.cac else z.abs()

    def _mask(self, z: Tensor, m: Tensor) -> Tensor:
        """Return the sources' spectra `[B, S, C, F, N]`, for the network's output `m`.

        `m` `[B, S, C', F, N]` holds complex parts as channels, or else magnitudes, which take the
        phase of the mixture `z` `[B, C, F, N]`.
        """
        if self.cac:
            return channels_as_complex(m)
        if self.wiener_iters < 0:
            return (z / (1e-8 + z.abs()))[:, None] * m
        if self.wiener_iters == 0:
            return phase_of(z)[:, None] * m
        return self._wiener(m, z, self.wiener_iters)

    def _wiener(self, mag_out: Tensor, mix_stft: Tensor, niters: int) -> Tensor:
        """Apply the multichannel Wiener filter of Open-Unmix (Stöter et al., 2019)."""
        try:
            from openunmix.filtering import wiener
        except ImportError as exc:
            raise MissingDependencyError("openunmix", "wiener_iters > 0") from exc
        targets = mag_out.permute(0, 4, 3, 2, 1)  # [B, N, F, C, S]
        mixture = torch.view_as_real(mix_stft.permute(0, 3, 2, 1))  # [B, N, F, C, 2]
        filtered = torch.stack(
            [
                torch.cat(
                    [
                        wiener(t, m, niters, residual=False)
                        for t, m in zip(target.split(WIENER_FRAMES), mixed.split(WIENER_FRAMES))
                    ]
                )
                for target, mixed in zip(targets, mixture)
            ]
        )  # [B, N, F, C, 2, S]
        return torch.view_as_complex(filtered.permute(0, 5, 3, 2, 1, 4).contiguous())


class HDemucs(HybridUNet):
    """Hybrid Demucs: its decoders start from zeros, and see the skip connections alone.

    Takes the options of `HDemucsOptions`. Callable on `[B, C, T]` at `samplerate`, of any length;
    returns `[B, S, C, T]`.
    """

    __signature__ = signature_of(HDemucsOptions)

    @capture_init
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(HDemucsOptions(*args, **kwargs))
        self.hybrid = True

    def _bottom(self, x: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), torch.zeros_like(x)
