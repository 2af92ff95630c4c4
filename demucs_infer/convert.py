"""Convert a checkpoint to safetensors or ONNX: python -m demucs_infer.convert IN OUT.

An ONNX file maps real tensors of fixed shapes (but any batch with `--dynamic`) to real tensors. Its
metadata describe the transforms around the network: `recipe` in words, and the numbers it needs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .engine.options import GRAPH_PRECISIONS
from .errors import DemucsInferError, ModelLoadingError, OptionError
from .fields import add_flags, option, values_of
from .log import fatal

if TYPE_CHECKING:
    from torch import Tensor, nn

LARGEST_CONFIG = 2**16  # bytes
SUFFIXES = (".safetensors", ".onnx")

SPECTRAL_RECIPE = """\
Input: `mix` [1, channels, samples], float32, at `samplerate`.
Pad it by 3/2 hop on the left and 3/2 hop plus the rest of a whole number of hops on the right
(hop = nfft / 4), with a reflection, or with zeros if `zero_padded`. Take the STFT with a periodic
Hann window of nfft samples, frames centred, divided by the square root of nfft. Drop the top bin
and two frames at each end. If `complex_as_channels`, real and imaginary part of each channel are
channels, in turn; else take the magnitude. This is x. Both x and mix are normalized: less their
mean, over 1e-5 plus their (unbiased) standard deviation.
The outputs hold the channels of each source in turn; scale them back, each by its own input's
mean and deviation. Spectra without complex parts take the phase of the mixture. Put a zero top bin
back, invert the STFT, undo the padding, and add the time output to get the stems."""

TIME_RECIPE = """\
Input: a mixture [1, channels, samples], float32, at `samplerate`. If `normalize`, subtract the mean
of its mono sum and divide by 1e-5 plus that sum's (unbiased) standard deviation. Pad it with zeros
on both sides to the model's valid length. If `resample`, resample it by 2 (julius.resample_frac).
The output holds the channels of each source in turn: resample it by 1/2, trim it evenly, and scale
it back."""


@dataclass(frozen=True)
class GraphOptions:
    """The options of a network in ONNX, see `export`."""

    precision: str = option(
        "float32",
        "precision of weights and network in ONNX; inputs and outputs stay in float32 (default:"
        " %(default)s)",
        choices=GRAPH_PRECISIONS,
    )
    dynamic: bool = option(False, "take any batch in ONNX, not one window")


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
        help="the model's configuration in ZFTurbo's training toolkit; IN is then its .ckpt file,"
        " with weights alone or with the state of a training",
    )
    add_flags(parser, GraphOptions)
    args = parser.parse_args(opts)
    try:
        convert(args.checkpoint, args.target, args.config, values_of(GraphOptions, args))
    except (DemucsInferError, OSError) as exc:
        fatal(exc)


def convert(checkpoint: Path, target: Path, config: Path | None, graph: dict[str, Any]) -> None:
    """Convert the file `checkpoint` to the file `target`, safetensors or ONNX.

    `config` is that of the training toolkit, and `graph` has the options of `export`. Raises
    `OptionError` for another suffix, `ModelLoadingError` if the checkpoint cannot be read, and
    the errors of `export`.
    """
    if target.suffix not in SUFFIXES:
        raise OptionError(f"{target}: the name must end in {' or '.join(SUFFIXES)}")
    if target.suffix != ".onnx" and GraphOptions(**graph) != GraphOptions():
        raise OptionError(f"{target}: precision and dynamic are for a name that ends in .onnx")
    from .hub.checkpoints import read_package, write_safetensors
    from .states import build_model

    package = read_package(checkpoint) if config is None else read_trained(checkpoint, config)
    model = build_model(package, str(checkpoint))
    if target.suffix == ".onnx":
        export(model, target, **graph)
    else:
        write_safetensors(package, target)


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    precision: str = "float32",
    dynamic: bool = False,
) -> Path:
    """Write the network of `model`, for windows of its `segment`, to the ONNX file `path`.

    Weights and network have `precision` ("float32" or "float16"), inputs and outputs float32. With
    `dynamic` they have any batch.

    Raises `MissingDependencyError` without the extra `onnx`, `OptionError` for another precision, a
    PyTorch that is too old or a model that ONNX cannot express, `OSError` if the file cannot be
    written.
    """
    import torch

    from .engine.backends.onnxruntime import network_graph
    from .utils import atomic_write

    path, ours, example = Path(path), cast(Any, model), list[torch.Tensor]()
    length = int(ours.segment * ours.samplerate)

    def network(*inputs: Tensor) -> tuple[Tensor, ...]:
        """Keep the network's inputs for a window as the example of their shapes."""
        example.extend(inputs)
        return ours.network(*inputs)

    with torch.no_grad():
        silence = torch.zeros(1, ours.audio_channels, length, device="cpu", dtype=torch.float32)
        ours(silence, network=network)
    graph = network_graph(ours, example, precision, dynamic)
    options = ours.options
    facts = {"sources": ours.sources, "samplerate": ours.samplerate, "samples": length}
    facts["channels"] = ours.audio_channels
    if hasattr(options, "nfft"):
        facts |= {"nfft": options.nfft, "complex_as_channels": options.cac}
        facts["zero_padded"] = getattr(options, "hybrid_old", False)
        recipe = SPECTRAL_RECIPE
    else:
        facts |= {"normalize": options.normalize, "resample": options.resample}
        recipe = TIME_RECIPE
    texts = {"recipe": recipe, "precision": precision, "batch": "any" if dynamic else "1"}
    for name, value in (texts | {name: json.dumps(fact) for name, fact in facts.items()}).items():
        graph.metadata_props.add(key=name, value=value)
    with atomic_write(path) as temporary:
        temporary.write_bytes(graph.SerializeToString())
    return path


def read_trained(checkpoint: Path, config: Path) -> dict[str, Any]:
    """Read a checkpoint of ZFTurbo's training toolkit and its configuration as a package.

    Raises `ModelLoadingError` for an unknown model type, or a file that cannot be read.
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
    """Return the class and the options of the model that a configuration describes."""
    from .hub.pickles import ClassName
    from .states import MODEL_CLASSES
    from .utils import shortened

    families = {name.partition(".")[0]: name for name in MODEL_CLASSES}
    kind, training = config["model"], config["training"]
    if not isinstance(kind, str) or kind not in families:
        named = shortened(kind) if isinstance(kind, str) else "no name of a model type"
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
    """Return the number in a text such as 1e-3, which only YAML 1.1 does not read as a number."""
    number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if number else value


if __name__ == "__main__":
    main()
