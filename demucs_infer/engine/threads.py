"""Threads beside the one that calls.

PyTorch's OpenMP gives each thread that works on tensors a team of its own, and once there are more
threads than cores, all teams wait for each other in the system instead of in a loop: a window of
htdemucs takes 1.7 instead of 1.4 s as soon as another thread has a team, were it idle.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


def worker_pool(workers: int) -> ThreadPoolExecutor:
    """A pool of threads that work on their tensors alone, without a team."""
    return ThreadPoolExecutor(workers, initializer=_work_alone)


def _work_alone() -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    # This is also what threads that start from now on begin with: only another one can put it back.
    other = threading.Thread(target=torch.set_num_threads, args=(usual,))
    other.start()
    other.join()
