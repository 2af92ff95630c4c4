"""Every exception that the package raises on purpose.

DemucsInferError
├── ModelLoadingError (RuntimeError)      a model name, a checkpoint file, a repository
│   └── DownloadError                     a checkpoint that cannot be fetched
├── AudioError
│   ├── LoadAudioError                    a track that cannot be read
│   └── SaveAudioError (OSError)          a stem that cannot be written
├── OptionError (ValueError)              a value that makes no sense where it was given
│   └── DeviceError (RuntimeError)        a device that this machine does not have
└── MissingDependencyError (ImportError)  an optional package that this task needs
"""

import argparse

from .log import printable


class DemucsInferError(Exception):
    """Base class of the package's exceptions; its text is one line, with a remedy."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ModelLoadingError(DemucsInferError, RuntimeError):
    """A model cannot be found, read, or built from its checkpoint."""


LoadModelError = ModelLoadingError  # the name under which `Separator` documents it


class DownloadError(ModelLoadingError):
    """A checkpoint cannot be fetched, or differs from the published one."""


class AudioError(DemucsInferError):
    """Base class of errors with an audio file."""


class LoadAudioError(AudioError):
    """A track cannot be read, or holds nothing that can be separated."""


class SaveAudioError(AudioError, OSError):
    """A stem cannot be written."""


class OptionError(DemucsInferError, ValueError, argparse.ArgumentTypeError):
    """An option has a value that is out of range, unknown, or not supported.

    If a `type` of argparse raises it, the parser shows its text.
    """


class DeviceError(OptionError, RuntimeError):
    """A device cannot be used. Programs catch it as PyTorch's error, and retry on the CPU."""


class MissingDependencyError(DemucsInferError, ImportError):
    """An optional dependency is not installed; the message has the pip command.

    The command names the packages themselves (`package`, with spaces between several): the name
    demucs-infer is another project's in the package index.
    """

    def __init__(self, package: str, purpose: str) -> None:
        # A shell would take brackets for a pattern.
        names = " ".join(f'"{name}"' if "[" in name else name for name in package.split())
        super().__init__(f"{purpose} needs {package}: pip install {names}")
