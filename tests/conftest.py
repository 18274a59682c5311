"""What all tests share: groups, real data that may be absent, deterministic hypothesis, two threads
or one."""

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

# The groups of each file; pyproject.toml says what they mean. `slow` comes beside another group.
GROUPS = {
    "test_adc": "numerics",
    "test_alarms": "files slow",
    "test_api": "files slow",
    "test_assign": "numerics slow",
    "test_audit": "unit",
    "test_augment": "unit",
    "test_bench": "unit slow",
    "test_calibrate": "numerics slow",
    "test_capture": "unit",
    "test_chain": "numerics slow",
    "test_cli": "files slow",
    "test_cli_docs": "files slow",
    "test_converter": "numerics",
    "test_correction": "numerics slow",
    "test_count": "unit",
    "test_data": "files",
    "test_diagnose": "numerics slow",
    "test_distill": "numerics slow",
    "test_docs": "files slow",
    "test_doors": "files slow",
    "test_examples": "files slow",
    "test_experiments": "files",
    "test_export": "numerics slow",
    "test_finetune": "numerics slow",
    "test_folded": "numerics slow",
    "test_freeze": "numerics slow",
    "test_golden": "numerics",
    "test_grids": "numerics slow",
    "test_groups": "unit",
    "test_heap": "unit",
    "test_house": "unit",
    "test_kernels": "numerics slow",
    "test_layout": "files slow",
    "test_load": "files",
    "test_macro": "unit",
    "test_onnx_adc": "numerics slow",
    "test_other_networks": "files slow",
    "test_paired": "unit",
    "test_plan": "unit",
    "test_planes": "numerics",
    "test_prove": "numerics slow",
    "test_quantizers": "numerics",
    "test_reads": "numerics slow",
    "test_rates": "numerics slow",
    "test_real": "numerics slow",
    "test_relax": "numerics",
    "test_report": "unit",
    "test_run": "numerics slow",
    "test_served": "numerics slow",
    "test_shades": "files",
    "test_soft": "numerics slow",
    "test_spread": "numerics slow",
    "test_stages": "numerics slow",
    "test_state": "files slow",
    "test_storage": "files",
    "test_wrap": "unit",
}

# Read when torch is first imported, here or in a command that a test starts: no import of torch
# only to set it.
os.environ["OMP_NUM_THREADS"] = "2"
sleep_soon()

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test with the groups of its file."""
    for item in items:
        for group in GROUPS.get(item.path.stem, "").split():
            item.add_marker(group)


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
    """For modules whose tensors are so small that a second thread only waits: `pytestmark =
    pytest.mark.usefixtures("one_thread")`."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
