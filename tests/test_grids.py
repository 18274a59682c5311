"""Grids fine enough for what a value holds: pools over small and large maps, the check of the step
that fixes numbers, older files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from styles import Model
from test_freeze import prepared
from test_served import assert_same
from torch import nn
from torch.nn import functional as F

import rqtool
from rqtool import checkpoint
from rqtool.errors import CheckError, InputError
from rqtool.export.onnx import to_onnx
from rqtool.export.verify import session, verify
from rqtool.hardware.macro import Macro
from rqtool.kernels import choose
from rqtool.model.capture import capture
from rqtool.model.data import Images
from rqtool.program import golden
from rqtool.program.ir import INT32, WIDE_BOUND, Program, is_wide
from rqtool.program.numbers import Grid, requant
from rqtool.program.prove import prove
from rqtool.program.run import Runner
from rqtool.train import fixed
from rqtool.train.finetune import Feed
from rqtool.train.fixed import FixedCheck, compare, grid_errors, tell
from rqtool.train.frozen import lower
from rqtool.train.served import Served

FILES = Path(__file__).parent / "files"
FINE = Macro(in_bits=8, w_bits=8, adc_bits=None)
DEFAULT = Macro()

pytestmark = pytest.mark.usefixtures("one_thread")


def pooled(pool: Callable[[torch.Tensor], torch.Tensor], features: int = 3) -> nn.Module:
    """A convolution, a pool of its features, and a layer over what is left."""
    torch.manual_seed(0)
    return Model(
        lambda m, x: m.last(pool(F.relu(m.first(x))).flatten(1)),
        first=nn.Conv2d(1, 3, 1),
        last=nn.Linear(features, 4),
    ).eval()


def lowered(model: nn.Module, pixels: np.ndarray, macro: Macro = FINE) -> tuple:
    """(network, served, program, feed) of a model on its pixels, uint8 or float32."""
    shape, whole = pixels.shape[1:], pixels.dtype == np.uint8
    job = prepared(capture(model, shape), macro, shape, whole, pixels)
    program, numbers = lower(job.network, macro, job.peaks, job.pixels, whole)
    return job.network, Served(job.network, numbers), program, job.feed


def sparse(count: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Dim pictures of different shares of lit pixels, with one bright one each: the largest value
    says nothing of the others."""
    rng = np.random.default_rng(seed)
    x = np.where(
        rng.random((count, 1, *size)) < rng.uniform(0.05, 0.6, (count, 1, 1, 1)),
        rng.integers(4, 30, (count, 1, *size)),
        0,
    )
    x.reshape(count, -1)[np.arange(count), rng.integers(size[0] * size[1], size=count)] = 255
    return x.astype(np.uint8)


@torch.no_grad()
def assert_like_before(network: nn.Module, program: Program, feed: Feed) -> None:
    """Within 1 % of the range of the network's scores before its numbers were fixed, and the same
    class on 99 % of images."""
    real = network.eval()(feed.real(slice(None)))
    found = Runner(program)(torch.from_numpy(feed.images.x)) * program.meta["output_scale"]
    assert (found - real).abs().max() <= 0.01 * (real.max() - real.min())
    assert (found.argmax(1) == real.argmax(1)).float().mean() >= 0.99


SIZES = [
    (7, 7),
    (14, 14),
    (32, 32),
    (64, 64),
    (112, 112),
    (224, 224),
    (256, 256),
    (13, 57),
    (1, 300),
    (129, 5),
]


@pytest.mark.parametrize("size", SIZES)
def test_the_mean_of_a_map_is_that_of_the_network(size: tuple[int, int]) -> None:
    network, served, program, feed = lowered(
        pooled(lambda x: F.adaptive_avg_pool2d(x, 1)), sparse(100 if size[0] < 100 else 40, size)
    )
    assert_like_before(network, program, feed)
    assert_same(served, program, torch.from_numpy(feed.images.x[:4]))
    assert max(grid_errors(network, served, feed).values()) < 2e-3


POOLS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, int], int]] = {
    "windows": (lambda x: F.avg_pool2d(x, 16), (64, 64), 48),
    "steps": (lambda x: F.avg_pool2d(x, (32, 8), (16, 24)), (64, 64), 27),
    "padding": (lambda x: F.avg_pool2d(x, 40, 24, 20), (64, 64), 27),
    "padding left out": (
        lambda x: F.avg_pool2d(x, 40, 24, 20, count_include_pad=False),
        (64, 64),
        27,
    ),
    "blocks": (lambda x: F.adaptive_avg_pool2d(x, (2, 4)), (128, 64), 24),
    "mean of axes": (lambda x: x.mean((2, 3)), (64, 64), 3),
    "one axis": (lambda x: F.avg_pool1d(x.flatten(2), 512), (64, 64), 24),
    "after a largest": (lambda x: F.adaptive_avg_pool2d(F.max_pool2d(x, 3, 1, 1), 1), (64, 64), 3),
    "after a join": (lambda x: F.adaptive_avg_pool2d(torch.cat([x, 0.01 * x], 1), 1), (64, 64), 6),
    "after a sum": (lambda x: F.adaptive_avg_pool2d(x + 0.3 * x, 1), (64, 64), 3),
    "twice": (lambda x: F.adaptive_avg_pool2d(F.avg_pool2d(x, 4), 1), (128, 128), 3),
}


