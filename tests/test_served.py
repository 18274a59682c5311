"""The network as it is served, in floating point, and its integer program: every input code of
every layer and every score, with ==."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from styles import STYLES, Model, Style, captured
from test_freeze import IMAGES, MACROS, every_style, prepared
from torch import nn
from torch.nn import functional as F

from rqtool.export.onnx import to_onnx
from rqtool.export.verify import session, verify
from rqtool.hardware.macro import Macro
from rqtool.model.capture import capture
from rqtool.model.network import Network
from rqtool.program.ir import REQUANT_BOUND, WIDE_BOUND, Program, requant_bound, requant_peak
from rqtool.program.numbers import Grid, requant
from rqtool.program.run import Runner
from rqtool.train.frozen import lower
from rqtool.train.rewrite import read_layers
from rqtool.train.served import Served

pytestmark = pytest.mark.usefixtures("one_thread")


def lowered(
    network: Network, macro: Macro, shape: tuple[int, ...], whole: bool
) -> tuple[Served, Program, torch.Tensor]:
    """(the served network, its program, pixels) of a network calibrated on the first half of the
    pixels."""
    job = prepared(network, macro, shape, whole)
    program, numbers = lower(job.network, macro, job.peaks, job.pixels, whole)
    return Served(job.network, numbers), program, torch.from_numpy(job.feed.images.x)


def input_codes(
    served: Served, pixels: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(the codes that each layer gets, padding left out; the scores)."""
    codes: dict[str, torch.Tensor] = {}
    for name, layer in read_layers(served).items():
        layer.watch = lambda layer, seen, weight, name=name: codes.update({name: seen})
    scores = served(pixels)
    for name, layer in read_layers(served).items():
        layer.watch = None
        ph, pw = layer.plan.geometry.padding
        codes[name] = codes[name][
            :, :, ph : codes[name].shape[2] - ph, pw : codes[name].shape[3] - pw
        ]
    return codes, scores


def assert_same(served: Served, program: Program, pixels: torch.Tensor) -> None:
    trace = Runner(program).trace(pixels)
    codes, scores = input_codes(served, pixels)
    assert set(codes) == {op.attrs["layer"] for op in program.reads()}
    for op in program.reads():
        got = trace[op.inputs[0]]
        assert torch.equal(got, codes[op.attrs["layer"]].to(got.dtype)), op.attrs["layer"]
    output = trace[program.output]
    assert torch.equal(output.double().mul(program.meta["output_scale"]).float(), scores)
    assert torch.equal(output.argmax(1), scores.argmax(1))


@pytest.mark.parametrize(("style", "macro", "whole"), every_style())
def test_each_style_of_model(style: str, macro: str, whole: bool) -> None:
    assert_same(*lowered(captured(style)[1], MACROS[macro], STYLES[style].shape, whole))


# -- models drawn from a seed ----------------------------------------------------------------------
def around(forward: Callable, **parts: Callable[[int], nn.Module]) -> Callable:
    """A piece with a chain of pieces of its own, beside its input."""
    return lambda rng, c, depth: Model(
        forward, inner=chain(rng, c, depth - 1), **{name: build(c) for name, build in parts.items()}
    )


def plain(build: Callable[[int], nn.Module]) -> Callable:
    return lambda rng, c, depth: build(c)


PIECES: dict[str, Callable[[np.random.Generator, int, int], nn.Module]] = {
    "convolution": plain(lambda c: nn.Conv2d(c, c, 3, padding=1)),
    "depthwise": plain(lambda c: nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False)),
    "norm": plain(nn.BatchNorm2d),
    "relu": plain(lambda c: nn.ReLU()),
    "clamp": plain(lambda c: nn.Hardtanh(-0.7, 1.3)),
    "largest": plain(lambda c: nn.MaxPool2d(3, 1, 1)),
    "average": plain(lambda c: nn.AvgPool2d(3, 1, 1)),
    "average of what is there": plain(lambda c: nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
    "numbers": plain(lambda c: Model(lambda m, x: 0.7 * x - 0.21)),
    "itself": plain(lambda c: Model(lambda m, x: x + x)),
    "moved": plain(lambda c: Model(lambda m, x: F.pad(x[:, :, 1:], (0, 0, 0, 1)))),
}
NESTED = {
    "residual": around(lambda m, x: x + m.inner(x)),
    "residual of a norm": around(lambda m, x: F.relu(m.inner(x) - x)),
    "join": around(
        lambda m, x: m.mix(torch.cat([m.inner(x), x], 1)), mix=lambda c: nn.Conv2d(2 * c, c, 1)
    ),
}


def chain(rng: np.random.Generator, c: int, depth: int) -> nn.Sequential:
    """One to four pieces; the first is a convolution in half of the chains."""
    names = [*PIECES, *(NESTED if depth else ())] * 2
    drawn = (["convolution", "norm"] if rng.integers(2) else []) + [
        names[n] for n in rng.integers(len(names), size=rng.integers(1, 4))
    ]
    return nn.Sequential(*((PIECES | NESTED)[name](rng, c, depth) for name in drawn))


def random_model(seed: int) -> nn.Module:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.last(m.body(m.first(x)).flatten(1))

    rng = np.random.default_rng(seed)
    body = nn.Sequential(*(chain(rng, 3, 2) for _ in range(2)))
    return Model(forward, first=nn.Conv2d(2, 3, 3), body=body, last=nn.Linear(3 * 16, 4))


