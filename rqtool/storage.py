"""Files that are whole or absent: atomic writes, and one hashed safetensors file for tensors with a
JSON document.

    bytes 0..7        length of the header, little-endian
    header            canonical JSON: name -> dtype, shape, data_offsets; __metadata__ -> format, document, sha256s
    data              the tensors back to back, in the order of their names

Any safetensors reader opens such a file. `load_tensors` is stricter: it takes only the one spelling
of the header that `save_tensors` writes, and checks every hash, so no changed byte passes unseen.
There is nothing to unpickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from safetensors import SafetensorError, deserialize

from rqtool.errors import ConfigError, InputError, RqError, StorageError, escaped

VERSION = 1
FORMAT = f"rqtool.rq/{VERSION}"
DTYPES = {
    "BOOL": "?", "I8": "i1", "U8": "u1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "I32": "<i4", "U32": "<u4", "F32": "<f4",
    "I64": "<i8", "U64": "<u8", "F64": "<f8",
}  # fmt: skip
CODES = {np.dtype(v): k for k, v in DTYPES.items()}


# -- plain files -----------------------------------------------------------------------------------
def read_file(path: str | Path) -> bytes:
    """The bytes of a file. Raises what `existing` raises, and InputError where it cannot be read."""
    with reading(path):
        return existing(path).read_bytes()


def existing(path: str | Path) -> Path:
    """`path`, once it is known to be a file with something in it. Raises InputError for one that is
    missing (naming a close neighbour), a folder, a device or empty."""
    path = Path(path)
    with reading(path):
        if not path.exists():
            raise InputError(f"{escaped(path)}: no such file; {_neighbour(path)}")
        if not path.is_file():
            raise InputError(
                f"{escaped(path)}: is {'a folder' if path.is_dir() else 'a device'}, "
                "not a file; give a file"
            )
        if path.stat().st_size == 0:
            raise InputError(f"{escaped(path)}: is empty (0 bytes); make or fetch it again")
    return path


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns what the system says about `path` into an InputError."""
    try:
        yield
    except OSError as e:
        raise InputError(
            f"{escaped(path)}: cannot be read ({_reason(e)}); check the name and its permissions"
        ) from e


def _neighbour(path: Path) -> str:
    try:
        names = [p.name for p in path.parent.iterdir()]
    except OSError:
        return f"the folder {escaped(path.parent)} cannot be listed either; check the name"
    near = get_close_matches(path.name, names, n=1)
    return f"did you mean '{escaped(path.parent / near[0])}'?" if near else "check the name"


def _reason(e: Exception) -> str:
    return escaped(getattr(e, "strerror", None) or e)


def check_writable(path: str | Path, force: bool = False, option: str = "--out") -> Path:
    """The real target of `path` (links followed), after every refusal that can be known before the
    work is done; they name `option`.

    Raises ConfigError for an existing file without `force`, a folder or a device; StorageError
    where the folder is missing or takes no new file.
    """
    path = Path(path)
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise ConfigError(f"{escaped(path)}: is a folder; give {option} the name of a file")
        if target.exists() and not target.is_file():
            raise ConfigError(f"{escaped(path)}: is not a regular file; give another {option}")
        if target.exists() and not force:
            raise ConfigError(
                f"{escaped(path)}: exists already; give --force to replace it or another {option}"
            )
        descriptor, temporary = _open_temporary(target.parent)
        os.close(descriptor)
        os.unlink(temporary)
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        _refuse_write(path, e, option)
    return target


def write_atomic(path: str | Path, data: bytes, *, force: bool = False) -> None:
    """`path` holds exactly `data`, on the disk, or is what it was before.

    A temporary file in the same folder, fsync, rename, fsync of the folder; the temporary file is
    removed on every failure. Raises what `check_writable` raises, and StorageError with the
    system's reason (a full disk, a lost mount).
    """
    target = check_writable(path, force)
    try:
        with _temporary(target.parent) as (descriptor, temporary):
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as e:
        _refuse_write(Path(path), e)


def _open_temporary(folder: Path) -> tuple[int, Path]:
    """A new file under a random name; os.open, unlike mkstemp, leaves the permissions to the user's
    umask."""
    temporary = folder / f".rqtool-{secrets.token_hex(8)}.tmp"
    return os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666
    ), temporary


@contextmanager
def _temporary(folder: Path) -> Iterator[tuple[int, Path]]:
    descriptor, temporary = _open_temporary(folder)
    try:
        yield descriptor, temporary
    finally:
        temporary.unlink(missing_ok=True)  # after the rename there is nothing left under this name


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_write(path: Path, e: Exception, option: str = "--out") -> NoReturn:
    raise StorageError(
        f"{escaped(path)}: cannot be written ({_reason(e)}); free or create "
        f"the place, or give another {option}"
    ) from e


# -- tensors with a document -----------------------------------------------------------------------
def save_tensors(
    path: str | Path,
    tensors: Mapping[str, np.ndarray],
    document: Mapping[str, Any],
    force: bool = False,
) -> None:
    """One .rq file with `tensors` (booleans, integers, float16..64, any shape) and the JSON object
    `document`; equal content gives equal bytes. Raises what `write_atomic` raises."""
    write_atomic(path, encode(tensors, document), force=force)