@pytest.mark.parametrize("name", POOLS)
def test_pools_of_every_kind(name: str) -> None:
    pool, size, features = POOLS[name]
    network, served, program, feed = lowered(pooled(pool, features), sparse(32, size))
    assert_like_before(network, program, feed)
    assert_same(served, program, torch.from_numpy(feed.images.x))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("size", [(64, 64), (224, 224)])
def test_a_pool_of_the_image_itself(size: tuple[int, int], whole: bool) -> None:
    torch.manual_seed(0)
    model = Model(
        lambda m, x: m.last(F.adaptive_avg_pool2d(x, 1).flatten(1)), last=nn.Linear(1, 4)
    ).eval()
    pixels = sparse(32, size) if whole else sparse(32, size).astype(np.float32) * 7
    network, served, program, feed = lowered(model, pixels)
    assert_like_before(network, program, feed)
    assert_same(served, program, torch.from_numpy(feed.images.x))


@pytest.mark.parametrize(
    ("name", "macro"),
    [
        ("padding left out", FINE),
        ("blocks", DEFAULT),
        ("one axis", FINE),
        ("after a join", DEFAULT),
    ],
)
@pytest.mark.parametrize("body", ["qlinear", "explicit"])
def test_every_carrier_has_every_integer(name: str, macro: Macro, body: str) -> None:
    pool, size, features = POOLS[name]
    program = lowered(pooled(pool, features), sparse(32, size), macro)[2]
    verify(
        to_onnx(program, body),
        program,
        sparse(5, size, 1),
        batches=(1, 2, 5),
        levels=("disabled", "all"),
    )


def test_a_sum_beyond_int32_in_every_carrier() -> None:
    program = lowered(pooled(lambda x: F.adaptive_avg_pool2d(x, 1)), sparse(32, (64, 64)))[2]
    sums = [program.tensors[op.output] for op in program.ops if op.kind == "sumpool"]
    assert [t.dtype for t in sums] == ["int64"]
    verify(to_onnx(program), program, sparse(5, (64, 64), 1), batches=(1, 2, 5))
    assert (
        Runner(program).trace(torch.from_numpy(sparse(2, (64, 64))))[sums[0].name].dtype
        == torch.int64
    )


