"""No input of a stranger ends in a traceback that is not ours, takes much memory, or lasts."""

from __future__ import annotations

import sys

import pytest

from .tools.fuzz import TARGETS, fuzz


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's account of memory")
@pytest.mark.parametrize("target", TARGETS)
def test_mutated_inputs(target: str) -> None:
    findings = fuzz(target, 30)
    assert findings.tried > 10
    assert not findings.wrong
