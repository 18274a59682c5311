"""Run the experiments behind docs/results.md: one row a job and seed, resumable, each finished row
kept.

    python tools/experiments.py --shared DIR [--only PATTERN ...] [--seeds 3] [--jobs N] [--threads N] [--rows DIR]
    python tools/experiments.py --list [--only PATTERN ...]

DIR holds data/mnist.npz, data/fashion_mnist.npz, data/cifar10_jpeg75.npz,
models/reference_models.py and the weights beside it. PATTERNs name jobs as a shell names files
("mnist-*"). A finished row is a JSON file in --rows (default docs/results) named after job and
seed, with the sentence of rqtool's error where it would not do the job; delete it to run the job
again. Every job is one call of rqtool.quantize. The ideal-ADC twin is trained equally long from the
same seed; jobs that differ only in the ADC have the same twin, which is then trained once. --jobs
seeds run side by side, each on --threads threads. At the end docs/results.md and its plots are
written from all rows there are (tools/results.py).
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import numpy as np
import results
import torch
from jobs import EXPERIMENTS, TASKS, Task
from PIL import Image
from results import DOCS

import rqtool
from rqtool.model.data import load_data
from rqtool.storage import write_atomic


def decode(jpeg: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """uint8 [N, 3, H, W] from JPEG files back to back."""
    images = (Image.open(io.BytesIO(jpeg[a:b].tobytes())) for a, b in zip(offsets, offsets[1:]))
    return np.stack([np.asarray(image.convert("RGB")) for image in images]).transpose(0, 3, 1, 2)


def data_of(task: Task, folder: Path) -> rqtool.Data:
    """The data set of a task, with as many training images as it asks for."""
    data = read_data(folder / task.data)
    return replace(
        data, train=rqtool.Images(data.train.x[: task.train], data.train.y[: task.train])
    )


def read_data(path: Path) -> rqtool.Data:
    """A data set; JPEG archives are decoded."""
    if "jpeg" not in path.name:
        return load_data(str(path))
    with np.load(path) as z:
        parts = {
            s: rqtool.Images(
                decode(z[f"{s}_jpeg"], z[f"{s}_offsets"]), z[f"{s}_labels"].astype(np.int64)
            )
            for s in ("train", "test")
        }
    return rqtool.Data(path.name, parts["train"], parts["test"], 10)


def read_model(task: Task, models: Path) -> torch.nn.Module | str:
    """The float network with its weights, or the name of one that rqtool brings."""
    if task.weights is None:
        return task.factory
    sys.path.insert(0, str(models))
    model = getattr(importlib.import_module("reference_models"), task.factory)()
    model.load_state_dict(torch.load(models / task.weights, weights_only=True, map_location="cpu"))
    return model.eval()


def known_twin(name: str, seed: int, rows: Path) -> float | None:
    """The ideal-ADC twin's top-1 from a finished row that has the same twin."""
    same = [
        n for n in EXPERIMENTS if n != name and EXPERIMENTS[n].twin() == EXPERIMENTS[name].twin()
    ]
    found = [
        json.loads(path.read_text())
        for n in same
        if (path := rows / f"{n}-seed{seed}.json").exists()
    ]
    return next((row["metrics"]["ideal_top1"] for row in found if "metrics" in row), None)


@cache
def commit() -> str:
    """The commit of this working copy when it is first asked for, "unknown" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def run(name: str, seed: int, shared: Path, data: rqtool.Data, rows: Path) -> dict:
    """The JSON result of one job, without what is known of each layer. Raises RqError where rqtool
    will not do it."""
    about, task = EXPERIMENTS[name], TASKS[EXPERIMENTS[name].task]
    macro, twin = about.made_macro(), known_twin(name, seed, rows)
    preprocess = None if task.weights is None else rqtool.Preprocess(mean=task.mean, std=task.std)
    result = rqtool.quantize(
        read_model(task, shared / "models"),
        data,
        macro,
        recipe=about.recipe(seed),
        preprocess=preprocess,
        twin=twin is None,
    ).to_json()
    if twin is not None:
        # a row has no figures of single images, so that this loss has no paired error
        result["metrics"] |= {
            "ideal_top1": twin,
            "adc_loss": twin - result["metrics"]["tuned_top1"],
        }
    kept = (
        "macro",
        "recipe",
        "metrics",
        "chain",
        "measured_on",
        "train_images",
        "held_out_images",
        "chosen",
        "epochs",
        "roll_backs",
        "twin_chosen",
        "warnings",
        "seconds",
    )
    return {
        "commit": commit(),
        "threads": torch.get_num_threads(),
        **{key: result[key] for key in kept},
    }


def run_seed(names: list[str], seed: int, threads: int, shared: Path, rows: Path) -> None:
    """The jobs of one seed that have no row yet, one after another."""
    torch.set_num_threads(threads)
    commit()  # now, for the working copy may move on while a job runs
    for task in dict.fromkeys(EXPERIMENTS[n].task for n in names):
        paths = {n: rows / f"{n}-seed{seed}.json" for n in names if EXPERIMENTS[n].task == task}
        data = (
            None
            if all(path.exists() for path in paths.values())
            else data_of(TASKS[task], shared / "data")
        )
        for name, path in paths.items():
            if not path.exists():
                try:
                    found = run(name, seed, shared, data, rows)
                    said = f"{json.dumps(found['metrics'])} {found['seconds']} s"
                except rqtool.RqError as e:
                    found = {"commit": commit(), "refused": str(e)}
                    said = f"refused: {e}"
                write_atomic(path, json.dumps(found, indent=1).encode() + b"\n")
                print(path.name, said, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, metavar="DIR")
    parser.add_argument("--only", nargs="*", default=["*"], metavar="PATTERN")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=Path, default=DOCS / "results")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    names = [n for n in EXPERIMENTS if any(fnmatch(n, pattern) for pattern in args.only)]
    if not names:
        sys.exit(f"no job is called {' or '.join(args.only)}; --list names them")
    if args.list:
        print(*names, sep="\n")
        return
    if not args.shared:
        parser.error("--shared DIR says where data and models are")
    args.rows.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(run_seed, names, seed, args.threads, args.shared, args.rows)
            for seed in range(args.seeds)
        ]
        for job in jobs:
            job.result()
    results.write(args.rows, DOCS)


if __name__ == "__main__":
    main()
