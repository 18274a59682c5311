"""Runs the same jobs on two commits and prints every shade of difference: figures, codes and files.

    make shades REF=v0.1.0                     six jobs on that commit and on HEAD
    python tools/shades.py REF --against main  another commit in the place of HEAD
    python tools/shades.py REF --jobs default,split --threads 1 --epochs 0

A change that is meant to change nothing is shown to do so: each job compresses the embedded network
with a fixed seed, in checkouts of the two commits, and what comes out is compared by equality:

    figures       every number and word that `rqtool quantize --json` prints, but for seconds
    program       the digest of the integer program, as the exported file names it
    constants     the digest of every constant of the exported file
    accumulators  the digest of what each layer gives on 20 test images, by onnxruntime
    .rq           the digest of each tensor and of each part of the document; seconds are left out,
                  so the file as a whole is not compared
    .onnx         the digest of the file; like the document, it holds the version of rqtool, too

Only what is committed takes part. Prints one line for each difference and ends with 1 where there
is one. A job that stops is compared by its last message, so that a commit which lacks an option
does not end the others. The kernels are compiled anew in each checkout, which takes a minute.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 20
METADATA = "rqtool.reram/1"
OPERATORS = "ai.rqtool"  # the domain of the nodes that hold the reads of a layer
NOT_COMPARED = {"seconds"}
JOBS = {
    "default": [],
    "nthu-2019": ["--macro", "nthu-2019"],
    "free": ["--levels", "free"],
    "split": ["--sign-scheme", "split"],
    "bit-serial": ["--dac-bits", "1"],
    "spread": ["--pack", "spread", "--granularity", "column"],
}

Found = dict[str, Any]  # by the name of a figure or a digest


class Stop(Exception):
    """What ends the comparison, in one sentence."""


@dataclass(frozen=True)
class Job:
    """One row of JOBS on a number of threads."""

    name: str
    threads: int
    epochs: int

    def __str__(self) -> str:
        return f"{self.name}, {self.threads} thread{'s' * (self.threads != 1)}"

    def commands(self) -> list[list[str]]:
        """Arguments for rqtool; the output of the first one is compared."""
        model = ["quantize", "demo", "--data", "demo", "--out", "job.rq", "--json"]
        recipe = ["--seed", "0", "--epochs", str(self.epochs), "--threads", str(self.threads)]
        twin = [] if self.name == "default" else ["--no-twin"]
        export = ["export", "job.rq", "--onnx", "job.onnx", "--no-verify", "--json"]
        return [[*model, *recipe, *twin, *JOBS[self.name]], export]


# -- checkouts -----------------------------------------------------------------------------------
def git(*arguments: str) -> str:
    """What git prints. Raises Stop with its first line where it fails."""
    command = ["git", "-C", str(ROOT), *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise Stop(f"git {arguments[0]}: {ran.stderr.strip().partition(chr(10))[0]}")
    return ran.stdout.strip()


def commit_of(name: str) -> str:
    """The full hash of a commit, tag or branch."""
    try:
        return git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    except Stop:
        raise Stop(f"{name!r} is no commit of this repository; see `git log --oneline`") from None


@contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """A git worktree of a commit, gone when the block ends."""
    git("worktree", "add", "--detach", "--quiet", str(folder), commit)
    try:
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


# -- one job -------------------------------------------------------------------------------------
def results(job: Job, tree: Path, folder: Path) -> Found:
    """All figures and digests of a job on one checkout, or the message with which it stopped."""
    folder.mkdir(parents=True)
    printed = []
    for command in job.commands():
        ran = rqtool(command, tree, folder, job.threads)
        if ran.returncode:
            return {"stopped": f"exit code {ran.returncode}: {last_line(ran.stderr)}"}
        printed.append(ran.stdout)
    return {**flat(json.loads(printed[0])), **digests(folder, tree)}


def rqtool(
    command: list[str], tree: Path, folder: Path, threads: int
) -> subprocess.CompletedProcess[str]:
    """Runs the command line of a checkout in a folder of its own."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)}
    line = [sys.executable, "-m", "rqtool", *command]
    return subprocess.run(
        line, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "nothing was said"


def flat(value: Any, name: str = "") -> Found:
    """The leaves of a JSON value by dotted names, those of NOT_COMPARED left out.

    >>> flat({"a": [{"b": 1}, 2], "seconds": 3})
    {'a.0.b': 1, 'a.1': 2}
    """
    if isinstance(value, dict):
        pairs = [(key, inner) for key, inner in value.items() if key not in NOT_COMPARED]
    elif isinstance(value, list):
        pairs = list(enumerate(value))
    else:
        return {name: value}
    leaves: Found = {}
    for key, inner in pairs:
        leaves |= flat(inner, f"{name}.{key}" if name else str(key))
    return leaves


# -- digests -------------------------------------------------------------------------------------
def digests(folder: Path, tree: Path) -> Found:
    """The digests of the files of a job and of what is in them."""
    model = onnx.load(folder / "job.onnx")
    document = {p.key: p.value for p in model.metadata_props}[METADATA]
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return {
        "program": json.loads(document)["program"]["sha256"],
        **{f"constant {name}": digest(array) for name, array in constants.items()},
        **{f"accumulators of {name}": digest(a) for name, a in layer_outputs(model, tree).items()},
        **rq_digests((folder / "job.rq").read_bytes()),
        ".onnx": sha256((folder / "job.onnx").read_bytes()),
    }


def rq_digests(data: bytes) -> Found:
    """A digest for each part of a .rq file; of the whole file, where it has another form."""
    (length,) = struct.unpack("<Q", data[:8])
    try:
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        tensors = json.loads(metadata["tensors_sha256"])
        parts = json.loads(metadata["document"])
    except (KeyError, ValueError):
        return {".rq": sha256(data)}
    texts = {key: json.dumps(flat(part)) for key, part in parts.items()}
    return {
        **{f".rq tensor {name}": value for name, value in tensors.items()},
        **{f".rq {key}": sha256(text.encode()) for key, text in texts.items()},
    }


def layer_outputs(model: onnx.ModelProto, tree: Path) -> dict[str, np.ndarray]:
    """What each node with reads gives on the first test images of the demo, by its name."""
    nodes = {n.name: n.output[0] for n in model.graph.node if n.domain == OPERATORS}
    shown = {o.name for o in model.graph.output}
    for output in nodes.values():
        if output not in shown:
            model.graph.output.append(helper.make_empty_tensor_value_info(output))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    given = session.get_inputs()[0]
    arrays = session.run(list(nodes.values()), {given.name: demo_images(tree, given.type)})
    return dict(zip(nodes, arrays, strict=True))


def demo_images(tree: Path, kind: str) -> np.ndarray:
    """[20, 1, 28, 28] images of the demonstration, in the type that a session asks for."""
    with np.load(tree / "rqtool" / "demo" / "fashion.npz", allow_pickle=False) as held:
        pixels = held["x_test"][:IMAGES]
    return pixels.reshape(len(pixels), 1, *pixels.shape[-2:]).astype(
        np.uint8 if "uint8" in kind else np.float32
    )


def digest(array: np.ndarray) -> str:
    """The digest of an array: of its type, its shape and its bytes."""
    head = f"{array.dtype} {list(array.shape)} ".encode()
    return sha256(head + np.ascontiguousarray(array).tobytes())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# -- the comparison ------------------------------------------------------------------------------
def differences(before: Found, after: Found) -> list[str]:
    """One line for each name whose values are not equal; a name that one side lacks is one, too.

    >>> differences({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 4})
    ['b: 2 -> 4', 'c: 3 -> absent']
    """
    names = [*before, *(name for name in after if name not in before)]
    pairs = [(n, before.get(n, "absent"), after.get(n, "absent")) for n in names]
    return [f"{name}: {short(old)} -> {short(new)}" for name, old, new in pairs if old != new]


def short(value: Any) -> str:
    """A value as text; sixteen signs of a digest tell it apart."""
    text = str(value)
    return text[:16] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def compare(commits: tuple[str, str], jobs: list[Job]) -> int:
    """Prints what differs, job by job; how many jobs do."""
    different = 0
    with tempfile.TemporaryDirectory(prefix="shades-") as name:
        work = Path(name).resolve()
        with checkout(commits[0], work / "ref") as ref, checkout(commits[1], work / "new") as new:
            for job in jobs:
                inside = f"{job.name}-{job.threads}"
                before = results(job, ref, work / "ref-runs" / inside)
                after = results(job, new, work / "new-runs" / inside)
                lines = differences(before, after)
                different += bool(lines)
                print(f"{job}: {verdict(before, lines)}", flush=True)
                print("".join(f"    {line}\n" for line in lines), end="", flush=True)
    return different


def verdict(before: Found, lines: list[str]) -> str:
    if lines:
        return f"{len(lines)} of {len(before)} values differ"
    if "stopped" in before:
        return f"both stop with {before['stopped']}"
    return f"all {len(before)} values are equal"


def parsed(arguments: list[str] | None) -> tuple[tuple[str, str], list[Job]]:
    """The two commits, and the jobs in order."""
    parser = argparse.ArgumentParser(description="Run the same jobs on two commits.")
    parser.add_argument("ref", nargs="?", help="the commit to compare with")
    parser.add_argument("--against", default="HEAD", help="the other commit (default HEAD)")
    parser.add_argument("--jobs", default=",".join(JOBS), help=f"of {', '.join(JOBS)}")
    parser.add_argument("--threads", default="1,2", help="numbers of threads (default 1,2)")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of each job (default 1)")
    given = parser.parse_args(arguments)
    if not given.ref:
        raise Stop("no commit to compare with; use make shades REF=commit")
    names = given.jobs.split(",")
    if unknown := [name for name in names if name not in JOBS]:
        raise Stop(f"{unknown[0]!r} is no job; use some of {', '.join(JOBS)}")
    threads = given.threads.split(",")
    if wrong := [n for n in threads if not n.isdecimal() or int(n) == 0]:
        raise Stop(f"--threads {wrong[0]!r} is no number of threads; use 1, 2 or 1,2")
    jobs = [Job(name, int(count), given.epochs) for count in threads for name in names]
    return (commit_of(given.ref), commit_of(given.against)), jobs


def main(arguments: list[str] | None = None) -> int:
    try:
        commits, jobs = parsed(arguments)
        print(f"{commits[0][:12]} -> {commits[1][:12]}", flush=True)
        different = compare(commits, jobs)
    except Stop as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    print(f"{different} of {len(jobs)} jobs differ" if different else "no job differs")
    return int(bool(different))


if __name__ == "__main__":
    # A command that is stopped takes its checkouts away, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
