"""The script behind docs/results.md: its decoder, its table, and that the table in the repository has its form."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from types import ModuleType

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image


@pytest.fixture(scope="module")
def experiments() -> ModuleType:
    spec = importlib.util.spec_from_file_location("experiments", REPOSITORY / "examples" / "experiments.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["experiments"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def result(tuned: float, ideal: float, agreement: float) -> dict:
    metrics = {"float_top1": 99.5, "ptq_top1": 99.0, "tuned_top1": tuned, "ideal_top1": ideal, "adc_loss": ideal - tuned, "agreement": agreement, "reads_per_mac": 1 / 9}
    macro = {"wl": 9, "in_bits": 4, "w_bits": 4, "adc_bits": 4, "codebook": "twos", "sign_scheme": "signed", "granularity": "layer"}
    return {"metrics": metrics, "macro": macro, "recipe": {"epochs": 2, "mode": "relaxed"}}


def test_a_row_is_mean_and_half_the_range_over_seeds(experiments: ModuleType) -> None:
    row = experiments.row("mnist-4-4-4", [result(99.4, 99.5, 100.0), {**result(99.5, 99.5, 99.9), "commit": "abc1234"}])
    assert row == (
        "| mnist-4-4-4 | 9 rows on, 4/4 bits, 4-bit ADC, twos, signed, step per layer | relaxed | 0.1111 | 2 | 2 | 99.50 ± 0.00 | 99.00 ± 0.00 | 99.45 ± 0.05 | 99.50 ± 0.00 | 0.05 ± 0.05 | 99.90 | abc1234, earlier |"
    )


def test_a_recipe_is_told_where_it_is_not_the_default(experiments: ModuleType) -> None:
    recipe = experiments.EXPERIMENTS["cifar-4-4-4-shift-flip"].recipe(3).to_dict()
    assert experiments.recipe_cell(recipe) == "ste, float teacher, shift-flip" and recipe["batch"] == 128 and recipe["seed"] == 3
    assert experiments.recipe_cell(experiments.EXPERIMENTS["mnist-4-4-4-two-stage"].recipe(0).to_dict()) == "ste, float teacher, 1 of the epochs with an ideal ADC first"
    assert experiments.recipe_cell({"epochs": 2, "mode": "ste"}) == "ste"  # a row from before the other settings existed


def test_a_twin_is_known_from_a_row_with_the_same_one(experiments: ModuleType, tmp_path) -> None:
    def known(name: str) -> float | None:
        return experiments.known_twin(name, 0, tmp_path)

    (tmp_path / "mnist-4-4-4-seed0.json").write_text(json.dumps(result(99.4, 99.55, 100.0)))
    assert known("mnist-4-4-4-relaxed") == known("mnist-4-4-4-column") == known("mnist-4-4-4-ideal-teacher") == 99.55
    assert known("mnist-4-4-4-no-teacher") is known("mnist-4-4-4-shift") is known("mnist-4-4-4-two-stage") is known("mnist-nthu-2019") is None
    (tmp_path / "mnist-4-4-4-no-teacher-seed0.json").write_text(json.dumps(result(99.4, 99.6, 100.0)))
    assert known("mnist-4-4-4-relaxed-no-teacher") == 99.6 and experiments.known_twin("mnist-4-4-4-relaxed-no-teacher", 1, tmp_path) is None


def test_the_report_lists_finished_rows_only(experiments: ModuleType, tmp_path) -> None:
    (tmp_path / "mnist-4-4-4-seed0.json").write_text(json.dumps(result(99.4, 99.5, 100.0)))
    text = experiments.report(tmp_path)
    assert text.count("| mnist-4-4-4 |") == 1 and "| mnist-nthu-2019 |" not in text
    assert "## CIFAR-10 (JPEG-75 copy), ResNet-20" in text


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


def test_the_published_table_is_the_scripts(experiments: ModuleType, tmp_path) -> None:
    published = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    assert published[: published.index("## MNIST, LeNet with batch norm")] == experiments.report(tmp_path).splitlines()[: published.index("## MNIST, LeNet with batch norm")]
