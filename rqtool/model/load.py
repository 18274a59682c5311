"""Model files -> torch networks in float32 and evaluation mode, without executing anything from the
file.

    nn.Module              as it is
    demo                   the embedded network with its trained weights
    torch.save, pickle     a state dictionary anywhere inside (with --arch), or a whole network of torch.nn layers
    safetensors            a state dictionary (with --arch), also in several files with their index, or in a folder
    TorchScript, .pt2      their weights (with --arch)
    .onnx                  refused, with the way out

What a file is is seen from its bytes; its name counts only where they say nothing. A pickle is read
by a machine of our own (pickles.py). A pickled whole network never makes a torch.nn object while it
is read: its classes become inert records (`Record`), the records are checked to be plain data
without hooks, and only then are the layers built from them.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import safetensors
import safetensors.torch
import torch
from torch import nn

from rqtool.errors import ConfigError, InputError, escaped
from rqtool.model import select
from rqtool.model.named import network_of, said
from rqtool.model.pickles import Name, Unknown, read_pickle, read_program_weights, read_zip
from rqtool.model.zoo import ZOO
from rqtool.storage import read_file

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".tar", ".bin", ".ckpt", ".pkl", ".pickle")
ONLY_STATE = (
    "save the weights with torch.save(model.state_dict(), FILE) and give "
    "--arch package.module:factory"
)
REFUSED = {
    ".pt2": "exported programs are not read by this version",
    ".onnx": "ONNX models are not read by this version",
    ".rq": "is compressed already, by rqtool",
}
OTHERS = (
    (b"\x89HDF\r\n", "is an HDF5 file, as Keras writes it", "give a torch or safetensors file"),
    (b"\x1f\x8b", "is packed with gzip", "unpack it and give what is inside"),
    (
        b"version https://git-lfs",
        "is a pointer of Git LFS, not the file itself",
        "fetch it with git lfs pull",
    ),
    (b"<!DOCTYPE", "is a web page, not a model", "fetch the file that the page links to"),
    (b"<html", "is a web page, not a model", "fetch the file that the page links to"),
)
INDEX = ".index.json"
FOLDER_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
RUNS = (
    "posix",
    "nt",
    "os",
    "subprocess",
    "pty",
    "runpy",
    "socket",
    "shutil",
    "ctypes",
    "importlib",
    "webbrowser",
    "code",
    "commands",
)
RUNS_BUILTIN = tuple(
    f"builtins.{name}"
    for name in ("eval", "exec", "compile", "__import__", "open", "input", "breakpoint")
)


def load_model(
    source: str | Path | nn.Module,
    arch: str | None = None,
    *,
    weights: str | None = None,
    prefix: str | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> nn.Module:
    """The network in `source`, float32, in evaluation mode (an nn.Module comes back as it is).

    arch: what a state dictionary belongs to, as `named.network_of` reads it (its code runs), or a
    name of `zoo.ZOO`. weights: where in the file the weights are ("model_ema", "ema.state_dict");
    needed only where several different ones fit. prefix: what stands before each name of the
    network's weights; needed only then, too. say: is given a sentence on what was left out. Raises
    InputError where the file cannot be read, is refused or does not fit; ConfigError for a missing
    or unknown `arch`, `weights` or `prefix`.
    """
    if isinstance(source, nn.Module):
        if weights is not None or prefix is not None:
            raise ConfigError(
                "--weights and --prefix choose in a file, but the model is a torch "
                "module already; leave them out"
            )
        return source
    if str(source) == "demo":
        source, arch = (
            Path(str(resources.files("rqtool.demo").joinpath("demo.safetensors"))),
            arch or "demo",
        )
    where = escaped(source)
    loaded = _read(Path(source), arch is not None)
    found = select.chosen(_tables(loaded, where), weights, where)
    net = (
        _whole(found, where)
        if arch is None
        else _fill(build(arch), found, prefix, where, escaped(arch), say)
    )
    return _finish(net, where)


def _finish(net: nn.Module, where: str) -> nn.Module:
    net = net.float().eval()
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{where}: {escaped(name)} holds NaN or infinity; give a network "
                "that was trained to its end"
            )
    return net


def state_of(source: str | Path, weights: str | None = None) -> dict[str, torch.Tensor]:
    """The names and tensors of a model file, in its own types, without making any network of it.

    A whole network gives the names its `state_dict()` would have. weights: where in the file they
    are, needed where there are several different ones. Raises InputError and ConfigError as
    `load_model` does.
    """
    where = escaped(source)
    table = select.single(
        select.chosen(_tables(_read(Path(source), True), where), weights, where), where
    )
    if not isinstance(table.network, Record) or _own_classes(table.network):
        return _plain_weights(table.tensors, where)
    try:
        return dict(_tensors_of(table.network, where))
    except RecursionError as e:
        _refuse_depth(where, e)


# -- reading ---------------------------------------------------------------------------------------
def _read(path: Path, weights_only: bool) -> Any:
    """What a model file holds: plain data, tensors and inert records. weights_only: nothing but
    weights is wanted, which archives of code have too. Any other kind of file is refused."""
    if path.is_dir():
        path = _in_folder(path)
    if path.name.endswith(INDEX):
        return _read_shards(path, weights_only)
    data, suffix, where = read_file(path), path.suffix.lower(), escaped(path)
    for start, what, way_out in OTHERS:
        if data[: len(start)].lower() == start.lower():
            raise InputError(f"{where}: {what}; {way_out}")
    if suffix == ".rq" or b'"rqtool.rq/' in data[:4096]:
        raise InputError(
            f"{where}: {REFUSED['.rq']}; use it with rqtool eval, train or "
            "export, or give the float model"
        )
    if suffix in REFUSED and data[:2] != b"PK":
        raise InputError(f"{where}: {REFUSED[suffix]}; {ONLY_STATE}")
    if suffix == ".safetensors" or _is_safetensors(data):
        return _read_safetensors(data, where)
    if data[:2] == b"PK" and weights_only and _is_program(data, where):
        return _guarded(read_program_weights, data, where)
    if data[:2] == b"PK" and not weights_only:
        _refuse_archives(data, where)
    if data[:2] != b"PK" and suffix not in TORCH_SUFFIXES and data[:1] not in b"\x80(]}":
        raise InputError(
            f"{where}: is no kind of model this version reads; give a file "
            "ending in .pt, .pth, .th, .safetensors"
        )
    return read_torch(data, where)


def _in_folder(folder: Path) -> Path:
    """The file that a folder of weights is about. Raises InputError where there is none, or
    several."""
    known = [folder / name for name in FOLDER_FILES if (folder / name).is_file()]
    found = known[:1] or [
        p
        for p in sorted(folder.iterdir())
        if p.name.endswith((".safetensors", ".safetensors" + INDEX))
    ]
    if not found:
        raise InputError(f"{escaped(folder)}: is a folder, not a file; give a file")
    if len(found) > 1:
        raise InputError(
            f"{escaped(folder)}: holds {len(found)} model files "
            f"({', '.join(escaped(p.name) for p in found[:3])}, ...); give one "
            "of them"
        )
    return found[0]


def _read_shards(path: Path, weights_only: bool) -> dict[str, Any]:
    """The tensors of all files that an index names; they lie beside it."""
    where = escaped(path)
    try:
        table = json.loads(read_file(path).decode("utf-8-sig"))["weight_map"]
        files = sorted(set(table.values()))
        plain = all(
            isinstance(f, str) and f == Path(f).name and not f.endswith(INDEX) for f in files
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(
            f"{where}: is no index of weights in several files; make or fetch it again"
        ) from e
    if not plain:
        raise InputError(
            f"{where}: names files in other folders; give an index whose files lie beside it"
        )
    parts = {name: _read(path.with_name(name), weights_only) for name in files}
    missing = [
        k
        for k, name in table.items()
        if not (isinstance(parts[name], Mapping) and k in parts[name])
    ]
    if missing:
        raise InputError(
            f"{where}: "
            f"{select.listed('tensors are not in the files it names', missing)}; "
            "fetch all files again"
        )
    return {k: parts[name][k] for k, name in table.items()}


def _is_safetensors(data: bytes) -> bool:
    return data[8:9] == b"{" and 2 <= int.from_bytes(data[:8], "little") <= len(data) - 8


def _read_safetensors(data: bytes, where: str) -> dict[str, torch.Tensor]:
    try:
        return dict(sorted(safetensors.torch.load(data).items()))  # the file keeps no order
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as e:
        raise InputError(
            f"{where}: is not a readable safetensors file; make or fetch it again"
        ) from e


def read_torch(data: bytes, where: str) -> Any:
    """What torch.save or pickle.dump wrote: tensors, plain data and inert records."""
    _members(data, where)
    return _guarded(read_zip if data[:2] == b"PK" else read_pickle, data, where)


def _guarded(read: Callable[[bytes, Mapping[str, type]], Any], data: bytes, where: str) -> Any:
    try:
        return read(data, RECORDS)
    except MemoryError:
        raise
    except (
        Exception
    ) as e:  # a broken or hostile pickle can end in any exception; none of it is ours
        raise InputError(f"{where}: is not a readable torch file; make or fetch it again") from e


def _members(data: bytes, where: str) -> list[str]:
    """The names in a zip file; none for any other."""
    try:
        return zipfile.ZipFile(io.BytesIO(data)).namelist() if data[:2] == b"PK" else []
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as e:
        raise InputError(f"{where}: is a damaged torch file; make or fetch it again") from e


def _is_program(data: bytes, where: str) -> bool:
    return any(
        n.endswith(("archive_format", "serialized_exported_program.json"))
        for n in _members(data, where)
    )


def _refuse_archives(data: bytes, where: str) -> None:
    """Other zip files that torch writes under the same endings, which are networks in code."""
    names = _members(data, where)
    if any(n.endswith("/constants.pkl") or "/code/" in n for n in names):
        raise InputError(
            f"{where}: is a TorchScript archive, which is code, not weights; {FROM_ARCHIVE}"
        )
    if _is_program(data, where):
        raise InputError(f"{where}: {REFUSED['.pt2']}; {FROM_ARCHIVE}")


FROM_ARCHIVE = "give --arch package.module:factory, and its weights are taken from the file"


# -- whole networks --------------------------------------------------------------------------------
class Record:
    """Stands for one torch.nn layer while a pickle is read: its class, and the state it came with."""

    target: type[nn.Module]
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _layer_classes() -> Iterator[type[nn.Module]]:
    """The layers of torch.nn itself; lazy ones are left out, for they change their class."""
    for file in vars(nn.modules).values():
        for value in vars(file).values() if isinstance(file, ModuleType) else ():
            own = (
                isinstance(value, type)
                and issubclass(value, nn.Module)
                and value.__module__ == file.__name__
            )
            if own and value is not nn.Module and not value.__name__.startswith(("_", "Lazy")):
                yield value


RECORDS = {
    f"{c.__module__}.{c.__qualname__}": type(c.__name__, (Record,), {"target": c})
    for c in _layer_classes()
}
PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def rebuild(
    record: Record, where: str, path: str = "", made: dict[int, nn.Module | None] | None = None
) -> nn.Module:
    """The layer of a record and those below it. Raises InputError unless all of it is plain data:
    no hooks, no replaced methods, no layer inside itself, tensors that own their memory. A layer
    used twice stays one layer."""
    made = {} if made is None else made
    if id(record) in made:
        if made[id(record)] is None:
            _refuse_layer(where, path, "contains itself")
        return made[id(record)]
    made[id(record)] = None
    state = dict(_checked_state(record, where, path))
    state["_modules"] = OrderedDict(
        (name, None if r is None else rebuild(r, where, f"{path}.{name}".strip("."), made))
        for name, r in state["_modules"].items()
    )
    try:
        layer = record.target.__new__(record.target)
        layer.__setstate__(state)
    except Exception as e:  # an old or broken state: torch's own code meets it unprepared
        _refuse_layer(where, path, f"cannot be built again ({said(e)})", e)
    made[id(record)] = layer
    return layer


def _tensors_of(
    record: Record, where: str, path: str = "", above: tuple[int, ...] = ()
) -> Iterator[tuple[str, torch.Tensor]]:
    """The names and tensors of a record and of those below it, which stay records."""
    if id(record) in above:
        _refuse_layer(where, path, "contains itself")
    state = _checked_state(record, where, path)
    hidden = state.get("_non_persistent_buffers_set", ())
    own = {
        **state["_parameters"],
        **{name: t for name, t in state["_buffers"].items() if name not in hidden},
    }
    yield from (
        (f"{path}.{name}".strip("."), t.detach()) for name, t in own.items() if t is not None
    )
    for name, inside in state["_modules"].items():
        if inside is not None:
            yield from _tensors_of(inside, where, f"{path}.{name}".strip("."), (*above, id(record)))


def _refuse_layer(where: str, path: str, what: str, cause: Exception | None = None) -> NoReturn:
    layer = f"its layer '{escaped(path)}'" if path else "the network"
    raise InputError(f"{where}: is refused, for {layer} {what}; {ONLY_STATE}") from cause


def _checked_state(record: Record, where: str, path: str) -> dict[str, Any]:
    state = record.state
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        _refuse_layer(where, path, "has no state")
    kinds = {"_parameters": (nn.Parameter,), "_buffers": (torch.Tensor,), "_modules": (Record,)}
    for name, kind in kinds.items():
        held = state.get(name)
        if not isinstance(held, dict) or not all(
            isinstance(k, str) and (v is None or isinstance(v, kind) or _is_odd(v, name))
            for k, v in held.items()
        ):
            _refuse_layer(where, path, f"has no table {name}")
        if not all(_is_plain(v) for v in held.values() if not isinstance(v, Record)):
            _refuse_layer(where, path, f"has a tensor in {name} that is no plain array")
    for name, value in state.items():
        _check_attribute(record.target, name, value, where, path)
    return state


def _is_odd(value: Any, table: str) -> bool:
    """Whether it is a tensor of a kind that is not read: no plain array, but no fault of its table
    either."""
    return table != "_modules" and isinstance(value, Unknown) and value.is_tensor()


def _check_attribute(target: type[nn.Module], name: str, value: Any, where: str, path: str) -> None:
    if name in ("_parameters", "_buffers", "_modules"):
        return
    if "hook" in name and value:
        _refuse_layer(where, path, f"holds the hook {escaped(name)}")
    if callable(getattr(target, name, None)) or name.startswith("__"):
        _refuse_layer(where, path, f"replaces its {escaped(name)}")
    if not _is_plain(value):
        _refuse_layer(where, path, f"has the attribute {escaped(name)}, which is no plain data")


def _is_plain(value: Any) -> bool:
    """Whether value is numbers, text, tensors that own their memory, or containers of them."""
    waiting, seen = [value], set()
    while waiting:
        v = waiting.pop()
        if type(v) in (list, tuple, set, dict, OrderedDict):
            if id(v) not in seen:
                seen.add(id(v))
                waiting += [*v, *v.values()] if isinstance(v, dict) else v
        elif not (is_plain_tensor(v) if isinstance(v, torch.Tensor) else type(v) in PLAIN):
            return False
    return True


def is_plain_tensor(t: torch.Tensor) -> bool:
    """Whether t is an ordinary dense array on the CPU, with an element in memory for each it shows
    and no attributes of its own."""
    if (
        type(t) not in (torch.Tensor, nn.Parameter)
        or t.layout is not torch.strided
        or t.device.type != "cpu"
        or t.is_quantized
        or t.is_nested
    ):
        return False
    return (
        not t.__dict__
        and not t._backward_hooks
        and t.untyped_storage().nbytes() >= t.numel() * t.element_size()
    )


# -- state dictionaries ----------------------------------------------------------------------------
def _tables(loaded: Any, where: str) -> list[select.Table]:
    """The tables of tensors in what a file held. Raises InputError where there is none, or where
    the file would run programs."""
    names = sorted(_unknown_names(loaded))
    runs = [n for n in names if n.rsplit(".", 1)[0] in RUNS or n in RUNS_BUILTIN]
    if runs:
        _refuse_names(runs, where)
    found = select.tables(loaded, _module_tensors)
    if not found:
        raise InputError(
            f"{where}: holds {_contents(loaded)}, neither a state dictionary nor "
            f"a network; {ONLY_STATE}"
        )
    return found


def _refuse_names(names: list[str], where: str) -> NoReturn:
    listed = ", ".join(escaped(n) for n in names[:6]) + (", ..." if len(names) > 6 else "")
    raise InputError(
        f"{where}: is refused, for it needs {listed}, beyond weights and "
        f"torch.nn layers; {ONLY_STATE}"
    )


def _inside(value: Any) -> list[Any]:
    """What a value from a file holds directly."""
    if isinstance(value, Unknown):
        return [value.args, value.state, value.items]
    if isinstance(value, Record):
        return [value.state]
    if isinstance(value, Mapping):
        return [*value, *value.values()]
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else []


def _walk(loaded: Any) -> Iterator[Any]:
    """Every value in what a file held, each once."""
    waiting, seen = [loaded], set()
    while waiting:
        value = waiting.pop()
        held = _inside(value)
        if held and id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        waiting += held


def _unknown_names(loaded: Any) -> set[str]:
    """The classes and functions in what a file held that are not known."""
    return {v.name for v in _walk(loaded) if isinstance(v, (Unknown, Name))}


def _own_classes(loaded: Any) -> list[str]:
    """The layers in a whole network that are not of torch.nn."""
    return sorted(
        {v.name for v in _walk(loaded) if isinstance(v, Unknown) and _module_state(v) is not None}
    )


def _module_state(value: Any) -> dict[str, Any] | None:
    """The state of what was a module when it was pickled."""
    if not isinstance(value, (Record, Unknown)) or not isinstance(value.state, dict):
        return None
    scripted = isinstance(value, Unknown) and value.name.startswith("__torch__.")
    whole = all(
        isinstance(value.state.get(name), dict) for name in ("_parameters", "_buffers", "_modules")
    )
    return value.state if whole or scripted or isinstance(value, Record) else None


def _module_tensors(value: Any) -> dict[str, Any] | None:
    """The names and tensors that the `state_dict()` of a pickled module would have; None where it
    was none."""
    if _module_state(value) is None and not isinstance(value, Record):
        return None
    found: dict[str, Any] = {}
    waiting: list[tuple[str, Any, tuple[int, ...]]] = [("", value, ())]
    while waiting:
        path, module, above = waiting.pop()
        state = _module_state(module)
        if state is None or id(module) in above:
            continue
        own, inside = _split(module, state)
        found.update({f"{path}{name}": t for name, t in own.items() if select.is_tensor(t)})
        waiting += [
            (f"{path}{name}.", m, (*above, id(module))) for name, m in reversed(inside.items())
        ]
    return found


def _split(module: Any, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, modules) directly in a pickled module, by name."""
    if isinstance(module, Unknown) and module.name.startswith("__torch__."):
        return state, state
    tables = {
        name: held if isinstance(held := state.get(name), dict) else {}
        for name in ("_parameters", "_buffers", "_modules")
    }
    hidden = state.get("_non_persistent_buffers_set") or ()
    buffers = {name: t for name, t in tables["_buffers"].items() if name not in hidden}
    return {**tables["_parameters"], **buffers}, tables["_modules"]