def load_tensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The (tensors, document) that `save_tensors` wrote. Raises InputError, one sentence, for
    anything else: another format or version, a truncated file, a single changed bit."""
    return decode(read_file(path), escaped(path))


def encode(tensors: Mapping[str, np.ndarray], document: Mapping[str, Any]) -> bytes:
    """The bytes of a .rq file."""
    entries, hashes, blobs, start = {}, {}, [], 0
    for name in sorted(tensors):
        code, shape, blob = _flat(name, tensors[name])
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [start, start + len(blob)]}
        hashes[name] = _tensor_sha256(code, shape, blob)
        blobs.append(blob)
        start += len(blob)
    text = json.dumps(document, sort_keys=True, allow_nan=False)
    entries["__metadata__"] = {
        "format": FORMAT, "document": text, "document_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tensors_sha256": json.dumps(hashes, sort_keys=True),
    }  # fmt: skip
    header = _canonical(entries)
    return b"".join([struct.pack("<Q", len(header)), header, *blobs])


def _flat(name: str, array: np.ndarray) -> tuple[str, list[int], bytes]:
    code = CODES.get(np.dtype(array.dtype).newbyteorder("<"))
    if code is None or name == "__metadata__":
        raise RqError(
            f"{escaped(name)}: a tensor of {array.dtype} under this name cannot "
            "be stored; use booleans, integers or float16 to float64"
        )
    return code, list(array.shape), array.astype(DTYPES[code]).tobytes()


def _tensor_sha256(code: str, shape: list[int], blob: bytes) -> str:
    return hashlib.sha256(f"{code} {shape} ".encode() + blob).hexdigest()


def _canonical(entries: Any) -> bytes:
    header = json.dumps(entries, sort_keys=True, separators=(",", ":")).encode("ascii")
    return header + b" " * (-len(header) % 8)  # the format aligns the data to 8 bytes


def decode(data: bytes, source: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The (tensors, document) in the bytes of a .rq file; `source` begins every InputError."""
    header, metadata, spelled = _header(data, source)
    _check_format(metadata, source)
    if _canonical(header) != spelled:
        _damaged(source, "its header is not spelled as rqtool writes it")
    document = _document(metadata, source)
    try:
        stored = dict(deserialize(data))
        hashes = json.loads(metadata["tensors_sha256"])
        tensors = {name: _tensor(name, stored[name], hashes, source) for name in sorted(stored)}
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as e:
        _damaged(source, f"its tensors do not fit its header, {escaped(e)}", e)
    if set(hashes) != set(tensors):
        _damaged(source, "its tensors are not those that were saved")
    return tensors, document


def _damaged(source: str, what: str, cause: Exception | None = None) -> NoReturn:
    raise InputError(f"{source}: is damaged ({what}); copy or make it again") from cause


def _header(data: bytes, source: str) -> tuple[dict[str, Any], dict[str, str], bytes]:
    """The parsed header, its metadata and its bytes; any other kind of file ends here."""
    spelled = data[8 : 8 + int.from_bytes(data[:8], "little")]
    try:
        header = json.loads(spelled.decode("ascii"))
        metadata = header.get("__metadata__", {})
        if not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("metadata is not text")
    except (ValueError, AttributeError, RecursionError) as e:
        raise InputError(
            f"{source}: is not an rqtool file, or is damaged (its first bytes "
            "are no safetensors header); give a .rq file"
        ) from e
    return header, metadata, spelled


def _check_format(metadata: dict[str, str], source: str) -> None:
    tag = re.fullmatch(r"rqtool\.rq/(\d{1,9})", metadata.get("format", ""), re.ASCII)
    if tag is None:
        raise InputError(
            f"{source}: is not an rqtool file (no format tag {FORMAT}); give a "
            ".rq file, or a safetensors state dictionary where a model is "
            "asked"
        )
    if metadata["format"] != FORMAT:
        way_out = "update rqtool" if int(tag[1]) > VERSION else "make it again with this version"
        raise InputError(
            f"{source}: has the format {escaped(metadata['format'])}, but this "
            f"version reads only {FORMAT}; {way_out}"
        )


def _document(metadata: dict[str, str], source: str) -> dict[str, Any]:
    text = metadata.get("document", "")
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get("document_sha256"):
        _damaged(source, "the sha256 of its document differs")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as e:
        _damaged(source, "its document is not JSON", e)
    if not isinstance(document, dict):
        _damaged(source, "its document is not a JSON object")
    return document


def _tensor(name: str, entry: dict[str, Any], hashes: dict[str, str], source: str) -> np.ndarray:
    """An array of its own (writable), after its hash was compared."""
    blob = bytes(entry["data"])
    if _tensor_sha256(entry["dtype"], list(entry["shape"]), blob) != hashes[name]:
        _damaged(source, f"the sha256 of tensor {escaped(name)} differs")
    return np.frombuffer(blob, DTYPES[entry["dtype"]]).reshape(entry["shape"]).copy()
