"""Short-time Fourier transforms, and the forms in which the networks see a spectrum.

Shapes: `[..., T]` samples; `[..., F, N]` complex spectra of `F` bins and `N` frames.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def spectro(x: Tensor, n_fft: int = 512, hop_length: int | None = None, pad: int = 0) -> Tensor:
    """Return the orthonormal STFT of `x` `[*, T]` with a Hann window, as complex `[*, F, N]`.

    `F = n_fft * (1 + pad) // 2 + 1`: `pad` adds that many window lengths of zeros to each frame.
    Frame `i` is centred on sample `i * hop_length` (default: `n_fft // 4`).
    """
    *other, length = x.shape
    spectrum = torch.stft(
        x.reshape(-1, length),
        n_fft * (1 + pad),
        hop_length or n_fft // 4,
        win_length=n_fft,
        window=torch.hann_window(n_fft, dtype=x.dtype, device=x.device),
        normalized=True,
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    return spectrum.view(*other, *spectrum.shape[-2:])


def ispectro(
    z: Tensor, hop_length: int | None = None, length: int | None = None, pad: int = 0
) -> Tensor:
    """Invert `spectro`: complex `[*, F, N]` to `[*, T]`, of `length` samples if given."""
    *other, bins, frames = z.shape
    n_fft = 2 * bins - 2
    win_length = n_fft // (1 + pad)
    x = torch.istft(
        z.reshape(-1, bins, frames),
        n_fft,
        hop_length or win_length // 4,
        win_length=win_length,
        window=torch.hann_window(win_length, dtype=z.real.dtype, device=z.device),
        normalized=True,
        center=True,
        length=length,
    )
    return x.view(*other, x.shape[-1])


def pad1d(
    x: Tensor, paddings: tuple[int, int], mode: str = "constant", value: float = 0.0
) -> Tensor:
    """Pad `x` `[..., T]` as `F.pad` does; `mode="reflect"` takes short signals, too.

    A mirror needs more samples than it adds. A shorter signal is lengthened with zeros first:
    at its end as far as the padding there reaches, then at its start.
    """
    left, right = paddings
    if mode != "reflect":
        return F.pad(x, (left, right), mode, value)
    missing = max(0, max(left, right) - x.shape[-1] + 1)
    zeros_right = min(right, missing)
    zeros_left = missing - zeros_right
    x = F.pad(x, (zeros_left, zeros_right))
    return F.pad(x, (left - zeros_left, right - zeros_right), mode)


def complex_as_channels(z: Tensor) -> Tensor:
    """Return complex `[B, C, F, N]` as real `[B, 2 C, F, N]`: two parts of each channel."""
    return torch.view_as_real(z).movedim(-1, 2).flatten(1, 2)


def channels_as_complex(x: Tensor) -> Tensor:
    """Return real `[*, 2 C, F, N]` as complex `[*, C, F, N]`; undoes `complex_as_channels`."""
    return torch.view_as_complex(x.unflatten(-3, (-1, 2)).movedim(-3, -1).contiguous())


def phase_of(z: Tensor) -> Tensor:
    """Return numbers of magnitude one with the phase of `z`, which is zero for an empty bin.

    A magnitude times the mixture's phase is Wiener filtering without an iteration, as in Open-Unmix
    (Stöter et al., 2019).
    """
    phase = z.angle()
    return torch.complex(phase.cos(), phase.sin())