@pytest.mark.parametrize("seed", range(30))
def test_models_drawn_from_a_seed(seed: int) -> None:
    macros = [*MACROS.values()]
    network = capture(Style(lambda: random_model(seed), (2, 6, 6))(), (2, 6, 6))
    assert_same(*lowered(network, macros[seed % len(macros)], (2, 6, 6), seed % 3 > 0))


def test_the_seeds_draw_every_operation() -> None:
    seen = {
        node.op
        for seed in range(30)
        for node in capture(Style(lambda: random_model(seed), (2, 6, 6))(), (2, 6, 6)).graph.nodes
    }
    assert seen >= {
        "conv",
        "batch_norm",
        "relu",
        "clamp",
        "maxpool",
        "avgpool",
        "affine",
        "add",
        "concat",
        "pad",
        "slice",
    }


def test_scores_that_are_used_inside_too() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x.flatten(1))
        return F.relu(y) + y

    network = capture(Style(lambda: Model(forward, a=nn.Linear(18, 4)), (2, 3, 3))(), (2, 3, 3))
    assert_same(*lowered(network, Macro(), (2, 3, 3), True))
    shared = capture(
        Style(
            lambda: Model(lambda m, x: m.a(x.flatten(1)).clamp(-1, 1), a=nn.Linear(18, 4)),
            (2, 3, 3),
        )(),
        (2, 3, 3),
    )
    served, program, pixels = lowered(shared, Macro(), (2, 3, 3), True)
    assert_same(served, program, pixels)
    assert float(served(pixels).abs().max()) <= 1.0001


def test_the_layers_are_the_trained_ones_and_no_operation_is_spent_between_them() -> None:
    served, program, pixels = lowered(
        captured("sequential")[1], Macro(), STYLES["sequential"].shape, True
    )
    assert [op.kind for op in program.ops if op.kind in ("requant", "reads", "maxpool")] == [
        "requant",
        "reads",
        "requant",
        "maxpool",
        "reads",
        "requant",
        "reads",
        "requant",
        "reads",
        "requant",
    ]
    names = [node.name for node in served.graph.nodes]
    seen: list[str] = []
    served(pixels, lambda name, value: seen.append(name))
    assert seen == [served.graph.input, *names]


@pytest.mark.parametrize(
    ("style", "macro"),
    [
        ("one layer", "ideal offset"),
        ("tokens", "offset columns"),
        ("branches", "default"),
        ("arithmetic", "offset columns"),
        ("norm after relu", "free"),
        ("branches", "free columns"),
    ],
)
def test_the_exported_file_has_the_same_scores(style: str, macro: str) -> None:
    """Sums of tensors with one column and with all, of every rank."""
    served, program, pixels = lowered(captured(style)[1], MACROS[macro], STYLES[style].shape, True)
    model = to_onnx(program)
    verify(model, program, pixels[:3].numpy(), batches=(2,), levels=("disabled", "all"))
    (output,) = session(model, "all").run(None, {program.input: pixels.numpy()})
    assert np.array_equal(
        (output * program.meta["output_scale"]).astype(np.float32), served(pixels).numpy()
    )


# -- the numbers themselves ------------------------------------------------------------------------
def test_float64_and_whole_numbers_give_the_same_at_the_ends_of_their_ranges() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        peaks = [int(2 ** rng.uniform(0, 20)) for _ in range(rng.integers(1, 4))]
        scales = [np.exp(rng.normal(0, 4, (5, 1))) * rng.choice([-1, 1], (5, 1)) for _ in peaks]
        grid = Grid(
            float(np.exp(rng.normal(0, 2)))
            * max(float(np.abs(s).max()) * p for s, p in zip(scales, peaks))
            / 2 ** rng.integers(0, 20),
            int(rng.integers(0, 9)),
            -999,
            999,
        )
        number = requant(scales, rng.normal(0, 3, (5, 1)) * grid.scale, peaks, grid, "x")
        xs = [rng.integers(-p, p + 1, (5, 60)) for p in peaks]
        xs = [np.where(rng.random(x.shape) < 0.2, np.sign(x) * p, x) for x, p in zip(xs, peaks)]
        total = sum(x * m.astype(np.int64) for x, m in zip(xs, number.mults)) + number.add
        assert np.abs(total).max() < (WIDE_BOUND if number.add.dtype == np.int64 else REQUANT_BOUND)
        real = (
            sum(x * 0.25 * number.factor(n, 0.25) for n, x in enumerate(xs))
            + number.add / 2.0**number.shift
        )
        assert np.array_equal(np.floor(real), total >> number.shift)


def test_no_requant_of_a_drawn_model_can_overflow() -> None:
    network = capture(Style(lambda: random_model(3), (2, 6, 6))(), (2, 6, 6))
    program = lowered(network, Macro(), (2, 6, 6), True)[1]
    assert all(
        requant_peak(program, op) < requant_bound(program, op)
        for op in program.ops
        if op.kind == "requant"
    )


def test_images_do_not_change_each_other() -> None:
    served, _, pixels = lowered(
        captured("pad shortcut")[1], Macro(), STYLES["pad shortcut"].shape, True
    )
    assert (
        torch.equal(served(pixels[:5]), torch.cat([served(pixels[n : n + 1]) for n in range(5)]))
        and len(pixels) == IMAGES
    )
