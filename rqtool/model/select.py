"""Which tensors of a checkpoint are the weights of a network: tables of tensors anywhere in what a
file held, and the names in them.

A table fits a network where, behind one prefix, it has every weight of it in its shape. Where
several different ones fit, the user is asked; nothing is chosen in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rqtool.errors import ConfigError, InputError, escaped, suggestion
from rqtool.model.pickles import Unknown

WRAPPERS = (
    "state_dict", "model_state_dict", "model", "model_state", "net", "network", "module", "weights", "params", "state", "generator", "student", "teacher",
    "ema", "ema_state_dict", "model_ema", "state_dict_ema", "params_ema",
)  # fmt: skip
NO_WEIGHTS = re.compile(
    r"(optim|sched|scaler|lr_)", re.IGNORECASE
)  # what training keeps beside the weights
MAX_WRAPPERS = 4
COUNTERS = ("num_batches_tracked", "n_averaged")  # no part of what a network computes
IN_NAMES = ("_orig_mod.", "module.")  # torch.compile and DataParallel put them before any layer
ROOT = "."  # how --weights names the outermost table


@dataclass
class Table:
    """Tensors by name, found at `path` of a file; `others`: entries beside them that are no
    tensors. `network`: what they were read from, where it was a whole network."""

    path: str
    tensors: dict[str, Any]
    others: list[str] = field(default_factory=list)
    network: Any = None


@dataclass
class Fit:
    """A table that has every weight behind `prefix`; `extra`: names of the network's own modules
    that it has no place for; `beside`: other names."""

    table: Table
    prefix: str
    state: dict[str, torch.Tensor]
    extra: list[str]
    beside: list[str]

    def name(self) -> str:
        """What a user may call it."""
        prefix = f" --prefix {escaped(self.prefix)}" if self.prefix else ""
        return f"--weights {escaped(self.table.path)}{prefix}"


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, Unknown) and value.is_tensor())


def entries(value: Any) -> Mapping[Any, Any] | None:
    """The entries of a dictionary, also of one whose class is not known."""
    if isinstance(value, Mapping):
        return value
    return value.items if isinstance(value, Unknown) and value.items else None


# -- tables ----------------------------------------------------------------------------------------
def tables(loaded: Any, tensors_of: Callable[[Any], dict[str, Any] | None]) -> list[Table]:
    """Every table of tensors in what a file held. tensors_of: those of a whole network; None for
    anything else."""
    return list(_tables(loaded, "", tensors_of, ()))


def _tables(
    value: Any,
    path: str,
    tensors_of: Callable[[Any], dict[str, Any] | None],
    above: tuple[int, ...],
) -> Iterator[Table]:
    if len(above) > MAX_WRAPPERS or id(value) in above:
        return
    whole = tensors_of(value)
    if whole is not None:
        yield Table(path or ROOT, whole, network=value)
        return
    held = entries(value)
    if held is None and isinstance(value, Unknown):
        held = entries(value.state)
    if not held:
        return
    found = {str(k): v for k, v in held.items() if is_tensor(v)}
    if found:
        plain = (bool, int, float, str, bytes, np.ndarray)
        yield Table(path or ROOT, found, [str(k) for k, v in held.items() if isinstance(v, plain)])
    for key, inside in held.items():
        if isinstance(key, str) and not NO_WEIGHTS.match(key) and not is_tensor(inside):
            yield from _tables(inside, f"{path}.{key}".strip("."), tensors_of, (*above, id(value)))


def chosen(found: list[Table], weights: str | None, where: str) -> list[Table]:
    """The tables that `--weights` leaves. Raises ConfigError where it names none."""
    if weights is None:
        return found
    left = [t for t in found if t.path == weights]
    if not left:
        raise ConfigError(
            f"{where}: has no weights under '{escaped(weights)}'; "
            f"{suggestion(weights, [escaped(t.path) for t in found])}"
        )
    return left


def single(found: list[Table], where: str) -> Table:
    """The one table to show where no network says which. Raises ConfigError where there are several
    different ones."""
    named = [t for t in found if t.path.rsplit(".", 1)[-1] in WRAPPERS] or found
    if any(not same(named[0].tensors, t.tensors) for t in named[1:]):
        raise ConfigError(
            f"{where}: holds several sets of weights "
            f"({', '.join(escaped(t.path) for t in named)}); choose one with "
            "--weights KEY"
        )
    return named[0]


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two tables hold equal tensors under equal names."""
    return a.keys() == b.keys() and all(
        isinstance(a[k], torch.Tensor)
        and isinstance(b[k], torch.Tensor)
        and torch.equal(a[k], b[k])
        for k in a
    )


