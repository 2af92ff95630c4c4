"""Cores of worker threads, and how little they change elsewhere."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from demucs_infer.threads import worker_pool

from .helpers import run


def test_workers_have_their_cores_and_nobody_else_is_touched() -> None:
    usual = torch.get_num_threads()
    with worker_pool(2, usual + 3) as pool:
        both = threading.Barrier(2)

        def cores() -> int:
            both.wait()
            return torch.get_num_threads()

        assert [job.result() for job in [pool.submit(cores) for _ in "ab"]] == [usual + 3] * 2
        assert torch.get_num_threads() == usual
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [usual]


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_worker_with_one_core_has_no_team() -> None:
    script = """
import os, sys, torch
from concurrent.futures import ThreadPoolExecutor
from demucs_infer.threads import worker_pool

def work():
    before = len(os.listdir("/proc/self/task"))
    x = torch.ones(2, 1, 1_000_000)
    torch.nn.functional.conv1d(x, torch.ones(4, 1, 50)).exp().sum()
    return len(os.listdir("/proc/self/task")) - before

torch.set_num_threads(4)
for pool in (ThreadPoolExecutor(1), worker_pool(1)):
    print(pool.submit(work).result())
"""
    result = run("-c", script)
    assert result.returncode == 0, result.stderr
    usual, alone = map(int, result.stdout.split())
    assert usual > 0
    assert alone == 0
