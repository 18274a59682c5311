"""The scripts behind docs/results.md: the decoder, the jobs, the tables and plots, and that those
in the repository come from its rows."""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

import rqtool
from rqtool.hardware.macro import Macro
from rqtool.train.finetune import Recipe


@pytest.fixture(scope="module")
def experiments() -> Iterator[ModuleType]:
    """tools/experiments.py as a module, with jobs, results and lines beside it."""
    sys.path.insert(0, str(REPOSITORY / "tools"))
    yield importlib.import_module("experiments")
    sys.path.remove(str(REPOSITORY / "tools"))


def result(
    tuned: float, ideal: float, agreement: float, commit: str = "abc1234", **recipe: object
) -> dict:
    metrics = {
        "float_top1": 99.5,
        "ptq_top1": 99.0,
        "tuned_top1": tuned,
        "ideal_top1": ideal,
        "adc_loss": ideal - tuned,
        "agreement": agreement,
        "reads_per_mac": 1 / 9,
    }
    return {
        "metrics": metrics,
        "macro": Macro().to_dict(),
        "recipe": Recipe(**{"teacher": "none", **recipe}).to_dict(),
        "seconds": 90.0,
        "commit": commit,
    }


def keep(rows: Path, name: str, found: dict, seed: int = 0) -> None:
    (rows / f"{name}-seed{seed}.json").write_text(json.dumps(found))


def test_a_row_is_mean_and_half_the_range_over_seeds(experiments: ModuleType) -> None:
    row = experiments.results.row(
        "mnist-4-layer", [result(99.4, 99.5, 100.0, "0123456"), result(99.5, 99.5, 99.9)]
    )
    assert row == (
        "| mnist-4-layer | 9 rows on, 4/4 bits, 4-bit ADC, twos, step per "
        "layer | ste | 0.1111 | 2 | 2 | 99.50 ± 0.00 | 99.00 ± 0.00 | 99.45 "
        "± 0.05 | 99.50 ± 0.00 "
        "| 0.05 | 0.05 | - | -0.59 to 0.69 | <= 0.03: open | 99.90 | 2 | 0123456, abc1234 |"
    )


def test_a_loss_has_its_errors_and_is_met_only_where_the_interval_says_so(
    experiments: ModuleType,
) -> None:
    def cells(*losses: float, goal: float | None = None, **metrics: object) -> list[str]:
        rows = [result(99.0, 99.0 + loss, 100.0) for loss in losses]
        return experiments.results.loss_cells(
            [{**r, "metrics": {**r["metrics"], **metrics}} for r in rows], goal
        )

    # sd .02, se .02 / sqrt(3), t 4.3027
    assert cells(0.08, 0.10, 0.12, goal=0.15) == [
        "0.10",
        "0.01",
        "-",
        "0.05 to 0.15",
        "<= 0.15: met",
    ]
    assert (
        cells(0.08, 0.10, 0.12, goal=0.1)[-1] == "<= 0.10: open"
        and cells(0.08, 0.10, 0.12, goal=0.05)[-1] == "<= 0.05: missed"
    )
    assert cells(0.06, 0.30, 0.54, goal=0.5) == [
        "0.30",
        "0.14",
        "-",
        "-0.30 to 0.90",
        "<= 0.50: open",
    ]
    assert cells(0.2, goal=0.5) == ["0.20", "-", "-", "-", "<= 0.50: open"]
    assert cells(0.2, goal=0.5, adc_loss_se=0.1, adc_loss_interval=[0.004, 0.396]) == [
        "0.20",
        "-",
        "0.10",
        "0.00 to 0.40",
        "<= 0.50: met",
    ]
    assert (
        cells(0.2, 0.2, adc_loss_se=None, adc_loss_interval=None)[2] == "-"
        and cells(0.2)[-1] == "-"
    )


def test_goals_are_those_of_fine_tuning_with_9_rows_on(experiments: ModuleType) -> None:
    goals = {name: job.goal() for name, job in experiments.EXPERIMENTS.items()}
    assert (
        goals["mnist-4"],
        goals["mnist-2-spread-long"],
        goals["cifar-3-free"],
        goals["cifar-nthu-2019-spread"],
    ) == (0.03, 0.15, 1.0, 0.5)
    assert (
        goals["mnist-4-relaxed"]
        is goals["cifar-wl128-4"]
        is goals["fashion-4"]
        is goals["cifar-4-ptq-free"]
        is goals["mnist-nthu-2019"]
        is None
    )


def test_a_recipe_is_told_where_it_is_not_the_default(experiments: ModuleType) -> None:
    def told(name: str) -> str:
        return experiments.results.recipe_cell(experiments.EXPERIMENTS[name].recipe(3).to_dict())

    assert (
        told("fashion-2-spread-shift") == "ste, float teacher, shift"
        and told("mnist-4-relaxed") == "relaxed"
    )
    assert (
        told("fashion-2-spread-two-stage")
        == "ste, float teacher, 1 of the epochs with an ideal ADC first"
    )
    assert told("fashion-2-spread-zero") == "ste, float teacher, zeros learned"
    assert told("cifar-2-matched") == "ste, float teacher, matched 300"
    assert [told(f"mnist-3-ptq-{name}") for name in ("uniform", "peak", "percentile")] == [
        "least squared error",
        "largest sum",
        "99.9 %",
    ]
    assert experiments.EXPERIMENTS["cifar-4"].recipe(3).to_dict()["batch"] == 128


