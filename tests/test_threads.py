from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from demucs_infer.engine.threads import worker_pool

from .helpers import run


def test_only_the_workers_of_the_pool_use_one_thread() -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with worker_pool(2) as pool:
            both = threading.Barrier(2)

            def threads() -> int:
                both.wait(60)
                return torch.get_num_threads()

            assert [job.result() for job in [pool.submit(threads) for _ in "ab"]] == [1, 1]
            assert torch.get_num_threads() == 3
            with ThreadPoolExecutor(1) as later:
                assert later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(usual)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_worker_does_not_start_openmp_threads() -> None:
    script = """
import os, torch
from concurrent.futures import ThreadPoolExecutor
from demucs_infer.engine.threads import worker_pool

def work():
    before = set(os.listdir("/proc/self/task"))
    x = torch.ones(2, 1, 1_000_000)
    torch.nn.functional.conv1d(x, torch.ones(4, 1, 50)).exp().sum()
    return len(set(os.listdir("/proc/self/task")) - before)

torch.set_num_threads(4)
for pool in (ThreadPoolExecutor(1), worker_pool(1)):
    print(pool.submit(work).result())
"""
    result = run("-c", script)
    assert result.returncode == 0, result.stderr
    usual, alone = map(int, result.stdout.split())
    assert usual > alone == 0
