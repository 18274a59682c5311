"""Model files -> torch networks in float32 and evaluation mode, without executing anything from the file.

    nn.Module              as it is
    demo                   the embedded network with its trained weights
    .pt .pth .th           weights_only loading, always: a state dictionary (with --arch), or a whole network of torch.nn layers
    .safetensors           a state dictionary (with --arch)
    TorchScript .pt2 .onnx refused, with the way out

A pickled whole network never makes a torch.nn object while it is read: its classes become inert records (`Record`), the records are
checked to be plain data without hooks, and only then are the layers built from them.
"""

from __future__ import annotations

import io
import pickletools
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # what Python 2 called the modules that old pickles name
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import safetensors
import safetensors.torch
import torch
from torch import nn

from rqtool.errors import ConfigError, InputError, escaped, suggestion
from rqtool.model.named import call, is_named, resolve, said
from rqtool.model.zoo import ZOO
from rqtool.storage import read_file

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "ema", "ema_state_dict", "model_ema")
MAX_WRAPPERS = 3
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
ONLY_STATE = "save the weights with torch.save(model.state_dict(), FILE) and give --arch package.module:factory"
REFUSED = {
    ".pt2": "exported programs are not read by this version",
    ".onnx": "ONNX models are not read by this version",
    ".rq": "is compressed already, by rqtool",
}


def load_model(source: str | Path | nn.Module, arch: str | None = None) -> nn.Module:
    """The network in `source`, float32, in evaluation mode (an nn.Module comes back as it is).

    arch: what a state dictionary belongs to, "package.module:factory" (called without arguments; importing it runs its code) or a
    name of `zoo.ZOO`. Raises InputError where the file cannot be read, is refused or does not fit; ConfigError for a missing or
    unknown `arch`.
    """
    if isinstance(source, nn.Module):
        return source
    if str(source) == "demo":
        return load_model(Path(str(resources.files("rqtool.demo").joinpath("demo.safetensors"))), arch or "demo")
    where = escaped(source)
    found = find_weights(_read(Path(source)), where)
    if isinstance(found, nn.Module) and arch is not None:
        found = found.state_dict()
    net = found if isinstance(found, nn.Module) else _fill(build(arch, where), found, where, arch)
    return _finish(net, where)


def _finish(net: nn.Module, where: str) -> nn.Module:
    net = net.float().eval()
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if not torch.isfinite(tensor).all():
            raise InputError(f"{where}: {escaped(name)} holds NaN or infinity; give a network that was trained to its end")
    return net


def state_of(source: str | Path) -> dict[str, torch.Tensor]:
    """The names and tensors of a model file, in its own types, without making any network of it.

    A whole network gives the names its `state_dict()` would have. Raises InputError as `load_model` does.
    """
    loaded, where = _unwrapped(_read(Path(source))), escaped(source)
    if not isinstance(loaded, Record):
        return find_weights(loaded, where)
    try:
        return dict(_tensors_of(loaded, where))
    except RecursionError as e:
        _refuse_depth(where, e)


# -- reading -----------------------------------------------------------------------------------------------------------
def _read(path: Path) -> Any:
    """What a model file holds: plain data, tensors and records. Any other kind of file is refused."""
    data, suffix, where = read_file(path), path.suffix.lower(), escaped(path)
    if suffix == ".rq":
        raise InputError(f"{where}: {REFUSED['.rq']}; use it with rqtool eval, train or export, or give the float model")
    if suffix in REFUSED:
        raise InputError(f"{where}: {REFUSED[suffix]}; {ONLY_STATE}")
    if suffix != ".safetensors" and suffix not in TORCH_SUFFIXES:
        raise InputError(f"{where}: is no kind of model this version reads; give a file ending in {', '.join((*TORCH_SUFFIXES[:3], '.safetensors'))}")
    return _read_safetensors(data, where) if suffix == ".safetensors" else read_torch(data, where)


def _read_safetensors(data: bytes, where: str) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as e:
        raise InputError(f"{where}: is not a readable safetensors file; make or fetch it again") from e


def read_torch(data: bytes, where: str) -> Any:
    """What torch.save wrote: tensors, plain data and records."""
    _refuse_archives(data, where)
    allowed = [(record, name) for name, record in RECORDS.items()]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
            warnings.simplefilter("ignore")  # about protocols and old storages
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as e:  # a broken or hostile pickle can end in any exception; none of it is ours
        _refuse_pickle(data, where, e)


def _refuse_archives(data: bytes, where: str) -> None:
    """Other zip files that torch writes under the same endings."""
    try:
        names = zipfile.ZipFile(io.BytesIO(data)).namelist() if data[:2] == b"PK" else []
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as e:
        raise InputError(f"{where}: is a damaged torch file; make or fetch it again") from e
    if any(n.endswith("/constants.pkl") or "/code/" in n for n in names):
        raise InputError(f"{where}: is a TorchScript archive, which is code, not weights; {ONLY_STATE}")
    if any(n.endswith("archive_format") or n.endswith("serialized_exported_program.json") for n in names):
        raise InputError(f"{where}: {REFUSED['.pt2']}; {ONLY_STATE}")


