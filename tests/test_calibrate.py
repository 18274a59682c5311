"""Calibration: the ADC of least squared error for a histogram, against brute force; ranges, batch
norm, and histograms that count right."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rqtool.hardware import adc
from rqtool.hardware.adc import FREE_LEVEL_PEAK
from rqtool.hardware.macro import Macro
from rqtool.mapping.plan import Geometry, Plan
from rqtool.mapping.planes import extract
from rqtool.model.capture import capture
from rqtool.program import golden
from rqtool.train.adc_numbers import group_shape, level_units
from rqtool.train.calibrate import (
    STEPS,
    calibrate,
    norms,
    optimal_column_levels,
    optimal_levels,
    optimal_uniform,
    reestimate_norms,
    set_adc,
)
from rqtool.train.histogram import partial_sum_histogram
from rqtool.train.layers import ReadLayer
from rqtool.train.rewrite import read_layers, rewrite

pytestmark = pytest.mark.usefixtures("one_thread")


SMALL = {
    "signed": Macro(wl=2, in_bits=2, w_bits=3, adc_bits=2),
    "sign-magnitude": Macro(wl=2, in_bits=2, w_bits=3, adc_bits=2, codebook="sign-magnitude"),
    "split": Macro(wl=2, in_bits=2, w_bits=3, adc_bits=2, sign_scheme="split"),
    "one bit": Macro(wl=2, in_bits=2, w_bits=3, adc_bits=1),
    "three bits": Macro(wl=3, in_bits=2, w_bits=3, adc_bits=3),
}


def histogram(macro: Macro, seed: int, groups: int = 1, occurring: int | None = None) -> np.ndarray:
    """Random counts int64 [groups, P]; at most `occurring` different sums."""
    rng = np.random.default_rng(seed)
    h = rng.integers(0, 50, (groups, macro.p_max - macro.p_min + 1))
    if occurring:
        h[:, rng.permutation(h.shape[1])[occurring:]] = 0
    return h


def bell(macro: Macro, mean: float, spread: float) -> np.ndarray:
    p = np.arange(macro.p_min, macro.p_max + 1)
    return np.round(1e5 * np.exp(-(((p - mean) / spread) ** 2) / 2)).astype(np.int64)


# -- uniform ---------------------------------------------------------------------------------------
def uniform_error(h: np.ndarray, macro: Macro, mult: int, zero: int) -> float:
    """sum_p h(p) * (value - p)**2, in plain Python."""
    step = 2**macro.shift / mult
    codes = [
        adc.uniform_code(p, mult, macro.shift, zero, macro.top)
        for p in range(macro.p_min, macro.p_max + 1)
    ]
    return sum(
        int(n) * (step * (c - zero) - p) ** 2
        for n, c, p in zip(h, codes, range(macro.p_min, macro.p_max + 1))
    )


def candidates(h: np.ndarray, macro: Macro) -> list[int]:
    used = [p for p, n in zip(range(macro.p_min, macro.p_max + 1), h.sum(0)) if n]
    largest = max([1.0, *(abs(p) for p in used)])
    return sorted(
        {
            int(adc.snap(float(s), macro.shift))
            for s in np.geomspace(1.0, max(1.5, 2.2 * largest / max(1, macro.top)), STEPS)
        }
    )


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=5)
@given(seed=st.integers(0, 1 << 32))
def test_no_candidate_is_better_than_the_chosen_step_and_zero(name, seed):
    macro = SMALL[name]
    h = histogram(macro, seed, groups=2, occurring=8)
    zeros = range(macro.top + 1) if macro.codebook == "twos" else [macro.zero]
    for row, step, zero in zip(h, *optimal_uniform(h, macro)):
        best = min(
            uniform_error(row, macro, mult, z) for mult in candidates(h, macro) for z in zeros
        )
        assert uniform_error(row, macro, round(2**macro.shift / step), zero) == pytest.approx(
            best, rel=1e-9
        )


@pytest.mark.parametrize(
    "macro",
    [
        Macro(),
        Macro(adc_bits=3),
        Macro(adc_bits=2),
        Macro(sign_scheme="split"),
        Macro(codebook="sign-magnitude"),
    ],
    ids=Macro.describe,
)
@pytest.mark.parametrize(("mean", "spread"), [(0, 60), (0, 150), (40, 90), (100, 50)])
def test_a_grid_ten_times_finer_is_hardly_better(macro, mean, spread):
    h = bell(macro, mean, spread)
    (step,), (zero,) = optimal_uniform(h[None], macro)
    p = np.arange(macro.p_min, macro.p_max + 1)

    def error(mult, zeros):
        code = adc.uniform_code(p[None], int(mult), macro.shift, zeros[:, None], macro.top)
        return float((((code - zeros[:, None]) * 2.0**macro.shift / mult - p) ** 2 @ h).min())

    zeros = np.arange(macro.top + 1) if macro.codebook == "twos" else np.array([macro.zero])
    finer = min(
        error(mult, zeros)
        for mult in np.unique(
            adc.snap(np.geomspace(1, 2.2 * macro.p_max / macro.top, 10 * STEPS), macro.shift)
        )
    )
    assert error(2**macro.shift / step, np.array([zero])) <= 1.03 * finer


def test_a_zero_moves_to_where_the_sums_are():
    macro = Macro()
    assert optimal_uniform(bell(macro, 0, 100)[None], macro)[1] in (7, 8)
    assert optimal_uniform(bell(macro, 200, 60)[None], macro)[1] == 0
    assert optimal_uniform(bell(macro, -200, 60)[None], macro)[1] == 15
    assert (
        optimal_uniform(bell(macro, 200, 60)[None], replace(macro, codebook="sign-magnitude"))[1]
        == 7
    )


def test_sums_that_fit_are_read_exactly():
    macro = Macro()
    h = np.zeros(1891, np.int64)
    h[945 - 8 : 945 + 8] = 7
    steps, zero = optimal_uniform(h[None], macro)
    assert (steps.tolist(), zero.tolist()) == ([2**15 / 32767], [8])


def test_a_group_without_reads_gets_a_step_all_the_same():
    macro = Macro()
    steps, zeros = optimal_uniform(
        np.stack([bell(macro, 200, 60), np.zeros(1891, np.int64)]), macro
    )
    assert np.isfinite(steps).all() and (steps >= 1).all()
    assert zeros.tolist() == [0, 8]
    assert np.isfinite(optimal_uniform(np.zeros((1, 1891), np.int64), macro)[0]).all()


@pytest.mark.parametrize(
    ("policy", "step"), [("peak", 400 / 7), ("percentile", 70 / 7), ("error", None)]
)
def test_a_step_for_the_largest_sums_is_there_to_be_compared_with(policy, step):
    """1,000 reads: 999 of them within -70 .. 70, one at -400; 7 codes above zero, 8 below."""
    layer = ReadLayer(
        Plan.make("layer", Geometry(1, 1), Macro()), nn.Parameter(torch.zeros(1, 1, 1, 1)), None
    )
    h = np.zeros((1, 1891), np.int64)
    h[0, [945 - 400, 945 - 70, 945, 945 + 70]] = 1, 99, 800, 100
    set_adc(layer, h, policy)
    assert (
        (layer.log_step.exp().item() == pytest.approx(step))
        if step
        else (layer.log_step.exp().item() < 400 / 7)
    )
    assert layer.zero.item() == 8 or policy == "error"


# -- free levels -----------------------------------------------------------------------------------
def cells(
    h: np.ndarray, macro: Macro, thresholds: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(sums, counts) of each code."""
    p = np.arange(macro.p_min, macro.p_max + 1)
    code = adc.threshold_code(p, thresholds)
    return [(p[code == c], h[code == c]) for c in range(macro.top + 1)]


