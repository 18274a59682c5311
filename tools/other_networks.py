"""Judge the defaults of rqtool on networks that played no part in choosing them: one row a job.

    python tools/other_networks.py --cache DIR --version-label LABEL
        [--only PATTERN ...] [--bits ideal 4 3 2] [--seeds 3] [--epochs N] [--rows DIR] [--jobs N]
    python tools/other_networks.py --list [--only PATTERN ...]

DIR of --cache is filled by tools/networks.py (seed 0). Every job is one call of rqtool.quantize with the
default macro and recipe of the version that Python imports, so another version is judged with
PYTHONPATH=ITS_CHECKOUT; only the bits of the ADC and the number of epochs are set. The job with an
ideal ADC is the twin of the other jobs of its network and seed; --paired trains a twin in each job
instead, from which rqtool may give a paired standard error. Finished rows are JSON files in --rows
(default docs/results) and are not run again. Each job runs on one thread, --jobs of them side by side.
examples/results.py writes the tables.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

import networks
import rqtool
from rqtool.storage import write_atomic

DOCS = Path(__file__).resolve().parent.parent / "docs"
IDEAL = "ideal"
BITS = (IDEAL, "4", "3", "2")  # the ideal ADC first: it is the twin of the others


@dataclass(frozen=True)
class Size:
    """Images and epochs of a job: at most about 40 seconds on one thread."""

    train: int = 10_000
    test: int = 2_000
    epochs: int = 1


SIZES = {
    "mnist-mlp": Size(epochs=2),
    "seq-conv1d": Size(epochs=2),
    "cifar-resnet20": Size(train=1_500, test=1_000),
}


@dataclass(frozen=True)
class Job:
    """One row: a network on the default macro with an ADC of so many bits, by one version."""

    network: str
    bits: str
    seed: int
    label: str
    epochs: int | None = None

    @property
    def size(self) -> Size:
        return SIZES.get(self.network.removesuffix(networks.FOLDED), Size())

    @property
    def recipe(self) -> rqtool.Recipe:
        epochs = self.size.epochs if self.epochs is None else self.epochs
        return rqtool.Recipe(epochs=epochs, seed=self.seed)

    @property
    def macro(self) -> rqtool.Macro:
        macro = rqtool.make_macro("default")
        if self.bits == IDEAL:
            return macro.with_ideal_adc()
        return rqtool.make_macro("default", adc_bits=int(self.bits))

    def path(self, rows: Path, bits: str | None = None) -> Path:
        """The row's file; bits: that of the same job with another ADC."""
        return rows / f"other-{self.network}-{bits or self.bits}-{self.label}-seed{self.seed}.json"


def commit() -> str:
    """The commit of the rqtool that runs, "unknown" where it is not a checkout."""
    command = ["git", "-C", str(Path(rqtool.__file__).parent), "describe", "--always", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def known_twin(job: Job, rows: Path) -> float | None:
    """The twin's top-1: what the finished job with an ideal ADC was fine-tuned to."""
    path = job.path(rows, IDEAL)
    row = json.loads(path.read_text()) if path.exists() else {}
    same = row.get("epochs") == job.recipe.epochs
    return row["metrics"]["tuned_top1"] if same and "metrics" in row else None


def about(job: Job) -> dict[str, Any]:
    """What a row says of its job."""
    fields = {"network": job.network, "bits": job.bits, "seed": job.seed, "label": job.label}
    sizes = {"epochs": job.recipe.epochs, "train_images": job.size.train, "test_images": job.size.test}
    return {**fields, "commit": commit(), **sizes, "threads": torch.get_num_threads()}


def run(job: Job, cache: Path, rows: Path, paired: bool) -> dict[str, Any]:
    """The row of a job; one with `refused`, rqtool's message, where rqtool refused it."""
    sizes = {"train": job.size.train, "test": job.size.test}
    module, data, preprocess = networks.load(job.network, cache, **sizes, draw=job.seed)
    twin = None if paired else known_twin(job, rows)
    row, started = about(job), time.process_time()
    try:
        result = rqtool.quantize(
            module, data, job.macro, recipe=job.recipe, preprocess=preprocess, twin=twin is None
        ).to_json()
    except rqtool.RqError as e:
        return {**row, "refused": str(e)}
    metrics = result["metrics"] if twin is None else {**result["metrics"], **loss_to(twin, result)}
    kept = {key: result[key] for key in ("chosen", "seconds", "macro", "recipe", "warnings") if key in result}
    cpu = round(time.process_time() - started, 1)
    return {**row, "metrics": metrics, "cpu_seconds": cpu, **kept}


def loss_to(twin: float, result: dict[str, Any]) -> dict[str, float]:
    """The metrics that a twin trained by another job gives."""
    return {"ideal_top1": twin, "adc_loss": twin - result["metrics"]["tuned_top1"]}


def run_all(jobs: list[Job], cache: Path, rows: Path, paired: bool) -> None:
    """The jobs of one network and seed that have no row yet, one after another on one thread."""
    torch.set_num_threads(1)
    for job in jobs:
        path = job.path(rows)
        if path.exists():
            continue
        row = run(job, cache, rows, paired)
        write_atomic(path, json.dumps(row, indent=1).encode() + b"\n")
        print(path.name, row.get("refused") or told(row), flush=True)


def told(row: dict[str, Any]) -> str:
    """The figures of a row in one line."""
    keys = ("float_top1", "ptq_top1", "tuned_top1", "ideal_top1")
    figures = {key.removesuffix("_top1"): row["metrics"].get(key) for key in keys}
    return f"{figures} {row['chosen']}, {row['seconds']} s, {row['cpu_seconds']} s of CPU"


def chosen_networks(patterns: list[str]) -> list[str]:
    found = [n for n in networks.NAMES if any(fnmatch(n, pattern) for pattern in patterns)]
    if not found:
        sys.exit(f"no network matches {' or '.join(patterns)}; --list names them")
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, metavar="DIR")
    parser.add_argument("--version-label", metavar="LABEL", help="letters, digits, dots and _")
    parser.add_argument("--only", nargs="*", default=["*"], metavar="PATTERN")
    parser.add_argument("--bits", nargs="*", choices=BITS, default=list(BITS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="instead of those of the table in this file")
    parser.add_argument("--paired", action="store_true", help="a twin in each job")
    parser.add_argument("--rows", type=Path, default=DOCS / "results")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if not args.list and (args.cache is None or not re.fullmatch(r"[\w.]+", args.version_label or "")):
        parser.error("--cache DIR and --version-label LABEL (letters, digits, dots, _) are needed")
    return args


def main() -> None:
    args = arguments()
    names = chosen_networks(args.only)
    if args.list:
        print(*names, sep="\n")
        return
    args.rows.mkdir(parents=True, exist_ok=True)
    bits = [b for b in BITS if b in args.bits]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = []
        for name, seed in ((n, s) for s in range(args.seeds) for n in names):
            jobs = [Job(name, b, seed, args.version_label, args.epochs) for b in bits]
            waiting.append(pool.submit(run_all, jobs, args.cache, args.rows, args.paired))
        for done in waiting:
            done.result()


if __name__ == "__main__":
    main()
