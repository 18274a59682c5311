"""Reads pickles without running them: a small machine of its own, in which a name of a class or
function is only a name.

    containers, numbers, text     as they are
    tensors                       views of the bytes in the file, made here from what the pickle says of them
    numpy scalars and arrays      numbers and tensors
    torch.nn layers               records (load.py), inert
    everything else               `Unknown`: what it was called and what it was given; it is never imported, never called

Nothing asks for memory by what a pickle says: tensors lie in bytes that the file has.
"""

from __future__ import annotations

import io
import json
import pickletools
import zipfile
from _compat_pickle import (  # what Python 2 called the modules that old pickles name
    IMPORT_MAPPING,
    NAME_MAPPING,
)
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

DEPTH = 4  # torch files inside torch files
TENSOR_MAKERS = ("torch._utils._rebuild_", "torch._tensor._rebuild_")


class Refused(Exception):
    """A pickle that is damaged or asks for what no checkpoint needs."""


class Unknown:
    """Stands for an object of a class (or what a function would return) that is not known here.
    `name`: of the class or function; `args`: what it was made with; `state`: what it was given
    after that; `items`: its entries, where it is a kind of dictionary."""

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: Any = ()) -> None:
        self.name, self.args, self.state, self.items = name, args, None, {}

    def is_tensor(self) -> bool:
        """Whether it is a tensor of a kind that is not read: sparse, quantised, without memory."""
        return self.name.startswith(TENSOR_MAKERS)


class Name:
    """A class or function that a pickle names, as no more than its name."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Storage:
    """Bytes of the file that tensors lie in, and the type of their elements (None: the tensors say
    it)."""

    def __init__(self, data: torch.Tensor, dtype: torch.dtype | None) -> None:
        self.data, self.dtype = data, dtype


DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": None,
}  # fmt: skip


def storage_dtype(kind: Any) -> torch.dtype | None:
    """The element type that a storage class stands for. Raises Refused for one that is not read
    (quantised)."""
    name = kind.name.rsplit(".", 1)[-1] if isinstance(kind, Name) else ""
    if name not in STORAGES:
        raise Refused("a storage of a kind that is not read")
    return STORAGES[name]


# -- what is made by hand --------------------------------------------------------------------------
def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    bits: Any = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """A view of a storage, once it is known to lie inside it."""
    if bits:  # conjugated or negated in memory
        return Unknown("torch._utils._rebuild_tensor_v2")
    dtype = dtype or storage.dtype
    offset, size, stride = int(offset), tuple(map(int, size)), tuple(map(int, stride))
    if len(size) != len(stride) or min((offset, *size, *stride), default=0) < 0:
        raise Refused("a tensor with impossible sizes")
    width = dtype.itemsize
    last = offset + sum((n - 1) * s for n, s in zip(size, stride)) if 0 not in size else -1
    if (last + 1) * width > storage.data.numel():
        raise Refused("a tensor that is larger than its bytes")
    made = torch.empty(0, dtype=dtype)
    made.set_(
        storage.data.untyped_storage(),
        storage.data.storage_offset() // width + offset,
        size,
        stride,
    )
    made.requires_grad_(bool(requires_grad) and (made.is_floating_point() or made.is_complex()))
    return _with_beside(made, hooks)


def _tensor_v3(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    bits: Any = None,
) -> Any:
    return _tensor(storage, offset, size, stride, requires_grad, hooks, bits, dtype)


def _parameter(data: Any, requires_grad: Any, hooks: Any = None, state: Any = None) -> nn.Parameter:
    made = nn.Parameter(
        data, bool(requires_grad) and (data.is_floating_point() or data.is_complex())
    )
    return _with_beside(made, hooks, state)


def _with_beside(tensor: torch.Tensor, *beside: Any) -> torch.Tensor:
    """The tensor, marked where it came with hooks or attributes: a whole network with such weights
    is refused."""
    if any(beside):
        tensor.came_with = beside
    return tensor


def _typed(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """A tensor of a subclass or with attributes of its own."""
    made = _called(function, args)
    return _with_beside(made, state) if isinstance(made, torch.Tensor) else made


def _numpy_dtype(name: Any, *flags: Any) -> Any:
    """A plain numpy type: numbers, text or bytes; objects stay unknown."""
    made = np.dtype(str(name))
    return Unknown("numpy.dtype") if made.hasobject or made.itemsize == 0 else made


def _numpy_scalar(dtype: Any, data: Any = None) -> Any:
    if isinstance(dtype, Unknown):
        return dtype
    found = np.frombuffer(_as_bytes(data), dtype)[0]
    return found.item() if isinstance(found, np.generic) else found


def _numpy_array(shape: Any, dtype: Any, fortran: Any, data: Any) -> Any:
    """An array as a tensor; as numpy's own where torch has no such type."""
    if isinstance(dtype, Unknown):
        return dtype
    flat = np.frombuffer(_as_bytes(data), dtype)
    made = flat.reshape(tuple(map(int, shape)), order="F" if fortran else "C")
    try:
        return torch.from_numpy(
            np.ascontiguousarray(made.astype(made.dtype.newbyteorder("=")))
            .reshape(made.shape)
            .copy()
        )
    except TypeError:
        return made


