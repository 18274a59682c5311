"""What all tests share: real data that may be absent, deterministic hypothesis, two threads or one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings

from rqtool.cli.main import sleep_soon

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"  # real data and real weights, too large to keep here

# Read when torch is first imported, here or in a command that a test starts: no import of torch only to set it.
os.environ["OMP_NUM_THREADS"] = "2"
sleep_soon()

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def _shared(folder: str, name: str) -> Path:
    path = SHARED / folder / name
    if not path.exists():
        pytest.skip(f"shared/{folder}/{name} is not beside the repository")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """shared_data("mnist.npz") is its path; the test is skipped where the file is absent."""
    return partial(_shared, "data")


@pytest.fixture(scope="session")
def shared_model() -> Callable[[str], Path]:
    """shared_model("lenetbn_mnist.pt") is its path; the test is skipped where the file is absent."""
    return partial(_shared, "models")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For modules whose tensors are so small that a second thread only waits: `pytestmark = pytest.mark.usefixtures("one_thread")`."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
