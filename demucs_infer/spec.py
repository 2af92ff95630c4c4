"""Short-time Fourier transforms, and the forms in which the networks see a spectrum.

Shapes: `[..., T]` samples; `[..., F, N]` complex spectra of `F` bins and `N` frames.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def spectro(x: Tensor, n_fft: int = 512, hop_length: int | None = None, pad: int = 0) -> Tensor:
    """Orthonormal STFT of `x` `[*, T]` with a Hann window, as complex `[*, F, N]`.

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
    """Inverse of `spectro`: complex `[*, F, N]` to `[*, T]`, of `length` samples if given."""
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


def istft_cropped(z: Tensor, hop_length: int, start: int, length: int) -> Tensor:
    """Inverse STFT of `z` `[*, F, N]` between two silent frames at either end, as `[*, length]`.

    Sample 0 is where the first frame of `z` starts, and the result begins at `start`. With frames
    of four hops:

        silence  |=======|                                       |=======|
                   |=======|                                   |=======|
        z            |=======|                               |=======|
                       |=======|        ...                |=======|
        samples      0   |------------ length ------------|
                       start

    A frame is the inverse FFT times the window `w`, and their sum is divided by the envelope that
    two windows leave, one in each direction:

        x[t] = sum_i w[t - i hop] ifft(z_i)[t - i hop]  /  sum_i w[t - i hop]^2

    Silent frames add nothing to the sum above, only to the one below, so they are never made:
    their part in the samples that are kept is in the envelope alone.
    """
    bins, frames = z.shape[-2:]
    n_fft = 2 * bins - 2
    window = torch.hann_window(n_fft, dtype=z.real.dtype, device=z.device)
    waves = torch.fft.irfft(z.transpose(-1, -2), n_fft, norm="ortho") * window
    envelope = overlap_add((window**2).expand(frames + 4, n_fft), hop_length)[2 * hop_length :]
    stop = start + length
    return overlap_add(waves, hop_length)[..., start:stop] / envelope[start:stop]


def overlap_add(frames: Tensor, hop_length: int) -> Tensor:
    """The sum `[*, T]` of `frames` `[*, N, L]` that start every `hop_length` samples, part of L."""
    *other, count, width = frames.shape
    parts = width // hop_length
    blocks = frames.unflatten(-1, (parts, hop_length))
    total = frames.new_zeros(*other, count + parts - 1, hop_length)
    for part in range(parts):
        total[..., part : part + count, :] += blocks[..., part, :]
    return total.flatten(-2)


def reflect_pad(x: Tensor, left: int, right: int) -> Tensor:
    """Mirror `x` `[..., T]` by `left` and `right` samples at its ends.

    A mirror needs more samples than it adds. A shorter signal is lengthened with zeros first:
    at its end as far as the padding there reaches, then at its start.
    """
    missing = max(0, max(left, right) - x.shape[-1] + 1)
    zeros_right = min(right, missing)
    zeros_left = missing - zeros_right
    x = F.pad(x, (zeros_left, zeros_right))
    return F.pad(x, (left - zeros_left, right - zeros_right), mode="reflect")


def complex_as_channels(z: Tensor) -> Tensor:
    """Complex `[B, C, F, N]` as real `[B, 2 C, F, N]`: real and imaginary part of each channel."""
    batch, channels, bins, frames = z.shape
    parts = torch.view_as_real(z).permute(0, 1, 4, 2, 3)
    return parts.reshape(batch, 2 * channels, bins, frames)


def channels_as_complex(x: Tensor) -> Tensor:
    """Real `[*, 2 C, F, N]` as complex `[*, C, F, N]`; undoes `complex_as_channels`.

    The bins of a frame are side by side in memory, as the inverse transform wants them.
    """
    parts = x.unflatten(-3, (-1, 2)).transpose(-1, -3)  # [*, C, N, F, 2]
    return torch.view_as_complex(parts.contiguous()).transpose(-1, -2)


def phase_of(z: Tensor) -> Tensor:
    """Numbers of magnitude one with the phase of `z`: zero, for an empty bin.

    A magnitude times the mixture's is Wiener filtering without an iteration, as in Open-Unmix
    (Stöter et al., 2019).
    """
    phase = z.angle()
    return torch.complex(phase.cos(), phase.sin())
