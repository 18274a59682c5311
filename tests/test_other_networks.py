"""The scripts that judge the defaults on other networks: folding, data, rows and tables."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rqtool

pytestmark = pytest.mark.usefixtures("one_thread")
TOOLS = REPOSITORY / "tools"


@pytest.fixture(scope="module")
def tool() -> Iterator[Callable[[str], ModuleType]]:
    """tool("networks") is tools/networks.py as a module."""
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def networks(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("networks")


def lived(net: nn.Module, seed: int = 0) -> nn.Module:
    """The network with batch norms that are far from the identity, in eval mode."""
    torch.manual_seed(seed)
    for norm in [m for m in net.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]:
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.2, 3)
        if norm.affine:
            nn.init.uniform_(norm.weight, -2, 2)
            nn.init.uniform_(norm.bias, -1, 1)
    return net.eval()


def norms_in(net: nn.Module) -> int:
    return sum(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in net.modules())


@torch.no_grad()
def apart(one: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    """The largest difference of scores, as a share of the largest score."""
    scores = one(x)
    return float((scores - other(x)).abs().max() / scores.abs().max())


# -- folding -------------------------------------------------------------------------------------
@st.composite
def nets(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    """A chain of layers, each with or without bias, batch norm and activation; and inputs."""
    conv, norm, shape = draw(st.sampled_from([
        (nn.Conv1d, nn.BatchNorm1d, (9,)), (nn.Conv2d, nn.BatchNorm2d, (7, 6)),
        (nn.Linear, nn.BatchNorm1d, ()),
    ]))  # fmt: skip
    widths = [4 * n for n in draw(st.lists(st.integers(1, 3), min_size=2, max_size=4))]
    layers: list[nn.Module] = []
    for into, out in zip(widths, widths[1:]):
        sizes = {} if conv is nn.Linear else {"kernel_size": 3, "padding": 1}
        if conv is not nn.Linear:
            sizes |= {"stride": draw(st.integers(1, 2)), "groups": draw(st.sampled_from([1, 4]))}
        layers.append(conv(into, out, bias=draw(st.booleans()), **sizes))
        if draw(st.booleans()):
            layers.append(norm(out, affine=draw(st.booleans())))
        if draw(st.booleans()):
            layers.append(draw(st.sampled_from([nn.ReLU, nn.Hardtanh]))())
    seed = draw(st.integers(0, 99))
    net = lived(nn.Sequential(*layers), seed)
    return net, torch.randn(5, widths[0], *shape)


@settings(max_examples=60)
@given(net_and_inputs=nets())
def test_a_folded_chain_computes_the_same(networks, net_and_inputs):
    net, x = net_and_inputs
    before = {name: value.clone() for name, value in net.state_dict().items()}
    folded = networks.fold(net)
    assert norms_in(folded) == 0 and apart(net.double(), folded.double(), x.double()) < 1e-5
    after = net.float().state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(("factory", "weights", "shape"), [
    ("lenet_bn", "lenetbn_mnist.pt", (1, 28, 28)),
    ("resnet20", "resnet20_cifar10jpeg_finetuned.pt", (3, 32, 32)),
])  # fmt: skip
def test_reference_networks_fold_to_the_same(networks, shared_model, factory, weights, shape):
    shared = shared_model(weights).parent.parent
    net = getattr(networks.reference_models(shared), factory)()
    net.load_state_dict(torch.load(shared_model(weights), weights_only=True))
    folded, x = networks.fold(net.eval()), torch.rand(20, *shape)
    assert norms_in(net) > 0 == norms_in(folded)
    with torch.no_grad():
        assert torch.allclose(net(x), folded(x), rtol=0, atol=1e-4)


def test_every_network_with_batch_norm_can_be_folded_whole(networks):
    for name, kind in networks.KINDS.items():
        if kind.weights is None:
            net, shape = lived(kind.build()), (2, 128) if kind.data == "waves" else (1, 28, 28)
            folded, x = networks.fold(net), torch.randn(3, *shape)
            twin = f"{name}-folded" in networks.NAMES
            assert (norms_in(net) > 0) == kind.normed == twin, name
            assert norms_in(folded) == 0, name
            assert apart(net.double(), folded.double(), x.double()) < 1e-5, name


class Odd(nn.Module):
    """Batch norms that cannot be folded: after a sum, of a shared output, without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.after_sum, self.beside, self.fresh = (
            nn.BatchNorm2d(3),
            nn.BatchNorm2d(3),
            nn.BatchNorm2d(3, track_running_stats=False),
        )
        self.twice, self.good = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        y = self.beside(y) + y
        y = self.fresh(self.b(self.after_sum(y)))
        return self.good(self.c(self.twice(self.twice(y))))


