"""Run the experiments behind docs/results.md: one row a job, resumable, each finished row kept.

    python examples/experiments.py --shared DIR [--only NAME ...] [--seeds 3] [--rows DIR] [--threads N] [--report docs/results.md]

DIR holds data/mnist.npz, data/cifar10_jpeg75.npz, models/reference_models.py and the weights beside it. A finished row is a JSON
file in --rows (default build/experiments) named after the job; delete it to run the job again. Every job is one call of
rqtool.quantize. The ideal-ADC twin is trained equally long from the same seed; jobs that differ only in the ADC have the same twin,
which is then trained once.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import rqtool
from rqtool.model.data import load_data
from rqtool.storage import write_atomic

CIFAR = "CIFAR-10 (JPEG-75 copy)"
DISTILL_WEIGHT = 0.9


@dataclass(frozen=True)
class Task:
    """A network, its weights, its data; batch and rate as held-out images chose them (seed 0, one epoch)."""

    title: str
    factory: str
    weights: str
    data: str
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    batch: int = 64
    lr: float = 1e-3


TASKS = {
    "mnist": Task("MNIST, LeNet with batch norm", "lenet_bn", "lenetbn_mnist.pt", "mnist.npz"),
    "cifar": Task(f"{CIFAR}, ResNet-20", "resnet20", "resnet20_cifar10jpeg_finetuned.pt", "cifar10_jpeg75.npz", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 128, 3e-3),
}


@dataclass(frozen=True)
class Experiment:
    """One line of the table: a task on a macro, so many epochs of a recipe."""

    task: str
    macro: tuple[tuple[str, object], ...] = ()
    preset: str | None = None
    epochs: int = 2
    mode: str = "ste"
    teacher: str = "float"
    augment: str = "none"
    ideal_epochs: int = 0

    def recipe(self, seed: int) -> rqtool.Recipe:
        about = {"mode": self.mode, "teacher": self.teacher, "augment": self.augment, "ideal_epochs": self.ideal_epochs, "distill_weight": DISTILL_WEIGHT}
        return rqtool.Recipe(epochs=self.epochs, seed=seed, batch=TASKS[self.task].batch, lr=TASKS[self.task].lr, **about)

    def twin(self) -> tuple:
        """All that the ideal-ADC twin depends on: no ADC, and whichever teacher, for it learns from the float network."""
        macro = rqtool.make_macro(self.preset, **dict(self.macro))
        return self.task, self.epochs, self.ideal_epochs, self.augment, self.teacher != "none", macro.in_bits, macro.w_bits


EXPERIMENTS = {
    "mnist-4-4-4": Experiment("mnist"),
    "mnist-4-4-4-relaxed": Experiment("mnist", mode="relaxed"),
    "mnist-nthu-2019": Experiment("mnist", preset="nthu-2019"),
    "mnist-4-4-4-no-teacher": Experiment("mnist", teacher="none"),
    "mnist-4-4-4-relaxed-no-teacher": Experiment("mnist", mode="relaxed", teacher="none"),
    "mnist-nthu-2019-relaxed-no-teacher": Experiment("mnist", preset="nthu-2019", mode="relaxed", teacher="none"),
    "mnist-4-4-4-ideal-teacher": Experiment("mnist", teacher="ideal"),
    "mnist-4-4-4-column": Experiment("mnist", macro=(("granularity", "column"),)),
    "mnist-4-4-4-shift": Experiment("mnist", augment="shift"),
    "mnist-4-4-4-two-stage": Experiment("mnist", ideal_epochs=1, epochs=1),
    "cifar-4-4-4": Experiment("cifar", epochs=1),
    "cifar-4-4-4-relaxed": Experiment("cifar", epochs=1, mode="relaxed"),
    "cifar-4-4-4-no-teacher": Experiment("cifar", epochs=1, teacher="none"),
    "cifar-4-4-4-shift-flip": Experiment("cifar", epochs=1, augment="shift-flip"),
}


def decode(jpeg: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """uint8 [N, 3, H, W] from JPEG files back to back."""
    images = (Image.open(io.BytesIO(jpeg[a:b].tobytes())) for a, b in zip(offsets, offsets[1:]))
    return np.stack([np.asarray(image.convert("RGB")) for image in images]).transpose(0, 3, 1, 2)


def read_data(path: Path) -> rqtool.Data:
    """The data set of a task; JPEG archives are decoded."""
    if "jpeg" not in path.name:
        return load_data(str(path))
    with np.load(path) as z:
        parts = {s: rqtool.Images(decode(z[f"{s}_jpeg"], z[f"{s}_offsets"]), z[f"{s}_labels"].astype(np.int64)) for s in ("train", "test")}
    return rqtool.Data(path.name, parts["train"], parts["test"], 10)


def read_model(task: Task, models: Path) -> torch.nn.Module:
    """The float network with its weights."""
    sys.path.insert(0, str(models))
    model = getattr(importlib.import_module("reference_models"), task.factory)()
    model.load_state_dict(torch.load(models / task.weights, weights_only=True, map_location="cpu"))
    return model.eval()


def macro_of(name: str) -> rqtool.Macro:
    return rqtool.make_macro(EXPERIMENTS[name].preset, **dict(EXPERIMENTS[name].macro))


def known_twin(name: str, seed: int, rows: Path) -> float | None:
    """The ideal-ADC twin's top-1 from a finished row that has the same twin."""
    same = [n for n in EXPERIMENTS if n != name and EXPERIMENTS[n].twin() == EXPERIMENTS[name].twin()]
    paths = [rows / f"{n}-seed{seed}.json" for n in same]
    found = [json.loads(p.read_text())["metrics"]["ideal_top1"] for p in paths if p.exists()]
    return found[0] if found else None