def _numpy_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C") -> Any:
    return _numpy_array(shape, dtype, order == "F", data)


class _Array:
    """A numpy array before its state has come."""


def _as_bytes(data: Any) -> bytes:
    return data.encode("latin-1") if isinstance(data, str) else bytes(data)  # Python 2 wrote text


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1", "ascii", "utf-8"):
        raise Refused("text in an unknown encoding")
    return text.encode(encoding)


def _pairs(*args: Any) -> dict[Any, Any]:
    """A dictionary of any of Python's kinds, from another one or a list of pairs."""
    given = next((a for a in args if isinstance(a, (Mapping, list, tuple))), ())
    return OrderedDict(given)


def _empty(*args: Any) -> dict[Any, Any]:
    """A defaultdict without what it would call."""
    return _pairs(*args[1:])


CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor, "torch._utils._rebuild_tensor_v2": _tensor, "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter, "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _typed, "torch.nn.parameter.Parameter": _parameter,
    "collections.OrderedDict": _pairs, "collections.Counter": _pairs, "collections.defaultdict": _empty, "builtins.dict": _pairs,
    "builtins.list": lambda *a: list(*a), "builtins.tuple": lambda *a: tuple(*a), "builtins.set": lambda *a: set(*a), "builtins.frozenset": lambda *a: frozenset(*a),
    "builtins.complex": lambda *a: complex(*a), "_codecs.encode": _encoded,
    "torch.Size": lambda *a: torch.Size(*a), "torch.device": lambda *a: torch.device(*map(_plain_word, a)),
    "numpy.dtype": _numpy_dtype,
    **{f"numpy.{core}.multiarray.{name}": make for core in ("core", "_core") for name, make in (("scalar", _numpy_scalar), ("_reconstruct", lambda *a: _Array()))},
    **{f"numpy.{core}.numeric._frombuffer": _numpy_buffer for core in ("core", "_core")},
}  # fmt: skip
LISTS = ("builtins.list", "builtins.tuple", "builtins.set", "builtins.frozenset", "torch.Size")


def _plain_word(value: Any) -> Any:
    if not isinstance(value, (str, int)):
        raise Refused("a device that is none")
    return value


def _called(function: Any, args: Any) -> Any:
    """What a call would return: made by hand for the few names in CALLS, inert for every other."""
    if not isinstance(args, tuple):
        raise Refused("a call without arguments")
    if isinstance(function, type):  # a record: an inert class of our own
        return function()
    name = function.name if isinstance(function, Name) else "an object"
    if name == "copyreg._reconstructor" and args:
        return _called(args[0], ())
    if name in LISTS and not all(isinstance(a, (list, tuple, set, frozenset)) for a in args):
        return Unknown(name, args)
    return CALLS[name](*args) if name in CALLS else Unknown(name, args)


