"""The options of a separation.

`Separator`, `update_parameter`, `--help` and the docstrings are made of their fields. One frozen
`SeparationOptions` goes from the interface to the decoder, the engine and the backends. Importing
this module does not import PyTorch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..fields import COUNT, DURATION, OVERLAP, POSITIVE, SECONDS, TIME, WHOLE, check, option

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL = "htdemucs"
# Engines, each with its module in `backends`.
ENGINES = {"torch": "pytorch", "openvino": "openvino", "onnxruntime": "onnxruntime"}
PRECISIONS = ("float32", "bfloat16", "float16")
GRAPH_PRECISIONS = ("float32", "float16")  # of a network in ONNX
# Titles in --help.
HOW, RUNS, STEMS = "separation", "device and engine", "stems"
READ = "limits for tracks"

Callback = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class ModelOptions:
    """The model, and where to find it."""

    model: str = option(
        DEFAULT_MODEL,
        "name of a bag or signature of a model (see `list_models`), its file, or"
        " hf://[NAMESPACE/]NAME[@REVISION]",
        "",
    )
    repo: str | os.PathLike[str] | None = option(
        None,
        "folder of checkpoints (SIGNATURE[-CHECKSUM].th or .safetensors) and bags (NAME.yaml)"
        " to use instead of the released models",
        type=Path,
        metavar="DIR",
    )
    _: KW_ONLY
    cache_dir: str | os.PathLike[str] | None = option(
        None,
        "folder to keep released models in (default: DEMUCS_INFER_CACHE, or where PyTorch and"
        " demucs keep them, ~/.cache/torch/hub/checkpoints)",
        type=Path,
        metavar="DIR",
    )
    offline: bool | None = option(
        None,
        "never download models; those on this machine need no network anyway (also:"
        " DEMUCS_INFER_OFFLINE=1). Tracks by URL are still read",
        action="store_true",
    )


@dataclass(frozen=True)
class SeparationOptions:
    """The options of a separation, which `Separator.update_parameter` can change.

    Raises `OptionError` for a value out of range.
    """

    device: str | torch.device | None = option(
        None,
        "cpu, cuda, cuda:1, mps, or a device of another engine's, such as openvino:GPU or"
        " onnxruntime:directml (default: a GPU if there is one)",
        "-d",
        "--device",
        section=RUNS,
    )
    shifts: int = option(
        1,
        "average N passes with random offsets: slower by that factor, slightly better; 0: one pass"
        " without an offset, always the same result (default: %(default)s)",
        section=HOW,
        type=COUNT,
    )
    overlap: float = option(
        0.25,
        "part of a window that the next one covers, from 0 to less than 1 (default: %(default)s)",
        type=OVERLAP,
    )
    split: bool = option(
        True,
        "work window by window; --no-split: the whole track in one, which needs much memory, and a"
        " model that can do it",
        "--no-split",
        action="store_false",
        group="windows",
    )
    segment: float | None = option(
        None,
        "length of a window in seconds: less needs less memory (default: the model's)",
        type=SECONDS,
        group="windows",
    )
    jobs: int = option(
        0,
        "windows that run at once on a CPU: needs N times the memory (default: %(default)s, one)",
        "-j",
        "--jobs",
        section=RUNS,
        type=COUNT,
    )
    progress: bool = option(False, "show progress bars on standard error", "")
    callback: Callback | None = option(
        None, "called before and after each window with a dictionary, see `apply_model`", ""
    )
    callback_arg: Mapping[str, Any] | None = option(None, "entries to add to that dictionary", "")
    _: KW_ONLY
    stems: str | Sequence[str] | None = option(
        None,
        "only these stems: models of a bag that do not contribute to them are not run; a stem may"
        " be a sum with a name, as in vocals,instrumental=drums+bass+other; all: every source",
        section=STEMS,
        type=lambda text: text.split(","),
        metavar="STEM,...",
        group="stems",
    )
    start: float | None = option(
        None,
        "separate a file from this time on: 90, 1:30 or 1:02:03.5 (in Python seconds)",
        section=HOW,
        type=TIME,
    )
    duration: float | None = option(
        None, "separate as much of a file: 90, 1:30 or 1:02:03.5", type=DURATION
    )
    seed: int | None = option(
        None,
        "draw the offsets of the shifts of each track from this number: the same stems each time",
        section=HOW,
        type=WHOLE,
    )
    precision: str = option(
        "float32",
        "precision of the network: bfloat16 is faster on CPUs and GPUs that have it (on others,"
        " float32 is used), float16 on GPUs; the error is far too small to hear (default:"
        " %(default)s)",
        section=RUNS,
        choices=PRECISIONS,
    )
    engine: str = option(
        "torch",
        "library that runs the network; openvino is faster on a CPU, onnxruntime has providers for"
        " the GPUs of many makers (default: %(default)s)",
        choices=tuple(ENGINES),
    )
    compile: bool = option(
        False, "compile the network with PyTorch, which takes minutes: for many tracks on a GPU"
    )
    batch_size: int | None = option(
        None,
        "windows in one batch (default: as many as fit into a GPU's memory, else 1)",
        type=POSITIVE,
    )
    max_duration: float | None = option(
        None,
        "refuse tracks that are longer, as soon as that is known (default: any length)",
        section=READ,
        type=SECONDS,
    )
    strict: bool = option(
        False,
        "a track that is damaged or cut off is an error, instead of separated without the damage",
    )

    def __post_init__(self) -> None:
        check(self)

    def excerpt(self, rate: int) -> tuple[int, int | None]:
        """Return the first sample of a file at `rate` hertz, and the end or None for the file's."""
        first = round((self.start or 0) * rate)
        return first, None if self.duration is None else first + round(self.duration * rate)


@dataclass(frozen=True)
class SeparatorOptions(SeparationOptions, ModelOptions):
    """The options of a `Separator`, in the order of demucs."""
