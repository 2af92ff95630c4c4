"""Try mutated inputs of every kind that others may send, in a process that may die.

    python -m tests.tools.fuzz TARGET [--seconds N] [--inputs N] [--seed S] [--save FOLDER]
    python -m tests.tools.fuzz TARGET --only I [--seed S]       input I here, with its traceback

Input I of a seed is always the same. A finding is an exception from outside of our tree, a death of
the process, a growth by more than `MEMORY` bytes, or more than `SECONDS`.

A further target is a row in `TARGETS`: valid inputs, how one is changed (`mutate_bytes` and
`mutate_words` do for most), and the door that it is handed to.
"""

from __future__ import annotations

import argparse
import glob
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from demucs_infer.errors import DemucsInferError

from ..helpers import publish

MEMORY = 500_000_000  # bytes
SECONDS = 20
SEED = 14
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1)

Mutate = Callable[[Random, Sequence[bytes]], bytes]


@dataclass(frozen=True)
class Target:
    """A kind of input: `seeds` makes valid ones in a folder; `read` hands a file to our code."""

    seeds: Callable[[Path], Sequence[bytes]]
    mutate: Mutate
    read: Callable[[Path], object]
    name: str = "input"  # of the file that is read


def mutate_bytes(random: Random, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds with one to eight places changed: for binary formats."""
    data = bytearray(random.choice(seeds))
    for _ in range(random.choice((1, 1, 2, 3, 8))):
        at = random.randrange(len(data) + 1) if random.random() < 0.5 else random.randrange(64)
        at, length = min(at, len(data)), random.choice((1, 2, 4, 8, 64, 1000))
        random.choice((_flip, _number, _cut, _repeat, _splice))(random, data, at, length, seeds)
    return bytes(data)


def _flip(random: Random, data: bytearray, at: int, length: int, seeds: Sequence[bytes]) -> None:
    for place in range(at, min(at + length, len(data))):
        data[place] ^= 1 << random.randrange(8)


def _number(random: Random, data: bytearray, at: int, length: int, seeds: Sequence[bytes]) -> None:
    size = random.choice((1, 2, 4, 8))
    number = random.choice(NUMBERS) & (256**size - 1)
    data[at : at + size] = number.to_bytes(size, random.choice(("big", "little")))


def _cut(random: Random, data: bytearray, at: int, length: int, seeds: Sequence[bytes]) -> None:
    del data[at : random.choice((at + length, at + length, len(data)))]


def _repeat(random: Random, data: bytearray, at: int, length: int, seeds: Sequence[bytes]) -> None:
    data[at:at] = data[at : at + length] * random.choice((1, 2, 50))


def _splice(random: Random, data: bytearray, at: int, length: int, seeds: Sequence[bytes]) -> None:
    other = random.choice(seeds)
    start = random.randrange(len(other) + 1)
    data[at : at + length] = other[start : start + length]


def mutate_words(words: Sequence[bytes], split: bytes = rb"([\s:/{}\[\]\",#.-])") -> Mutate:
    """For text: pieces of the seeds are dropped, doubled, moved, or replaced by one of `words`."""

    def mutate(random: Random, seeds: Sequence[bytes]) -> bytes:
        pieces = re.split(split, random.choice(seeds))
        for _ in range(random.choice((1, 1, 2, 3, 8, 20))):
            at = random.randrange(len(pieces) + 1)
            kind = random.randrange(5)
            if kind == 0:
                del pieces[at : at + random.choice((1, 1, 5))]
            elif kind == 1:
                pieces[at:at] = pieces[at : at + 5] * random.choice((1, 1, 3, 300))
            else:
                pieces[at : at + (kind == 2)] = [random.choice(words)]
        data = b"".join(pieces)
        return mutate_bytes(random, [data or b" "]) if random.random() < 0.2 else data

    return mutate


SEPARATORS = (*(bytes([code]) for code in b"\0\n\r\t /\\.~\xff"), b"..", b"\xef\xbb\xbf")
NAMES = (b"x" * 300, b"\xe9", *b"a.wav - -- * [ ** ? # %00 %2e%2e".split())
SCHEMES = tuple(
    word.encode()
    for word in "memory:// file:// file: http://127.0.0.1:9/ :: reference:// data: zip:// local://"
    " simplecache:: memory: MEMORY:// file://host/ //".split()
)
LIST = "# songs\na.wav\n\nmusic/b.flac\nmemory://in/*.wav\nfile:///tmp/a.wav\nmusic\n../c [1].mp3\n"


def _lists(folder: Path) -> Sequence[bytes]:
    Path(folder, "music", "deep").mkdir(parents=True)
    for name in ("a.wav", "music/b.flac", "music/deep/c.wav"):
        Path(folder, name).touch()
    return [LIST.encode(), LIST.encode("utf-16"), b"\xef\xbb\xbfa.wav\r\n", LIST.encode("utf-32")]


def _is_outside(name: object) -> bool:
    """Return True if a name, or the start of a pattern, is a folder outside of the test."""
    try:
        text = str(name).removeprefix("file://")
        if glob.has_magic(text):
            magic = re.search(r"[*?\[]", text)
            text = text[: text.rfind("/", 0, magic.start()) + 1] or "."
        return Path(text).is_dir() and not Path(text).resolve().is_relative_to(Path.cwd())
    except (OSError, ValueError):
        return False


def _read_list(path: Path) -> None:
    from demucs_infer.batch.tracks import find_tracks, plan_jobs, read_list
    from demucs_infer.write.output import Output

    names = (name for name in read_list(path) if not _is_outside(name))
    tracks = list(itertools.islice(find_tracks(names), 1000))
    plan_jobs(tracks, Output("out", "{parent}/{track}-{trackext}-{stem}"), "model", ["drums"])


FIELDS = tuple(
    word.encode()
    for word in "{track} {stem} {ext} {parent} {model} {trackext} {track!r} {stem:>9} {{ }} { } ! :"
    " {ext:9999999999} {track:{stem}} {0} {} {stem.__class__} {track[0]} {track[-1]} 9 .9".split()
)


def _templates(folder: Path) -> Sequence[bytes]:
    return [b"{track}/{stem}.{ext}", b"{parent}/{model}-{track}.{trackext}/{stem}", b"{{{stem}}}"]


def _read_template(path: Path) -> None:
    from demucs_infer.write.output import Output

    template = path.read_bytes().decode("utf-8", "surrogateescape")
    for track in (Path("a b.wav"), Path("...wav"), Path("x" * 200, "y" * 250), Path("-")):
        for folder in ("out", "memory://out"):
            Output(folder, template).paths(track, "model", ["drums", "no_drums"])


OPTION_VALUES = (
    *(0, 1, -1, 2, 3, 7, 64, 1000, 2**31, 2**63, 10**30, True, False, None, 0.5, -0.5, 1e-30, 1e9),
    *(float("nan"), float("inf"), 1e300, "", "x", "1e9", b"x", [], [0.5], [2, 1], ["a"] * 3, {}),
    *(Fraction(1, 3), Fraction(10**17, 3), (1, 2), [[]], "../x", "a\0b"),
)


def _tiny_packages() -> list[dict]:
    """Small models of each family, and a quantized one."""
    import diffq
    import torch

    from demucs_infer.demucs import Demucs
    from demucs_infer.hdemucs import HDemucs
    from demucs_infer.htdemucs import HTDemucs

    names, packages = {"sources": ["a", "b"], "samplerate": 8000, "segment": 0.25}, []
    hybrid = {"channels": 4, "nfft": 256, "depth": 3, **names}
    transformer = {"t_layers": 2, "t_heads": 2, "bottom_channels": 8}
    time = {"channels": 4, "depth": 2, "lstm_layers": 1, "dconv_lstm": 1, "dconv_attn": 9}
    torch.manual_seed(0)
    for kind, options in (
        (HTDemucs, {**hybrid, **transformer, "segment": Fraction(1, 4)}),
        (HDemucs, hybrid),
        (HDemucs, {**hybrid, "cac": False, "hybrid_old": True, "norm_starts": 1}),
        (Demucs, {**names, **time}),
    ):
        model = kind(**options)
        package = {"klass": kind, "args": (), "kwargs": options, "training_args": {"epochs": 1}}
        packages.append({**package, "state": model.half().state_dict()})
    model = HDemucs(**hybrid)
    state = diffq.UniformQuantizer(model, min_size=0.001).get_quantized_state()
    package = {"klass": HDemucs, "args": (), "kwargs": hybrid, "training_args": {}}
    return [*packages, {**package, "state": {**state, "__quantized": True}}]


def _archives(folder: Path) -> Sequence[bytes]:
    import torch

    buffers = [io.BytesIO() for _ in range(5)]
    for buffer, package in zip(buffers, _tiny_packages()):
        torch.save(package, buffer)
    return [buffer.getvalue() for buffer in buffers]


def _mutate_archive(random: Random, seeds: Sequence[bytes]) -> bytes:
    """The bytes as they are, those of an entry (whose check sums then fit), or an option."""
    kind = random.randrange(4)
    if kind == 0:
        return mutate_bytes(random, seeds)
    if kind == 1:
        return _with_options(random, seeds)
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(random.choice(seeds))) as old,
        zipfile.ZipFile(buffer, "w") as new,
    ):
        names = old.namelist()
        chosen = next(name for name in names if name.endswith("data.pkl"))
        chosen = random.choice(names) if random.random() < 0.2 else chosen
        for name in names:
            data = old.read(name)
            new.writestr(name, mutate_bytes(random, [data or b" "]) if name == chosen else data)
    return buffer.getvalue()


@cache
def _option_names(klass: type) -> list[str]:
    import torch

    with torch.device("meta"):  # a whole model takes a second
        return [*vars(klass(["a"]).options)]


def _change_options(random: Random, package: dict) -> dict:
    package = {**package, "kwargs": dict(package["kwargs"]), "state": dict(package["state"])}
    names = _option_names(package["klass"])
    for _ in range(random.choice((1, 1, 2, 4))):
        package["kwargs"][random.choice(names)] = random.choice(OPTION_VALUES)
    if random.random() < 0.2 and "__quantized" not in package["state"]:
        name = random.choice([*package["state"]])
        value = random.choice((float("nan"), float("inf"), 6e4))
        package["state"][name] = package["state"][name] * value
    return package


def _with_options(random: Random, seeds: Sequence[bytes]) -> bytes:
    import torch

    buffer = io.BytesIO()
    package = torch.load(io.BytesIO(random.choice(seeds)), weights_only=False)
    torch.save(_change_options(random, package), buffer)
    return buffer.getvalue()


def _run_checkpoint(path: Path) -> None:
    """Load a model, and run a window of it."""
    import torch

    from demucs_infer.apply import apply_model
    from demucs_infer.states import load_model

    model = load_model(path)
    length = max(1, int(model.segment * model.samplerate))
    apply_model(model, torch.zeros(1, model.audio_channels, length), shifts=0)


def _safetensors(folder: Path) -> Sequence[bytes]:
    from demucs_infer.hub.checkpoints import write_safetensors
    from demucs_infer.hub.pickles import ClassName

    contents = []
    for package in _tiny_packages():
        klass = ClassName(f"{package['klass'].__module__}.{package['klass'].__name__}")
        state = package["state"]
        if "meta" in state:
            meta = {**state["meta"], "klass": ClassName("diffq.uniform.UniformQuantizer")}
            state = {**state, "meta": meta}
        path = write_safetensors({**package, "klass": klass, "state": state}, folder / "seed")
        contents.append(path.read_bytes())
    return contents


JSON_WORDS = tuple(
    word.encode()
    for word in '0 1 -1 null true false [] {} NaN Infinity 1e999 1e9 9999999999999 0.5 "x" "F64"'
    ' "I8" "klass" "_type" "fraction" "_tensor" "_class" "_dict" "_list" "shape" -9 64 1000'
    ' "demucs.demucs.Demucs" "numerator" "kwargs"'
    ' {"_type":"fraction","numerator":1,"denominator":3}'.split()
)


def _mutate_safetensors(random: Random, seeds: Sequence[bytes]) -> bytes:
    """The bytes as they are, or words of the header (whose length then fits)."""
    if random.random() < 0.3:
        return mutate_bytes(random, seeds)
    data = random.choice(seeds)
    length = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:length])
    metadata = header["__metadata__"]
    if random.random() < 0.7:
        name = random.choice([*metadata, "kwargs"])
        changed = mutate_words(JSON_WORDS)(random, [metadata[name].encode()])
        metadata[name] = changed.decode("utf-8", "replace")
        text = json.dumps(header).encode()
    else:
        text = mutate_words(JSON_WORDS)(random, [data[8:length]])
    return len(text).to_bytes(8, "little") + text + data[length:]


YAML_WORDS = tuple(
    word.encode()
    for word in "&a *a <<: ! !!int !!float !!binary !!timestamp !!set !!omap !!bool !!python/tuple"
    " = ~ 2024-99-99 1:99:99 0x 0b2 1_ .inf .nan 1e999 yes null ? | > - [ ] { } , : # % @ ` ' \""
    " tiny models weights segment 9999999999999999999999 -1 0 0.5 --- ..."
    " 2001-12-14t21:59:43-99:00".split()
)
BAG = b"models: [tiny, tiny]\nweights:\n- [1., 0.]\n- [0.5, 1.]\nsegment: 0.2\n"
PLAIN_BAG = b"models: ['tiny']\n"


def _bags(folder: Path) -> Sequence[bytes]:
    import torch

    torch.save(_tiny_packages()[1], folder / "tiny.th")
    return [BAG, PLAIN_BAG]


def _read_bag(path: Path) -> None:
    from demucs_infer.pretrained import get_model

    get_model(path.stem, path.parent)


def _registries(folder: Path) -> Sequence[bytes]:
    publish(folder, "http://127.0.0.1:9", b"", b"")
    return [(folder / "registry.yml").read_bytes()]


def _read_registry(path: Path) -> None:
    from demucs_infer.catalog import catalog
    from demucs_infer.hub import registry

    registry.REMOTE_ROOT = path.parent
    registry.registry.cache_clear()
    list(catalog())


# Container, and codecs that are tried in it; those that cannot be encoded here are left out.
SOUNDS = {
    "wav": "pcm_s16le pcm_f32le adpcm_ms adpcm_ima_wav pcm_mulaw",
    "aiff": "pcm_s16be",
    "au": "pcm_s16be",
    "w64": "pcm_s24le",
    "caf": "pcm_s16le alac",
    "flac": "flac",
    "mp3": "mp3",
    "mp4": "aac",
    "ipod": "alac",
    "mov": "pcm_s24le",
    "ogg": "libopus flac vorbis",
    "matroska": "aac flac alac mp3 libopus",
    "mpegts": "mp2 ac3 aac",
    "mpeg": "mp2",
    "avi": "mp3 pcm_s16le",
    "flv": "mp3",
    "asf": "wmav2",
    "wv": "wavpack",
    "tta": "tta",
    "adts": "aac",
    "ac3": "ac3",
    "eac3": "eac3",
    "dts": "dca",
    "voc": "pcm_s16le",
    "nut": "mp3",
    "truehd": "truehd",
    "rm": "ac3",
}


def _sounds(folder: Path) -> Sequence[bytes]:
    made = (_sound(folder, kind, codec) for kind in SOUNDS for codec in SOUNDS[kind].split())
    return list(filter(None, made))


def _sound(folder: Path, kind: str, codec: str) -> bytes:
    import av
    import numpy as np

    path = folder / "seed"
    samples = np.random.default_rng(1).normal(0, 0.1, (1, 2 * 16000)).astype(np.float32)
    frame = av.AudioFrame.from_ndarray(samples, "flt", "stereo")
    frame.sample_rate = 48000
    try:
        with av.open(str(path), "w", format=kind) as container:
            container.metadata["title"] = "noise"
            stream = container.add_stream(codec, rate=48000, options={"strict": "-2"})
            stream.layout = "stereo"
            for part in (frame, None):
                container.mux(stream.encode(part))
    except (av.FFmpegError, ValueError):
        return b""
    return path.read_bytes()


def _read_audio(path: Path) -> None:
    from demucs_infer.audio import AudioFile
    from demucs_infer.engine.options import SeparationOptions
    from demucs_infer.read.mixture import Decoder

    file = AudioFile(path)
    for _ in Decoder(file, 44100, 2, SeparationOptions(max_duration=600)).chunks():
        pass
    _ = file.tags, file.info


TARGETS = {
    "th": Target(_archives, _mutate_archive, _run_checkpoint, "input.th"),
    "safetensors": Target(_safetensors, _mutate_safetensors, _run_checkpoint, "input.safetensors"),
    "bags": Target(_bags, mutate_words(YAML_WORDS), _read_bag, "bag.yaml"),
    "registry": Target(_registries, mutate_words(YAML_WORDS), _read_registry, "registry.yml"),
    "audio": Target(_sounds, mutate_bytes, _read_audio),
    "tracks": Target(_lists, mutate_words(SEPARATORS + NAMES + SCHEMES), _read_list),
    "templates": Target(_templates, mutate_words(FIELDS + SEPARATORS + NAMES), _read_template),
}


@dataclass(frozen=True)
class Findings:
    """The number of inputs that were tried, and the faults of some, by their numbers."""

    tried: int
    wrong: dict[int, str]


def fuzz(target: str, seconds: float, seed: int = SEED, inputs: int = sys.maxsize) -> Findings:
    """Try inputs of a target for some seconds, or up to a number, in a process.

    Another process goes on when it dies.
    """
    end = time.monotonic() + seconds
    number, wrong = 0, dict[int, str]()
    while time.monotonic() < end and number < inputs:
        words = [target, "--seed", seed, "--seconds", end - time.monotonic()]
        words += ["--from", number, "--inputs", inputs]
        options: Any = {"stderr": subprocess.DEVNULL, "cwd": Path(__file__).parents[2]}
        command = [sys.executable, "-m", "tests.tools.fuzz", *map(str, words)]
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options) as process,
            _Watch(process.pid) as watch,
        ):
            for line in process.stdout:
                watch.restart()
                head, _, text = line.partition(" ")
                number = int(head)
                if text.strip():
                    wrong[number] = text.strip()
        number += 1
        if process.returncode:
            wrong.setdefault(number - 1, _death(process.returncode))
    return Findings(number, wrong)


class _Watch:
    """Ends a process that takes more than `SECONDS` after `restart`, from outside.

    The time for which it waits for a processor, on a busy machine, does not count.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._start: float | None = None  # by its clock
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def restart(self) -> None:
        self._start = self._clock()

    def _clock(self) -> float:
        try:
            waited = int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[1])
        except (OSError, IndexError):
            waited = 0
        return time.monotonic() - waited / 1e9

    def _run(self) -> None:
        while not self._over.wait(0.5):
            if self._start is not None and self._clock() - self._start > SECONDS:
                os.kill(self.pid, signal.SIGALRM)
                return


