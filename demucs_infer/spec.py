"""Short-time Fourier transforms, and the forms in which the networks see a spectrum.

Shapes: `[..., T]` samples; `[..., F, N]` complex spectra of `F` bins and `N` frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

FRAMES_AT_ONCE = 64  # what is made of them between samples and spectrum stays in the cache


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


def stft_in_parts(x: Tensor, n_fft: int, hop_length: int) -> Iterator[Tensor]:
    """STFT of `x` `[*, T]` as in `spectro`, some frames at a time, `[*, n_fft / 2, n]`.

    The first frame starts at the first sample, nothing is padded, and the top bin is left out.
    """
    window = torch.hann_window(n_fft, dtype=x.dtype, device=x.device)
    for frames in x.unfold(-1, n_fft, hop_length).split(FRAMES_AT_ONCE, -2):  # [*, n, n_fft]
        yield torch.fft.rfft(frames * window, norm="ortho")[..., :-1].transpose(-1, -2)


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

    It is a view where channels are last in memory.
    """
    parts = x.unflatten(-3, (-1, 2)).transpose(-1, -3)  # [*, C, N, F, 2]
    pairs = parts if parts.stride(-1) == 1 else parts.contiguous()
    return torch.view_as_complex(pairs).transpose(-1, -2)


def phase_of(z: Tensor) -> Tensor:
    """Numbers of magnitude one with the phase of `z`: zero, for an empty bin.

    A magnitude times the mixture's is Wiener filtering without an iteration, as in Open-Unmix
    (Stöter et al., 2019).
    """
    phase = z.angle()
    return torch.complex(phase.cos(), phase.sin())