def cell_error(p: np.ndarray, h: np.ndarray) -> float:
    """The squared error of one cell at its best level; a cell that holds 0 is read as 0."""
    level = 0.0 if 0 in p else (h @ p / h.sum() if h.sum() else 0.0)
    return float(h @ (p - level) ** 2)


def brute_force(h: np.ndarray, macro: Macro) -> float:
    """Over every choice of thresholds."""
    p = np.arange(macro.p_min, macro.p_max + 1)
    kept = np.flatnonzero((h > 0) | (p == 0))
    p, h = p[kept], h[kept]
    size = min(macro.top + 1, len(p))
    cuts = ((0, *inner, len(p)) for inner in combinations(range(1, len(p)), size - 1))
    return min(sum(cell_error(p[a:b], h[a:b]) for a, b in zip(c, c[1:])) for c in cuts)


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=12)
@given(seed=st.integers(0, 1 << 32))
def test_free_levels_are_the_best_of_all_cuts(name, seed):
    macro = replace(SMALL[name], levels="free")
    h = histogram(macro, seed, occurring=9)[0]
    thresholds, levels = optimal_levels(h, macro)
    assert thresholds.shape == (macro.top,) and levels.shape == (macro.top + 1,)
    assert (np.diff(thresholds) > 0).all() and (np.diff(levels) >= 0).all()
    parts = cells(h, macro, thresholds)
    assert sum(cell_error(p, n) for p, n in parts) == pytest.approx(
        brute_force(h, macro), rel=1e-9, abs=1e-9
    )
    for (p, n), level in zip(parts, levels):
        if n.sum() and 0 not in p:
            assert abs(level - level_units(macro) * (n @ p) / n.sum()) <= 0.5 + 1e-4