def _refuse_pickle(data: bytes, where: str, cause: Exception) -> NoReturn:
    needed = sorted(pickled_globals(data) - set(RECORDS) - set(torch._weights_only_unpickler._get_allowed_globals()))
    if needed:
        listed = ", ".join(escaped(n) for n in needed[:6]) + (", ..." if len(needed) > 6 else "")
        raise InputError(f"{where}: is refused, for it needs {listed}, beyond weights and torch.nn layers; {ONLY_STATE}") from cause
    if data[:2] != b"PK" and "persistent_load" in str(cause):  # the weights-only reader takes nothing but numbers from that format
        raise InputError(f"{where}: is a whole network in the format of torch before 1.6; {ONLY_STATE}") from cause
    raise InputError(f"{where}: is not a readable torch file; make or fetch it again") from cause


def pickled_globals(data: bytes) -> set[str]:
    """The classes and functions that the pickles in a torch file name, without loading any of them."""
    names: set[str] = set()
    try:
        for stream in _pickles(data):
            names |= set(_globals_of(stream))
    except Exception:  # pickletools raises anything on garbage; what was found up to there is the answer
        pass
    return names


def _pickles(data: bytes) -> Iterator[io.BytesIO]:
    """A zip holds one pickle; the format before it is a row of them, then raw numbers."""
    if data[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            yield from (io.BytesIO(archive.read(n)) for n in archive.namelist() if n.endswith("data.pkl"))
    else:
        yield (row := io.BytesIO(data))
        for _ in range(4):
            yield row


def _globals_of(stream: io.BytesIO) -> Iterator[str]:
    strings: list[str] = []  # in the order they were pushed, for STACK_GLOBAL takes the last two
    memo: dict[int, str] = {}
    pushed = ""
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = argument.partition(" ")
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            yield f"{module}.{name}"
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif isinstance(argument, str):
            strings.append(argument)
            pushed = argument
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = pushed
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            strings.append(memo.get(argument, ""))


# -- whole networks ----------------------------------------------------------------------------------------------------
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
            own = isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == file.__name__
            if own and value is not nn.Module and not value.__name__.startswith(("_", "Lazy")):
                yield value


RECORDS = {f"{c.__module__}.{c.__qualname__}": type(c.__name__, (Record,), {"target": c}) for c in _layer_classes()}
PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def rebuild(record: Record, where: str, path: str = "", made: dict[int, nn.Module | None] | None = None) -> nn.Module:
    """The layer of a record and those below it. Raises InputError unless all of it is plain data: no hooks, no replaced methods,
    no layer inside itself, tensors that own their memory. A layer used twice stays one layer."""
    made = {} if made is None else made
    if id(record) in made:
        if made[id(record)] is None:
            _refuse_layer(where, path, "contains itself")
        return made[id(record)]
    made[id(record)] = None
    state = dict(_checked_state(record, where, path))
    state["_modules"] = OrderedDict((name, None if r is None else rebuild(r, where, f"{path}.{name}".strip("."), made)) for name, r in state["_modules"].items())
    try:
        layer = record.target.__new__(record.target)
        layer.__setstate__(state)
    except Exception as e:  # an old or broken state: torch's own code meets it unprepared
        _refuse_layer(where, path, f"cannot be built again ({said(e)})", e)
    made[id(record)] = layer
    return layer


def _tensors_of(record: Record, where: str, path: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """The names and tensors of a record and of those below it, which stay records."""
    if id(record) in above:
        _refuse_layer(where, path, "contains itself")
    state = _checked_state(record, where, path)
    hidden = state.get("_non_persistent_buffers_set", ())
    own = {**state["_parameters"], **{name: t for name, t in state["_buffers"].items() if name not in hidden}}
    yield from ((f"{path}.{name}".strip("."), t.detach()) for name, t in own.items() if t is not None)
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
        if not isinstance(held, dict) or not all(isinstance(k, str) and (v is None or isinstance(v, kind)) for k, v in held.items()):
            _refuse_layer(where, path, f"has no table {name}")
        if not all(_is_plain(v) for v in held.values() if not isinstance(v, Record)):
            _refuse_layer(where, path, f"has a tensor in {name} that is no plain array")
    for name, value in state.items():
        _check_attribute(record.target, name, value, where, path)
    return state


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
    """Whether t is an ordinary dense array on the CPU, with an element in memory for each it shows and no attributes of its own."""
    if type(t) not in (torch.Tensor, nn.Parameter) or t.layout is not torch.strided or t.device.type != "cpu" or t.is_quantized or t.is_nested:
        return False
    return not t.__dict__ and not t._backward_hooks and t.untyped_storage().nbytes() >= t.numel() * t.element_size()


# -- state dictionaries ------------------------------------------------------------------------------------------------
def find_weights(loaded: Any, where: str) -> nn.Module | dict[str, torch.Tensor]:
    """The network, or the state dictionary, in what a file held; looks under the usual names of a training checkpoint (WRAPPERS,
    in that order). Raises InputError where there is neither."""
    loaded = _unwrapped(loaded)
    if isinstance(loaded, Record):
        return _whole_network(loaded, where)
    if isinstance(loaded, Mapping) and loaded and all(isinstance(v, torch.Tensor) for v in loaded.values()):
        return _plain_weights(loaded, where)
    raise InputError(f"{where}: holds {_contents(loaded)}, neither a state dictionary nor a network; {ONLY_STATE}")


def _unwrapped(loaded: Any) -> Any:
    for _ in range(MAX_WRAPPERS):
        inside = [loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), (Mapping, Record))] if isinstance(loaded, Mapping) else []
        loaded = inside[0] if inside else loaded
    return loaded


