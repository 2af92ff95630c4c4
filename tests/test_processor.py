from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from demucs_infer.engine import processor

SCRIPT = "from demucs_infer.engine.processor import onednn_is_faster as f; print(f())"


@pytest.mark.parametrize(
    ("capability", "of_intel", "faster"),
    [("AVX512", False, True), ("AVX512", True, False), ("AVX2", False, False)],
)
def test_products_by_onednn_where_mkl_leaves_instructions_out(
    capability: str, of_intel: bool, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "X86", True)
    monkeypatch.setattr(processor, "_is_of_intel", lambda: of_intel)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert processor.onednn_is_faster() == faster


def test_the_environment_can_leave_instructions_out() -> None:
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=env, stdout=-1, text=True)
    assert result.stdout == "False\n"
