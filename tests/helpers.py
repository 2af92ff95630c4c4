"""Models in both implementations, checkpoints, tracks, and calls of the command lines."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

import av
import demucs.demucs
import demucs.hdemucs
import demucs.htdemucs
import numpy as np
import pytest
import soundfile
import torch
import yaml
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from demucs_infer.boxes import find
from demucs_infer.demucs import Demucs
from demucs_infer.hdemucs import HDemucs
from demucs_infer.htdemucs import HTDemucs
from demucs_infer.separate import command

Command = Callable[..., subprocess.CompletedProcess[str]]

SOURCES = ["drums", "bass", "other", "vocals"]
FPS = 25  # of a video
FFMPEG_MAJOR = av.library_versions["libavcodec"][0] - 54  # of the libraries in PyAV
TOLERANCE = 1e-5  # of the reference's peak

TINY = {
    "sources": SOURCES,
    "channels": 8,
    "nfft": 1024,
    "depth": 3,
    "segment": 0.5,
    "samplerate": 8000,
    "t_layers": 2,
    "t_heads": 2,
    "bottom_channels": 16,
}
# Released models: our class, and the options that differ from the constructor's defaults.
HTDEMUCS = {"bottom_channels": 512, "dconv_mode": 3, "t_dropout": 0.02, "segment": Fraction(39, 5)}
SIX_STEMS = {**HTDEMUCS, "bottom_channels": 0, "sources": [*SOURCES, "guitar", "piano"]}
RELEASED = {
    **dict.fromkeys("955717e8 f7e0c4bc d12395a8 92cfc3b6 04573f0d".split(), (HTDemucs, HTDEMUCS)),
    "5c90dfd2": (HTDemucs, SIX_STEMS),
    **dict.fromkeys("75fc33f5 e51eebcc cfa93e08 fa0cb7f9 902315c2".split(), (HDemucs, {})),
    "a1d90b5c": (HDemucs, {"hybrid_old": True, "cac": False}),
    "5d2d6c55": (HDemucs, {"cac": False}),
    "c511e2ab": (HDemucs, {"hybrid_old": True, "cac": False, "norm_starts": 999}),
    "7d865c68": (HDemucs, {"norm_starts": 999, "multi_freqs": [0.1, 0.3], "multi_freqs_depth": 2}),
    **dict.fromkeys("0d19c1c6 7ecf8ec1 9a6b4851 1ef250f1".split(), (Demucs, {"rewrite": False})),
}
REFERENCE = {
    HTDemucs: demucs.htdemucs.HTDemucs,
    HDemucs: demucs.hdemucs.HDemucs,
    Demucs: demucs.demucs.Demucs,
}
SMALL = {"sources": SOURCES, "channels": 8, "samplerate": 8000, "segment": 0.5}
FAMILIES = {
    "htdemucs": (HTDemucs, TINY),
    "hdemucs": (HDemucs, {**SMALL, "nfft": 1024, "depth": 4, "dconv_lstm": 3, "dconv_attn": 3}),
    "bands": (HDemucs, {**SMALL, "nfft": 1024, "multi_freqs": [0.3], "dconv_mode": 3}),
    "demucs": (Demucs, {**SMALL, "depth": 4, "dconv_lstm": 3, "dconv_attn": 3}),
}


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give biases and gains values that show in the output (they start near zero)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                gain = name.endswith("scale") or ("norm" in name and name.endswith("weight"))
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise + gain)
    return model.eval()


def pair(ours: type, seed: int = 0, **options: object) -> tuple[nn.Module, nn.Module]:
    """The same model in the reference and here."""
    torch.manual_seed(seed)
    reference = shake(REFERENCE[ours](**options), seed)
    with torch.device("meta"):
        model = ours(**options).eval()
    # Quantized states depend on the order, too.
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in reference.named_parameters()]
    model.to_empty(device="cpu").load_state_dict(reference.state_dict())
    return reference, model


def fast_model(seed: int = 0) -> nn.Module:
    """A network of two layers of the reference, for tests that need a model but not its family."""
    options = {**SMALL, "channels": 4, "depth": 2, "dconv_mode": 0, "resample": False}
    return pair(Demucs, seed, **options)[0]


def released_pair(signature: str, **changes: object) -> tuple[nn.Module, nn.Module]:
    """A released architecture with random weights, in the reference and here."""
    model_class, options = RELEASED[signature]
    options = {"sources": SOURCES, **options, **changes}
    return pair(model_class, int(signature[:4], 16), **options)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    """Assert that the largest difference is within `tolerance` of the reference's peak."""
    assert ours.shape == theirs.shape
    assert torch.isfinite(ours).all()
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def assert_equal_models(
    family: type, options: Mapping[str, Any], length: int | None = None
) -> None:
    """Compare a model with the reference on two items of noise, by default of a full window."""
    theirs, ours = pair(family, **options)
    length = ours.valid_length(1) - 1 if length is None else length
    mix = torch.stack([noise(ours.audio_channels, length, seed) for seed in range(2)])
    with torch.no_grad():
        assert_close(ours(mix), theirs(mix))