WIDE = [
    Macro(wl=128),
    Macro(wl=64, in_bits=8, w_bits=5, adc_bits=3),
    Macro(wl=128, sign_scheme="split", adc_bits=6),
    Macro(in_bits=8, w_bits=8, wl=4, sign_scheme="offset"),
    Macro(),
]


@pytest.mark.parametrize("macro", WIDE, ids=Macro.describe)
@pytest.mark.parametrize("seed", range(4))
def test_zero_is_always_read_as_exactly_zero_and_levels_fit_16_bits(macro, seed):
    macro = replace(macro, levels="free")
    rng = np.random.default_rng(seed)
    h = histogram(macro, seed, occurring=int(rng.integers(1, 4000)))[0] * (
        rng.random(macro.p_max - macro.p_min + 1) < 0.7
    )
    if seed == 0:  # only the largest sum there is
        h[:], h[-1] = 0, 9
    thresholds, levels = optimal_levels(h, macro)
    assert adc.level_value(adc.threshold_code(0, thresholds), levels) == 0
    assert (np.diff(thresholds) > 0).all() and (np.diff(levels) >= 0).all()
    assert np.abs(levels).max() <= FREE_LEVEL_PEAK


def test_units_of_a_level_are_eighths_unless_16_bits_are_too_few():
    assert level_units(Macro()) == 8
    assert level_units(Macro(wl=128)) == 2
    assert level_units(Macro(wl=1024, adc_bits=2)) == 0.25


@pytest.mark.parametrize(
    "macro",
    [
        Macro(),
        Macro(adc_bits=2),
        Macro(sign_scheme="split"),
        Macro(sign_scheme="offset", adc_bits=3),
    ],
    ids=Macro.describe,
)
@pytest.mark.parametrize(("mean", "spread"), [(0, 40), (30, 100), (120, 20)])
def test_free_levels_are_never_worse_than_uniform_ones(macro, mean, spread):
    h = bell(macro, mean, spread) * (
        np.random.default_rng(1).random(macro.p_max - macro.p_min + 1) < 0.5
    )
    (step,), (zero,) = optimal_uniform(h[None], macro)
    free = replace(macro, levels="free")
    thresholds, levels = optimal_levels(h, free)
    p = np.arange(macro.p_min, macro.p_max + 1)
    squared = (
        h
        @ (adc.level_value(adc.threshold_code(p, thresholds), levels) / level_units(free) - p) ** 2
    )
    rounding = h.sum() * (0.5 / level_units(free)) ** 2
    assert squared <= uniform_error(h, macro, round(2**15 / step), zero) + rounding