# -- the machine -----------------------------------------------------------------------------------
class Machine:
    """One pickle, read opcode by opcode. `persistent`: what stands for storages outside of it;
    `records`: names of classes that have inert stand-ins; `nested`: reads a torch file inside this
    one; `dry`: nothing is made, not even tensors."""

    def __init__(
        self,
        persistent: Callable[[Any], Any],
        records: Mapping[str, type],
        nested: Callable[[Any], Any],
        dry: bool = False,
    ) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.protocol = 0
        self.persistent, self.records, self.nested, self.dry = persistent, records, nested, dry
        self.inert = set(records.values())

    def run(self, stream: io.BytesIO) -> Any:
        """What the pickle holds; the stream stands behind it after that."""
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name in VALUES:
                self.stack.append(VALUES[opcode.name](argument))
            else:
                step = STEPS.get(opcode.name)
                if step is None:
                    raise Refused(f"the opcode {opcode.name}")
                step(self, argument)
        raise Refused("a pickle without an end")

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def named(self, module: Any, name: Any) -> Any:
        """What a global stands for: a record, a dtype, or its name alone."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused("a name that is no text")
        if self.protocol < 3:
            module, name = NAME_MAPPING.get(
                (module, name), (IMPORT_MAPPING.get(module, module), name)
            )
        full = f"{module}.{name}"
        return self.records.get(full) or DTYPES.get(full) or Name(full)

    def call(self, function: Any, args: Any) -> None:
        if self.dry:
            self.stack.append(Unknown("not made"))
        elif isinstance(function, Name) and function.name == "torch.storage._load_from_bytes":
            self.stack.append(self.nested(args[0]))
        else:
            self.stack.append(_called(function, args))

    def build(self, _: Any) -> None:
        """State for the object on the stack: kept where it is inert, laid into arrays, left out
        otherwise."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, _Array):
            made = _numpy_array(*state[1:5])
            self.stack[-1] = made
            self.memo.update({k: made for k, v in self.memo.items() if v is target})
        elif isinstance(target, Unknown) or type(target) in self.inert:
            target.state = state
        elif (
            isinstance(target, np.dtype)
            and isinstance(state, tuple)
            and state[1:2] in ((">",), ("<",))
        ):
            made = target.newbyteorder(state[1])
            self.stack[-1] = made
            self.memo.update({k: made for k, v in self.memo.items() if v is target})

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        held = target.items if isinstance(target, Unknown) else target
        if isinstance(held, dict):
            for key, value in zip(flat[::2], flat[1::2]):
                held[key if isinstance(key, Hashable) else id(key)] = value

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(values)

    def new(self, args: int) -> None:
        given = self.stack[-args:]
        del self.stack[-args:]
        self.call(given[0], given[1] if len(given) > 1 else ())

    def remember(self, place: int | None) -> None:
        self.memo[len(self.memo) if place is None else place] = self.stack[-1]

    def from_mark(self, make: Callable[[list[Any]], Any]) -> None:
        made = make(self.since_mark())
        self.stack.append(made)

    def top(self, count: int) -> None:
        taken = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(taken)

    def inst(self, spelled: str) -> None:
        module, _, name = spelled.partition(" ")
        args = tuple(self.since_mark())
        self.call(self.named(module, name), args)

    def call_held(self, held: list[Any]) -> None:
        self.call(held[0], tuple(held[1:]))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(self.named(module, name))


def _dictionary(flat: list[Any]) -> dict[Any, Any]:
    return dict(zip(flat[::2], flat[1::2]))


def _same(value: Any) -> Any:
    return value


