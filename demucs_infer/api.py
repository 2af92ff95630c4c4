"""The Python interface: a `Separator` turns a track into its stems.

separator = Separator(model="htdemucs")
mixture, stems = separator.separate_audio_file("song.mp3")
for name, stem in stems.items():
    save_audio(stem, f"{name}.wav", samplerate=separator.samplerate)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .apply import ApplyOptions, Pass, check_segment, plan_passes, separate_blocks
from .audio import AudioFile, convert_audio, save_audio
from .engine.backends import EngineOptions, on_engine
from .errors import LoadAudioError, LoadModelError, ModelLoadingError, OptionError
from .hub.registry import cache_folder
from .io.batch import TrackResult, separate_file
from .io.mixture import Decoder, Mixture
from .io.output import Output
from .io.pcm import as_samples
from .io.storage import local_copy, place
from .pretrained import DEFAULT_MODEL, get_model, list_models

__all__ = [
    "LoadAudioError",
    "LoadModelError",
    "Output",
    "Separation",
    "Separator",
    "TrackResult",
    "list_models",
    "save_audio",
]

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
    seed: int | None
    precision: str
    engine: str
    compile: bool
    batch_size: int | None
    openvino_device: str
    cache: Path | None

    def __post_init__(self) -> None:
        if self.jobs < 0:
            raise OptionError(f"jobs={self.jobs} must be 0 or more")
        if self.batch_size is not None and self.batch_size < 1:
            raise OptionError(f"batch_size={self.batch_size} must be 1 or more")
        _ = self.engine_options
        _ = self.apply_options

    @property
    def engine_options(self) -> EngineOptions:
        """What runs the networks. Raises `OptionError` for what does not go together."""
        return EngineOptions(
            self.engine,
            self.precision,
            self.compile,
            self.device.type,
            self.openvino_device,
            self.cache,
        )

    @property
    def apply_options(self) -> ApplyOptions:
        """How a track is cut. Raises `OptionError` for values out of range."""
        return ApplyOptions(
            self.shifts, self.split, self.overlap, segment=self.segment, seed=self.seed
        )


def _place(device: str | torch.device | None, engine: str) -> dict[str, Any]:
    """The settings `device`, `engine` and `openvino_device` that "openvino:GPU" and the like mean.

    Raises `OptionError` for a device that cannot be used.
    """
    kind, _, rest = str(device).partition(":")
    if kind == "openvino":
        return {
            "device": torch.device("cpu"),
            "engine": kind,
            "openvino_device": rest.upper() or "CPU",
        }
    if device is None and engine == "openvino":
        device = "cpu"
    return {"device": _usable_device(device), "engine": engine, "openvino_device": "CPU"}


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


def _openvino_cache(cache_dir: str | os.PathLike[str] | None) -> Path | None:
    """Where OpenVINO's compiled networks are kept: beside the checkpoints, if there is a folder."""
    try:
        return cache_folder(cache_dir)
    except ModelLoadingError:
        return None


class Separation(NamedTuple):
    """A separated track: the mixture `[C, T]` and its stems by name, each `[C, T]`.

    Float32 at the model's sample rate and with its channels.
    """

    origin: Tensor
    stems: dict[str, Tensor]