# -- free levels with a step for each column -------------------------------------------------------
def squared_errors(
    histograms: np.ndarray, macro: Macro, thresholds: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """float64 [O] from thresholds [1 or O, top] and values [1 or O, top + 1] in partial-sum units,
    column by column."""
    p = np.arange(macro.p_min, macro.p_max + 1)
    thresholds, values = (
        np.broadcast_to(table, (len(histograms), table.shape[1])) for table in (thresholds, values)
    )
    return np.array(
        [
            h @ (v[adc.threshold_code(p, row)] - p) ** 2
            for h, row, v in zip(histograms, thresholds, values)
        ]
    )


def of_the_layer(histograms: np.ndarray, macro: Macro) -> np.ndarray:
    thresholds, levels = optimal_levels(histograms.sum(0), macro)
    return squared_errors(histograms, macro, thresholds[None], levels[None] / level_units(macro))


def of_columns(histograms: np.ndarray, macro: Macro) -> np.ndarray:
    found = optimal_column_levels(histograms, macro)
    thresholds = found.thresholds(macro)
    assert (
        thresholds.shape == (len(histograms), macro.top)
        and (np.diff(thresholds) >= 0).all()
        and (np.diff(found.levels) >= 0).all()
    )
    assert {adc.threshold_code(0, row) for row in thresholds.tolist()} == {
        found.zero
    } and found.levels[found.zero] == 0
    assert np.abs(found.levels).max() <= FREE_LEVEL_PEAK and (found.ratio > 0).all()
    error = squared_errors(
        histograms, macro, thresholds, found.ratio[:, None] / level_units(macro) * found.levels
    )
    assert found.error == pytest.approx(error, rel=1e-6, abs=1e-6 * histograms.sum())
    return error


@settings(max_examples=25)
@given(
    name=st.sampled_from(sorted(SMALL)),
    seed=st.integers(0, 1 << 32),
    columns=st.integers(1, 5),
    occurring=st.sampled_from([1, 4, 9, None]),
)
def test_steps_of_columns_are_never_worse_than_levels_of_the_layer(name, seed, columns, occurring):
    macro = replace(SMALL[name], levels="free", granularity="column")
    h = histogram(macro, seed, columns, occurring)
    h[0] *= seed % 2  # a column that no read was counted of
    assert of_columns(h, macro).sum() <= of_the_layer(h, macro).sum() * (1 + 1e-9) + 1e-6


UNLIKE = [
    Macro(),
    Macro(adc_bits=3),
    Macro(adc_bits=2),
    Macro(sign_scheme="split"),
    Macro(in_bits=2, w_bits=3, codebook="sign-magnitude"),
    Macro(wl=128),
    Macro(wl=128, adc_bits=6),
]


@pytest.mark.parametrize("macro", UNLIKE, ids=Macro.describe)
def test_steps_of_columns_read_unlike_columns_much_better(macro):
    """Columns of one form and of sizes from a third of the mean to three times it; two columns are
    dead, and one is hardly read."""
    macro = replace(
        macro,
        levels="free",
        granularity="column",
        codebook=None if macro.codebook == "unsigned" else macro.codebook,
    )
    h = np.stack([bell(macro, 0, macro.p_max / 24 * 3 ** (o / 8 - 1)) for o in range(17)])
    h[3], h[4] = 0, np.arange(h.shape[1]) == -macro.p_min
    h[5] = h[5] > h[5].max() / 2
    columns, layer = of_columns(h, macro), of_the_layer(h, macro)
    assert columns.sum() <= layer.sum() and columns[6:].max() < layer.max()
    relative = lambda error: (
        error[6:] / (h[6:] @ np.arange(macro.p_min, macro.p_max + 1) ** 2)
    ).max()  # noqa: E731
    assert relative(columns) < relative(layer) / 1.5


def test_like_columns_share_the_step_of_the_layer():
    macro = Macro(levels="free", granularity="column")
    h = np.stack([bell(macro, 20, 60)] * 3)
    assert optimal_column_levels(h, macro).ratio == pytest.approx([1, 1, 1], rel=0.02)


# -- histograms ------------------------------------------------------------------------------------
@pytest.mark.parametrize("granularity", ["layer", "column", "tile"])
@pytest.mark.parametrize(
    "macro",
    [
        Macro(wl=5),
        Macro(sign_scheme="split", cell_bits=2),
        Macro(dac_bits=1, pack="kernels", wl=13),
    ],
    ids=Macro.describe,
)
def test_histograms_count_what_golden_reads(macro, granularity):
    macro = replace(macro, granularity=granularity)
    g = Geometry(4, 6, (3, 2), (2, 1), (1, 1), groups=2)
    plan = Plan.make("layer", g, macro)
    rng = np.random.default_rng(0)
    x, w = rng.integers(0, 16, (3, 4, 5, 6)), rng.integers(-7, 8, (6, 12))
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    got = partial_sum_histogram(torch.from_numpy(padded).float(), torch.from_numpy(w).float(), plan)
    expected = np.zeros_like(got)
    rows, weight = golden.rows_of(x, g, 0), w.reshape(2, 3, 12)
    for t, (start, stop) in enumerate(plan.tiles):
        for a in plan.input_planes:
            for b in plan.weight_planes:
                p = np.einsum(
                    "gok,ngkyx->ngoyx",
                    extract(weight[:, :, start:stop], b),
                    extract(rows[:, :, start:stop], a),
                )
                for group in range(2):
                    for column in range(3):
                        row = {"layer": 0, "column": group * 3 + column, "tile": t}[granularity]
                        expected[row] += np.bincount(
                            p[:, group, column].ravel() - macro.p_min, minlength=expected.shape[1]
                        )
    assert np.array_equal(got, expected)


# -- layers and networks ---------------------------------------------------------------------------
@cache
def small_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    return capture(model, (2, 6, 6))


def small_network(macro: Macro):
    return rewrite(small_model(), macro)


@pytest.mark.parametrize("granularity", ["layer", "column", "tile"])
def test_every_range_gives_every_layer_its_steps(granularity):
    x = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    for macro in (
        Macro(granularity=granularity),
        Macro(granularity=granularity, range="full"),
        Macro(granularity=granularity, range="fixed", step=21.5),
    ):
        network = small_network(macro)
        seen = []
        calibrate(network, x, small_model(), lambda: seen.append(1))
        assert len(seen) == 3
        for layer in read_layers(network).values():
            step = layer.log_step.detach().exp()
            assert step.shape == group_shape(layer.plan)
            if macro.range != "calibrated":
                assert np.allclose(step.numpy(), 21.5 if macro.range == "fixed" else 135.0)
                assert (layer.zero == 8).all()


def test_a_layer_is_calibrated_on_what_calibrated_layers_before_it_give():
    network = small_network(Macro())
    x = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    calibrate(network, x, small_model())
    seen = {}
    layers = read_layers(network)
    for name, layer in layers.items():
        layer.watch = lambda layer, codes, weight, name=name: seen.update({name: (codes, weight)})
    network.eval()(x)
    for name, (codes, weight) in seen.items():
        steps, zero = optimal_uniform(
            partial_sum_histogram(codes, weight, layers[name].plan), Macro()
        )
        assert layers[name].zero.item() == zero
        assert layers[name].log_step.exp().item() == pytest.approx(steps[0])


def test_set_adc_on_free_levels():
    macro = Macro(levels="free", adc_bits=2)
    layer = ReadLayer(
        Plan.make("layer", Geometry(1, 1), macro), nn.Parameter(torch.zeros(1, 1, 1, 1)), None
    )
    h = np.zeros((1, 1891), np.int64)
    h[0, [945 - 50, 945, 945 + 10, 945 + 11, 945 + 300]] = [5, 100, 5, 5, 1]
    set_adc(layer, h)
    assert layer.levels.tolist() == [-400, 0, 84, 2400]  # eighths: 10.5 * 8
    assert layer.thresholds.tolist() == [[-24, 5, 156]]


def test_set_adc_on_free_levels_with_a_step_for_each_column():
    """The second column is the first one at twice the size, the third has no sums but 0: one shape,
    two steps, and nothing is lost."""
    macro = Macro(levels="free", adc_bits=2, granularity="column")
    layer = ReadLayer(
        Plan.make("layer", Geometry(1, 3), macro), nn.Parameter(torch.zeros(3, 1, 1, 1)), None
    )
    h = np.zeros((3, 1891), np.int64)
    for column, sums in enumerate(([-50, 0, 10, 200], [-100, 0, 20, 400], [0] * 4)):
        h[column, np.array(sums) + 945] = [5, 100, 10, 1]
    set_adc(layer, h)
    assert float(layer.unit[1] / layer.unit[0]) == pytest.approx(2, rel=0.01)
    values = layer.eval().adc.level_values().numpy()
    assert np.abs(values[:2] / [[1], [2]] - [-50, 0, 10, 200]).max() < 0.3
    assert [
        [adc.threshold_code(p, row) for p in sums]
        for row, sums in zip(
            layer.thresholds.tolist(), ([-50, 0, 10, 200], [-100, 0, 20, 400], [0])
        )
    ] == [[0, 1, 2, 3], [0, 1, 2, 3], [1]]


# -- batch norm ------------------------------------------------------------------------------------
def test_batch_norm_is_the_average_over_batches():
    network = small_network(Macro())
    batches = [
        torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(n)) for n in range(3)
    ]
    calibrate(network, batches[0], small_model())
    norm = network.layer("1")
    momentum = norm.momentum
    reestimate_norms(network, batches)
    outputs = []
    network.eval()
    for x in batches:
        network(x, lambda name, value: outputs.append(value) if name == "0" else None)
    means = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    variances = torch.stack([y.transpose(0, 1).flatten(1).var(1) for y in outputs]).mean(0)
    assert torch.allclose(norm.running_mean, means, atol=1e-5) and torch.allclose(
        norm.running_var, variances, rtol=1e-4
    )
    assert norm.momentum == momentum and not norm.training


def test_a_last_batch_of_one_image_has_no_statistics_and_is_left_out():
    torch.manual_seed(0)
    floating = capture(
        nn.Sequential(
            nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)
        ),
        (3, 2, 2),
    )
    network = rewrite(floating, Macro())
    x = torch.randn(9, 3, 2, 2)
    calibrate(network, x, floating)
    reestimate_norms(network, [x[:8]])
    expected = norms(network)[0].running_mean.clone()
    reestimate_norms(network, [x[:8], x[8:]])
    assert torch.equal(norms(network)[0].running_mean, expected)
