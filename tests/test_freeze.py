"""From a calibrated network to its integer program: the same codes in every layer, the same class,
nothing out of its bounds."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from styles import STYLES, captured
from torch import nn

from rqtool.errors import InputError
from rqtool.hardware.macro import Macro
from rqtool.model.capture import capture
from rqtool.model.data import Images
from rqtool.model.network import Network
from rqtool.program import golden
from rqtool.program.freeze import LOWER, Norm
from rqtool.program.ir import REQUANT_BOUND, Program, is_wide, requant_bound, requant_peak
from rqtool.program.run import Runner
from rqtool.train.calibrate import calibrate
from rqtool.train.finetune import Feed
from rqtool.train.frozen import freeze, norm_of, peaks_of
from rqtool.train.rewrite import read_layers, rewrite

MACROS = {
    "default": Macro(),
    "ideal": Macro(adc_bits=None),
    "ideal offset": Macro(adc_bits=None, sign_scheme="offset"),
    "split tiles": Macro(granularity="tile", sign_scheme="split"),
    "offset columns": Macro(granularity="column", sign_scheme="offset"),
    "free": Macro(levels="free"),
    "free columns": Macro(levels="free", granularity="column", adc_bits=3),
    "few bits": Macro(in_bits=2, w_bits=3, codebook="sign-magnitude"),
    "serial slices": Macro(dac_bits=1, cell_bits=1, in_bits=3),
    "many rows": Macro(wl=128, adc_bits=6),
    "six bits": Macro(in_bits=6, w_bits=6, adc_bits=6, wl=8),
}
IMAGES = 32

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Case:
    """A network that was calibrated on the first half of its images, and its program."""

    network: Network
    program: Program
    pixels: np.ndarray
    feed: Feed


@dataclass(frozen=True)
class Prepared:
    """A calibrated network and what freezing needs beside it."""

    network: Network
    feed: Feed
    peaks: dict[str, float]
    pixels: Norm


def prepared(
    network: Network,
    macro: Macro,
    shape: tuple[int, ...],
    whole: bool,
    pixels: np.ndarray | None = None,
) -> Prepared:
    rng = np.random.default_rng(0)
    mult = np.linspace(0.011, 0.014, shape[0]) if whole else np.linspace(0.9, 1.3, shape[0])
    add = np.linspace(-1.3, -1.1, shape[0]) if whole else np.zeros(shape[0])
    if pixels is None:
        pixels = (
            rng.integers(0, 256, (IMAGES, *shape)).astype(np.uint8)
            if whole
            else rng.normal(0, 1, (IMAGES, *shape)).astype(np.float32)
        )
    feed = Feed(Images(pixels, np.zeros(len(pixels), np.int64)), mult, add)
    floating, network = network, rewrite(network, macro)
    batch = feed.real(slice(0, IMAGES // 2))
    calibrate(network, batch, floating)
    network.eval()
    return Prepared(network, feed, peaks_of(network, [batch]), Norm(mult, add))


def frozen(
    network: Network,
    macro: Macro,
    shape: tuple[int, ...],
    whole: bool,
    pixels: np.ndarray | None = None,
) -> Case:
    job = prepared(network, macro, shape, whole, pixels)
    return Case(
        job.network,
        freeze(job.network, macro, job.peaks, job.pixels, whole),
        job.feed.images.x,
        job.feed,
    )


@cache
def style_case(name: str, macro: str, whole: bool) -> Case:
    return frozen(captured(name)[1], MACROS[macro], STYLES[name].shape, whole)


def every_style() -> list[tuple[str, str, bool]]:
    """Each style with two macros on uint8 pixels and with another on float32 ones: all macros come
    up several times."""
    names = list(MACROS)
    cases = []
    for n, style in enumerate(STYLES):
        cases += [
            (style, "default", True),
            (style, names[1 + n % (len(names) - 1)], True),
            (style, names[1 + (n + 4) % (len(names) - 1)], False),
        ]
    return cases


@torch.no_grad()
def compared(case: Case) -> tuple[np.ndarray, torch.Tensor, dict[str, torch.Tensor], int, int]:
    """(differing codes of each image, scores, trace, codes that are the first to differ, all
    codes), each difference proved to be a tie.

    A code of an image whose earlier layers agree may differ only where the real input lies within
    1/500 of the code range of halfway between two codes: there float32 and one rounding per grid
    decide.
    """
    codes, values = {}, {}
    layers = read_layers(case.network)
    for name, layer in layers.items():
        layer.watch = lambda layer, seen, weight, name=name: codes.update({name: seen})
    scores = case.network(
        case.feed.real(slice(0, IMAGES)), lambda name, value: values.update({name: value})
    )
    trace = Runner(case.program).trace(torch.from_numpy(case.pixels))
    inputs = {node.name: node.inputs[0] for node in case.network.graph.convs()}
    differing, first, count = np.zeros(IMAGES, np.int64), 0, 0
    for op in case.program.reads():
        name = op.attrs["layer"]
        layer, expected = layers[name], codes[name]
        ph, pw = layer.plan.geometry.padding
        expected = expected[:, :, ph : expected.shape[2] - ph, pw : expected.shape[3] - pw]
        got = trace[op.inputs[0]].reshape(expected.shape)
        wrong = (got != expected).flatten(1)
        halfway = (values[inputs[name]].double() / layer.input.scale.double() + 0.5) % 1
        distance = torch.minimum(halfway, 1 - halfway) / layer.input.peak
        for image in np.flatnonzero((differing == 0) & wrong.any(1).numpy()):
            off = (got[image].int() - expected[image].int()).abs()
            assert off.max() == 1 and int((distance[image] < 0.002).sum()) >= int(off.sum())
            first += int(off.sum())
        differing += wrong.sum(1).numpy()
        count += wrong.numel()
    return differing, scores, trace, first, count


@pytest.mark.parametrize(("style", "macro", "whole"), every_style())
def test_the_program_has_the_codes_and_the_class_of_the_network(style, macro, whole):
    case = style_case(style, macro, whole)
    differing, scores, trace, first, count = compared(case)
    assert first <= 3 + count // 1000
    same = differing == 0
    assert same.sum() >= IMAGES // 2
    output = trace[case.program.output].reshape(scores.shape)
    best = scores.topk(2, 1).values
    clear = torch.from_numpy(same) & (best[:, 0] - best[:, 1] > 1e-3 * scores.abs().max())
    assert torch.equal(output.argmax(1)[clear], scores.argmax(1)[clear])
    if case.network.graph.nodes[-1].op != "tail":
        error = (output * case.program.meta["output_scale"] - scores)[same].abs().max()
        assert error <= 2e-3 * scores.abs().max()


@pytest.mark.parametrize(("style", "macro", "whole"), every_style()[1::3] + every_style()[2::3])
def test_every_tensor_of_a_frozen_program_equals_golden(style, macro, whole):
    case = style_case(style, macro, whole)
    trace, expected = (
        Runner(case.program).trace(torch.from_numpy(case.pixels[:2])),
        golden.run(case.program, case.pixels[:2]),
    )
    for name, values in expected.items():
        assert np.array_equal(trace[name].numpy(), values), name
        if name != case.program.input:
            assert str(trace[name].dtype) == f"torch.{case.program.tensors[name].dtype}"


def test_most_programs_have_every_single_code():
    """Where pixels are whole and no average is taken, nothing is rounded between two layers but
    what training rounds too."""
    exact = [name for name in STYLES if not compared(style_case(name, "default", True))[0].any()]
    assert len(exact) >= len(STYLES) - 5


def test_each_requant_stays_below_its_bound_and_uses_it():
    for style in STYLES:
        program = style_case(style, "default", True).program
        requants = [op for op in program.ops if op.kind == "requant"]
        assert all(requant_peak(program, op) < requant_bound(program, op) for op in requants)
        assert min(requant_peak(program, op) for op in requants) >= REQUANT_BOUND // 4
        assert not all(is_wide(program, op) for op in requants)
        assert program.meta["islands"] == []


def test_every_operation_of_a_graph_has_a_rule():
    assert {node.op for name in STYLES for node in captured(name)[1].graph.nodes} == set(LOWER)


def test_a_softmax_is_left_out_and_its_input_sets_the_range():
    for style in ("softmax", "log softmax"):
        case = style_case(style, "default", True)
        output = Runner(case.program)(torch.from_numpy(case.pixels))
        limit = case.program.tensors[case.program.output].hi
        assert limit // 8 < output.abs().max() < limit


def test_images_do_not_change_each_other():
    case = style_case("sequential", "default", True)
    runner = Runner(case.program)
    together = runner(torch.from_numpy(case.pixels[:7]))
    assert torch.equal(
        together, torch.cat([runner(torch.from_numpy(case.pixels[n : n + 1])) for n in range(7)])
    )


def test_batch_norm_as_one_factor_and_one_sum():
    norm = nn.BatchNorm2d(2).eval()
    with torch.no_grad():
        (
            norm.running_mean.copy_(torch.tensor([1.0, -2.0])),
            norm.running_var.copy_(torch.tensor([4.0, 0.25])),
        )
        norm.weight.copy_(torch.tensor([3.0, 0.0])), norm.bias.copy_(torch.tensor([0.5, 7.0]))
    folded = norm_of(norm)
    assert folded.mult == pytest.approx([1.5, 0.0], abs=1e-5) and folded.add == pytest.approx(
        [-1.0, 7.0], abs=1e-4
    )
    plain = norm_of(nn.BatchNorm1d(2, affine=False).eval())
    assert plain.mult == pytest.approx([1, 1], abs=1e-4) and plain.add == pytest.approx([0, 0])


# -- degenerate models -----------------------------------------------------------------------------
@cache
def base() -> Network:
    torch.manual_seed(0)
    return capture(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        ),
        (2, 8, 8),
    )  # fmt: skip


EDITS = {
    "nothing": lambda net: None,
    "a dead channel": lambda net: net.layer("1").weight[1].zero_(),
    "only dead channels": lambda net: (net.layer("1").weight.zero_(), net.layer("1").bias.zero_()),
    "a column of zeros": lambda net: net.layer("4").weight[2].zero_(),
    "a layer of zeros": lambda net: net.layer("4").weight.zero_(),
    "zeros first": lambda net: net.layer("0").weight.zero_(),
    "zeros last": lambda net: (net.layer("9").weight.zero_(), net.layer("9").bias.zero_()),
    "one huge batch norm scale": lambda net: net.layer("1").weight[0].fill_(1e6),
    "huge batch norm scales": lambda net: net.layer("1").weight.fill_(1e6),
    "tiny batch norm scales": lambda net: net.layer("1").weight.fill_(1e-8),
    "negative batch norm scales": lambda net: net.layer("1").weight.neg_(),
    "a relu that never opens": lambda net: net.layer("1").bias.fill_(-1e3),
    "tiny weights": lambda net: net.layer("0").weight.mul_(1e-20),
    "huge weights": lambda net: net.layer("0").weight.mul_(1e12),
}
PIXELS = {
    "random": lambda rng: rng.integers(0, 256, (IMAGES, 2, 8, 8)),
    "black": lambda rng: np.zeros((IMAGES, 2, 8, 8)),
    "white": lambda rng: np.full((IMAGES, 2, 8, 8), 255),
    "one point": lambda rng: (
        255 * np.eye(128)[rng.integers(0, 128, IMAGES)].reshape(IMAGES, 2, 8, 8)
    ),
}


def edited(name: str) -> Network:
    network = deepcopy(base())
    with torch.no_grad():
        EDITS[name](network)
    return network


@pytest.mark.parametrize(
    ("edit", "pixels"),
    [(edit, "random") for edit in EDITS] + [("a dead channel", pixels) for pixels in PIXELS],
)
@pytest.mark.parametrize("macro", ["default", "ideal offset", "free"])
@pytest.mark.parametrize("whole", [True, False])
def test_degenerate_models_and_images_freeze_all_the_same(edit, pixels, macro, whole):
    case = frozen(
        edited(edit),
        MACROS[macro],
        (2, 8, 8),
        whole,
        PIXELS[pixels](np.random.default_rng(0)).astype(np.uint8 if whole else np.float32),
    )
    trace, expected = (
        Runner(case.program).trace(torch.from_numpy(case.pixels)),
        golden.run(case.program, case.pixels[:3]),
    )
    assert all(np.array_equal(trace[name][:3].numpy(), values) for name, values in expected.items())
    with torch.no_grad():
        scores = case.network(case.feed.real(slice(0, IMAGES)))
    wrong = (trace[case.program.output] * case.program.meta["output_scale"] - scores).abs().amax(
        1
    ) > 1e-2 * scores.abs().max() + 1e-9
    assert wrong.float().mean() <= 0.2


def test_a_layer_that_amplifies_what_it_never_saw_is_refused():
    job = prepared(edited("nothing"), MACROS["split tiles"], (2, 8, 8), True)
    with torch.no_grad():
        job.network.layer("5").weight.fill_(2.0**30)  # the peaks are those of before
    with pytest.raises(InputError) as e:
        freeze(job.network, MACROS["split tiles"], job.peaks, job.pixels, True)
    sentence = str(e.value)
    assert sentence.startswith("relu_1: its weights allow values ")
    assert sentence.endswith(
        " times as large as any seen on the calibration images, beyond "
        "2**20; a channel of it hardly varies: take --range calibrated or "
        "more ADC bits where its reads all give one code, else retrain or "
        "prune that channel"
    )


def test_a_convolution_that_sees_almost_a_constant_is_calibrated_to_what_it_varies():
    network = edited("nothing")
    with torch.no_grad():
        network.layer("1").bias.fill_(1e6)
    assert frozen(network, MACROS["split tiles"], (2, 8, 8), True).program.reads()


def test_a_code_that_no_requant_can_count_is_refused():
    case = style_case("sequential", "default", True)
    network = case.network
    with torch.no_grad():
        read_layers(network)["4"].input.log_scale.fill_(-30.0)
    with pytest.raises(InputError) as e:
        freeze(
            network,
            MACROS["default"],
            peaks_of(network, [case.feed.real(slice(0, 4))]),
            Norm(case.feed.mult.view(-1).double().numpy(), case.feed.add.view(-1).double().numpy()),
            True,
        )
    assert str(e.value).startswith("4.codes: a value reaches ")
    assert str(e.value).endswith(
        " steps of its grid, beyond 2**44; a channel of it hardly varies: "
        "take --range calibrated or more ADC bits where its reads all give "
        "one code, else retrain or prune that channel"
    )