def merged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Join options of a network. Bands need layers without a norm."""
    options = {name: value for row in rows for name, value in row.items()}
    return {**options, "norm_starts": 99} if "multi_freqs" in options else options


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is made meanwhile."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return made


def tone_with_gaps(length: int, samplerate: int = 8000) -> Tensor:
    """Two tones that are silent every other quarter of the time, as `[1, 2, T]` in float64."""
    time = torch.arange(length, dtype=torch.float64) / samplerate
    tone = 0.3 * torch.sin(2 * torch.pi * 220 * time) + 0.1 * torch.sin(2 * torch.pi * 1760 * time)
    tone = tone * ((4 * time).floor() % 2 == 0)
    return torch.stack([tone, 0.7 * tone])[None]


def archive(path: Path, data: bytes, **entries: bytes) -> Path:
    """A PyTorch archive around a pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        for name, content in entries.items():
            file.writestr(f"archive/data/{name}", content)
    return path


def save_package(path: Path, model: nn.Module, half: bool = False, **changes: object) -> Path:
    """Save `model` as the reference's training does."""
    args, kwargs = model._init_args_kwargs
    state = {k: v.half() if half else v for k, v in model.state_dict().items()}
    package = {
        "klass": type(model),
        "args": args,
        "kwargs": kwargs,
        "state": state,
        "training_args": {"epochs": 1},
    }
    torch.save({**package, **changes}, path)
    return path


def noise(channels: int, length: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randn(channels, length)).float() * 0.1


def environment() -> dict[str, str]:
    """Return the environment of processes that tests start."""
    return {**os.environ, "PYTHONWARNINGS": "ignore"}