def _whole(found: list[select.Table], where: str) -> nn.Module:
    """The network that a file holds whole. Raises ConfigError where it is weights alone, or has
    layers of its own."""
    networks = [t for t in found if t.network is not None]
    if not networks:
        for table in found:
            _plain_weights(table.tensors, where)
        raise ConfigError(
            f"{where}: holds weights without their network; give --arch "
            f"package.module:factory or one of {', '.join(sorted(ZOO))}"
        )
    network = select.single(networks, where).network
    own = _own_classes(network)
    if own:
        raise ConfigError(
            f"{where}: holds a network with layers of its own "
            f"({', '.join(escaped(n) for n in own[:3])}{', ...' if len(own) > 3 else ''}); {FROM_ARCHIVE}"
        )
    return _whole_network(network, where)


def _whole_network(record: Record, where: str) -> nn.Module:
    try:
        return rebuild(record, where).float().eval()
    except RecursionError as e:
        _refuse_depth(where, e)


def _refuse_depth(where: str, cause: RecursionError) -> NoReturn:
    raise InputError(f"{where}: its layers are nested too deeply; {ONLY_STATE}") from cause


def _contents(loaded: Any) -> str:
    held = select.entries(loaded)
    if held is None and not isinstance(loaded, Mapping):
        return (
            "a single "
            f"{escaped(loaded.name) if isinstance(loaded, Unknown) else type(loaded).__name__}"
        )
    held = held or {}
    return (
        ", ".join(escaped(k) for k in list(held)[:6]) + (", ..." if len(held) > 6 else "")
        or "an empty dictionary"
    )


