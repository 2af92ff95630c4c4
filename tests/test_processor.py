from __future__ import annotations

import pytest
import torch

from demucs_infer.engine import processor

from .helpers import environment, run


@pytest.mark.parametrize(
    ("capability", "of_intel", "faster"),
    [("AVX512", False, True), ("AVX512", True, False), ("AVX2", False, False)],
)
def test_onednn_is_faster_where_mkl_does_not_use_avx512(
    capability: str, of_intel: bool, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "X86", True)
    monkeypatch.setattr(processor, "_is_of_intel", lambda: of_intel)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert processor.onednn_is_faster() == faster


@pytest.mark.slow
def test_onednn_is_not_faster_if_the_environment_excludes_avx512() -> None:
    script = "from demucs_infer.engine.processor import onednn_is_faster; print(onednn_is_faster())"
    result = run("-c", script, env={**environment(), "ATEN_CPU_CAPABILITY": "avx2"})
    assert result.stdout == "False\n", result.stderr
