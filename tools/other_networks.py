"""Judge the defaults of rqtool on networks of many kinds: a row for each job.

    python tools/other_networks.py --cache DIR --version-label LABEL [--shared DIR] [--paired]
        [--only PATTERN ...] [--bits ideal 4 3 2] [--seeds 3] [--epochs N] [--rows DIR] [--jobs N]
    python tools/other_networks.py --list [--only PATTERN ...]

DIR of --cache is filled by tools/networks.py (seed 0). Every job is one call of rqtool.quantize
with the default macro and recipe of the version that Python imports, so another version is judged
with PYTHONPATH=ITS_CHECKOUT; only the bits of the ADC, the epochs and the seed are set. The seed
draws the training images, too. The job with an ideal ADC is the twin of the other jobs of its
network and seed; --paired trains a twin in each job instead, for the paired standard error where
rqtool gives one. Finished rows are JSON files in --rows (default docs/results) and are not run
again. Each job runs on one thread, --jobs networks side by side. tools/results.py writes the
tables.
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
from functools import cache as remembered
from pathlib import Path
from typing import Any

import networks
import torch

import rqtool
from rqtool.storage import write_atomic

DOCS = Path(__file__).resolve().parent.parent / "docs"
IDEAL = "ideal"
BITS = (IDEAL, "4", "3", "2")  # the ideal ADC first: it is the twin of the others
KEPT = ("chosen", "seconds", "macro", "recipe", "warnings")


@dataclass(frozen=True)
class Size:
    """Images and epochs of a job: at most about 40 seconds on one thread."""

    train: int = 5_000
    test: int = 2_000
    epochs: int = 2


SIZES = {"cifar-resnet20": Size(train=1_200, test=1_000)}


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
        if self.bits == IDEAL:
            return rqtool.make_macro("default").with_ideal_adc()
        return rqtool.make_macro("default", adc_bits=int(self.bits))

    def path(self, rows: Path, bits: str | None = None) -> Path:
        """The row's file; bits: that of the same job with another ADC."""
        name = f"{self.network}-{bits or self.bits}-{self.label}-seed{self.seed}"
        return rows / f"other-{name}.json"


@dataclass(frozen=True)
class Places:
    """Folders: trained networks, shared models, finished rows."""

    cache: Path
    shared: Path
    rows: Path


@remembered
def commit() -> str:
    """The commit of the rqtool that runs when first asked, "unknown" outside of a checkout."""
    here = str(Path(rqtool.__file__).parent)
    command = ["git", "-C", here, "describe", "--always", "--exclude=*"]
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
    sizes = {"train_images": job.size.train, "test_images": job.size.test}
    return {
        **fields,
        "commit": commit(),
        "epochs": job.recipe.epochs,
        **sizes,
        "threads": torch.get_num_threads(),
    }


def run(job: Job, places: Places, paired: bool) -> dict[str, Any]:
    """The row of a job; one with `refused`, rqtool's message, where rqtool refused it."""
    sizes = {"train": job.size.train, "test": job.size.test}
    where = {"cache": places.cache, "shared": places.shared}
    module, data, preprocess = networks.load(job.network, **where, **sizes, draw=job.seed)
    twin = None if paired else known_twin(job, places.rows)
    row, started = about(job), time.process_time()
    try:
        result = rqtool.quantize(
            module, data, job.macro, recipe=job.recipe, preprocess=preprocess, twin=twin is None
        ).to_json()
    except rqtool.RqError as e:
        return {**row, "refused": str(e)}
    kept = {key: result[key] for key in KEPT if key in result}
    cpu = round(time.process_time() - started, 1)
    return {**row, "metrics": with_twin(result["metrics"], twin), "cpu_seconds": cpu, **kept}


def with_twin(metrics: dict[str, Any], twin: float | None) -> dict[str, Any]:
    """The metrics of a job, with those that a twin trained by another job gives."""
    if twin is None:
        return metrics
    return {**metrics, "ideal_top1": twin, "adc_loss": twin - metrics["tuned_top1"]}


def run_all(jobs: list[Job], places: Places, paired: bool) -> None:
    """The jobs of one network and seed that have no row yet, one after another on one thread."""
    torch.set_num_threads(1)
    commit()  # now, because the checkout may change while a job runs
    for job in jobs:
        path = job.path(places.rows)
        if path.exists():
            continue
        row = run(job, places, paired)
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


def check_trained(names: list[str], cache: Path) -> None:
    """Exit where the weights of a network are missing."""
    missing = [name for name in names if not networks.weights_path(name, 0, cache).exists()]
    if missing:
        sys.exit(f"{cache} has no weights of {', '.join(missing)}; run tools/networks.py first")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, metavar="DIR")
    parser.add_argument("--shared", type=Path, metavar="DIR", default=networks.SHARED)
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
    if not args.list and (
        args.cache is None or not re.fullmatch(r"[\w.]+", args.version_label or "")
    ):
        parser.error("--cache DIR and --version-label LABEL (letters, digits, dots, _) are needed")
    return args


def main() -> None:
    args = arguments()
    names = chosen_networks(args.only)
    if args.list:
        print(*names, sep="\n")
        return
    check_trained(names, args.cache)
    args.rows.mkdir(parents=True, exist_ok=True)
    places = Places(args.cache, args.shared, args.rows)
    bits = [b for b in BITS if b in args.bits]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = []
        for name, seed in ((n, s) for s in range(args.seeds) for n in names):
            jobs = [Job(name, b, seed, args.version_label, args.epochs) for b in bits]
            waiting.append(pool.submit(run_all, jobs, places, args.paired))
        for done in waiting:
            done.result()


if __name__ == "__main__":
    main()