VALUES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING"), _same),
    **dict.fromkeys(("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _same),
    "NONE": lambda _: None, "NEWTRUE": lambda _: True, "NEWFALSE": lambda _: False,
    "EMPTY_LIST": lambda _: [], "EMPTY_TUPLE": lambda _: (), "EMPTY_DICT": lambda _: {}, "EMPTY_SET": lambda _: set(),
}  # fmt: skip
STEPS: dict[str, Callable[[Machine, Any], Any]] = {
    "PROTO": lambda m, a: setattr(m, "protocol", a), "FRAME": lambda m, a: None, "READONLY_BUFFER": lambda m, a: None,
    "MARK": lambda m, a: m.marks.append(len(m.stack)), "POP": lambda m, a: m.marks.pop() if m.marks and m.marks[-1] == len(m.stack) else m.stack.pop(),
    "POP_MARK": lambda m, a: m.since_mark(), "DUP": lambda m, a: m.stack.append(m.stack[-1]),
    "LIST": lambda m, a: m.from_mark(list), "TUPLE": lambda m, a: m.from_mark(tuple), "DICT": lambda m, a: m.from_mark(_dictionary), "FROZENSET": lambda m, a: m.from_mark(frozenset),
    "TUPLE1": lambda m, a: m.top(1), "TUPLE2": lambda m, a: m.top(2), "TUPLE3": lambda m, a: m.top(3),
    "APPEND": lambda m, a: m.append([m.stack.pop()]), "APPENDS": lambda m, a: m.append(m.since_mark()), "ADDITEMS": lambda m, a: m.append(m.since_mark()),
    "SETITEM": lambda m, a: m.set_items([m.stack.pop(), m.stack.pop()][::-1]), "SETITEMS": lambda m, a: m.set_items(m.since_mark()),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, a: m.stack.append(m.memo[a])),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), lambda m, a: m.remember(a)),
    "GLOBAL": lambda m, a: m.stack.append(m.named(*a.split(" ", 1))), "STACK_GLOBAL": lambda m, a: m.stack_global(),
    "REDUCE": lambda m, a: m.new(2), "NEWOBJ": lambda m, a: m.new(2), "NEWOBJ_EX": lambda m, a: m.new(3), "BUILD": Machine.build,
    "INST": lambda m, a: m.inst(a), "OBJ": lambda m, a: m.call_held(m.since_mark()),
    "PERSID": lambda m, a: m.stack.append(m.persistent(a)), "BINPERSID": lambda m, a: m.stack.append(m.persistent(m.stack.pop())),
}  # fmt: skip


# -- torch files -----------------------------------------------------------------------------------
MAGIC = 0x1950A86A20F9469CFC6C  # what torch.save began with before it wrote zip files


def read_pickle(data: bytes, records: Mapping[str, type], depth: int = 0) -> Any:
    """What torch.save (in its format before zip) or pickle.dump wrote. Raises Refused, or anything
    that garbage can raise."""
    if depth > DEPTH:
        raise Refused("torch files inside each other")
    stream, nested = io.BytesIO(data), partial(_nested, records=records, depth=depth + 1)
    first = Machine(_no_storage, records, nested).run(stream)
    if type(first) is not int or first != MAGIC:
        return first
    for _ in range(2):  # the protocol, and the machine that wrote the file
        Machine(_no_storage, {}, nested).run(stream)
    start, kinds = stream.tell(), {}
    Machine(partial(_seen, kinds), {}, nested, dry=True).run(stream)
    stored = {
        key: _raw(stream, kinds.get(key)) for key in Machine(_no_storage, {}, nested).run(stream)
    }
    stream.seek(start)
    return Machine(partial(_old_storage, stored), records, nested).run(stream)


def _nested(data: Any, records: Mapping[str, type], depth: int) -> Any:
    """A tensor's storage that plain pickling wrote as a torch file of its own."""
    if not isinstance(data, bytes):
        raise Refused("a torch file that is no bytes")
    return (
        read_zip(data, records, depth) if data[:2] == b"PK" else read_pickle(data, records, depth)
    )


def _no_storage(_: Any) -> Any:
    raise Refused("a tensor outside of a torch file")


def _seen(kinds: dict[Any, Any], spec: Any) -> Unknown:
    """Note the element type of a storage whose bytes come later in the file."""
    if spec[0] == "storage":
        kinds[spec[2]] = storage_dtype(spec[1])
    return Unknown("storage")


def _raw(stream: io.BytesIO, dtype: torch.dtype | None) -> Storage:
    """The next storage of the old format: how many elements, then these."""
    count = int.from_bytes(stream.read(8), "little", signed=True)
    wanted = count * (1 if dtype is None else dtype.itemsize)
    if not 0 <= wanted <= len(stream.getbuffer()) - stream.tell():
        raise Refused("a storage that is larger than the file")
    return Storage(_bytes_of(stream.read(wanted)), dtype)