def _death(status: int) -> str:
    if status == -signal.SIGALRM:
        return f"took more than {SECONDS} s"
    return f"the process died ({status})"


def _work(target: Target, seed: int, seconds: float, numbers: range) -> None:
    """Print each number before its input is tried, and the fault if there was one."""
    end = time.monotonic() + seconds
    with _inputs(target, seed) as inputs:
        _attempt(target, inputs(None))  # imports, which are not the inputs' fault
        for number in numbers:
            if time.monotonic() > end:
                return
            print(number, flush=True)
            path = inputs(number)
            before = _memory()
            fault = _attempt(target, path)
            grown = _memory() - before
            if grown > MEMORY:
                fault = f"took {grown / 1e6:.0f} MB"
            if fault:
                print(number, fault, flush=True)
            if grown > MEMORY and not _forget_peak():
                return


class _inputs:
    """A folder in which inputs are made. It is the current one while the block runs."""

    def __init__(self, target: Target, seed: int) -> None:
        self.target, self.seed = target, seed

    def __enter__(self) -> Callable[[int | None], Path]:
        self._folder = tempfile.TemporaryDirectory()
        self._before = Path.cwd()
        os.chdir(self._folder.name)
        self._seeds = self.target.seeds(Path(self._folder.name))
        return self._make

    def __exit__(self, *_: object) -> None:
        os.chdir(self._before)
        self._folder.cleanup()

    def _make(self, number: int | None) -> Path:
        path = Path(self._folder.name, self.target.name)
        random = Random(f"{self.seed} {number}")
        path.write_bytes(
            self._seeds[0] if number is None else self.target.mutate(random, self._seeds)
        )
        _forget_peak()
        return path