def run(*arguments: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments` in a new process."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        **{"env": environment(), **kwargs},
    )


def separate(
    *arguments: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input: str | bytes = b"",
    main: Callable[[list[str]], object] = command,
    streams: Mapping[str, Any] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run our command line, or another `main`, in this process.

    `streams` may replace `stdin`, `stdout` and `stderr`, which are not captured then.
    Standard output that is not UTF-8 comes back with surrogates; `os.fsencode` gives its bytes.
    """
    before = Path.cwd()
    given = input.encode() if isinstance(input, str) else input
    captured = [io.TextIOWrapper(io.BytesIO(data), "utf-8") for data in (given, b"", b"")]
    used = {**dict(zip(("stdin", "stdout", "stderr"), captured)), **(streams or {})}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, env or {}))
        for name, stream in used.items():
            stack.enter_context(mock.patch.object(sys, name, stream))
        if cwd is not None:
            stack.callback(os.chdir, before)
            os.chdir(cwd)
        try:
            main([*map(str, arguments)])
            status = 0
        except SystemExit as exc:
            status = exc.code or 0
    for stream in captured:
        stream.flush()
    _, output, errors = (
        stream.buffer.getvalue().decode("utf-8", "surrogateescape") for stream in captured
    )
    return subprocess.CompletedProcess(arguments, status, output, errors)


class WriteAndFlush:
    """A standard error as programs with windows set it: an object with two methods."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def stems_of(folder: Path) -> set[str]:
    """Every file below `folder`, as a relative path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in files}


def json_lines(result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """Parse standard output as one JSON object per line."""
    return [json.loads(line) for line in result.stdout.splitlines()]


def assert_one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """The command failed with one line on standard error, which has `words` in it."""
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line and "%|" not in line]
    errors = [line for line in said if not line.startswith(("Separating", "Stems in"))]
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("demucs-infer: error: ")
    for word in words:
        assert word in errors[0]


@contextmanager
def limited_file_size(size: int) -> Iterator[None]:
    """Let files grow to `size` bytes only, as a full disk does."""
    resource = pytest.importorskip("resource", reason="needs the limits of POSIX")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def decibels(ours: Tensor, theirs: Tensor) -> float:
    """Return the level of the signal over the difference in dB."""
    return float(10 * torch.log10(theirs.square().mean() / (ours - theirs).square().mean()))


def lag(heard: np.ndarray, given: np.ndarray) -> int:
    """Return by how many samples `heard` `[T]` is behind `given` `[T]`."""
    size = 2 * max(len(heard), len(given))
    product = np.fft.rfft(heard, size) * np.conj(np.fft.rfft(given, size))
    peak = int(np.fft.irfft(product, size).argmax())
    return peak if peak < size // 2 else peak - size


def write_track(
    path: Path, seconds: float = 1.0, rate: int = 8000, channels: int = 2, gain: float = 1
) -> Path:
    """Write noise as a WAV file of floats. Names of different lengths sound different."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = gain * noise(channels, int(seconds * rate), seed=len(path.name))
    soundfile.write(path, samples.T.numpy(), rate, subtype="FLOAT")
    return path


def wav(seconds: float = 1.0, seed: int = 0) -> bytes:
    file = io.BytesIO()
    samples = noise(2, int(8000 * seconds), seed).T.numpy()
    soundfile.write(file, samples, 8000, subtype="FLOAT", format="WAV")
    return file.getvalue()


def video(path: Path, sound_at: float = 0.0, picture_at: float = 0.0, codec: str = "mpeg4") -> Path:
    """Three seconds of a picture and two of clicks, that start at these times."""
    frames = np.random.RandomState(0).randint(0, 255, (3 * FPS, 64, 96, 3), np.uint8)
    samples = np.zeros((2, 2 * 44_100), np.float32)
    samples[:, 4410::11_025] = 0.8
    with av.open(str(path), "w") as file:
        bf = "0" if codec == "wmv2" else "2"  # pictures that are decoded before their time
        picture = file.add_stream(codec, rate=FPS, options={"g": "12", "bf": bf})
        picture.width, picture.height, picture.pix_fmt = 96, 64, "yuv420p"
        sound_codec = "mp2" if path.suffix in (".mpg", ".vob") else "aac"
        stream = file.add_stream(sound_codec, rate=44_100, layout="stereo")
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.time_base = index + round(picture_at * FPS), Fraction(1, FPS)
            file.mux(picture.encode(frame))
        file.mux(picture.encode(None))
        frame = av.AudioFrame.from_ndarray(samples, "fltp", "stereo")
        frame.sample_rate, frame.pts = 44_100, round(sound_at * 44_100)
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def ffmpeg(*arguments: object) -> bytes:
    """Run FFmpeg's command and return its standard output."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs ffmpeg")
    command = ["ffmpeg", "-v", "error", "-nostdin", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def sound(path: Path, stream: int, length: int | None = None) -> np.ndarray:
    """Decode an audio stream with FFmpeg, as `[2, T]`."""
    data = ffmpeg("-i", path, "-map", f"0:a:{stream}", "-f", "f32le", "-ac", 2, "-")
    return np.frombuffer(data, np.float32).reshape(-1, 2).T[:, :length]


def probe(path: Path, *entries: str) -> Any:
    """Run ffprobe on a file and return its JSON."""
    if shutil.which("ffprobe") is None:
        pytest.skip("needs ffprobe")
    command = ["ffprobe", "-v", "error", "-of", "json", *entries, str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def stem_box(path: Path) -> dict[str, Any]:
    """The JSON of a stem file."""
    with path.open("rb") as file:
        box = find(file, b"moov", b"udta", b"stem")[2]
        file.seek(box.content)
        return json.loads(file.read(box.stop - box.content))


def publish(folder: Path, root: str, content: bytes, state: bytes = b"") -> None:
    """Write a registry of two released models, the bags `one` and `both`, and a community model."""
    digest, state_digest = (sha256(data).hexdigest() for data in (content, state))
    released = {
        name: {"description": f"the {name} model", "sha256": digest} for name in ("first", "second")
    }
    released["first"]["megabytes"] = 1
    foreign = {
        "description": "weights alone",
        "url": f"{root}/elsewhere/weights.ckpt",
        "sha256": state_digest,
        "source": "someone",
        "licence": "MIT",
        "architecture": {"klass": "demucs.htdemucs.HTDemucs", "kwargs": TINY},
    }
    files = "".join(f"{name}-{digest[:8]}.th\n" for name in released)
    (folder / "files.txt").write_text(f"root: models/\n{files}")
    members = {"one": ["first"], "both": ["first", "second"], "foreign": ["foreign_state"]}
    for name, models in members.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"models": models}))
    bags = {name: {"description": f"of {name}", "sources": SOURCES} for name in members}
    registry = {
        "root": f"{root}/",
        "embedded": {},
        "checkpoints": released,
        "community": {
            "checkpoints": {"foreign_state": foreign},
            "bags": {"foreign": bags.pop("foreign")},
        },
        "bags": bags,
    }
    (folder / "registry.yml").write_text(yaml.safe_dump(registry, sort_keys=False))
