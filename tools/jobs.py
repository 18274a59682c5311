"""The jobs behind docs/results.md: a network, its data, a macro and a recipe each;
tools/experiments.py runs them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import rqtool

DISTILL_WEIGHT = 0.9
PLAIN = {"granularity": "layer", "pack": "rows"}  # what a job's macro has where it says nothing


@dataclass(frozen=True)
class Task:
    """A network, its weights, its data; batch and rate as held-out images chose them (seed 0, one
    epoch)."""

    title: str
    factory: str  # of reference_models, or a built-in model of rqtool where `weights` is None
    weights: str | None
    data: str
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    batch: int = 64
    lr: float = 1e-3
    train: int | None = None  # so many training images, the first ones; None for all


RESNET = Task(
    "CIFAR-10 (JPEG-75 copy), ResNet-20",
    "resnet20",
    "resnet20_cifar10jpeg_finetuned.pt",
    "cifar10_jpeg75.npz",
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
    128,
    3e-3,
)
TASKS = {
    "mnist": Task("MNIST, LeNet with batch norm", "lenet_bn", "lenetbn_mnist.pt", "mnist.npz"),
    "fashion": Task("Fashion-MNIST (20,000 training images), the network of the " "demonstration", "demo", None, "fashion_mnist.npz", lr=3e-3, train=20_000),
    "small": Task("Fashion-MNIST (5,000 training images), the network of the " "demonstration", "demo", None, "fashion_mnist.npz", lr=3e-3, train=5_000),
    "cifar": RESNET,
    "few": replace(RESNET, title=f"{RESNET.title}, 2,560 training images", batch=64, train=2_560),
}  # fmt: skip

# The most points that the ADC should cost after fine-tuning with 9 rows on: by task and macro
# preset, then bits of the ADC.
GOALS = {
    ("mnist", None): {4: 0.03, 3: 0.06, 2: 0.15},
    ("cifar", None): {4: 0.3, 3: 1.0, 2: 3.0},
    ("cifar", "nthu-2019"): {4: 0.5},
}


@dataclass(frozen=True)
class Experiment:
    """One line of a table: a task on a macro, so many epochs of a recipe. macro and about: fields
    of Macro and of Recipe, laid over PLAIN and over a recipe without a teacher."""

    section: str
    task: str
    macro: tuple[tuple[str, Any], ...] = ()
    preset: str | None = None
    epochs: int = 2
    about: tuple[tuple[str, Any], ...] = ()

    def made_macro(self) -> rqtool.Macro:
        return rqtool.make_macro(self.preset, **{**PLAIN, **dict(self.macro)})

    def recipe(self, seed: int) -> rqtool.Recipe:
        task = TASKS[self.task]
        return rqtool.Recipe(
            **{
                "epochs": self.epochs,
                "seed": seed,
                "batch": task.batch,
                "lr": task.lr,
                "teacher": "none",
                "distill_weight": DISTILL_WEIGHT,
                **dict(self.about),
            }
        )

    def goal(self) -> float | None:
        """The most points that the ADC should cost; None where nothing was set as a goal."""
        if self.section != FINE:
            return None
        return GOALS.get((self.task, self.preset), {}).get(self.made_macro().adc_bits)

    def twin(self) -> tuple:
        """All that the ideal-ADC twin depends on: no ADC, and whichever teacher, for it learns from
        the float network."""
        macro, recipe = self.made_macro(), self.recipe(0)
        return (
            self.task,
            macro.in_bits,
            macro.w_bits,
            recipe.epochs,
            recipe.ideal_epochs,
            recipe.augment,
            recipe.teacher != "none",
            recipe.match,
            recipe.batch,
            recipe.lr,
        )


def fields(**given: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(given.items())


FINE, MODES, RANGES, WIDE, TRIED = (
    "Fine-tuned through the ADC",
    "The four modes",
    "Post-training alone",
    "128 rows on",
    "Other recipes",
)
EPOCHS = {"mnist": 2, "fashion": 2, "small": 1, "cifar": 1, "few": 1}
LONG = {"mnist": 6, "fashion": 4, "cifar": 4}  # epochs
LONGER = {"mnist": 12, "fashion": 8, "cifar": 6}
MOVED = {"mnist": "shift", "fashion": "shift-flip", "cifar": "shift-flip"}
MATCHED_EPOCHS = {"mnist": 6, "fashion": 4, "cifar": 3}
TAUGHT = fields(mode="ste", teacher="float")
MATCHED = (*TAUGHT, ("match", 300.0))
COLUMN = fields(granularity="column")
WAYS = {
    "": COLUMN, "-layer": (), "-free": fields(levels="free"),
    "-spread": fields(granularity="column", pack="spread"), "-spread-free": fields(levels="free", pack="spread"),
    "-spread-free-column": fields(levels="free", granularity="column", pack="spread"),
}  # fmt: skip
POLICIES = {
    "full": (fields(range="full"), ()),
    "peak": ((), fields(calibration="peak")),
    "percentile": ((), fields(calibration="percentile")),
    "uniform": ((), ()),
    "column": (fields(granularity="column"), ()),
    "tile": (fields(granularity="tile"), ()),
    "free": (fields(levels="free"), ()),
    "spread": (fields(pack="spread"), ()),
    "spread-column": (fields(granularity="column", pack="spread"), ()),
    "spread-free": (fields(levels="free", pack="spread"), ()),
    "spread-free-column": (fields(levels="free", granularity="column", pack="spread"), ()),
}


def fine_tuned(task: str) -> dict[str, Experiment]:
    """4, 3 and 2 bits, and the preset: a step for each column, a step for the layer, free levels;
    rows in order, or spread, that for more epochs too, with images that are moved, and with a
    teacher whose inner values are matched."""
    found = {
        f"{task}-{bits}{way}": Experiment(
            FINE, task, fields(adc_bits=bits) + macro, None, EPOCHS[task], TAUGHT
        )
        for bits in (4, 3, 2)
        for way, macro in WAYS.items()
    }
    for name, epochs, ways in (
        ("long", LONG, ("-spread", "-spread-free-column")),
        ("longer", LONGER, ("-spread",)),
    ):
        found |= {
            f"{task}-{bits}{way}-{name}": Experiment(
                FINE, task, fields(adc_bits=bits) + WAYS[way], None, epochs[task], TAUGHT
            )
            for way in ways
            for bits in (4, 3, 2)
        }
    moved = fields(augment=MOVED[task])
    found |= {
        f"{task}-{bits}-moved": Experiment(
            FINE,
            task,
            fields(adc_bits=bits) + WAYS["-spread-free-column"],
            None,
            LONG[task],
            TAUGHT + moved,
        )
        for bits in (4, 3, 2)
    }
    for name, epochs in (("matched", MATCHED_EPOCHS), ("matched-short", EPOCHS)):
        found |= {
            f"{task}-{bits}-{name}": Experiment(
                FINE, task, fields(adc_bits=bits) + WAYS["-spread"], None, epochs[task], MATCHED
            )
            for bits in (4, 3, 2)
        }
    found |= {
        f"{task}-nthu-2019{way}": Experiment(
            FINE, task, WAYS[way], "nthu-2019", EPOCHS[task], TAUGHT
        )
        for way in ("", "-layer", "-spread")
    }
    return found | {
        f"{task}-nthu-2019-matched": Experiment(
            FINE, task, WAYS["-spread"], "nthu-2019", MATCHED_EPOCHS[task], MATCHED
        )
    }


def modes(
    task: str, names: tuple[str, ...], all_bits: tuple[int, ...] = (4, 3, 2)
) -> dict[str, Experiment]:
    """The modes against each other: a step for the layer, no teacher. `gumbel` is too slow for all
    but a small budget."""
    return {
        f"{task}-{bits}-{mode}": Experiment(
            MODES, task, fields(adc_bits=bits), None, EPOCHS[task], fields(mode=mode)
        )
        for bits in all_bits
        for mode in names
    }


def ranges(task: str) -> dict[str, Experiment]:
    return {
        f"{task}-{bits}-ptq-{name}": Experiment(
            RANGES, task, fields(adc_bits=bits) + macro, None, 0, about
        )
        for bits in (4, 3, 2)
        for name, (macro, about) in POLICIES.items()
    }


def wide(task: str) -> dict[str, Experiment]:
    packs = {"": (), "-spread": fields(pack="spread")}
    return {
        f"{task}-wl128-{bits}{name}": Experiment(
            WIDE,
            task,
            fields(wl=128, adc_bits=bits, granularity="column") + pack,
            None,
            EPOCHS[task],
            TAUGHT,
        )
        for bits in (6, 5, 4)
        for name, pack in packs.items()
    }


def other_recipes(task: str, bits: int) -> dict[str, Experiment]:
    """One thing changed at a time in the job `task-bits-spread`."""
    changed = {
        "alone": fields(mode="ste"), "ideal-teacher": fields(mode="ste", teacher="ideal"), "relaxed": fields(mode="relaxed", teacher="float"),
        "zero": (*TAUGHT, ("zero", "learned")), "shift": (*TAUGHT, ("augment", "shift")), "two-stage": (*TAUGHT, ("ideal_epochs", 1), ("epochs", EPOCHS[task] - 1)),
    }  # fmt: skip
    macro = fields(adc_bits=bits) + WAYS["-spread"]
    return {
        f"{task}-{bits}-spread-{name}": Experiment(TRIED, task, macro, None, EPOCHS[task], about)
        for name, about in changed.items()
    }


EXPERIMENTS = {
    **fine_tuned("mnist"), **fine_tuned("fashion"), **fine_tuned("cifar"),
    **modes("small", ("relaxed", "ste", "mean", "gumbel")), **modes("fashion", ("relaxed", "ste", "mean")), **modes("mnist", ("relaxed", "ste")), **modes("cifar", ("relaxed", "ste", "mean")),
    **modes("few", ("relaxed", "ste", "mean", "gumbel"), (4, 2)),
    **ranges("mnist"), **ranges("fashion"), **ranges("cifar"),
    **wide("mnist"), **wide("cifar"),
    **other_recipes("fashion", 2),
}  # fmt: skip