@pytest.mark.parametrize("seed", range(12))
def test_pools_drawn_from_a_seed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = tuple(int(n) for n in rng.integers(6, 70, 2))
    kernel = tuple(int(rng.integers(1, n + 1)) for n in size)
    pads = tuple(int(rng.integers(0, k // 2 + 1)) for k in kernel)
    stride = tuple(int(rng.integers(max(1, k // 2), k + 1)) for k in kernel)
    counted = bool(rng.integers(2))

    def pool(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, kernel, stride, pads, count_include_pad=counted)

    features = 3 * pool(torch.zeros(1, 1, *size)).numel()
    network, served, program, feed = lowered(pooled(pool, features), sparse(32, size, seed))
    assert_like_before(network, program, feed)
    assert_same(served, program, torch.from_numpy(feed.images.x))
    want, got = (
        golden.run(program, feed.images.x[:2]),
        Runner(program).trace(torch.from_numpy(feed.images.x[:2])),
    )
    assert all(np.array_equal(got[name].numpy(), value) for name, value in want.items())


# -- a job -----------------------------------------------------------------------------------------
def lit(count: int, size: int, seed: int) -> Images:
    """Pictures whose class is how much of them is dimly lit: 5, 15, 25 or 35 % of the pixels; one
    is bright."""
    rng, y, (lo, hi) = (
        np.random.default_rng(seed),
        np.arange(count) % 4,
        {64: (4, 8), 224: (20, 60)}[size],
    )
    x = np.zeros((count, size * size), np.uint8)
    for row, label in zip(x, y):
        chosen = rng.choice(size * size, int(size * size * (0.05 + 0.10 * label)), replace=False)
        row[chosen] = rng.integers(lo, hi, len(chosen))
        row[rng.integers(size * size)] = 255
    return Images(x.reshape(count, 1, size, size), y.astype(np.int64))


def counting(size: int) -> nn.Module:
    """The class whose mean is nearest, exactly."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 4)
    )
    lo, hi = {64: (4, 8), 224: (20, 60)}[size]
    mean = torch.tensor(
        [(0.05 + 0.10 * k) * (lo + hi - 1) / 510 + 1 / 255 / size for k in range(4)]
    )
    with torch.no_grad():
        model[0].weight.fill_(1.0), model[0].bias.zero_()
        (
            model[4].weight.copy_((mean * 1000)[:, None].expand(4, 2)),
            model[4].bias.copy_(-(mean**2) * 1000),
        )
    return model


@pytest.mark.parametrize("size", [64, 224])
def test_a_job_on_a_large_map_keeps_every_class(size: int) -> None:
    data = rqtool.Data("pictures", lit(48, size, 0), lit(40, size, 1), 4)
    result = rqtool.quantize(counting(size), data, FINE, recipe=rqtool.Recipe(epochs=0), twin=False)
    assert (result.float_top1, result.tuned_top1, result.agreement) == (100.0, 100.0, 100.0)
    assert not any("fixing the numbers" in sentence for sentence in result.warnings)


def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rqtool.program.freeze.SUM_PEAK", (1 << 16) - 1)


def test_a_grid_that_loses_the_classes_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse(monkeypatch)
    data = rqtool.Data("pictures", lit(48, 64, 0), lit(40, 64, 1), 4)
    with pytest.raises(CheckError) as caught:
        rqtool.quantize(counting(64), data, FINE, recipe=rqtool.Recipe(epochs=0), twin=False)
    assert caught.value.exit_code == 5
    assert str(caught.value) == (
        "fixing the numbers of the network costs 75.00 points of top-1 "
        "(100.00 to 25.00 on 40 images, counting error 27.39): the grid of "
        "the value '0' is too coarse (it moves it by 94 % of its mean "
        "magnitude); if its largest value stands out, clamp it in the model, "
        "or leave out the "
        "images that cause it"
    )


def checked(right: int, kept: int, b: int, c: int, n: int, **more) -> FixedCheck:
    return FixedCheck(
        100 * right / n, 100 * kept / n, 90.0, n, 100 * max(1.0, 2 * (b + c) ** 0.5) / n, **more
    )


def test_what_is_said_of_a_loss() -> None:
    said: list[str] = []
    tell(checked(740, 734, 30, 24, 1000), said.append)  # flips of single codes
    tell(checked(740, 745, 0, 5, 1000), said.append)
    assert said == []
    tell(checked(740, 725, 15, 0, 1000, worst="add_3", worst_error=0.02), said.append)
    assert said == [
        "fixing the numbers of the network costs 1.50 points of top-1 (74.00 "
        "to 72.50 on 1000 images, counting error 0.77): the grid of the "
        "value 'add_3' is "
        "too coarse (it moves it by 2 % of its mean magnitude); if its "
        "largest value stands out, clamp it in the model, or leave out the "
        "images that cause it"
    ]
    tell(checked(740, 700, 50, 10, 1000, worst="add_3", worst_error=0.0004), said.append)
    assert said[1] == (
        "fixing the numbers of the network costs 4.00 points of top-1 (74.00 "
        "to 70.00 on 1000 images, counting error 1.55), and no grid is too "
        "coarse (that "
        "of 'add_3' moves its value most, by 0.04 % of its mean magnitude): "
        "codes beside a tie flip; train for an epoch (--epochs 1), or "
        "measure on more images"
    )
    with pytest.raises(CheckError):
        tell(checked(740, 700, 50, 10, 1000, worst="add_3", worst_error=0.02), said.append)


def test_the_check_takes_the_served_network_or_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    network, served, program, feed = lowered(counting(64), lit(24, 64, 0).x)
    feed = Feed(
        Images(feed.images.x, network(feed.real(slice(None))).argmax(1).numpy()),
        feed.mult.numpy(),
        feed.add.numpy(),
    )
    check = compare(network, served, feed)
    assert check == compare(
        network, served, feed, Runner(program)(torch.from_numpy(feed.images.x)).argmax(1).numpy()
    )
    assert (check.before_top1, check.images, check.worst) == (
        100.0,
        24,
        None,
    ) and check.loss <= check.counting_error
    assert check.to_dict()["same_class"] == check.same_class
    monkeypatch.setattr(fixed, "MOST_IMAGES", 10)
    assert compare(network, served, feed).images == 10


# -- the numbers -----------------------------------------------------------------------------------
def test_a_requant_takes_64_bits_only_where_multipliers_need_them() -> None:
    codes, values = Grid(1.0, 0, 0, 15), Grid(2.0**-20, 0, -(1 << 22) + 1, (1 << 22) - 1)
    few = requant([np.array([0.0123])], np.zeros(1), [500], codes, "x")
    exact = requant([np.array([2.0**-22])], np.zeros(1), [1 << 22], values, "x")
    many = requant([np.array([0.0123, 1e-6])], np.zeros(2), [1 << 24], codes, "x")
    large = requant([np.array([1e-11])], np.zeros(1), [1 << 38], values, "x")
    assert [n.add.dtype for n in (few, exact, many, large)] == [
        np.int32,
        np.int32,
        np.int64,
        np.int64,
    ]
    assert abs(many.mults[0][1] / 2.0**many.shift - 1e-6) * (1 << 24) < 2**-6
    assert all(n.mults[0].dtype == np.int32 for n in (few, exact, many, large))


@pytest.mark.parametrize("seed", range(20))
def test_sums_of_52_bits_are_exact_in_one_pass_and_in_torch(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, count = np.random.default_rng(seed), seed % 3 + 1
    peaks = [int(2 ** rng.uniform(8, 38)) for _ in range(count)]
    xs = [rng.choice([-p, p, p // 3], (3, 4, 5)) for p in peaks]
    xs = [x.astype(np.int32) if p <= INT32 else x for x, p in zip(xs, peaks)]
    mults = [
        rng.integers(-m, m + 1, (4, 1)).astype(np.int32)
        for m in (min(INT32, WIDE_BOUND // 4 // p) for p in peaks)
    ]
    add, shift = rng.integers(-WIDE_BOUND // 8, WIDE_BOUND // 8, (4, 1)), int(rng.integers(0, 51))
    want = ((sum(x.astype(np.int64) * m for x, m in zip(xs, mults)) + add) >> shift).clip(
        -1000, 900
    )
    given = (
        tuple(map(torch.from_numpy, xs)),
        list(map(torch.from_numpy, mults)),
        torch.from_numpy(add),
        shift,
        -1000,
        900,
        torch.int32,
    )
    assert np.array_equal(choose.requant(*given).numpy(), want)
    monkeypatch.setattr(choose, "numba_available", lambda: False)
    assert np.array_equal(choose.requant(*given).numpy(), want)


def wide_program() -> Program:
    return lowered(pooled(lambda x: F.adaptive_avg_pool2d(x, 1)), sparse(32, (64, 64)))[2]


def forged(edit: Callable[[Program, int], None]) -> str:
    """How a program is refused after edit(program, number of the requant that takes the sum of a
    large window)."""
    program = wide_program()
    edit(
        program,
        next(
            n for n, op in enumerate(program.ops) if program.tensors[op.inputs[0]].dtype == "int64"
        ),
    )
    with pytest.raises(InputError) as caught:
        prove(program)
    return str(caught.value)


def test_a_forged_program_of_64_bits_is_refused() -> None:
    def constants(
        program: Program, n: int, role: str, change: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        name = program.ops[n].consts[role]
        program.constants[name] = change(program.constants[name])

    def larger(program: Program, n: int) -> None:
        constants(program, n, "add", lambda a: a + WIDE_BOUND)

    def narrow(program: Program, n: int) -> None:
        constants(program, n, "add", lambda a: np.zeros_like(a, np.int32))
        constants(program, n, "mult0", np.zeros_like)

    def ends(program: Program, n: int) -> None:
        op = program.ops[n]
        t = program.tensors[op.output]
        program.tensors[op.output] = replace(t, hi=INT32 + 1)

    assert forged(larger).endswith("its sum can pass 2**52; make the file again")
    assert forged(narrow).endswith("its input is int64; make the file again")
    assert forged(ends).endswith("its output is int64; make the file again")


# -- files made before -----------------------------------------------------------------------------
OLD_IMAGES = (np.arange(3 * 64) * 37 % 256).astype(np.uint8).reshape(3, 1, 8, 8)
OLD_SCORES = [[-426442, 304702, 146582], [-491673, 293205, 243940], [-491673, 304702, 211487]]


def test_files_of_earlier_versions_mean_the_same() -> None:
    """They have requants of 30 bits and grids of 20 bits and fewer."""
    program = checkpoint.load(FILES / "pools.rq").program
    assert not any(is_wide(program, op) for op in program.ops if op.kind == "requant")
    assert golden.run(program, OLD_IMAGES)[program.output].tolist() == OLD_SCORES
    assert Runner(program)(torch.from_numpy(OLD_IMAGES)).tolist() == OLD_SCORES
    file = onnx.load(FILES / "pools.onnx")
    assert session(file, "all").run(None, {program.input: OLD_IMAGES})[0].tolist() == OLD_SCORES
    verify(file, program, OLD_IMAGES, batches=(2,), levels=("all",))
