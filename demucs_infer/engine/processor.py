"""What the processor can do, as far as the environment lets it be used."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

import torch

from ..compat import has_bfloat16_instructions

X86 = platform.machine().lower() in ("x86_64", "amd64")
# Variables, with values at which a library uses no instruction for bfloat16.
ONEDNN = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
ATEN = ("ATEN_CPU_CAPABILITY",)
_WITHOUT = {
    **dict.fromkeys(
        ONEDNN, "SSE41 AVX AVX2 AVX2_VNNI AVX2_VNNI_2 AVX512_CORE AVX512_CORE_VNNI".split()
    ),
    **dict.fromkeys(ATEN, ("DEFAULT", "AVX2")),
}


def limit_on_bfloat16(*variables: str) -> str | None:
    """Say which of `variables` keeps bfloat16's instructions from being used, if one does."""
    for name in variables:
        value = os.environ.get(name, "")
        if value.upper() in _WITHOUT[name]:
            return f"{name}={value} leaves out the instructions for it"
    return None


@functools.cache
def _is_of_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux; Apple's computers have no other x86 processor
        return platform.system() == "Darwin" or "GenuineIntel" in platform.processor()


def onednn_is_faster() -> bool:
    """Tell if products of matrices are faster by oneDNN than by MKL.

    MKL takes AVX-512 only on processors by Intel. It is as good where there is no AVX-512.
    """
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return X86 and wide and not _is_of_intel() and torch.backends.mkldnn.is_available()


def why_no_bfloat16() -> str | None:
    """Say why PyTorch's bfloat16 would not be faster than float32 here; None where it is."""
    has = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    limit = limit_on_bfloat16(*ONEDNN, *ATEN) if X86 else None
    if limit is None and (not has or (X86 and not has_bfloat16_instructions())):
        return "this processor has no instructions for it"
    return limit
