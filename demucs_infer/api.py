"""The Python interface: a `Separator` turns a track into its stems.

separator = Separator(model="htdemucs")
mixture, stems = separator.separate_audio_file("song.mp3")
for name, stem in stems.items():
    save_audio(stem, f"{name}.wav", samplerate=separator.samplerate)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .apply import ApplyOptions, apply_model, check_segment
from .audio import AudioFile, convert_audio, save_audio
from .errors import LoadAudioError, LoadModelError, OptionError
from .pretrained import DEFAULT_MODEL, get_model, list_models

__all__ = ["LoadAudioError", "LoadModelError", "Separator", "list_models", "save_audio"]

NORMALIZATION_EPSILON = 1e-8  # added to the deviation of a track

Callback = Callable[[dict[str, Any]], Any]


class _NotProvided:
    """Stands for an argument that was not given, where `None` is a value."""

    def __repr__(self) -> str:
        return "NotProvided"


NotProvided: Any = _NotProvided()


@dataclass(frozen=True)
class _Settings:
    """What `Separator` was told, checked."""

    device: torch.device
    shifts: int
    overlap: float
    split: bool
    segment: float | None
    jobs: int
    progress: bool
    callback: Callback | None
    callback_arg: Mapping[str, Any] | None
    stems: tuple[str, ...] | None

    def __post_init__(self) -> None:
        ApplyOptions(self.shifts, self.split, self.overlap, segment=self.segment)
        if self.jobs < 0:
            raise OptionError(f"jobs={self.jobs} must be 0 or more")


def _usable_device(device: str | torch.device | None) -> torch.device:
    """`device`, or the best there is. Raises `OptionError` if it cannot be used."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        device = "mps" if device == "cpu" and torch.backends.mps.is_available() else device
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as exc:
        reason = str(exc).splitlines()[0]
        raise OptionError(f"the device {str(device)!r} cannot be used: {reason}") from exc