def _attempt(target: Target, path: Path) -> str:
    """Read an input, and return the fault in one line, or an empty text."""
    try:
        target.read(path)
    except DemucsInferError as exc:
        return f"more than one line: {exc}"[:200].replace("\n", " ") if "\n" in str(exc) else ""
    except Exception as exc:
        frame = traceback.extract_tb(exc.__traceback__)[-1]
        text = f"{type(exc).__name__}: {exc} ({Path(frame.filename).name}:{frame.lineno})"
        return " ".join(text.split()).encode("ascii", "backslashreplace").decode()[:200]
    return ""


def _memory() -> int:
    """Return the peak of this process in bytes since the peak was reset."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _forget_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _show(target: Target, seed: int, number: int, save: Path | None) -> None:
    with _inputs(target, seed) as inputs:
        path = inputs(number)
        data = path.read_bytes()
        print(f"{len(data)} bytes: {data[:500]!r}", flush=True)
        if save is not None:
            save.mkdir(parents=True, exist_ok=True)
            (save / f"{seed}-{number}").write_bytes(data)
        target.read(path)


def _options() -> Iterator[tuple[str, dict[str, object]]]:
    yield "target", {"choices": TARGETS}
    yield "--seconds", {"type": float, "default": 30.0}
    yield "--inputs", {"type": int, "default": sys.maxsize, "help": "how many at most"}
    yield "--seed", {"type": int, "default": SEED}
    yield (
        "--save",
        {"type": lambda text: Path(text).absolute(), "help": "folder for findings"},
    )
    yield "--only", {"type": int, "help": "the number of one input"}
    yield "--from", {"type": int, "dest": "start", "help": argparse.SUPPRESS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, options in _options():
        parser.add_argument(name, **options)
    args = parser.parse_args()
    target = TARGETS[args.target]
    if args.start is not None:
        _work(target, args.seed, args.seconds, range(args.start, args.inputs))
    elif args.only is not None:
        _show(target, args.seed, args.only, args.save)
    else:
        findings = fuzz(args.target, args.seconds, args.seed, args.inputs)
        print(f"{args.target}: {findings.tried} inputs, {len(findings.wrong)} wrong")
        for number, text in findings.wrong.items():
            print(f"    {number}: {text}")
            if args.save is not None:
                command = [sys.executable, "-m", "tests.tools.fuzz", args.target, "--only", number]
                command += ["--seed", args.seed, "--save", args.save]
                subprocess.run(list(map(str, command)), capture_output=True, check=False)


if __name__ == "__main__":
    main()