def commit() -> str:
    """The commit of this working copy, "unknown" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def run(name: str, seed: int, shared: Path, data: rqtool.Data, rows: Path) -> dict:
    """The JSON result of one job."""
    task = TASKS[EXPERIMENTS[name].task]
    recipe = EXPERIMENTS[name].recipe(seed)
    preprocess, twin = rqtool.Preprocess(mean=task.mean, std=task.std), known_twin(name, seed, rows)
    model = read_model(task, shared / "models")
    result = rqtool.quantize(model, data, macro_of(name), recipe=recipe, preprocess=preprocess, twin=twin is None).to_json()
    result["commit"] = commit()
    if twin is not None:
        result["metrics"] |= {"ideal_top1": twin, "adc_loss": twin - result["metrics"]["tuned_top1"]}
    return result


# -- the table -------------------------------------------------------------------------------------------------------
def spread(values: list[float]) -> str:
    """Mean, and half the range when there are several."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.2f}"


def recipe_cell(recipe: dict) -> str:
    """The mode, and what is not the default of a recipe; rows from before a setting existed do not have it."""
    extra = {"teacher": "{} teacher", "augment": "{}", "ideal_epochs": "{} of the epochs with an ideal ADC first"}
    told = [text.format(recipe[key]) for key, text in extra.items() if recipe.get(key, "none") not in ("none", 0)]
    return ", ".join([recipe["mode"], *told])


def row(name: str, results: list[dict]) -> str:
    m, macro, recipe = [r["metrics"] for r in results], results[0]["macro"], results[0]["recipe"]
    column = {key: spread([x[key] for x in m]) for key in ("float_top1", "ptq_top1", "tuned_top1", "ideal_top1", "adc_loss")}
    setting = f"{macro['wl']} rows on, {macro['in_bits']}/{macro['w_bits']} bits, {macro['adc_bits']}-bit ADC, {macro['codebook']}, {macro['sign_scheme']}, step per {macro['granularity']}"
    cells = [name, setting, recipe_cell(recipe), f"{m[0]['reads_per_mac']:.4f}", str(recipe["epochs"] + recipe.get("ideal_epochs", 0)), str(len(results)), *column.values(), f"{min(x['agreement'] for x in m):.2f}", ", ".join(sorted({r.get("commit", "earlier") for r in results}))]
    return "| " + " | ".join(cells) + " |"


def report(rows: Path) -> str:
    """docs/results.md from the finished rows."""
    lines = [
        "# Results", "",
        "Written by `make experiments` (examples/experiments.py). top-1 in percent on the test images, by the integer program; ± is half the range over",
        "the runs (seeds 0, 1, ..; a seed counts again where it ran at another commit). No layer is kept off the macro. Selection is on held-out training images. The ideal-ADC twin starts from the same weights and",
        "is trained for as many epochs with the same seed; the loss is twin minus fine-tuned, in points. \"Agreement\" is the smallest share of test",
        "images over the runs on which the integer program and the served network in floating point name the same class. A teacher is the float network",
        f"(weight {DISTILL_WEIGHT} of the loss) and teaches the twin, too. A row without a commit is an earlier one.", "",
    ]  # fmt: skip
    for key, task in TASKS.items():
        names = [n for n, e in EXPERIMENTS.items() if e.task == key]
        found = {n: [json.loads(p.read_text()) for p in sorted(rows.glob(f"{n}-seed*.json"))] for n in names}
        lines += [f"## {task.title}", "", "| job | setting | recipe | reads per MAC | epochs | runs | float | post-training | fine-tuned | ideal-ADC twin | loss | agreement | commit |"]
        lines += ["|" + "---|" * 13, *(row(n, r) for n, r in found.items() if r), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=Path, default=Path("build/experiments"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", type=Path, default=Path("docs/results.md"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.rows.mkdir(parents=True, exist_ok=True)
    for task in dict.fromkeys(EXPERIMENTS[n].task for n in args.only):
        data = read_data(args.shared / "data" / TASKS[task].data)
        for seed in range(args.seeds):
            for name in (n for n in args.only if EXPERIMENTS[n].task == task):
                path = args.rows / f"{name}-seed{seed}.json"
                if not path.exists():
                    result = run(name, seed, args.shared, data, args.rows)
                    write_atomic(path, json.dumps(result).encode())
                    print(path.name, json.dumps(result["metrics"]), f"{result['seconds']} s", flush=True)
    write_atomic(args.report, report(args.rows).encode(), force=True)


if __name__ == "__main__":
    main()
