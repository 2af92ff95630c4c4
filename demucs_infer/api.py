"""The Python interface: a `Separator` turns a track into its stems.

separator = Separator(model="htdemucs")
mixture, stems = separator.separate_audio_file("song.mp3")
for name, stem in stems.items():
    save_audio(stem, f"{name}.wav", samplerate=separator.samplerate)
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .apply import Pass, check_segment, plan_passes, separate_blocks
from .audio import AudioFile, convert_audio, save_audio
from .batch.batch import separate_track
from .batch.tracks import TrackResult
from .engine.backends import Backend, backend_of
from .engine.options import ModelOptions, SeparationOptions, SeparatorOptions
from .errors import LoadAudioError, LoadModelError, ModelLoadingError, OptionError
from .fields import NotProvided, takes
from .hub.registry import cache_folder
from .log import fatal
from .pretrained import get_model, list_models, model_label
from .read.decode import AudioInput
from .read.mixture import Decoder, Mixture
from .read.pcm import as_samples, strange_samples
from .storage.locations import local_copy, location
from .write.output import Output
from .write.stems import mixed, needed_sources, parse_stems

__all__ = [
    "LoadAudioError",
    "LoadModelError",
    "NotProvided",
    "Output",
    "Separation",
    "Separator",
    "TrackResult",
    "list_models",
    "save_audio",
]

Options = TypeVar("Options", ModelOptions, SeparationOptions)


class Separation(NamedTuple):
    """A separated track: the mixture `[C, T]` and its stems by name, each `[C, T]`.

    Float32 at the model's sample rate and with its channels.
    """

    origin: Tensor
    stems: dict[str, Tensor]


def _attribute(option: str) -> str:
    """The attribute of a `Separator` that holds an option; `_model` is the model itself."""
    return "_name" if option == "model" else f"_{option}"


class Separator:
    """A model with the options of a separation. The constructor loads the model, once.

    As a context manager it releases the model at the end of the block (see `close`).

    Each option is an attribute, with an underscore before its name; the model's name is `_name`.
    Subclasses and callers may set these and `_model`, `_samplerate` and `_audio_channels`, with or
    without a call of `__init__`, and may override `_load_model` and `_load_audio`. A separation
    uses the attributes as they are when it begins.
    """

    _model: Any = None
    _samplerate: int | None = None
    _audio_channels: int | None = None
    _backend: tuple[tuple[Any, ...], Backend] | None = None
    _running: tuple[nn.Module, Backend, nn.Module] | None = None

    @takes(SeparatorOptions)
    def __init__(self, options: SeparatorOptions) -> None:
        """Load the model.

        Raises `LoadModelError` (also called `ModelLoadingError`) if the model cannot be loaded,
        `OptionError` for an option out of range or options that do not go together, and
        `MissingDependencyError` without the engine's package.
        """
        for name, value in vars(options).items():
            setattr(self, _attribute(name), value)
        self._name = str(options.model)
        self._check(options)
        self._load_model()
        self._check(options)

    def _load_model(self) -> None:
        """Load the model `_name`, and set `_model`, `_samplerate` and `_audio_channels`."""
        source = self._chosen(ModelOptions)
        repo = None if source.repo is None else Path(source.repo)
        options: dict[str, Any] = {
            "repo": repo,
            "cache_dir": source.cache_dir,
            "offline": source.offline,
        }
        # Programs replace `get_model` by functions that know only the older options.
        given = {name: value for name, value in options.items() if value is not None}
        model: Any = get_model(source.model, **given)
        self._model = model
        self._samplerate, self._audio_channels = model.samplerate, model.audio_channels

    def _chosen(self, kind: type[Options]) -> Options:
        """The options of `kind`, as they are set now."""
        names = (option.name for option in fields(kind))
        return kind(**{name: getattr(self, _attribute(name)) for name in names})

    @property
    def options(self) -> SeparationOptions:
        """The options of a separation, as they are set now. Raises `OptionError` for wrong ones."""
        return self._chosen(SeparationOptions)

    def _check(self, options: SeparationOptions) -> None:
        """Raise `OptionError` for options that the engine or the model does not have."""
        self._backend_for(options)
        if self._model is not None:
            check_segment(self._model, options.segment)
            parse_stems(options.stems, self._model.sources)

    def _backend_for(self, options: SeparationOptions) -> Backend:
        """Return the backend for `options`: the one of the last call, unless they changed."""
        try:
            cache = cache_folder(self._chosen(ModelOptions).cache_dir)
        except ModelLoadingError:  # checkpoints have no folder, and compiled networks neither
            cache = None
        wanted = (options.engine, options.precision, options.compile, options.device, cache)
        if self._backend is None or self._backend[0] != wanted:
            self._backend = (wanted, backend_of(options, cache))
        return self._backend[1]

    def _model_on(self, backend: Backend) -> nn.Module:
        """Return the model with its network run by `backend`."""
        kept = self._running
        if kept is None or kept[0] is not self._model or kept[1] is not backend:
            self._running = kept = (self._model, backend, backend.run(self._model))
        return kept[2]

    @property
    def samplerate(self) -> int:
        """Sample rate of the stems, in hertz."""
        return self._samplerate or self._model.samplerate

    @property
    def audio_channels(self) -> int:
        """Channels of the stems."""
        return self._audio_channels or self._model.audio_channels

    @property
    def model(self) -> nn.Module:
        """The model or bag, with `sources`."""
        return self._model

    @property
    def name(self) -> str:
        """The name of the model in paths of stems: without the folder of its file."""
        return model_label(self._chosen(ModelOptions).model)

    @takes(SeparationOptions, some=True)
    def update_parameter(self, changes: dict[str, Any]) -> None:
        """Change the options that are given, for the separations that follow.

        Raises `OptionError` for a value out of range, and then changes nothing.
        """
        self._check(replace(self.options, **changes))
        for name, value in changes.items():
            setattr(self, _attribute(name), value)

    def close(self) -> None:
        """Release the model and its memory on a GPU. No separation is possible afterwards."""
        self._model = self._running = self._backend = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __enter__(self) -> Separator:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

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
        reason = strange_samples(samples)
        if reason:
            raise OptionError(f"the track has samples that are {reason}")
        samples = samples.reshape(-1, samples.shape[-1])
        origin = convert_audio(samples, sr or self.samplerate, self.samplerate, self.audio_channels)
        return self._separate(origin)

    def separate_audio_file(self, file: AudioInput, **options: Any) -> Separation:
        """Separate an audio file, and return the result of `separate_tensor`.

        `file` is a path, a URL, or a binary file object that can seek, read from its beginning.
        `options` are those of `update_parameter`, for this call: `start=30, duration=10`.
        Raises `LoadAudioError` if it cannot be read or has samples that are not finite.
        """
        this = self._changed(options)
        return this.separate_tensor(this._load_audio(file), this.samplerate)

    def _load_audio(self, track: AudioInput) -> Tensor:
        """Decode `track` at the model's rate and with its channels, as `[C, T]`."""
        with ExitStack() as stack:
            if isinstance(track, (str, bytes, os.PathLike)):
                place = location(os.fsdecode(track) if isinstance(track, bytes) else track)
                audio = AudioFile(stack.enter_context(local_copy(place)), name=str(place))
            else:
                audio = AudioFile(track)
            rate, channels = self.samplerate, self.audio_channels
            decoder = Decoder(audio, rate, channels, self.options)
            return torch.cat(list(decoder.chunks()), dim=-1)

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
        file: str | bytes | os.PathLike[str],
        out: str | os.PathLike[str] | Output = "separated",
        **options: Any,
    ) -> TrackResult:
        """Separate an audio file into files: the stems of `separate_audio_file`, block by block.

        Memory does not grow with the track. Both may be URLs. `out` is the output folder, with
        `options` those of `Output`; or an `Output`. Options of `update_parameter` are for this call
        (`stems=`, `start=`). Returns paths, peaks and gains of the stems, seconds and offsets.

        Raises `LoadAudioError` if the track cannot be read, `SaveAudioError` if a stem cannot be
        written, `OptionError` for options that cannot be had.
        """
        known = {option.name for option in fields(SeparationOptions)}
        changes = {name: options.pop(name) for name in known & options.keys()}
        output = replace(out, **options) if isinstance(out, Output) else Output(out, **options)
        if hasattr(file, "read"):
            raise OptionError(
                "a file object cannot be separated to files, which are named after their track."
                " Pass a path, or call separate_audio_file"
            )
        track = location(os.fsdecode(file) if isinstance(file, bytes) else file)
        this = self._changed(changes)
        output.check_stems(this._model.sources, this.stems)
        result = separate_track(this, track, output)
        if result.error is not None:
            raise result.error
        return result

    def _changed(self, changes: dict[str, Any]) -> Separator:
        """Return a copy with other options for one call, which shares the model."""
        if not changes:
            return self
        other = copy.copy(self)
        other.update_parameter(**changes)
        return other

    @property
    def stems(self) -> list[str]:
        """The names of the stems, in their order."""
        return [stem.name for stem in parse_stems(self.options.stems, self._model.sources)]

    def plan(self, length: int) -> list[Pass]:
        """Plan the passes over `length` samples at the model's rate, and draw their offsets."""
        return plan_passes(self._model, length, self.options)

    def blocks(
        self, mixture: Mixture, passes: Sequence[Pass], title: str | None = None
    ) -> Iterator[Tensor]:
        """Yield the stems of `mixture` block by block, `[1, S, C, n]`, for the passes of `plan`.

        `title` is that of progress bars.
        """
        if self._model is None:
            raise OptionError("this Separator is closed, or has no model")
        options = self.options
        self._check(options)
        backend = self._backend_for(options)
        stems = parse_stems(options.stems, self._model.sources)
        sources = needed_sources(stems, self._model.sources)
        wanted = None if options.stems is None else sources
        blocks = separate_blocks(
            self._model_on(backend),
            mixture,
            options=replace(options, device=backend.device, stems=wanted),
            in_lockstep=options.callback is None,  # a callback expects one model after the other
            passes=passes,
            stay=True,
            title=title,
        )
        # Unlike a loop here, this keeps no block while the next window runs.
        return map(partial(mixed, stems, sources), map(mixture.restored, blocks))


for _option in fields(SeparatorOptions):
    setattr(Separator, _attribute(_option.name), _option.default)

if __name__ == "__main__":
    fatal("this module has no command: run demucs-infer, or python -m demucs_infer", status=2)