def _whole_network(record: Record, where: str) -> nn.Module:
    try:
        return rebuild(record, where).float().eval()
    except RecursionError as e:
        _refuse_depth(where, e)


def _refuse_depth(where: str, cause: RecursionError) -> NoReturn:
    raise InputError(f"{where}: its layers are nested too deeply; {ONLY_STATE}") from cause


def _contents(loaded: Any) -> str:
    if not isinstance(loaded, Mapping):
        return f"a single {type(loaded).__name__}"
    return ", ".join(escaped(k) for k in list(loaded)[:6]) + (", ..." if len(loaded) > 6 else "") or "an empty dictionary"


def _plain_weights(state: Mapping[Any, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    for name, tensor in state.items():
        if not is_plain_tensor(tensor):
            raise InputError(f"{where}: {escaped(name)} is no plain array (sparse, quantised or repeated in memory); give the float weights")
    return {str(name): tensor.detach() for name, tensor in state.items()}


def build(arch: str | None, where: str) -> nn.Module:
    """The network that `arch` names. Raises ConfigError for none or an unknown name, InputError where its code fails."""
    if arch is None:
        raise ConfigError(f"{where}: holds weights without their network; give --arch package.module:factory or one of {', '.join(sorted(ZOO))}")
    if arch in ZOO:
        return ZOO[arch]()
    if not is_named(arch):
        raise ConfigError(f"--arch {escaped(arch)} is neither package.module:factory nor a built-in network; {suggestion(arch, ZOO)}")
    named = resolve(arch)
    net = named if isinstance(named, nn.Module) else call(arch, named)
    if not isinstance(net, nn.Module):
        raise InputError(f"--arch {escaped(arch)} made {escaped(type(net).__name__)}, not a torch.nn.Module; name a function that returns the network")
    return net


def _fill(net: nn.Module, state: dict[str, torch.Tensor], where: str, arch: str | None) -> nn.Module:
    """`net` with the weights of `state`, every one of them used. Raises InputError naming what is missing, unexpected or misshapen."""
    own = net.state_dict(keep_vars=True)
    state = _fit_prefixes(state, own)
    shared = {id(own[k]) for k in state if k in own}  # tied weights are stored once, under either name
    missing = [k for k in own if k not in state and id(own[k]) not in shared and not k.endswith(".num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    odd = [f"{k} is {_kind(state[k])}, not {_kind(own[k])}" for k in state if k in own and isinstance(own[k], torch.Tensor) and _kind(state[k]) != _kind(own[k])]
    faults = [_listed("missing", missing), _listed("unexpected", unexpected), _listed("of another kind", odd)]
    if any(faults):
        raise InputError(f"{where}: does not fit {escaped(arch)}: {', '.join(f for f in faults if f)}; give the network it was trained as")
    net.load_state_dict(state, strict=False)
    return net


def _fit_prefixes(state: dict[str, torch.Tensor], own: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """`state` without what DataParallel, torch.compile and training frameworks put before (or inside) every name."""
    if any(k not in own for k in state):
        state = {k.replace("._orig_mod.", "."): v for k, v in state.items()}
        counted = [k for k in state if k != "n_averaged"]  # torch.optim.swa_utils.AveragedModel counts beside its module
        for prefix in PREFIXES:
            if counted and all(k.startswith(prefix) for k in counted) and not any(k.startswith(prefix) for k in own):
                return _fit_prefixes({k.removeprefix(prefix): state[k] for k in counted}, own)
    return state


def _kind(t: torch.Tensor) -> str:
    shape = "x".join(map(str, t.shape)) or "a single number"
    return shape if t.is_floating_point() else f"{shape} of {str(t.dtype).removeprefix('torch.')}"


def _listed(what: str, names: list[str]) -> str:
    """"2 missing (a, b)", or nothing."""
    return f"{len(names)} {what} ({', '.join(escaped(n) for n in names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