def test_a_batch_norm_that_cannot_be_folded_stays(networks):
    net = Odd()
    net.good.running_mean.fill_(0.5)
    net.eval()
    folded, x = networks.fold(net), torch.randn(4, 3, 5, 5)
    assert networks.foldable(net) == [("c", "good")] and norms_in(folded) == 3
    assert apart(net.double(), folded.double(), x.double()) < 1e-5


# -- data ----------------------------------------------------------------------------------------
def test_waves_are_the_same_for_a_seed_and_of_every_class(networks):
    x, y = networks.wave_images(60, 3)
    again, other = networks.wave_images(60, 3), networks.wave_images(60, 4)
    assert x.shape == (60, 2, 128) and x.dtype == np.float32 and y.dtype == np.int64
    assert np.array_equal(x, again[0]) and not np.array_equal(x, other[0])
    assert set(networks.wave_images(600, 0)[1]) == set(range(networks.WAVES))


def cached(networks: ModuleType, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache with 300 waves, and a small network of one epoch on them."""

    def read(shared: Path) -> dict[str, np.ndarray]:
        (x, y), (x_test, y_test) = networks.wave_images(300, 0), networks.wave_images(60, 1)
        return {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test}

    monkeypatch.setitem(networks.READERS, "waves", read)
    kind = networks.Kind(
        lambda: nn.Sequential(
            networks.wave_conv(2, 8, 5), networks.pooled(8, 6, nn.AdaptiveAvgPool1d)
        ),
        "waves",
        epochs=1,
        images=256,
    )
    monkeypatch.setitem(networks.KINDS, "seq-conv1d", kind)
    networks.arrays.cache_clear()
    networks.train("seq-conv1d", 0, cache)


def test_training_is_repeatable_and_loading_needs_the_cache_only(networks, tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        cached(networks, tmp_path / folder, monkeypatch)
    nowhere = tmp_path / "nowhere"
    net, data, preprocess = networks.load(
        "seq-conv1d", tmp_path / "a", train=100, test=20, shared=nowhere
    )
    other, more, _ = networks.load(
        "seq-conv1d-folded", tmp_path / "b", train=100, test=20, shared=nowhere, draw=1
    )
    x = torch.from_numpy(data.test.x)
    assert apart(net, other, x) < 1e-5 and norms_in(other) == 0 and preprocess == {}
    assert (len(data.train), len(data.test), data.classes) == (100, 20, 6)
    assert not np.array_equal(data.train.x, more.train.x) and np.array_equal(
        data.test.x, more.test.x
    )


# -- jobs ----------------------------------------------------------------------------------------
def test_the_job_with_an_ideal_adc_is_the_twin_of_the_others(tool, networks, tmp_path, monkeypatch):
    other = tool("other_networks")
    cached(networks, tmp_path, monkeypatch)
    monkeypatch.setitem(other.SIZES, "seq-conv1d", other.Size(train=150, test=40))
    jobs = [other.Job("seq-conv1d", bits, 0, "new", 1) for bits in other.BITS]
    other.run_all(jobs, other.Places(tmp_path, tmp_path, tmp_path), paired=False)
    rows = [json.loads(job.path(tmp_path).read_text()) for job in jobs]
    own = other.run(jobs[1], other.Places(tmp_path, tmp_path, tmp_path), paired=True)
    twins = {row["metrics"]["ideal_top1"] for row in [*rows, own]}
    assert twins == {rows[0]["metrics"]["tuned_top1"]}
    assert [row["macro"]["adc_bits"] for row in rows] == [None, 4, 3, 2]
    assert [
        (row["network"], row["bits"], row["seed"], row["label"], row["epochs"]) for row in rows
    ] == [("seq-conv1d", bits, 0, "new", 1) for bits in other.BITS]
    text = "\n".join(tool("other_table").section(tmp_path))
    assert all(
        title in text
        for title in ("### Ideal ADC", "### 4-bit ADC", "### 3-bit ADC", "### 2-bit ADC")
    )


def test_a_finished_row_is_not_run_again_and_a_refusal_is_kept(
    tool, networks, tmp_path, monkeypatch
):
    other = tool("other_networks")
    calls = []

    def quantize(*_: object, **__: object) -> None:
        calls.append(1)
        raise rqtool.RqError("its range is too wide")

    monkeypatch.setattr(other.rqtool, "quantize", quantize)
    monkeypatch.setattr(other.networks, "load", lambda *_, **__: (None, None, {}))
    jobs = [other.Job("mnist-mlp", "4", seed, "new") for seed in (0, 0, 1)]
    other.run_all(jobs, other.Places(tmp_path, tmp_path, tmp_path), paired=False)
    assert len(calls) == 2
    row = json.loads(jobs[0].path(tmp_path).read_text())
    assert row["refused"] == "its range is too wide" and (
        row["train_images"],
        row["test_images"],
        row["epochs"],
    ) == (5_000, 2_000, 2)
    assert "- mnist-mlp, new: its range is too wide" in tool("other_table").section(tmp_path)


# -- tables --------------------------------------------------------------------------------------
def keep(
    rows: Path, network: str, bits: str, label: str, seed: int, tuned: float, **more: float
) -> None:
    figures = {"float_top1": 90.0, "ptq_top1": 80.0, "tuned_top1": tuned, "ideal_top1": 89.0}
    row = {"network": network, "bits": bits, "seed": seed, "label": label}
    row |= {"commit": f"{label}123", "metrics": figures | more, "chosen": "epoch 1"}
    row |= {"epochs": 1, "train_images": 10_000, "test_images": 2_000}
    (rows / f"other-{network}-{bits}-{label}-seed{seed}.json").write_text(json.dumps(row))


def cells(line: str) -> list[str]:
    return line.strip("| ").split(" | ")


def test_versions_stand_side_by_side(tool, tmp_path):
    for seed, tuned in enumerate((86.0, 87.0, 88.0)):
        keep(tmp_path, "fashion-dscnn", "4", "a", seed, tuned)
        keep(tmp_path, "fashion-dscnn", "4", "b", seed, tuned + 1, adc_loss_se=0.6)
    keep(tmp_path, "fashion-dscnn-folded", "4", "b", 0, 84.0)
    keep(tmp_path, "fashion-dscnn", "2", "b", 0, 70.0)
    lines = tool("other_table").section(tmp_path)
    assert lines[0] == "## Other networks"
    assert [line for line in lines if line.startswith("- ")] == [
        "- a: commit a123", "- b: commit b123",
    ]  # fmt: skip
    titles = [line for line in lines if line.startswith("###")]
    assert titles == ["### 4-bit ADC", "### 2-bit ADC"]
    start = lines.index("### 4-bit ADC")
    names = ("post-training", "fine-tuned", "twin", "loss to the ADC", "loss to float")
    assert cells(lines[start + 2]) == [
        "network", "float", *(f"{name}, {label}" for name in names for label in "ab"),
        "training images", "epochs", "test images", "runs",
    ]  # fmt: skip
    assert cells(lines[start + 4]) == [
        "fashion-dscnn", "90.00 ± 0.00", "80.00 ± 0.00", "80.00 ± 0.00",
        "87.00 ± 0.58", "88.00 ± 0.58", "89.00 ± 0.00", "89.00 ± 0.00",
        "2.00 ± 0.58", "1.00 ± 0.58 (0.35)", "3.00 ± 0.58", "2.00 ± 0.58",
        "10,000", "1", "2,000", "3",
    ]  # fmt: skip
    assert cells(lines[start + 5]) == [
        "fashion-dscnn-folded", "90.00", "–", "80.00", "–", "84.00", "–", "89.00", "–", "5.00",
        "–", "6.00", "10,000", "1", "2,000", "0/1",
    ]  # fmt: skip


def test_the_ideal_adc_comes_first_and_is_compared_with_float(tool, tmp_path):
    keep(tmp_path, "mnist-mlp", "ideal", "b", 0, 89.5)
    keep(tmp_path, "mnist-mlp", "4", "b", 0, 86.0)
    lines = tool("other_table").section(tmp_path)
    start = lines.index("### Ideal ADC")
    assert cells(lines[start + 2])[2:6] == [
        "post-training, b", "loss of post-training to float, b", "fine-tuned, b", "loss to float, b",
    ]  # fmt: skip
    assert cells(lines[start + 4]) == [
        "mnist-mlp", "90.00", "80.00", "10.00", "89.50", "0.50", "10,000", "1", "2,000", "1",
    ]  # fmt: skip
    assert start < lines.index("### 4-bit ADC")


def test_without_rows_there_is_no_section(tool, tmp_path):
    assert tool("other_table").section(tmp_path) == []