# -- names -----------------------------------------------------------------------------------------
def fits(found: list[Table], own: Mapping[str, Any], prefix: str | None) -> list[Fit]:
    """All ways in which the tables give the weights `own`, equal ones once."""
    kept: list[Fit] = []
    for fit in (fit for table in found for fit in _fits(table, own, prefix)):
        if not any(same(fit.state, other.state) for other in kept):
            kept.append(fit)
    return kept


def the_fit(
    found: list[Table], own: Mapping[str, Any], prefix: str | None, where: str, arch: str
) -> Fit | None:
    """The one way; None where there is none. Raises ConfigError, with the list, where there are
    several."""
    kept = fits(found, own, prefix)
    if len(kept) > 1:
        raise ConfigError(
            f"{where}: holds {len(kept)} different sets of weights that fit "
            f"{arch}; choose one with {' or '.join(f.name() for f in kept)}"
        )
    return kept[0] if kept else None


def _fits(table: Table, own: Mapping[str, Any], prefix: str | None) -> Iterator[Fit]:
    names = plain_names(table.tensors, own)
    for start in prefixes(names, own) if prefix is None else [spelled_prefix(prefix, names)]:
        state = {k.removeprefix(start): v for k, v in names.items() if k.startswith(start)}
        if not any(misfits(state, own)):
            inside = [k for k in state if k not in own]
            outside = [k for k in names if not k.startswith(start)]
            extra = [k for k in inside if _is_own(k, state[k], own)]
            beside = [
                k
                for k in (*inside, *outside)
                if k not in extra and k.rsplit(".", 1)[-1] not in COUNTERS
            ]
            yield Fit(table, start, {k: v for k, v in state.items() if k in own}, extra, beside)


def spelled_prefix(prefix: str, names: Mapping[str, Any]) -> str:
    """`prefix` as the names spell it, with or without its dot."""
    dotted = f"{prefix.rstrip('.')}." if prefix else ""
    return dotted if any(k.startswith(dotted) for k in names) else prefix


