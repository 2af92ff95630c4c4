"""Small programs that give the same with `demucs` and with this package."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import tqdm
from torch import nn

from demucs_infer.htdemucs import HTDemucs

from .helpers import SOURCES, TINY, WriteAndFlush, noise, pair

REFERENCE, OURS = "demucs", "demucs_infer"
MIX = noise(2, 7000)


class Library:
    """One of the two packages, with the tiny model in it."""

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name, self.model = name, model

    def __getattr__(self, module: str) -> Any:
        return importlib.import_module(f"{self.name}.{module}")

    def bag(self) -> nn.Module:
        return self.apply.BagOfModels([self.model, self.model])


@pytest.fixture
def libraries() -> list[Library]:
    return [Library(n, m) for n, m in zip((REFERENCE, OURS), pair(HTDemucs, **TINY))]


def same(libraries: list[Library], program: Callable[[Library], Any]) -> Any:
    """Assert that `program` gives the same with both, and return it."""
    theirs, ours = map(program, libraries)
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    else:
        assert ours == theirs
    return theirs


def separated(library: Library, model: nn.Module | None = None, **options: Any) -> torch.Tensor:
    options = {"shifts": 0, **options}
    return library.apply.apply_model(model or library.model, MIX[None], **options)


# --- progress -----------------------------------------------------------------------------------


def test_bars_go_to_the_standard_error_of_a_program_if_it_has_one(
    libraries: list[Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    def program(library: Library) -> bool:
        window: Any = WriteAndFlush()
        with contextlib.redirect_stderr(window):
            separated(library, progress=True)
        return "100%|" in window.text

    assert same(libraries, program)
    monkeypatch.setattr(sys, "stderr", None)
    same(libraries, separated)
    separated(libraries[1], progress=True)  # the reference stops here


@pytest.mark.parametrize("place", ["apply.tqdm", "apply.tqdm.tqdm", "tqdm.tqdm"])
def test_hooks_see_every_window_and_may_raise(
    place: str, libraries: list[Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    def program(library: Library) -> list[Any]:
        seen: list[Any] = []
        most = math.inf

        def hook(iterable: Any, **options: Any) -> Any:
            seen.append((options["unit"], options["unit_scale"]))
            for item in iterable:
                if len(seen) > most:
                    raise KeyError("stop")
                seen.append("window")
                yield item

        with monkeypatch.context() as patch:
            if place == "apply.tqdm":
                patch.setattr(library.apply, "tqdm", types.SimpleNamespace(tqdm=hook))
            else:
                patch.setattr(library.apply.tqdm if "apply" in place else tqdm, "tqdm", hook)
            separated(library)
            assert not seen
            separated(library, library.bag(), progress=True)
            most = len(seen) + 1
            with pytest.raises(KeyError, match="stop"):
                separated(library, progress=True)
        return seen

    assert len(same(libraries, program)) > 4


def test_callback_stops_and_leaves_no_thread_and_a_whole_line(libraries: list[Library]) -> None:
    def program(library: Library) -> int:
        calls: list[dict[str, Any]] = []

        def callback(info: dict[str, Any]) -> None:
            calls.append(info)
            if len(calls) == 3:
                raise KeyboardInterrupt

        errors, threads = io.StringIO(), set(threading.enumerate())
        with contextlib.redirect_stderr(errors), pytest.raises(KeyboardInterrupt):
            separated(library, progress=True, callback=callback)
        left = {thread for thread in threading.enumerate() if "TMonitor" not in repr(thread)}
        assert left <= threads
        assert errors.getvalue().endswith("\n") or library.name == REFERENCE
        return len(calls)

    assert same(libraries, program) == 3


# --- Separators that others finish ----------------------------------------------------------------


def finished_by_subclass(library: Library) -> Any:
    class Own(library.api.Separator):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self._model, self._audio_channels, self._samplerate = library.model, 2, 8000
            self.update_parameter(
                device="cpu", shifts=0, overlap=0.25, split=True, segment=None, jobs=0,
                progress=False, callback=None, callback_arg=None,
            )  # fmt: skip

    return Own()


def finished_by_new(library: Library) -> Any:
    separator = library.api.Separator.__new__(library.api.Separator)
    separator._model, separator._audio_channels, separator._samplerate = library.model, 2, 8000
    separator._device, separator._shifts, separator._split, separator._overlap = "cpu", 0, True, 0.1
    separator._segment = separator._callback = separator._callback_arg = None
    separator._jobs, separator._progress, separator._name = 0, False, "mine"
    return separator


def finished_by_load_model(library: Library) -> Any:
    class Own(library.api.Separator):  # type: ignore[name-defined]
        def _load_model(self) -> None:
            self._model, self._audio_channels, self._samplerate = library.model, 2, 8000

        def _load_audio(self, track: object) -> torch.Tensor:
            return MIX

    return Own("nothing", device="cpu", shifts=0)


@pytest.mark.parametrize("finish", [finished_by_subclass, finished_by_new, finished_by_load_model])
def test_separators_that_others_finish(finish: Any, libraries: list[Library]) -> None:
    def program(library: Library) -> torch.Tensor:
        separator = finish(library)
        if finish is finished_by_load_model:
            from_file = separator.separate_audio_file("none.wav")[1]["bass"]
            separator._model = library.bag()
            return torch.stack([from_file, separator.separate_tensor(MIX, 8000)[1]["bass"]])
        return separator.separate_tensor(MIX, 8000)[1]["bass"]

    same(libraries, program)


def test_main_raises_errors_of_tracks_and_reports_missing_ones(
    libraries: list[Library], repo: Path, track: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.wav").write_text("words " * 999)
    shift = ["--shifts", "0", "-d", "cpu"]

    def program(library: Library) -> list[str]:
        def error(*words: str) -> str:
            try:
                library.separate.main([*shift, *words])
            except RuntimeError:  # Programs catch it, and retry on the CPU.
                return "RuntimeError"
            except (Exception, SystemExit) as exc:
                return type(exc).__name__
            return "none"

        tiny = ["--repo", str(repo), "-n", "tiny"]
        names = [error(*tiny, "text.wav"), error(*tiny, "none.wav"), error(*tiny)]
        names += [error("--repo", str(repo), "-n", "tinny", "track.wav")]
        names += [error(*tiny, *w, "track.wav") for w in (["--two-stems", "voice"], ["-d", "gpu"])]
        with monkeypatch.context() as patch:
            model: Any = importlib.import_module(f"{library.name}.htdemucs").HTDemucs
            forward = model.forward

            def full(self: Any, mix: torch.Tensor, *args: Any, **options: Any) -> Any:
                if mix.any():  # unlike the silence of a test when the model is loaded
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory")
                return forward(self, mix, *args, **options)

            patch.setattr(model, "forward", full)
            names.append(error(*tiny, "track.wav"))
        return names

    expected = ["LoadAudioError", "none", "SystemExit", "SystemExit", "SystemExit"]
    assert same(libraries, program) == [*expected, "RuntimeError", "RuntimeError"]


# --- models that others change --------------------------------------------------------------------


def shorter(library: Library) -> nn.Module:
    bag: Any = library.bag()
    bag.segment = 0.25  # of no effect in the reference
    return bag


def replaced_forward(library: Library) -> nn.Module:
    model: Any = library.model
    model.forward = lambda mix: torch.stack([mix * i for i in range(4)], 1)
    return model


def plain(library: Library) -> nn.Module:
    class Plain(nn.Module):
        samplerate, segment, sources = 8000, 0.5, SOURCES

        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, mix: torch.Tensor) -> torch.Tensor:
            return torch.stack([mix * i * self.gain for i in range(4)], 1).detach()

    return Plain()


def scripted(library: Library) -> nn.Module:
    model: Any = torch.jit.trace(library.model, MIX[None, :, :4000], check_trace=False)
    model.samplerate, model.segment, model.sources = 8000, 0.5, SOURCES
    model.valid_length = library.model.valid_length
    return model


def called_by_subclass(library: Library) -> nn.Module:
    class Own(type(library.model)):  # type: ignore[misc]
        def __call__(self, mix: torch.Tensor) -> torch.Tensor:
            return 0.5 * super().__call__(mix)

    library.model.__class__ = Own
    return library.model


def quantized(library: Library) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(library.model, {nn.Linear}, torch.qint8)


def compiled(library: Library) -> nn.Module:
    model: Any = library.model
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.parametrize(
    "change",
    [
        shorter, replaced_forward, plain, called_by_subclass, quantized,
        *(pytest.param(change, marks=pytest.mark.slow) for change in (scripted, compiled)),
    ],
)  # fmt: skip
def test_models_that_others_change(change: Any, libraries: list[Library]) -> None:
    same(libraries, lambda library: separated(library, change(library)))
