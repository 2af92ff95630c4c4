"""Threads beside the one that calls.

PyTorch's OpenMP gives each thread that works on tensors a team of its own, and once there are more
threads than cores, all teams wait for each other in the system instead of in a loop: a window of
htdemucs takes 1.7 instead of 1.4 s as soon as another thread has a team, were it idle.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


def worker_pool(workers: int, cores: int = 1) -> ThreadPoolExecutor:
    """A pool of `workers` threads, each with `cores` cores for its tensors."""
    return ThreadPoolExecutor(workers, initializer=_take_cores, initargs=(cores,))


def _take_cores(cores: int) -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(cores)
    # This is also what threads that start from now on begin with: only another one can put it back.
    other = threading.Thread(target=torch.set_num_threads, args=(usual,))
    other.start()
    other.join()