class Separator:
    """A model with the options of a separation. The model is loaded once, when this is made.

    Args:
        model: name of a bag or signature of a model (see `list_models`).
        repo: a folder of checkpoints and bags to use instead of the released ones.
        device: "cpu", "cuda", "cuda:1", "mps" …; by default the first GPU, else the CPU. Or a
            device of OpenVINO's, "openvino:GPU", which implies that engine.
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
        seed: draw the offsets of the shifts from this, anew for each track, instead of from
            `random`.
        precision: of the network, "float32", "bfloat16" or "float16"; see `EngineOptions`.
        engine: what runs the network, "torch" or "openvino".
        compile: run it through `torch.compile`, which takes minutes the first time.
        batch_size: windows in one batch (default: on a GPU what its memory holds, else 1).
        cache_dir: the folder to keep published models in, see `get_model`.
        offline: never download, see `get_model`.

    Raises `LoadModelError` (also called `ModelLoadingError`) if the model cannot be loaded,
    `OptionError` for an option out of range or options that do not go together, and
    `MissingDependencyError` without the engine's package.
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
        seed: int | None = None,
        precision: str = "float32",
        engine: str = "torch",
        compile: bool = False,
        batch_size: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        offline: bool | None = None,
    ) -> None:
        self._settings = _Settings(
            **_place(device, engine),
            shifts=shifts,
            overlap=overlap,
            split=split,
            segment=segment,
            jobs=jobs,
            progress=progress,
            callback=callback,
            callback_arg=callback_arg,
            stems=None if stems is None else tuple(stems),
            seed=seed,
            precision=precision,
            compile=compile,
            batch_size=batch_size,
            cache=_openvino_cache(cache_dir),
        )
        self.name = str(model)
        folder = None if repo is None else Path(repo)
        loaded: Any = get_model(model, folder, cache_dir=cache_dir, offline=offline)
        self._model: nn.Module = loaded
        self._samplerate: int = loaded.samplerate
        self._audio_channels: int = loaded.audio_channels
        check_segment(self._model, segment)
        self._check_stems(self._settings)
        self._running = on_engine(self._model, self._settings.engine_options)

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
        seed: int | None = NotProvided,
        precision: str = NotProvided,
        engine: str = NotProvided,
        compile: bool = NotProvided,
        batch_size: int | None = NotProvided,
    ) -> None:
        """Change the options that are given, for what is separated from now on.

        Raises `OptionError` for a value out of range; nothing is changed then.
        """
        given = {name: value for name, value in locals().items() if value is not NotProvided}
        del given["self"]
        if "device" in given:
            given |= _place(device, given.get("engine", self._settings.engine))
        if given.get("stems") is not None:
            given["stems"] = tuple(given["stems"])
        settings = replace(self._settings, **given)
        check_segment(self._model, settings.segment)
        self._check_stems(settings)
        if settings.engine_options != self._settings.engine_options:
            self._running = on_engine(self._model, settings.engine_options)
        self._settings = settings

    def separate_tensor(
        self, wav: Tensor | np.ndarray[Any, Any], sr: int | None = None
    ) -> Separation:
        """Separate `wav`, samples `[C, T]` or `[T]` at `sr` hertz (default: the model's rate).

        They may be PyTorch's or numpy's, floating point (±1), int16 or int32; they are not changed.
        Returns the mixture, converted to the model's rate and channels, and the stems by name, each
        float32 `[C, T]`. Silence gives silence; a constant is part of each stem, as in the
        reference. Raises `OptionError` for another shape or type, no samples, or values that are
        not finite.
        """
        samples = as_samples(wav)
        if samples.dim() not in (1, 2) or not samples.numel():
            raise OptionError(
                f"a track must be [channels, samples] and not empty: {list(samples.shape)}"
            )
        if not samples.isfinite().all():
            raise OptionError("the track has samples that are not finite (NaN or Inf)")
        samples = samples.reshape(-1, samples.shape[-1])
        origin = convert_audio(samples, sr or self.samplerate, self.samplerate, self.audio_channels)
        return self._separate(origin)

    def separate_audio_file(self, file: str | os.PathLike[str]) -> Separation:
        """Separate an audio file, also by URL; returns what `separate_tensor` does.

        Raises `LoadAudioError` if it cannot be read or holds samples that are not finite.
        """
        with local_copy(place(os.fspath(file))) as path:
            audio = AudioFile(path, name=str(file))
            decoder = Decoder(audio, self.samplerate, self.audio_channels)
            return self._separate(torch.cat(list(decoder.blocks()), dim=-1))

    def _separate(self, origin: Tensor) -> Separation:
        if not origin.shape[-1]:
            raise OptionError("the track is too short: nothing is left of it at the model's rate")
        mixture = Mixture.of(origin)
        stems = origin.new_empty(len(self.stems), *origin.shape)
        done = 0
        for block in self.blocks(mixture, self.plan(mixture.length)):
            stems[..., done : done + block.shape[-1]] = block[0]
            done += block.shape[-1]
        return Separation(origin, dict(zip(self.stems, stems)))

    def separate_to_files(
        self,
        file: str | os.PathLike[str],
        out: str | os.PathLike[str] | Output = "separated",
        **options: Any,
    ) -> TrackResult:
        """Separate an audio file into files: the stems of `separate_audio_file`, block by block.

        Memory does not grow with the track. Both may be URLs. `out` is the output folder, with
        `options` those of `Output`; or an `Output`. Returns paths, peaks and gains of the stems,
        seconds and offsets.

        Raises `LoadAudioError` if the track cannot be read, `SaveAudioError` if a stem cannot be
        written, `OptionError` for options that cannot be had.
        """
        output = out if isinstance(out, Output) else Output(out, **options)
        return separate_file(self, place(os.fspath(file)), output)

    @property
    def stems(self) -> list[str]:
        """The stems that are separated, in their order."""
        sources: Any = self._model.sources
        return list(self._settings.stems or sources)

    def plan(self, length: int) -> list[Pass]:
        """The passes over a track of `length` samples at the model's rate, with offsets drawn."""
        return plan_passes(self._model, length, self._settings.apply_options)

    def blocks(self, mixture: Mixture, passes: Sequence[Pass]) -> Iterator[Tensor]:
        """The stems of `mixture` block by block, each `[1, S, C, n]`, for the passes of `plan`."""
        settings = self._settings
        blocks = separate_blocks(
            self._running,
            mixture,
            options=settings.apply_options,
            in_lockstep=settings.callback is None,  # which expects one model after the other
            progress=settings.progress,
            device=settings.device,
            num_workers=settings.jobs,
            callback=settings.callback,
            callback_arg=settings.callback_arg,
            stems=settings.stems,
            passes=passes,
            batch_size=settings.batch_size,
        )
        # Unlike a loop here, this keeps no block while the next window runs.
        return map(mixture.restored, blocks)
