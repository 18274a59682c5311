"""The options that several commands share: groups of flags that reach a command as one dictionary,
and the words for single ones.

The annotation of a command is its option: help, name and placeholder in one place. Values arrive as
text and become numbers in values.py, for the checks and their sentences belong to the public
functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_type_hints

import typer

from rqtool.cli import values
from rqtool.cli.output import results_only, terminal_width, write_result
from rqtool.hardware.macro import CHOICES, WHOLE, flag

option = partial(typer.Option, show_default=False)
argument = partial(typer.Argument, show_default=False)

IMAGES = (
    "Labelled images: .npz, MNIST or CIFAR-10 files, class folders, package.module:function, demo."
)
NETWORK = (
    "What the weights belong to: package.module:factory, "
    "file.py:factory, with (arguments) or without, or a built-in network "
    "(rqtool ops)."
)

DataSource = Annotated[str, option("--data", metavar="SRC", help=IMAGES)]
Arch = Annotated[str | None, option("--arch", metavar="NET", help=NETWORK)]
Weights = Annotated[
    str | None,
    option(
        "--weights",
        metavar="KEY",
        help="Which weights of a checkpoint, where several fit: model_ema, ema.state_dict, ...",
    ),
]
Prefix = Annotated[
    str | None,
    option(
        "--prefix",
        metavar="P",
        help="What stands before the names of the weights, where several fit: encoder_q, ...",
    ),
]
InputShape = Annotated[
    str | None,
    option(
        "--input",
        metavar="C,H,W",
        help="The shape of one input of the model, where it is not known otherwise.",
    ),
]
Threads = Annotated[
    str | None,
    option(
        "--threads",
        metavar="N",
        help="Threads for torch and the kernels (default: torch's own choice).",
    ),
]
State = Annotated[
    str | None,
    option(
        "--state",
        metavar="FILE",
        help="Keep the state of training here after every epoch; where it exists, go on from it.",
    ),
]
Force = Annotated[bool, option("--force", help="Replace files that exist.")]


@dataclass(frozen=True)
class Flag:
    """One option of a group; `read` makes a value of (flag, text), None is a switch. many: it may
    be given again, and its value is a list of texts."""

    name: str
    metavar: str | None
    help: str
    read: Callable[[str, str | None], Any] | None = values.as_given
    many: bool = False

    def parameter(self, panel: str) -> Parameter:
        kind = bool if self.read is None else list[str] | None if self.many else str | None
        told = option(flag(self.name), metavar=self.metavar, help=self.help, rich_help_panel=panel)
        return Parameter(
            self.name,
            Parameter.KEYWORD_ONLY,
            default=False if self.read is None else None,
            annotation=Annotated[kind, told],
        )

    def value(self, given: Any) -> Any:
        if self.many:
            return given or None
        return given if self.read is None else self.read(flag(self.name), given)


def _whole(name: str, about: str, default: Any) -> Flag:
    lo, hi = WHOLE[name]
    return Flag(name, "N", f"{about}, {lo} to {hi} (default {default}).", values.loosely)


def _choice(name: str, about: str, default: str) -> Flag:
    *others, last = CHOICES[name]
    return Flag(name, "KIND", f"{about}: {', '.join(others)} or {last} (default {default}).")


MACRO = (
    Flag(
        "macro",
        "PRESET|FILE.toml",
        "Where the macro's values come from (rqtool presets); the options below are laid over it.",
    ),
    _whole("wl", "Wordlines: rows that are on at once in one read", 9),
    _whole("io", "Columns read at once; it sets the cycles, never a code", 8),
    Flag(
        "adc_bits",
        "N|ideal",
        "Bits of the ADC, 1 to 8, or an ADC that changes nothing (default 4).",
        values.loosely,
    ),
    _whole("in_bits", "Bits of an input", 4),
    _whole("w_bits", "Bits of a weight, its sign among them", 4),
    _whole("dac_bits", "Input bits in one read", "all"),
    _whole("cell_bits", "Weight bits in one column", "all"),
    _choice("sign_scheme", "How columns hold negative weights", "signed"),
    _choice("codebook", "Which codes the ADC has", "twos, or unsigned where no read is negative"),
    _choice("granularity", "Who shares a step and a zero", "column"),
    _choice("range", "Where the step comes from", "calibrated"),
    Flag(
        "step", "S", "The step in partial-sum units per code, with --range fixed.", values.loosely
    ),
    _choice("levels", "Whether codes are evenly spaced", "uniform"),
    _choice("pack", "Which rows meet in a read", "spread"),
    Flag(
        "layer",
        "NAME:FIELD=N,...",
        "Other values for a layer, or for all that a pattern means, for example "
        "conv1:adc-bits=6,wl=64; may be repeated.",
        many=True,
    ),
    Flag(
        "keep",
        "NAME,...",
        "Layers kept off the macro, as 8-bit digital ones: names, patterns, first, last, re:REGEX.",
        many=True,
    ),
)
RECIPE = (
    Flag("epochs", "N", "Epochs of fine-tuning; 0 only calibrates (default 2).", values.whole),
    Flag(
        "ideal_epochs",
        "N",
        "Epochs with an ideal ADC before these (default 0).",
        partial(values.whole, low=0),
    ),
    Flag(
        "teacher",
        "float|ideal|none",
        "Also learn the scores of the float network, or of the ideal-ADC twin (default float).",
        values.as_given,
    ),
    Flag("distill_weight", "X", "The teacher's share of the loss (default 0.9).", values.number),
    Flag(
        "distill_temperature",
        "X",
        "Scores are divided by it before they are compared (default 2).",
        values.number,
    ),
    Flag(
        "match",
        "X",
        "How much what enters each layer of the teacher counts, beside its "
        "scores; falls to 0 over the steps (default 0).",
        values.number,
    ),
    Flag(
        "augment",
        "KIND",
        "Move training images a little: none, shift or shift-flip (default none).",
        values.as_given,
    ),
    Flag("batch", "N", "Images in a step (default 64).", values.whole),
    Flag(
        "lr",
        "X|auto",
        "Peak learning rate, or found by short tests on training images (default auto).",
        values.loosely,
    ),
    Flag("weight_decay", "X", "Of weight matrices (default 0.0001).", values.number),
    Flag(
        "mode",
        "KIND",
        "Gradients straight through, through noisy codes, or soft codes: "
        "ste, relaxed, mean or gumbel (default ste).",
        values.as_given,
    ),
    Flag(
        "zero",
        "fixed|learned",
        "Whether the ADC's code of p = 0 stays as calibrated; learning it is slow (default fixed).",
        values.as_given,
    ),
    Flag(
        "seed",
        "N",
        "Of batches, noise and held-out images (default 0).",
        partial(values.whole, low=0),
    ),
    Flag("tau_start", "X", "Noise in codes at the start (default 0.3).", values.number),
    Flag("tau_end", "X", "Noise in codes where it ends (default 0.08).", values.number),
    Flag(
        "hard_share",
        "X",
        "Share of the steps, at the end, without noise (default 0.2).",
        values.number,
    ),
    Flag(
        "warmup",
        "X",
        "Share of the steps in which the learning rate rises (default 0.05).",
        values.number,
    ),
    Flag(
        "calibration",
        "KIND",
        "What a calibrated step is for: least squared error, peak or percentile (default error).",
        values.as_given,
    ),
    Flag(
        "rounding",
        "KIND",
        "Weights rounded for what their columns give (learned), or each to "
        "the nearest (default learned).",
        values.as_given,
    ),
    Flag("calibration_images", "N", "Images that set the steps (default 512).", values.whole),
    Flag("norm_images", "N", "Images that re-estimate batch norm (default 2048).", values.whole),
    Flag(
        "held_out",
        "N",
        "Training images kept to choose by (default a tenth, 5000 at most).",
        partial(values.whole, low=1),
    ),
)
FIRST_TIME = (
    "seed",
    "held_out",
    "calibration",
    "rounding",
    "calibration_images",
    "ideal_epochs",
    "teacher",
    "distill_weight",
    "distill_temperature",
    "match",
)
AGAIN = tuple(
    replace(f, help=f"{re.split(r'[;(]', f.help)[0].strip()} (default: as before).")
    for f in RECIPE
    if f.name not in FIRST_TIME
)
PIXELS = (
    Flag(
        "mean",
        "X[,X...]",
        "Subtracted from pixels, one for all channels or one each (default 0).",
        values.numbers,
    ),
    Flag("std", "X[,X...]", "Divides pixels after that (default 1).", values.numbers),
    Flag(
        "scale",
        "X",
        "Multiplies pixels first (default 1/255 for whole numbers, 1 for others).",
        values.number,
    ),
    Flag(
        "resize",
        "N",
        "Image files: the shorter side becomes N pixels long (bilinear).",
        values.whole,
    ),
    Flag(
        "crop", "N", "Image files: keep N x N pixels from the middle, after --resize.", values.whole
    ),
)
OUTPUT = (
    Flag(
        "json", None, "Print exactly one JSON object (docs/json.md); all else goes to stderr.", None
    ),
    Flag("debug", None, "Show the traceback of an error.", None),
)


def takes(
    name: str, flags: Sequence[Flag], panel: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: the command's parameter `name` becomes these options, and gets a dictionary of
    those that were given."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def wrapper(**given: Any) -> Any:
            read = {f.name: f.value(given.pop(f.name)) for f in flags}
            return command(
                **given, **{name: {key: value for key, value in read.items() if value is not None}}
            )

        hints = get_type_hints(command, include_extras=True)
        own = [
            p.replace(annotation=hints[p.name], kind=Parameter.KEYWORD_ONLY)
            for p in signature(command).parameters.values()
            if p.name != name
        ]
        wrapper.__signature__ = Signature([*own, *(f.parameter(panel) for f in flags)])
        wrapper.__annotations__ = {
            p.name: p.annotation for p in wrapper.__signature__.parameters.values()
        }
        return wrapper

    return decorate


def shows(
    render: Callable[[dict[str, Any], int | None], str],
) -> Callable[[Callable[..., dict[str, Any]]], Callable[..., None]]:
    """A decorator: what the command returns is printed, as one JSON object or rendered for people."""

    def decorate(command: Callable[..., dict[str, Any]]) -> Callable[..., None]:
        @takes("output", OUTPUT, "Output")
        @wraps(command)
        def wrapper(output: dict[str, bool], **given: Any) -> None:
            with results_only():
                data = command(**given)
            write_result(json.dumps(data) if output["json"] else render(data, terminal_width()))

        return wrapper

    return decorate


def use_threads(text: str | None) -> None:
    """Set torch's number of threads, which the kernels follow."""
    count = values.whole("--threads", text, 1)
    if count is not None:
        import torch

        torch.set_num_threads(count)


LAYER_FLAGS = ("macro", "layer", "keep")  # that are no field of a macro


def macro_of(flags: dict[str, Any]) -> Any:
    """The Assignment that the flags of MACRO describe."""
    from rqtool.mapping.assign import make_assignment, merged, read_keep, read_layer

    fields = {name: value for name, value in flags.items() if name not in LAYER_FLAGS}
    layers = merged(
        read_layer(text, partial(values.loosely, "--layer")) for text in flags.get("layer", ())
    )
    keep = tuple(name for text in flags.get("keep", ()) for name in read_keep(text))
    return make_assignment(flags.get("macro"), layers, keep, **fields)
