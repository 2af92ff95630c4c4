"""Tests of the package. Each worker of pytest-xdist computes on one thread."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # PyTorch reads this when it is first imported.
    os.environ["OMP_NUM_THREADS"] = "1"
