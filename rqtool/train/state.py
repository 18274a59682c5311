"""The training state: what an interrupted job goes on from, in one file that is replaced after
every epoch. No pickle.

    tensors   STAGE/network/NAME, STAGE/best/NAME     states of the network: now, and of the best candidate
              STAGE/optim/NUMBER/NAME                 what AdamW keeps
    STAGE/right/best                        which held-out images the best one names rightly
    document  kind, about (what the job was asked for, and digests of its inputs), runs (STAGE -> epoch, roll-backs, figures)

Orders, noise and moves of images depend on seed and step alone, so no state of a random generator
is needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rqtool import __version__
from rqtool.errors import ConfigError, InputError, escaped
from rqtool.hardware.macro import Macro
from rqtool.mapping.assign import Macros, assigned
from rqtool.model.network import Network
from rqtool.storage import check_writable, load_tensors, save_tensors
from rqtool.train.finetune import Candidate, Epoch, Feed, Recipe, Run

KIND = "training state"
States = dict[str, torch.Tensor]


@dataclass
class Runs:
    """The runs of a job by the name of their stage. path: the file that holds them, None for no
    file."""

    path: Path | None = None
    about: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)

    def keep(self, stage: str, run: Run) -> None:
        """Replace the file. Raises StorageError where that fails; the file is then the old one."""
        if self.path is None:
            return
        self.runs[stage] = run
        tensors = {
            f"{name}/{key}": value.numpy()
            for name, r in self.runs.items()
            for key, value in _tensors(r).items()
        }
        document = {
            "kind": KIND,
            "about": self.about,
            "runs": {name: _figures(r) for name, r in self.runs.items()},
        }
        save_tensors(self.path, tensors, document, force=True)


def kept_runs(path: str | Path, about: dict[str, Any]) -> Runs:
    """The runs in the file at `path`, none where there is no such file yet. about: as from
    `about_job`.

    Raises InputError where it is another kind of file, ConfigError where it belongs to another job
    or cannot be written.
    """
    check_writable(path, force=True, option="--state")
    about = json.loads(json.dumps(about))
    if not Path(path).exists():
        return Runs(Path(path), about)
    tensors, document = load_tensors(path)
    if document.get("kind") != KIND:
        raise InputError(
            f"{escaped(path)}: holds no training state; give --state the name of "
            "a file that is not there yet"
        )
    try:
        runs = {
            name: _run(figures, _under(tensors, name)) for name, figures in document["runs"].items()
        }
        other = _difference(document["about"], about)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InputError(
            f"{escaped(path)}: its parts do not fit together ({escaped(e)}); "
            "delete the file and start again"
        ) from e
    if other:
        raise ConfigError(
            f"{escaped(path)}: is the state of another job ({escaped(other)}); "
            "give the command it was made with, or another --state"
        )
    return Runs(Path(path), about, runs)


def about_job(
    network: Network, macro: Macro | Macros, recipe: Recipe, feeds: list[Feed]
) -> dict[str, Any]:
    """What decides every bit of a job's training, as JSON data."""
    model = {name: value.numpy() for name, value in network.state_dict().items()}
    images = {
        f"{n} {name}": array
        for n, f in enumerate(feeds)
        for name, array in (
            ("x", f.images.x),
            ("y", f.images.y),
            ("mult", f.mult.numpy()),
            ("add", f.add.numpy()),
        )
    }
    graph = {"graph": np.frombuffer(json.dumps(network.graph.to_json()).encode(), np.uint8)}
    digests = {"model": _sha256(model | graph), "images": _sha256(images)}
    macros = assigned(macro)
    layers = {"layers": macros.tables()}
    about = {"macro": macros.default.to_dict(), "recipe": recipe.to_dict(), **layers}
    return {"rqtool": __version__, **digests, **about}


def _sha256(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, a in arrays.items():
        digest.update(f"{name} {a.dtype} {a.shape} ".encode())
        digest.update(np.ascontiguousarray(a))
    return digest.hexdigest()


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """What of the job is not as it was, in words; None where all is."""
    for key, value in new.items():
        before = old.get(key)
        if key == "layers":
            if (before or {}) != value:
                return "its layers had other macros, by --layer or --keep"
            continue
        if before != value and isinstance(value, dict):
            changed = (
                f"--{name.replace('_', '-')} was {before.get(name)} and is {value[name]}"
                for name in value
                if before.get(name) != value[name]
            )
            return next(changed, f"it had another {key}")
        if before != value:
            return (
                f"made by rqtool {before}" if key == "rqtool" else f"its {key} had another content"
            )
    return None


# -- a run as tensors and figures ------------------------------------------------------------------
def _tensors(run: Run) -> States:
    right = {} if run.best.right is None else {"best": run.best.right.to(torch.uint8)}
    rooms = {
        "network": run.network,
        "best": run.best.state,
        "optim": run.optim,
        "right": right,
    }
    return {
        f"{room}/{name}": value.detach()
        for room, values in rooms.items()
        for name, value in values.items()
    }


def _figures(run: Run) -> dict[str, Any]:
    """JSON data; losses in hexadecimal, which holds every bit and what is no number."""
    best = {"chosen": run.best.name, "top1": run.best.top1, "loss": run.best.loss.hex()}
    history = [
        [e.number, *(value.hex() for value in (e.top1, e.loss, e.first_loss, e.last_loss))]
        for e in run.history
    ]
    return {"epoch": run.epoch, "roll_backs": run.roll_backs, **best, "history": history}


def _under(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(f"{prefix}/"): array
        for name, array in tensors.items()
        if name.startswith(f"{prefix}/")
    }


def _run(figures: dict[str, Any], tensors: dict[str, np.ndarray]) -> Run:
    network, best, optim, right = (
        {name: torch.from_numpy(a) for name, a in _under(tensors, room).items()}
        for room in ("network", "best", "optim", "right")
    )
    loss = float.fromhex(figures["loss"])
    named = right["best"].bool() if "best" in right else None
    candidate = Candidate(figures["chosen"], figures["top1"], loss, best, named)
    history = tuple(
        Epoch(number, *map(float.fromhex, values)) for number, *values in figures.get("history", [])
    )
    return Run(figures["epoch"], figures["roll_backs"], candidate, network, optim, history)