def test_a_setting_says_whose_the_steps_and_levels_are(experiments: ModuleType) -> None:
    def told(**macro: object) -> str:
        return experiments.results.setting_cell(Macro(**macro).to_dict()).removeprefix(
            "9 rows on, 4/4 bits, 4-bit ADC, twos, "
        )

    assert [told(), told(levels="free"), told(levels="free", granularity="column", pack="spread")] == [
        "step per layer", "free levels", "free levels, step per column, rows spread",
    ]  # fmt: skip


def test_every_job_has_a_macro_a_recipe_and_a_twin(experiments: ModuleType) -> None:
    for experiment in experiments.EXPERIMENTS.values():
        assert (
            experiment.section in experiments.results.ABOUT
            and experiment.twin()[0] in experiments.TASKS
        )


def test_a_twin_is_known_from_a_row_with_the_same_one(
    experiments: ModuleType, tmp_path: Path
) -> None:
    def known(name: str, seed: int = 0) -> float | None:
        return experiments.known_twin(name, seed, tmp_path)

    keep(tmp_path, "mnist-4", result(99.4, 99.55, 100.0))
    assert known("mnist-2-free") == known("mnist-wl128-5") == 99.55
    assert (
        known("mnist-4-relaxed")
        is known("mnist-4-spread-long")
        is known("mnist-nthu-2019")
        is known("mnist-4-ptq-free")
        is None
    )
    keep(tmp_path, "mnist-4-ste", result(99.4, 99.6, 100.0))
    assert known("mnist-4-relaxed") == 99.6 and known("mnist-4-relaxed", 1) is None
    keep(tmp_path, "fashion-2-spread", result(88.0, 90.0, 100.0))
    assert (
        known("fashion-2-spread-ideal-teacher")
        == known("fashion-2-spread-relaxed")
        == known("fashion-2-spread-zero")
        == 90
    )
    assert (
        known("fashion-2-spread-alone")
        is known("fashion-2-spread-shift")
        is known("fashion-2-spread-two-stage")
        is None
    )


def test_the_report_and_the_plots_show_finished_rows_only(
    experiments: ModuleType, tmp_path: Path
) -> None:
    keep(tmp_path, "mnist-4", result(99.4, 99.5, 100.0))
    keep(tmp_path, "mnist-3", result(99.2, 99.5, 100.0))
    keep(tmp_path, "cifar-4-ptq-free", result(80.0, 88.0, 100.0, epochs=0))
    experiments.results.write(tmp_path, tmp_path)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert (
        text.count("| mnist-4 |") == 1
        and "| mnist-nthu-2019 |" not in text
        and "The four modes" not in text
    )
    assert (
        "![results-mnist](results-mnist.svg)" in text
        and not (tmp_path / "results-cifar.svg").exists()
    )
    drawing = ElementTree.parse(tmp_path / "results-mnist.svg").getroot()
    assert len(drawing.findall("{*}polyline")) == 2 and len(drawing.findall("{*}circle")) == 4
    words = {t.text for t in drawing.findall("{*}text")}
    assert {
        "fine-tuned, step per column",
        "twin with an ideal ADC",
    } <= words and "fine-tuned, free levels" not in words


def test_what_rqtool_refuses_is_kept_and_told_under_the_table(
    experiments: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def run(name: str, seed: int, *_: object) -> dict:
        calls.append((name, seed))
        if name == "mnist-3-ptq-full":
            raise rqtool.RqError("a channel of it hardly varies")
        return result(99.4, 99.5, 100.0, epochs=0)

    monkeypatch.setattr(experiments, "run", run)
    monkeypatch.setattr(experiments, "data_of", lambda *_: None)
    monkeypatch.setattr(experiments.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(experiments, "commit", lambda: "abc1234")
    names = ["mnist-3-ptq-full", "mnist-3-ptq-peak"]
    for _ in range(2):
        experiments.run_seed(names, 0, 1, tmp_path, tmp_path)
    assert calls == [(name, 0) for name in names]
    assert json.loads((tmp_path / "mnist-3-ptq-full-seed0.json").read_text()) == {
        "commit": "abc1234",
        "refused": "a channel of it hardly varies",
    }
    assert experiments.known_twin("mnist-3-ptq-uniform", 0, tmp_path) == 99.5
    experiments.results.write(tmp_path, tmp_path)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert (
        "Refused:\n\n- mnist-3-ptq-full: a channel of it hardly varies\n" in text
        and text.count("| mnist-3-ptq-peak |") == 1
        and "| mnist-3-ptq-full |" not in text
    )


def test_jpeg_files_back_to_back_are_decoded(experiments: ModuleType) -> None:
    blobs = []
    for grey in (0, 200):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (grey,) * 3).save(file, "JPEG", quality=95)
        blobs.append(file.getvalue())
    jpeg = np.frombuffer(b"".join(blobs), np.uint8)
    images = experiments.decode(jpeg, np.cumsum([0, *map(len, blobs)]))
    assert images.shape == (2, 3, 8, 8) and images.dtype == np.uint8
    assert [int(image.mean()) for image in images] == [0, 200]


def test_the_published_page_and_plots_are_the_scripts(
    experiments: ModuleType, tmp_path: Path
) -> None:
    experiments.results.write(REPOSITORY / "docs" / "results", tmp_path)
    published = sorted(
        path.name for path in (REPOSITORY / "docs").glob("results*") if path.is_file()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == published
    for name in published:
        assert (tmp_path / name).read_text(encoding="utf-8") == (
            REPOSITORY / "docs" / name
        ).read_text(encoding="utf-8")