def _plain_weights(state: Mapping[str, Any], where: str) -> dict[str, torch.Tensor]:
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or not is_plain_tensor(tensor.detach()):
            raise InputError(
                f"{where}: {escaped(name)} is no plain array (sparse, quantised or "
                "repeated in memory); give the float weights"
            )
    return {name: tensor.detach() for name, tensor in state.items()}


def build(arch: str) -> nn.Module:
    """The network that `arch` names. Raises ConfigError for an unknown name, InputError where its
    code fails."""
    return ZOO[arch]() if arch in ZOO else network_of(arch, tuple(ZOO))


def _fill(
    net: nn.Module,
    found: list[select.Table],
    prefix: str | None,
    where: str,
    arch: str,
    say: Callable[[str], None],
) -> nn.Module:
    """`net` with the weights among `found` that fit it, every one of its own. Raises InputError
    naming what is missing, unexpected or misshapen, ConfigError where several different ones fit.
    """
    own = net.state_dict(keep_vars=True)
    fit = select.the_fit(found, own, prefix, where, arch)
    hidden = {name for name, _ in net.named_buffers()} - own.keys()
    if fit is None:
        select.refuse_misfit(found, own, prefix, where, arch)
    extra = [k for k in fit.extra if k not in hidden]
    if extra:
        select.refuse_state({**fit.state, **dict.fromkeys(extra)}, own, where, arch)
    fit.beside = [k for k in fit.beside if k.removeprefix(fit.prefix) not in hidden]
    state = _plain_weights(fit.state, where)
    for name, tensor in state.items():
        if tensor.dtype == torch.float64 and not torch.isfinite(tensor.float()).equal(
            torch.isfinite(tensor)
        ):
            raise InputError(
                f"{where}: {escaped(name)} holds numbers beyond what float32 can; "
                "give a network with weights of ordinary size"
            )
    net.load_state_dict(state, strict=False)
    for sentence in select.notes(fit, where):
        say(sentence)
    return net
