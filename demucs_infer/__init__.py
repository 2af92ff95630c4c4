"""Demucs models for music source separation, for inference only.

The command line is `demucs-infer`, the Python interface `demucs_infer.api.Separator`. Importing
this package does not import PyTorch.
"""

__version__ = "5.0.0"