def plain_names(tensors: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors under their names without what torch.compile and DataParallel put into them,
    where that stays unambiguous."""
    names = dict(tensors)
    for word in IN_NAMES:
        if any(word in k for k in own):
            continue
        pattern = re.compile(rf"(^|\.){re.escape(word)}")
        short = {pattern.sub(r"\1", k): v for k, v in names.items()}
        names = short if len(short) == len(names) and not _lone(names, word) else names
    return names


def _lone(names: Mapping[str, Any], word: str) -> bool:
    """Whether some names begin with `word` and others, which are no counters, do not: the choice is
    then the prefix search's."""
    leading = [k.startswith(word) for k in names if k.rsplit(".", 1)[-1] not in COUNTERS]
    return any(leading) and not all(leading)


def prefixes(names: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """What may stand before every name of `own`: what stands before the first of them, shortest
    first."""
    groups = _groups(own)
    first = groups[0] if groups else []
    found = {
        k[: len(k) - len(name)]
        for name in first
        for k in names
        if k == name or k.endswith(f".{name}")
    }
    return sorted(found, key=lambda p: (len(p), p))


def _groups(own: Mapping[str, Any]) -> list[list[str]]:
    """Names of each weight: tied ones are stored once, under any of their names."""
    groups: dict[int, list[str]] = {}
    for name, tensor in own.items():
        if not name.endswith(".num_batches_tracked"):
            groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def misfits(state: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(names of missing weights, sentences about misshapen ones) of a state without prefix."""
    missing = [group[0] for group in _groups(own) if not any(name in state for name in group)]
    odd = [
        f"{k} is {kind(state[k])}, not {kind(own[k])}"
        for k in state
        if k in own and isinstance(own[k], torch.Tensor) and kind(state[k]) != kind(own[k])
    ]
    return missing, odd


def _is_own(name: str, tensor: Any, own: Mapping[str, Any]) -> bool:
    """Whether a name that the network lacks looks like a weight of its own modules: known ones, or
    one more in a numbered row."""
    if name.rsplit(".", 1)[-1] in (*COUNTERS, "total_ops", "total_params"):
        return False
    if "." not in name:
        return is_tensor(tensor) and not (isinstance(tensor, torch.Tensor) and tensor.numel() <= 1)
    rows = {_row(k) for k in own}
    return _row(name) in rows


def _row(name: str) -> str:
    """The outermost module, without its number.

    >>> _row("layer4.0.weight"), _row("3.bias")
    ('layer', '')
    """
    return name.split(".", 1)[0].rstrip("0123456789")


def kind(t: Any) -> str:
    """What a tensor is, in words."""
    if not isinstance(t, torch.Tensor):
        return "no plain array"
    shape = "x".join(map(str, t.shape)) or "a single number"
    return shape if t.is_floating_point() else f"{shape} of {str(t.dtype).removeprefix('torch.')}"


# -- what does not fit -----------------------------------------------------------------------------
def refuse_misfit(
    found: list[Table], own: Mapping[str, Any], prefix: str | None, where: str, arch: str
) -> None:
    """Raise InputError: what is missing, unexpected or misshapen in the table that comes nearest."""
    best: tuple[int, dict[str, Any]] = (-1, {})
    for table in found:
        names = plain_names(table.tensors, own)
        starts = (
            {"", *_usual(names), *prefixes(names, own)}
            if prefix is None
            else {spelled_prefix(prefix, names)}
        )
        for start in sorted(starts, key=lambda p: (len(p), p)):
            state = {k.removeprefix(start): v for k, v in names.items() if k.startswith(start)}
            count = sum(k in own for k in state)
            best = max(best, (count, state), key=lambda pair: pair[0])
    refuse_state(best[1], own, where, arch)


def _usual(names: Mapping[str, Any]) -> list[str]:
    """The prefix that all names have in common, where they have one."""
    firsts = {k.split(".", 1)[0] + "." for k in names if "." in k}
    return list(firsts) if len(firsts) == 1 else []


def refuse_state(state: Mapping[str, Any], own: Mapping[str, Any], where: str, arch: str) -> None:
    missing, odd = misfits(state, own)
    faults = [
        listed("missing", missing),
        listed("unexpected", [k for k in state if k not in own]),
        listed("of another kind", odd),
    ]
    raise InputError(
        f"{where}: does not fit {arch}: {', '.join(f for f in faults if f)}; "
        "give the network it was trained as"
    )


def listed(what: str, names: list[str]) -> str:
    """ "2 missing (a, b)", or nothing."""
    return (
        f"{len(names)} {what} "
        f"({', '.join(escaped(n) for n in names[:3])}{', ...' if len(names) > 3 else ''})"
        if names
        else ""
    )


def notes(fit: Fit, where: str) -> Iterator[str]:
    """What a user should know of what was left out."""
    if fit.beside:
        yield (
            f"{where}: "
            f"{listed('tensors beside the weights are not read', fit.beside)}; "
            "check that the network does not need them"
        )
    if fit.table.others:
        yield (
            f"{where}: "
            f"{listed('entries among the weights are no tensors and are not read', fit.table.others)}; check that the network does not need them"
        )
