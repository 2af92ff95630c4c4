"""Convert a checkpoint to safetensors: python -m demucs_infer.convert IN OUT."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .errors import DemucsInferError
from .log import fatal


def main(opts: Sequence[str] | None = None) -> None:
    """Run the command with `opts` (default: those of the process)."""
    parser = argparse.ArgumentParser(
        prog="python -m demucs_infer.convert",
        description="Convert a .th checkpoint, quantized or not, to safetensors. The weights keep"
        " their precision; the model is built once to see that they fit.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="IN", help="a .th or .safetensors file")
    parser.add_argument("target", type=Path, metavar="OUT", help="a .safetensors file")
    args = parser.parse_args(opts)
    try:
        convert(args.checkpoint, args.target)
    except (DemucsInferError, OSError) as exc:
        fatal(exc)


def convert(checkpoint: Path, target: Path) -> None:
    """Convert a checkpoint file. Raises `ModelLoadingError`, or `OSError` if writing fails."""
    from .errors import OptionError
    from .hub.packages import read_package, write_safetensors
    from .states import load_model

    if target.suffix != ".safetensors":
        raise OptionError(f"{target}: the name must end in .safetensors")
    package = read_package(checkpoint)
    load_model(package)
    write_safetensors(package, target)


if __name__ == "__main__":
    main()
