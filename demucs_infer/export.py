"""Write a model's network as ONNX: python -m demucs_infer.export IN OUT.onnx

What is written maps real tensors of a fixed shape, but for the batch if that is wanted, to real
tensors. The recipe of the transforms around it is in the file's metadata: `recipe` in words, and
what it needs in numbers.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .engine.backends.graph import network_graph
from .engine.model import Model
from .engine.options import GraphOptions, add_flags, values_of
from .errors import DemucsInferError, OptionError
from .log import fatal
from .states import load_model
from .utils import appearing

SPECTRAL_RECIPE = """\
Input: `mix` [1, channels, samples], float32, at `samplerate`.
Pad it by 3/2 hop on the left and 3/2 hop plus what makes a whole number of hops on the right
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


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    precision: str = "float32",
    dynamic: bool = False,
) -> Path:
    """Write the network of `model`, for windows of its `segment`, to `path`.

    Weights and network are in `precision` ("float32" or "float16"), inputs and outputs in float32;
    `dynamic`: they have any batch.

    Raises `MissingDependencyError` without the extra `onnx`, `OptionError` for another precision, a
    PyTorch that is too old or a model that ONNX cannot express, `OSError` if the file cannot be
    written.
    """
    path, ours = Path(path), cast(Any, model)
    graph = network_graph(ours, _example(ours), precision, dynamic)
    metadata = _metadata(ours) | {"precision": precision, "batch": "any" if dynamic else "1"}
    for name, value in metadata.items():
        graph.metadata_props.add(key=name, value=value)
    with appearing(path) as temporary:
        temporary.write_bytes(graph.SerializeToString())
    return path


def _example(model: Model) -> list[Tensor]:
    """What the network is given for a window."""
    length = int(model.segment * model.samplerate)
    seen: list[Tensor] = []

    def network(*inputs: Tensor) -> tuple[Tensor, ...]:
        seen.extend(inputs)
        return model.network(*inputs)

    with torch.no_grad():
        silence = torch.zeros(1, model.audio_channels, length, dtype=torch.float32, device="cpu")
        model(silence, network=network)
    return seen


def _metadata(model: Model) -> dict[str, str]:
    options = model.options
    facts = {
        "sources": model.sources,
        "samplerate": model.samplerate,
        "channels": model.audio_channels,
        "samples": int(model.segment * model.samplerate),
    }
    if hasattr(options, "nfft"):
        zeros = getattr(options, "hybrid_old", False)
        facts |= {"nfft": options.nfft, "complex_as_channels": options.cac, "zero_padded": zeros}
        recipe = SPECTRAL_RECIPE
    else:
        facts |= {"normalize": options.normalize, "resample": options.resample}
        recipe = TIME_RECIPE
    return {"recipe": recipe, **{name: json.dumps(value) for name, value in facts.items()}}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demucs_infer.export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="IN", help="a .th or .safetensors file")
    parser.add_argument("out", type=Path, metavar="OUT", help="the .onnx file to write")
    add_flags(parser, GraphOptions)
    args = parser.parse_args(arguments)
    try:
        if args.out.suffix != ".onnx":
            raise OptionError(f"{args.out}: the name must end with .onnx")
        export(load_model(args.checkpoint), args.out, **values_of(GraphOptions, args))
    except (DemucsInferError, OSError) as exc:
        fatal(exc)


if __name__ == "__main__":
    main()