def _bytes_of(data: bytes) -> torch.Tensor:
    return (
        torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if data
        else torch.empty(0, dtype=torch.uint8)
    )


def _old_storage(stored: dict[Any, Storage], spec: Any) -> Any:
    if spec[0] == "module":  # a class, with its source beside it
        return spec[1]
    whole, view = stored[spec[2]], spec[5] if len(spec) > 5 else None
    if view is None:
        return whole
    width = 1 if whole.dtype is None else whole.dtype.itemsize
    return Storage(whole.data[int(view[1]) * width :][: int(view[2]) * width], whole.dtype)


UNPACKED = 16  # a zip may hold so many times its own size; torch does not compress at all


def check_zip(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse an archive that unpacks to far more than it is."""
    if sum(i.file_size for i in archive.infolist()) > UNPACKED * size + (1 << 20):
        raise Refused("an archive that unpacks to many times its size")


def read_zip(data: bytes, records: Mapping[str, type], depth: int = 0) -> Any:
    """What torch.save or TorchScript wrote as a zip file: the object in its data.pkl. Raises as
    `read_pickle` does."""
    if depth > DEPTH:
        raise Refused("torch files inside each other")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        check_zip(archive, len(data))
        names = archive.namelist()
        main = min((n for n in names if n.endswith("data.pkl")), key=len)
        folder = main.removesuffix("data.pkl")
        swapped = (
            f"{folder}byteorder" in names and archive.read(f"{folder}byteorder").strip() == b"big"
        )
        stored: dict[str, Storage] = {}

        def storage(spec: Any) -> Storage:
            key, dtype = str(spec[2]), storage_dtype(spec[1])
            if key not in stored:
                flat = archive.read(f"{folder}data/{key}")
                if swapped and dtype is not None and dtype.itemsize > 1:
                    flat = (
                        np.frombuffer(flat, f"V{dtype.itemsize}")
                        .view(f"({dtype.itemsize},)u1")
                        .reshape(-1, dtype.itemsize)[:, ::-1]
                        .tobytes()
                    )
                stored[key] = Storage(_bytes_of(flat), dtype)
            return Storage(stored[key].data, dtype)

        return Machine(storage, records, partial(_nested, records=records, depth=depth + 1)).run(
            io.BytesIO(archive.read(main))
        )


SCALARS = (
    None, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64, None, torch.complex64,
    torch.complex128, torch.bool, torch.bfloat16,
)  # fmt: skip


def read_program_weights(data: bytes, records: Mapping[str, type]) -> dict[str, Any]:
    """The weights of an archive that torch.export.save wrote; its graph is not read. Raises
    Refused, or anything that garbage can raise."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        check_zip(archive, len(data))
        names = archive.namelist()
        configs = [n for n in names if n.endswith("_weights_config.json")]
        if not configs:  # torch before 2.8 pickled them
            old = next(
                n
                for n in names
                if n.endswith(
                    (
                        "serialized_state_dict.pt",
                        "serialized_state_dict.json",
                        "data/weights/model.pt",
                    )
                )
            )
            return read_zip(archive.read(old), records)
        folder, table = configs[0].rsplit("/", 1)[0], json.loads(archive.read(configs[0]))["config"]
        return {
            name: _program_weight(archive, folder, entry, records) for name, entry in table.items()
        }


def _program_weight(
    archive: zipfile.ZipFile, folder: str, entry: dict[str, Any], records: Mapping[str, type]
) -> Any:
    data, meta = archive.read(f"{folder}/{entry['path_name']}"), entry["tensor_meta"]
    if entry.get("use_pickle"):
        return read_zip(data, records)
    dtype = SCALARS[meta["dtype"]]
    if dtype is None:
        raise Refused("a weight of a kind that is not read")
    sizes, strides = ([n["as_int"] for n in meta[key]] for key in ("sizes", "strides"))
    return _tensor(
        Storage(_bytes_of(data), dtype), meta["storage_offset"]["as_int"], sizes, strides
    )
