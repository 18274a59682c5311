"""The scripts behind docs/performance.md: their layers run on every plan, their tables say what was
measured. Nothing is timed here."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from rqtool.hardware.macro import Macro
from rqtool.kernels import cpu


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up, and bench_peers imports bench
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return load("bench")


def test_every_plan_of_the_tables_runs(bench: ModuleType) -> None:
    for options in bench.PLANS.values():
        bench.Layer(Macro(**options), batch=2, channels=8, size=6).forward(1)
    layer = bench.Layer(Macro(), batch=2, channels=8, size=6)
    layer.step(layer.noisy(), 1)
    layer.chunked()


def test_the_yardstick_computes_the_same_sums(bench: ModuleType) -> None:
    """With one row a read and a step of 1 the ADC changes nothing that fits its codes, so both give
    the same numbers."""
    layer = bench.Layer(Macro(wl=9, in_bits=1, w_bits=2, adc_bits=8), batch=2, channels=4, size=5)
    rate, (low, high) = np.ones_like(layer.spec.rate), (-128, 127)
    whole = bench.replace(layer.spec, rate=rate, lo=low * rate, hi=high * rate)
    convolution, _ = layer.convolutions()
    assert convolution() is None  # it is timed, not used
    x = torch.from_numpy(layer.codes[:, :, 1:-1, 1:-1].astype("float32"))
    expected = torch.nn.functional.conv2d(
        x, torch.from_numpy(layer.weight.astype("float32")).view(4, 4, 3, 3), padding=1
    )
    assert np.array_equal(
        cpu.forward(layer.codes, layer.weight, whole, 1, dot8=False), expected.numpy()
    )


def test_a_network_step_and_its_integer_program_run(bench: ModuleType) -> None:
    net = bench.Resnet(Macro(wl=144), batch=2)
    net.step(net.rewritten, True)()
    assert net.runner()().shape == (2, 10)


def test_ratios_are_medians_over_the_first_form(bench: ModuleType, monkeypatch) -> None:
    ticks = iter(np.cumsum([t for _ in range(5) for t in (0.0, 0.010, 0.0, 0.025)]))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(ticks)))
    rows = bench.ratios("wl 9", 1, {"F.conv2d": lambda: None, "ours": lambda: None}, 3)
    assert rows == [
        {
            "setting": "wl 9",
            "threads": 1,
            "form": "ours",
            "ratio": 2.5,
            "yardstick": "F.conv2d",
            "yardstick_ms": 10.0,
        }
    ]


def test_the_report_has_a_table_for_each_measured_group(bench: ModuleType) -> None:
    rows = [
        {
            "setting": "wl 9",
            "threads": t,
            "form": "ours",
            "ratio": 0.5 * t,
            "yardstick": "F.conv2d",
            "yardstick_ms": 8.0,
        }
        for t in (1, 2)
    ]
    machine = {"processor": "P", "cores": 2, "dot8": True, "torch": "2", "python": "3"}
    text = bench.report({"machine": machine, "repeats": 9, "rows": {"forward": rows}})
    assert (
        "| setting | form | 1 thread | 2 threads |\n|---|---|---|---|\n| wl "
        "9 | ours | 0.50 | 1.00 |" in text
    )
    assert text.count("## ") == 1
    json.dumps(bench.machine())


def test_the_plain_torch_forms_give_the_codes(bench: ModuleType) -> None:
    peers = load("bench_peers")
    for wl in (9, 16):
        layer = bench.Layer(Macro(wl=wl), batch=2, channels=4, size=6)
        peers.check(layer)
        found = peers.forms(layer, 1, True)
        assert list(found)[:4] == [
            "F.conv2d",
            "rqtool",
            "torch, loop over tiles",
            "torch, all partial sums at once",
        ]
        for form in found.values():
            form()
