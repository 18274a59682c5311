"""Files are whole or absent, and a changed byte never passes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rqtool.errors import ConfigError, InputError, RqError, StorageError
from rqtool.storage import (
    check_writable,
    decode,
    encode,
    load_tensors,
    read_file,
    save_tensors,
    write_atomic,
)

TENSORS = {
    "conv.weight": np.arange(-12, 12, dtype=np.int8).reshape(2, 3, 4),
    "gain": np.array([1.5, -0.0, np.nan], np.float32),
    "step": np.array(7, np.int64),
    "nothing": np.zeros((0, 3), np.uint8),
    "on": np.array([True, False]),
}
DOCUMENT = {
    "graph": [{"kind": "reads", "name": "conv"}],
    "history": [0.25, 1e-9],
    "macro": None,
    "ä": "\x1b",
}
GOOD = encode(TENSORS, DOCUMENT)


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# -- atomic writes ---------------------------------------------------------------------------------
def test_a_write_leaves_exactly_the_file(tmp_path):
    write_atomic(tmp_path / "out.rq", b"one")
    assert leftovers(tmp_path) == ["out.rq"]
    assert (tmp_path / "out.rq").read_bytes() == b"one"


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_atomic(tmp_path / "out.rq", b"one")
    finally:
        os.umask(old)
    assert (tmp_path / "out.rq").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("refused", [check_writable, lambda p: write_atomic(p, b"two")])
def test_an_existing_file_needs_force(tmp_path, refused):
    path = tmp_path / "out.rq"
    path.write_bytes(b"one")
    with pytest.raises(ConfigError) as e:
        refused(path)
    assert str(e.value) == f"{path}: exists already; give --force to replace it or another --out"
    assert path.read_bytes() == b"one"
    write_atomic(path, b"two", force=True)
    assert path.read_bytes() == b"two"
    assert leftovers(tmp_path) == ["out.rq"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out.rq").symlink_to(tmp_path / "disk" / "real.rq")
    write_atomic(tmp_path / "out.rq", b"one")
    assert (tmp_path / "out.rq").is_symlink()
    assert (tmp_path / "disk" / "real.rq").read_bytes() == b"one"


@pytest.mark.parametrize("force", [False, True])
def test_folders_and_devices_are_refused(tmp_path, force):
    for path, what in (
        (tmp_path, "is a folder; give --out the name of a file"),
        ("/dev/null", "is not a regular file; give another --out"),
    ):
        with pytest.raises(ConfigError) as e:
            write_atomic(path, b"one", force=force)
        assert str(e.value) == f"{path}: {what}"


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("missing/out.rq", "No such file or directory"),
        ("file/out.rq", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("a\0b", "embedded null byte"),
    ],
)
@pytest.mark.parametrize("refused", [check_writable, lambda p: write_atomic(p, b"two")])
def test_a_place_that_takes_no_file(tmp_path, place, reason, refused):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError) as e:
        refused(tmp_path / place)
    name = str(tmp_path / place).replace("\0", "\\x00")
    assert (
        str(e.value)
        == f"{name}: cannot be written ({reason}); free or create the place, or give another --out"
    )
    assert leftovers(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "out.rq"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageError) as e:
        write_atomic(path, b"new", force=True)
    assert (
        str(e.value) == f"{path}: cannot be written (No space left on device); free or "
        "create the place, or give another --out"
    )
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == ["out.rq"]


def test_a_write_beyond_the_quota_is_one_sentence(tmp_path):
    """The system itself refuses here: the process may write files of 4,096 bytes at most."""
    code = (
        "import sys; from rqtool.storage import write_atomic; from "
        "rqtool.errors import StorageError\n"
        "try: write_atomic(sys.argv[1], bytes(100_000))\n"
        "except StorageError as e: print(e)"
    )
    path = tmp_path / "out.rq"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, path],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (
        done.stdout == f"{path}: cannot be written (File too large); free or create the "
        "place, or give another --out\n"
    ), done.stderr
    assert leftovers(tmp_path) == []


def test_an_interruption_removes_the_temporary_file(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "out.rq", b"new")
    assert leftovers(tmp_path) == []


# -- reading plain files ---------------------------------------------------------------------------
def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "model.rq").write_bytes(b"x")
    (tmp_path / "empty.rq").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    cases = {
        tmp_path / "modle.rq": f"no such file; did you mean '{tmp_path / 'model.rq'}'?",
        tmp_path / "zzzzzzzz": "no such file; check the name",
        tmp_path
        / "no"
        / "model.rq": f"no such file; the folder {tmp_path / 'no'} cannot be listed "
        "either; check the name",
        tmp_path: "is a folder, not a file; give a file",
        tmp_path / "pipe": "is a device, not a file; give a file",
        tmp_path / "empty.rq": "is empty (0 bytes); make or fetch it again",
        tmp_path
        / ("x" * 300): "cannot be read (File name too long); check the name and its permissions",
    }
    for path, what in cases.items():
        with pytest.raises(InputError) as e:
            read_file(path)
        assert str(e.value) == f"{path}: {what}"


def test_names_are_escaped(tmp_path):
    with pytest.raises(InputError) as e:
        read_file("no\x1b[2Jsuch")
    assert str(e.value) == "no\\x1b[2Jsuch: no such file; check the name"


# -- .rq files -------------------------------------------------------------------------------------
def test_what_goes_in_comes_out(tmp_path):
    save_tensors(tmp_path / "m.rq", TENSORS, DOCUMENT)
    tensors, document = load_tensors(tmp_path / "m.rq")
    assert document == DOCUMENT
    assert list(tensors) == sorted(TENSORS)
    for name, array in TENSORS.items():
        assert (tensors[name].dtype, tensors[name].shape, tensors[name].tobytes()) == (
            array.dtype,
            array.shape,
            array.tobytes(),
        )
        assert tensors[name].flags.writeable


@given(
    hnp.arrays(
        st.sampled_from(["?", "<i1", ">i2", "<u4", ">f4", "<f2", "<f8", "<u8"]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0),
    )
)
def test_every_array_comes_back(array):
    (back,) = decode(encode({"a": array}, {}), "m.rq")[0].values()
    assert back.shape == array.shape
    assert back.dtype == array.dtype.newbyteorder("<")
    assert back.tobytes() == array.astype(back.dtype).tobytes()


def test_strided_arrays_are_stored_as_they_read():
    array = np.arange(12).reshape(3, 4)[::2, ::-1].T
    assert (decode(encode({"a": array}, {}), "m.rq")[0]["a"] == array).all()


def test_equal_content_gives_equal_bytes():
    assert encode(dict(reversed(TENSORS.items())), dict(reversed(DOCUMENT.items()))) == GOOD


def test_any_safetensors_reader_opens_it(tmp_path):
    save_tensors(tmp_path / "m.rq", TENSORS, DOCUMENT)
    tensors = safetensors.numpy.load_file(tmp_path / "m.rq")
    assert {k: v.tobytes() for k, v in tensors.items()} == {
        k: v.tobytes() for k, v in TENSORS.items()
    }
    with safetensors.safe_open(tmp_path / "m.rq", framework="numpy") as f:
        assert f.metadata()["format"] == "rqtool.rq/1"
        assert json.loads(f.metadata()["document"]) == DOCUMENT


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([None]), np.array([1j])])
def test_other_arrays_cannot_be_stored(array):
    with pytest.raises(RqError) as e:
        encode({"a": array}, {})
    assert (
        str(e.value) == f"a: a tensor of {array.dtype} under this name cannot be stored; use "
        "booleans, integers or float16 to float64"
    )


def refusal(data: bytes) -> str:
    with pytest.raises(InputError) as e:
        decode(data, "m.rq")
    text = str(e.value)
    assert "\n" not in text and text.isprintable() and text.startswith("m.rq: ")
    return text


def test_every_single_bit_matters():
    for position in range(8 * len(GOOD)):
        changed = bytearray(GOOD)
        changed[position // 8] ^= 1 << position % 8
        refusal(bytes(changed))


def test_every_truncation_is_refused():
    for length in range(len(GOOD)):
        refusal(GOOD[:length])


@settings(max_examples=500)
@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=8)
)
def test_changed_bytes_are_refused(changes):
    changed = bytearray(GOOD)
    for place, value in changes:
        changed[place] = value
    if bytes(changed) != GOOD:
        refusal(bytes(changed))


@given(
    st.binary(max_size=200), st.sampled_from([b"", GOOD[:8], struct.pack("<Q", 2) + b"{}", GOOD])
)
def test_other_bytes_are_refused(tail, head):
    if head + tail != GOOD:
        refusal(head + tail)


def respelled(edit) -> bytes:
    """GOOD with its header changed by `edit`, spelled as rqtool does."""
    length = int.from_bytes(GOOD[:8], "little")
    header = json.loads(GOOD[8 : 8 + length])
    edit(header)
    spelled = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    spelled += b" " * (-len(spelled) % 8)
    return struct.pack("<Q", len(spelled)) + spelled + GOOD[8 + length :]


NO_TAG = (
    "m.rq: is not an rqtool file (no format tag rqtool.rq/1); give a .rq "
    "file, or a safetensors state dictionary where a model is asked"
)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (
            lambda h: h["__metadata__"].update(format="rqtool.rq/2"),
            "has the format rqtool.rq/2, but this version reads only rqtool.rq/1; update rqtool",
        ),
        (
            lambda h: h["__metadata__"].update(format="rqtool.rq/0"),
            "has the format rqtool.rq/0, but this version reads only "
            "rqtool.rq/1; make it again with this version",
        ),
        (lambda h: h["__metadata__"].pop("format"), NO_TAG.removeprefix("m.rq: ")),
        (lambda h: h.pop("__metadata__"), NO_TAG.removeprefix("m.rq: ")),
        (
            lambda h: h["__metadata__"].update(document="{}"),
            "is damaged (the sha256 of its document differs); copy or make it again",
        ),
        (
            lambda h: h["__metadata__"].update(tensors_sha256="{}"),
            "is damaged (its tensors do not fit its header, 'conv.weight'); copy or make it again",
        ),
        (
            lambda h: h["gain"].update(shape=[3, 1]),
            "is damaged (the sha256 of tensor gain differs); copy or make it again",
        ),
    ],
)
def test_what_is_wrong_is_said(edit, sentence):
    assert refusal(respelled(edit)) == f"m.rq: {sentence}"


def test_another_spelling_of_the_same_header_is_refused():
    length = int.from_bytes(GOOD[:8], "little")
    spaced = GOOD[8 : 8 + length].replace(b'"gain":', b'"gain": ')
    assert (
        refusal(struct.pack("<Q", len(spaced)) + spaced + GOOD[8 + length :])
        == "m.rq: is damaged (its header is not spelled as rqtool writes it); copy or make it again"
    )


def test_a_deep_document_is_refused():
    text = "[" * 100_000
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert (
        refusal(
            respelled(lambda h: h["__metadata__"].update(document=text, document_sha256=digest))
        )
        == "m.rq: is damaged (its document is not JSON); copy or make it again"
    )


def test_a_state_dictionary_is_no_rq_file(tmp_path):
    safetensors.numpy.save_file({"a": np.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError) as e:
        load_tensors(tmp_path / "w.safetensors")
    assert str(e.value) == NO_TAG.replace("m.rq", str(tmp_path / "w.safetensors"))


def test_garbage_is_no_rq_file():
    assert (
        refusal(b"hello") == "m.rq: is not an rqtool file, or is damaged (its first bytes are no "
        "safetensors header); give a .rq file"
    )