class Separator:
    """A model with the options of a separation. The model is loaded once, when this is made.

    Args:
        model: name of a bag or signature of a model (see `list_models`).
        repo: a folder of checkpoints and bags to use instead of the released ones.
        device: "cpu", "cuda", "cuda:1", "mps" …; by default the first GPU, else the CPU.
        shifts: passes with random offsets to average, see `apply_model`.
        overlap: part of a window that the next one covers, from 0 to less than 1.
        split: work window by window.
        segment: length of a window in seconds, instead of the model's.
        jobs: windows that run at once on a CPU (0 or 1: one, which uses all cores by itself).
        progress: show a progress bar on standard error.
        callback: called before and after each window with a dictionary, see `apply_model`.
        callback_arg: entries to add to that dictionary.
        stems: the stems that are wanted (default: all); models of a bag that do not count for
            them are not run.
        cache_dir: the folder to keep published models in, see `get_model`.
        offline: never download, see `get_model`.

    Raises `LoadModelError` (also called `ModelLoadingError`) if the model cannot be loaded, and
    `OptionError` for an option out of range.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        repo: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        shifts: int = 1,
        overlap: float = 0.25,
        split: bool = True,
        segment: float | None = None,
        jobs: int = 0,
        progress: bool = False,
        callback: Callback | None = None,
        callback_arg: Mapping[str, Any] | None = None,
        *,
        stems: Sequence[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        offline: bool | None = None,
    ) -> None:
        self._settings = _Settings(
            _usable_device(device),
            shifts,
            overlap,
            split,
            segment,
            jobs,
            progress,
            callback,
            callback_arg,
            None if stems is None else tuple(stems),
        )
        folder = None if repo is None else Path(repo)
        loaded: Any = get_model(model, folder, cache_dir=cache_dir, offline=offline)
        self._model: nn.Module = loaded
        self._samplerate: int = loaded.samplerate
        self._audio_channels: int = loaded.audio_channels
        check_segment(self._model, segment)
        self._check_stems(self._settings)

    def _check_stems(self, settings: _Settings) -> None:
        sources: Any = self._model.sources
        for stem in settings.stems or ():
            if stem not in sources:
                raise OptionError(f"there is no stem {stem!r}: the model has {', '.join(sources)}")

    @property
    def samplerate(self) -> int:
        """Sample rate of the stems, in hertz."""
        return self._samplerate

    @property
    def audio_channels(self) -> int:
        """Channels of the stems."""
        return self._audio_channels

    @property
    def model(self) -> nn.Module:
        """The model or bag, with `sources`."""
        return self._model

    def update_parameter(
        self,
        device: str | torch.device | None = NotProvided,
        shifts: int = NotProvided,
        overlap: float = NotProvided,
        split: bool = NotProvided,
        segment: float | None = NotProvided,
        jobs: int = NotProvided,
        progress: bool = NotProvided,
        callback: Callback | None = NotProvided,
        callback_arg: Mapping[str, Any] | None = NotProvided,
        *,
        stems: Sequence[str] | None = NotProvided,
    ) -> None:
        """Change the options that are given, for what is separated from now on.

        Raises `OptionError` for a value out of range; nothing is changed then.
        """
        given = {name: value for name, value in locals().items() if value is not NotProvided}
        del given["self"]
        if "device" in given:
            given["device"] = _usable_device(device)
        if given.get("stems") is not None:
            given["stems"] = tuple(given["stems"])
        settings = replace(self._settings, **given)
        check_segment(self._model, settings.segment)
        self._check_stems(settings)
        self._settings = settings

    def separate_tensor(
        self, wav: Tensor, sr: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Separate `wav` `[C, T]`, samples at `sr` hertz (default: the model's rate).

        Returns the mixture, converted to the model's rate and channels, and the stems by name,
        each `[C, T]`. Silence gives silence; a constant is part of each stem, as in the reference.
        Raises `OptionError` for another shape, no samples, or values that are not finite.
        """
        if wav.dim() != 2 or not wav.numel():
            raise OptionError(
                f"a track must be [channels, samples] and not empty: {list(wav.shape)}"
            )
        if not wav.isfinite().all():
            raise OptionError("the track has samples that are not finite (NaN or Inf)")
        settings = self._settings
        mixture = convert_audio(wav, sr or self._samplerate, self._samplerate, self._audio_channels)
        reference = mixture.mean(0)
        mean = reference.mean()
        std = reference.std(correction=min(1, reference.numel() - 1)) + NORMALIZATION_EPSILON
        stems = apply_model(
            self._model,
            ((mixture - mean) / std)[None],
            shifts=settings.shifts,
            split=settings.split,
            overlap=settings.overlap,
            progress=settings.progress,
            device=settings.device,
            num_workers=settings.jobs,
            segment=settings.segment,
            callback=settings.callback,
            callback_arg=settings.callback_arg,
            stems=settings.stems,
        )[0]
        # What a network makes of silence is tiny after scaling, but it is not silence.
        stems = stems.mul_(std).add_(mean) if mixture.any() else stems.zero_()
        names: Any = settings.stems or self._model.sources
        return mixture, dict(zip(names, stems))

    def separate_audio_file(self, file: str | os.PathLike[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Separate an audio file; returns what `separate_tensor` does.

        Raises `LoadAudioError` if it cannot be read or holds samples that are not finite.
        """
        return self.separate_tensor(self._load_audio(file), self._samplerate)

    def _load_audio(self, track: str | os.PathLike[str]) -> Tensor:
        """The first audio stream of a file, at the model's rate and channels."""
        wav = AudioFile(track).read(
            streams=0, samplerate=self._samplerate, channels=self._audio_channels
        )
        if not wav.isfinite().all():
            raise LoadAudioError(f"{track}: has samples that are not finite (NaN or Inf)")
        return wav
