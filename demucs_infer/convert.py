"""Convert a checkpoint to safetensors or ONNX: python -m demucs_infer.convert IN OUT."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engine.options import GraphOptions, add_flags, values_of
from .errors import DemucsInferError, ModelLoadingError, OptionError
from .log import fatal

if TYPE_CHECKING:
    from torch import nn

LARGEST_CONFIG = 2**16  # bytes
PLAIN = GraphOptions()

Write = Callable[["nn.Module", Mapping[str, Any], Path, GraphOptions], object]


def main(opts: Sequence[str] | None = None) -> None:
    """Run the command with `opts` (default: those of the process)."""
    parser = argparse.ArgumentParser(
        prog="python -m demucs_infer.convert",
        description="Convert a checkpoint, quantized or not, to safetensors, or its network to"
        " ONNX. The weights keep their precision in safetensors; the model is built once to see"
        " that they fit.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="IN", help="a .th or .safetensors file")
    parser.add_argument("target", type=Path, metavar="OUT", help="a .safetensors or .onnx file")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="CONFIG.yaml",
        help="what ZFTurbo's training toolkit was given for the model; IN is then its .ckpt file,"
        " of weights alone or with the state of a training",
    )
    add_flags(parser, GraphOptions)
    args = parser.parse_args(opts)
    try:
        graph = GraphOptions(**values_of(GraphOptions, args))
        convert(args.checkpoint, args.target, args.config, graph)
    except (DemucsInferError, OSError) as exc:
        fatal(exc)


def convert(
    checkpoint: Path,
    target: Path,
    config: Path | None = None,
    graph: GraphOptions = PLAIN,
) -> None:
    """Convert a checkpoint file; with `config`, one of ZFTurbo's training toolkit.

    Raises `ModelLoadingError`, `OptionError` for a name of `target` that tells no format and for
    options that its format does not have, or `OSError` if writing fails.
    """
    if target.suffix not in WRITERS:
        raise OptionError(f"{target}: the name must end in {' or '.join(WRITERS)}")
    if target.suffix != ".onnx" and graph != PLAIN:
        raise OptionError(f"{target}: precision and dynamic are for a name that ends in .onnx")
    from .hub.checkpoints import read_package
    from .states import build_model

    package = read_package(checkpoint) if config is None else read_trained(checkpoint, config)
    WRITERS[target.suffix](build_model(package, str(checkpoint)), package, target, graph)


def _write_safetensors(
    model: nn.Module, package: Mapping[str, Any], target: Path, graph: GraphOptions
) -> None:
    from .hub.checkpoints import write_safetensors

    write_safetensors(package, target)


def _write_onnx(
    model: nn.Module, package: Mapping[str, Any], target: Path, graph: GraphOptions
) -> None:
    from .export import export

    export(model, target, graph.precision, graph.dynamic)


WRITERS: dict[str, Write] = {".safetensors": _write_safetensors, ".onnx": _write_onnx}


def read_trained(checkpoint: Path, config: Path) -> dict[str, Any]:
    """Read a checkpoint of ZFTurbo's training toolkit and its configuration as a package.

    Raises `ModelLoadingError` for a model type that is not ours, or a file that cannot be read.
    """
    from .hub.checkpoints import Content, read_weights

    values = Content.read(config, "configuration", LARGEST_CONFIG).yaml()
    try:
        klass, kwargs = _described(values)
    except (ArithmeticError, LookupError, TypeError, ValueError) as exc:
        raise ModelLoadingError(f"{config}: is not a configuration of a model ({exc!r})") from exc
    except ModelLoadingError as exc:
        raise ModelLoadingError(f"{config}: {exc}") from exc
    return {"klass": klass, "args": (), "kwargs": kwargs, "state": read_weights(checkpoint)}


def _described(config: Any) -> tuple[Any, dict[str, Any]]:
    """The class and the options of the model that a configuration describes."""
    from .hub.pickles import ClassName
    from .states import MODEL_CLASSES
    from .utils import shortened

    families = {name.partition(".")[0]: name for name in MODEL_CLASSES}
    kind, training = config["model"], config["training"]
    if not isinstance(kind, str) or kind not in families:
        named = shortened(kind) if isinstance(kind, str) else "no model type by name"
        raise ModelLoadingError(f"has {named}, and can have {', '.join(families)}")
    options = {name: _number(value) for name, value in dict(config[kind]).items()}
    if options.get("num_subbands") == 1:  # an option of the toolkit's own network, without effect
        del options["num_subbands"]
    rate = training["samplerate"]
    segment = training["segment"] if "segment" in training else config["audio"]["chunk_size"] / rate
    given = {
        "sources": training["instruments"],
        "audio_channels": training["channels"],
        "samplerate": rate,
        "segment": segment,
    }
    return ClassName(f"demucs.{families[kind]}"), {**options, **given}


def _number(value: Any) -> Any:
    """The number in a text such as 1e-3, which is none in YAML 1.1 but in the toolkit's reader."""
    number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if number else value


if __name__ == "__main__":
    main()
