"""Mutated inputs end in an error of ours, in little memory and time."""

from __future__ import annotations

import sys

import pytest

from .tools.fuzz import TARGETS, fuzz


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory through /proc")
@pytest.mark.parametrize("target", TARGETS)
def test_mutated_inputs(target: str) -> None:
    findings = fuzz(target, 5)
    assert findings.tried > 10
    assert not findings.wrong
