"""Every kind of data file becomes the same checked arrays, and what is not labelled images is
refused in one sentence."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from rqtool.errors import ConfigError, InputError
from rqtool.model.data import (
    Data,
    Images,
    Preprocess,
    batches,
    held_out,
    load_data,
    shuffled,
    subset,
)
from rqtool.model.folders import Sizing

GREY = np.arange(4 * 5 * 6, dtype=np.uint8).reshape(4, 5, 6)
LABELS = np.array([2, 0, 1, 2])
KINDS = (
    "a .npz file, MNIST IDX files, a CIFAR-10 binary folder, a folder of "
    "class folders, package.module:function or demo"
)


def npz(path: Path, **arrays) -> str:
    np.savez(path, **arrays)
    return str(path)


def refusal(source: str | Path) -> str:
    with pytest.raises(InputError) as e:
        load_data(str(source))
    return str(e.value)


def same(images: Images, x: np.ndarray, y: np.ndarray) -> bool:
    return (
        images.x.dtype == x.dtype
        and images.y.dtype == np.int64
        and images.x.shape == x.shape
        and (images.x == x).all()
        and (images.y == y).all()
    )


# -- .npz ------------------------------------------------------------------------------------------
def test_named_splits(tmp_path):
    data = load_data(
        npz(
            tmp_path / "a.npz", x_train=GREY, y_train=LABELS, x_test=GREY[:1] + 1, y_test=LABELS[:1]
        )
    )
    assert (data.name, data.classes) == ("a.npz", 3)
    assert same(data.train, GREY[:, None], LABELS)
    assert same(data.test, GREY[:1, None] + 1, LABELS[:1])


@pytest.mark.parametrize("names", [("images", "labels"), ("x", "y")])
def test_a_single_set_is_for_measuring_unless_training_is_asked(tmp_path, names):
    path = npz(tmp_path / "a.npz", **dict(zip(names, (GREY, LABELS))))
    data = load_data(path)
    assert data.train is None and same(data.test, GREY[:, None], LABELS)
    data = load_data(path, unsplit="train")
    assert data.test is None and same(data.train, GREY[:, None], LABELS)


def test_named_splits_win_over_a_single_set(tmp_path):
    data = load_data(
        npz(tmp_path / "a.npz", x=GREY, y=LABELS, x_train=GREY[:2], y_train=LABELS[:2]),
        unsplit="train",
    )
    assert (
        data.test is None
        and len(data.train) == 2
        and "only train is read, not x, y; " in data.notes[0]
    )


@pytest.mark.parametrize(
    ("shape", "result"),
    [
        ((2, 7), (2, 7)),
        ((2, 5, 6), (2, 1, 5, 6)),
        ((2, 5, 3), (2, 1, 5, 3)),
        ((2, 3, 8, 8), (2, 3, 8, 8)),
        ((2, 8, 8, 3), (2, 3, 8, 8)),
        ((2, 8, 9, 1), (2, 1, 8, 9)),
        ((2, 8, 9, 4), (2, 4, 8, 9)),
        ((2, 3, 8, 3), (2, 3, 8, 3)),
        ((2, 8, 9, 10), (2, 8, 9, 10)),
    ],
)
def test_layout(tmp_path, shape, result):
    x = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    images = load_data(npz(tmp_path / "a.npz", x=x, y=[0, 1])).test
    assert images.x.shape == result and images.shape == result[1:]
    if len(shape) == 4 and shape != result:
        assert (images.x == x.transpose(0, 3, 1, 2)).all()
    else:
        assert (images.x == x.reshape(result)).all()


@pytest.mark.parametrize(
    ("dtype", "becomes"),
    [
        ("u1", "u1"),
        ("?", "u1"),
        (">i8", "u1"),
        ("i2", "u1"),
        ("<f2", "<f4"),
        (">f4", "<f4"),
        ("f8", "<f4"),
    ],
)
def test_types(tmp_path, dtype, becomes):
    x = np.array([[0, 1], [1, 0]], dtype)
    images = load_data(npz(tmp_path / "a.npz", x=x, y=[[0], [1]])).test
    assert images.x.dtype == np.dtype(becomes) and (images.x == x).all()
    assert images.x.flags.c_contiguous and images.x.flags.writeable


@pytest.mark.parametrize(
    "labels",
    [np.array([2.0, 0, 1, 2], np.float16), LABELS.astype(">u2"), LABELS[:, None], LABELS > 0],
)
def test_labels_in_other_clothes(tmp_path, labels):
    images = load_data(npz(tmp_path / "a.npz", x=GREY, y=labels)).test
    assert images.y.dtype == np.int64 and (images.y == labels.reshape(-1)).all()


@pytest.mark.parametrize(
    ("x", "y", "sentence"),
    [
        (GREY, LABELS[:3], "has 4 images but 3 labels; give one label for each image"),
        (GREY[:0], LABELS[:0], "has no images (shape 0x5x6); give at least one"),
        (
            GREY[0, 0],
            LABELS,
            "images have 1 axes (6); give [N, H, W], [N, C, H, W], [N, H, W, C] or [N, F]",
        ),
        (
            GREY.astype("c8"),
            LABELS,
            "images are complex64, not numbers; save them as uint8 or float32",
        ),
        (GREY.astype("U3"), LABELS, "images are <U3, not numbers; save them as uint8 or float32"),
        (
            GREY.astype("i2") - 1,
            LABELS,
            "images are whole numbers from -1 to 118, beyond 0..255; save them as float32",
        ),
        (
            GREY.astype("u8") * 9,
            LABELS,
            "images are whole numbers from 0 to 1071, beyond 0..255; save them as float32",
        ),
        (
            np.full((1, 2, 2), np.nan),
            [0],
            "images hold NaN, infinity or values beyond float32; clean them first",
        ),
        (
            np.full((1, 2, 2), 1e300),
            [0],
            "images hold NaN, infinity or values beyond float32; clean them first",
        ),
        (GREY, -LABELS, "labels run from -2 to 0; give 0, 1, 2, ... below 100000"),
        (GREY, LABELS * 100_000, "labels run from 0 to 200000; give 0, 1, 2, ... below 100000"),
        (GREY, LABELS / 4, "labels are not whole numbers; give 0, 1, 2, ..."),
        (GREY, LABELS + np.inf, "labels are not whole numbers; give 0, 1, 2, ..."),
        (GREY, np.eye(4), "labels are float64 of 4x4; give one whole number for each image"),
        (
            GREY,
            np.array(["a", "b", "c", "d"]),
            "labels are <U1 of 4; give one whole number for each image",
        ),
    ],
)
def test_arrays_that_are_refused(tmp_path, x, y, sentence):
    path = npz(tmp_path / "a.npz", x=x, y=y)
    assert refusal(path) == f"{path}: {sentence}"


def test_the_split_is_named(tmp_path):
    path = npz(tmp_path / "a.npz", x_train=GREY, y_train=LABELS, x_test=GREY, y_test=LABELS - 1)
    assert refusal(path) == f"{path}, test: labels run from -1 to 1; give 0, 1, 2, ... below 100000"


def test_splits_must_be_alike(tmp_path):
    path = npz(tmp_path / "a.npz", x_train=GREY, y_train=LABELS, x_test=GREY[:, :4], y_test=LABELS)
    assert refusal(path) == f"{path}: training images are 1x5x6, test images 1x4x6; give one shape"
    path = npz(tmp_path / "b.npz", x_train=GREY, y_train=LABELS, x_test=GREY / 255, y_test=LABELS)
    assert (
        refusal(path)
        == f"{path}: training images are uint8, test images float32; save both in one type"
    )


def test_pickled_arrays_are_never_read(tmp_path):
    path = npz(tmp_path / "a.npz", x=GREY, y=np.array([print, 1, 2, 3], object))
    assert (
        refusal(path)
        == f"{path}: y holds pickled objects, which are never read; save it as numbers"
    )
    path = npz(
        tmp_path / "b.npz", x=GREY, y=LABELS, note=np.array([None])
    )  # not asked for, not touched
    assert len(load_data(path).test) == 4


def test_names_that_are_missing(tmp_path):
    path = npz(tmp_path / "a.npz", pictures=GREY, y=LABELS)
    assert (
        refusal(path) == f"{path}: holds pictures, y; name the arrays x_train, y_train, "
        "x_test, y_test, or images, labels"
    )
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("x", b"")
        archive.writestr("y", b"")
    assert (
        refusal(tmp_path / "b.npz")
        == f"{tmp_path / 'b.npz'}: holds nothing; name the arrays x_train, "
        "y_train, x_test, y_test, or images, labels"
    )


def test_a_header_that_promises_too_much(tmp_path):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 10**9)}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", file.getvalue() + bytes(10))
        archive.writestr("y.npy", b"")
    path = tmp_path / "a.npz"
    assert (
        refusal(path) == f"{path}: is not a readable .npz file (ValueError: x has 10 bytes, "
        "not those of uint8 1000000000x1000000000); make or fetch it again"
    )


def test_what_is_no_npz_file(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"hello")
    assert (
        refusal(path) == f"{path}: is not a readable .npz file (BadZipFile: File is not a zip "
        "file); make or fetch it again"
    )
    path.write_bytes(pickle.dumps(GREY))
    assert (
        refusal(path) == f"{path}: is not a readable .npz file (BadZipFile: File is not a zip "
        "file); make or fetch it again"
    )


def damaged_npz() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, x=GREY, y=LABELS)
    return file.getvalue()


NPZ = damaged_npz()


@settings(max_examples=500)
@given(
    st.lists(st.tuples(st.integers(0, len(NPZ) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, len(NPZ)),
)
@pytest.mark.filterwarnings(
    "ignore"
)  # zipfile and numpy warn of some of the damage, beside what is raised
def test_damage_is_an_input_error_or_harmless(tmp_path_factory, changes, length):
    data = bytearray(NPZ)
    for place, value in changes:
        data[place] = value
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(data[:length])
    try:
        images = load_data(str(path)).test
    except InputError as e:
        assert str(e).isprintable()
    else:
        assert same(images, GREY[:, None], LABELS)  # zip holds a checksum of every array


@given(
    hnp.arrays(
        st.sampled_from(["u1", "i4", "f4", "f8", "?", "c8", "U2", "M8[s]"]),
        hnp.array_shapes(max_dims=5, min_side=0, max_side=3),
    ),
    st.integers(0, 3),
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_any_array_is_read_or_refused(tmp_path_factory, x, n):
    path = npz(tmp_path_factory.getbasetemp() / "any.npz", x=x, y=np.arange(n))
    try:
        images = load_data(path).test
    except InputError as e:
        assert str(e).startswith(path) and str(e).isprintable()
    else:
        assert (
            images.x.dtype in (np.uint8, np.float32)
            and images.x.ndim in (2, 4)
            and len(images) == len(images.x) == n
        )


# -- names -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("train", "measured", "part"),
    [
        (("X_train", "Y_train"), ("X_test", "Y_test"), "test"), (("train_images", "train_labels"), ("test_images", "test_labels"), "test"),
        (("trainX", "trainy"), ("testX", "testy"), "test"), (("data_train", "targets_train"), ("data-test", "targets-test"), "test"),
        (("xtr", "ytr"), ("xte", "yte"), "test"), (("training_data", "training_labels"), ("x_val", "y_val"), "val"),
        (("x_train", "y_train"), ("images_valid", "labels_valid"), "valid"), (("x_train", "y_train"), ("X.validation", "Y.validation"), "validation"),
        (("x_train", "y_train"), ("dev_x", "dev_y"), "dev"),
    ],
)  # fmt: skip
def test_parts_may_be_named_in_other_ways(tmp_path, train, measured, part):
    data = load_data(
        npz(
            tmp_path / "a.npz",
            **dict(zip(train, (GREY, LABELS))),
            **dict(zip(measured, (GREY[1:] + 1, LABELS[1:]))),
        )
    )
    assert same(data.train, GREY[:, None], LABELS) and same(
        data.test, GREY[1:, None] + 1, LABELS[1:]
    )
    assert (data.part, data.notes) == (part, ())


def test_a_validation_part_beside_test_is_said(tmp_path):
    arrays = {
        f"{w}_{p}": a for p in ("train", "val", "test") for w, a in (("x", GREY), ("y", LABELS))
    }
    path = npz(tmp_path / "a.npz", **arrays)
    data = load_data(path)
    assert data.part == "test" and data.notes == (
        f"{path}: only train and test are read, not x_val, y_val; to measure "
        "on other images, name them x_test and their labels y_test",
    )


def test_arrays_that_are_not_read_are_said(tmp_path):
    path = npz(tmp_path / "a.npz", x=GREY, y=LABELS, extra=GREY, x_train=GREY)
    assert load_data(path).notes == (
        f"{path}: only images and their labels are read, not extra, x_train; "
        "to measure on other images, name them x_test and their labels "
        "y_test",
    )


def test_a_name_that_is_there_twice(tmp_path):
    path = npz(tmp_path / "a.npz", images=GREY, labels=LABELS, x=GREY + 1, y=LABELS)
    data = load_data(path)
    assert same(data.test, GREY[:, None], LABELS) and ", not x, y; " in data.notes[0]


# -- other files -----------------------------------------------------------------------------------
def test_a_source_that_is_not_there(tmp_path):
    npz(tmp_path / "mnist.npz", x=GREY, y=LABELS)
    assert (
        refusal(tmp_path / "minst.npz")
        == f"{tmp_path / 'minst.npz'}: no such file; did you mean '{tmp_path / 'mnist.npz'}'?"
    )


def test_a_kind_that_is_not_read(tmp_path):
    (tmp_path / "a.csv").write_text("1,2")
    assert (
        refusal(tmp_path / "a.csv")
        == f"{tmp_path / 'a.csv'}: is no kind of data this version reads; give {KINDS}"
    )


def idx(x: np.ndarray, code: int = 8) -> bytes:
    return struct.pack(f">BBBB{x.ndim}I", 0, 0, code, x.ndim, *x.shape) + x.tobytes()


def mnist(folder: Path, name: str, x: np.ndarray, y: np.ndarray, gz: bool) -> None:
    for what, array in (
        (f"{name}-images-idx3-ubyte", x),
        (f"{name}-labels-idx1-ubyte", y.astype(np.uint8)),
    ):
        data = idx(array)
        (folder / (what + ".gz" * gz)).write_bytes(gzip.compress(data) if gz else data)


@pytest.mark.parametrize("gz", [False, True])
def test_mnist_folder(tmp_path, gz):
    mnist(tmp_path, "train", GREY, LABELS, gz)
    data = load_data(str(tmp_path))
    assert data.test is None and same(data.train, GREY[:, None], LABELS)
    mnist(tmp_path, "t10k", GREY[1:], LABELS[1:], gz)
    data = load_data(str(tmp_path))
    assert same(data.train, GREY[:, None], LABELS) and same(data.test, GREY[1:, None], LABELS[1:])


def test_one_idx_file(tmp_path):
    mnist(tmp_path, "train", GREY, LABELS, False)
    mnist(tmp_path, "mine", GREY, LABELS, True)
    assert load_data(str(tmp_path / "train-images-idx3-ubyte")).test is None
    assert load_data(str(tmp_path / "mine-images-idx3-ubyte.gz")).train is None


def test_idx_files_with_dots_and_wide_numbers(tmp_path):
    (tmp_path / "t10k-images.idx3-ubyte").write_bytes(idx((GREY / 8).astype(">f4"), 0x0D))
    (tmp_path / "t10k-labels.idx1-ubyte").write_bytes(idx(LABELS.astype(">i4"), 0x0C))
    assert same(load_data(str(tmp_path)).test, (GREY[:, None] / 8).astype(np.float32), LABELS)


def test_mnist_folder_with_a_validation_part(tmp_path):
    mnist(tmp_path, "train", GREY, LABELS, False)
    mnist(tmp_path, "val", GREY[1:], LABELS[1:], False)
    data = load_data(str(tmp_path))
    assert same(data.test, GREY[1:, None], LABELS[1:]) and (data.part, data.notes) == ("val", ())
    mnist(tmp_path, "t10k", GREY, LABELS, False)
    data = load_data(str(tmp_path))
    assert data.part == "test" and data.notes == (
        f"{tmp_path}: only train and test are read, not "
        "val-images-idx3-ubyte; give such a file by its own name to measure "
        "on it",
    )


def test_idx_files_that_are_refused(tmp_path):
    images, labels = tmp_path / "t10k-images-idx3-ubyte", tmp_path / "t10k-labels-idx1-ubyte"
    assert refusal(images).startswith(f"{images}: no such file; ")
    images.write_bytes(idx(GREY))
    assert refusal(images) == f"{labels}: no such file; did you mean '{images}'?"
    labels.write_bytes(idx(LABELS.astype(np.uint8))[:-1])
    assert (
        refusal(tmp_path)
        == f"{labels}: has 3 bytes of data, but its header says 4 of 1; fetch it again"
    )
    labels.write_bytes(b"<html>")
    assert (
        refusal(tmp_path)
        == f"{labels}: is not an IDX file (it begins with 3c 68 74 6d); fetch it again"
    )
    labels.write_bytes(gzip.compress(bytes(99))[:-9])
    assert (
        refusal(tmp_path) == f"{labels}: is not a readable gzip file (EOFError: Compressed file "
        "ended before the end-of-stream marker was reached); make or fetch "
        "it again"
    )
    assert (
        refusal(labels) == f"{labels}: is not named like a file of images "
        "(...images-idx3-ubyte); give that one, its labels are found beside "
        "it"
    )
    images.unlink()
    assert (
        refusal(tmp_path) == f"{tmp_path}: has neither train-images-idx3-ubyte nor "
        "t10k-images-idx3-ubyte (or .gz); give the four MNIST files their "
        "names"
    )


@given(st.binary(max_size=40))
def test_any_idx_bytes_are_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "some-images-idx3-ubyte"
    path.write_bytes(b"\0\0\x08" + data)
    assert refusal(path).isprintable()  # there are no labels beside it


def cifar(path: Path, first: int) -> np.ndarray:
    records = np.random.default_rng(first).integers(0, 256, (3, 3073), np.uint8)
    records[:, 0] = [first, 9, 0]
    path.write_bytes(records.tobytes())
    return records


def test_cifar_binary_folder(tmp_path):
    parts = [cifar(tmp_path / f"data_batch_{n}.bin", n) for n in range(1, 6)]
    data = load_data(str(tmp_path))
    assert data.test is None and data.classes == 10
    assert same(
        data.train, np.concatenate(parts)[:, 1:].reshape(-1, 3, 32, 32), np.concatenate(parts)[:, 0]
    )
    test = cifar(tmp_path / "test_batch.bin", 7)
    assert same(load_data(str(tmp_path)).test, test[:, 1:].reshape(-1, 3, 32, 32), test[:, 0])


def test_cifar_folders_that_are_refused(tmp_path):
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(bytes(3072))
    assert refusal(tmp_path) == f"{path}: has 3072 bytes, not whole records of 3073; fetch it again"
    path.write_bytes(b"\x0a" + bytes(3072))
    assert refusal(tmp_path) == f"{path}: has the label 10, but CIFAR-10 has 0..9; fetch it again"
    path.write_bytes(bytes(3073))
    assert (
        refusal(tmp_path)
        == f"{tmp_path / 'data_batch_2.bin'}: no such file; did you mean '{path}'?"
    )
    path.rename(tmp_path / "data_batch_1")
    assert (
        refusal(tmp_path) == f"{tmp_path}: is the Python version of CIFAR-10 (pickles, never "
        "read); fetch the binary version"
    )


# -- folders of images -----------------------------------------------------------------------------
def picture(path: Path, array: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)


RGB = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), np.uint8)


def test_class_folders(tmp_path):
    for n, name in enumerate(("b/1.png", "a/2.bmp", "a/1.png", "c/1.PNG")):
        picture(tmp_path / name, RGB[n])
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a" / ".1.png").write_text("left by a file manager")
    data = load_data(str(tmp_path))
    assert data.train is None and [note.split(" ")[1:3] for note in data.notes] == [
        ["1", "file"],
        ["1", "file"],
    ]
    assert same(data.test, RGB[[2, 1, 0, 3]].transpose(0, 3, 1, 2), np.array([0, 0, 1, 2]))


def test_train_and_test_folders(tmp_path):
    for n, name in enumerate(("train/b/1.png", "train/a/1.png", "test/a/1.png", "test/b/1.png")):
        picture(tmp_path / name, GREY[n])
    data = load_data(str(tmp_path))
    assert same(data.train, GREY[[1, 0], None], np.array([0, 1])) and same(
        data.test, GREY[[2, 3], None], np.array([0, 1])
    )


def test_one_coloured_image_makes_all_rgb(tmp_path):
    picture(tmp_path / "a" / "1.png", GREY[0])
    picture(tmp_path / "a" / "2.png", RGB[1], "RGBA")
    x = np.stack([np.repeat(GREY[0][None], 3, 0), RGB[1].transpose(2, 0, 1)])
    assert same(load_data(str(tmp_path)).test, x, np.zeros(2))


def test_palettes_and_alpha(tmp_path):
    picture(tmp_path / "a" / "1.png", GREY[0], "1")
    picture(tmp_path / "a" / "2.png", GREY[0], "LA")
    assert load_data(str(tmp_path)).test.shape == (1, 5, 6)
    picture(tmp_path / "a" / "3.png", RGB[0], "P")
    assert load_data(str(tmp_path)).test.shape == (3, 5, 6)


@pytest.mark.parametrize("name", ["val", "Valid", "validation", "dev", "TEST"])
def test_folders_of_a_validation_part(tmp_path, name):
    for n, file in enumerate(
        ("train/b/1.png", "train/a/1.png", f"{name}/a/1.png", f"{name}/b/1.png")
    ):
        picture(tmp_path / file, GREY[n])
    data = load_data(str(tmp_path))
    assert same(data.train, GREY[[1, 0], None], np.array([0, 1])) and same(
        data.test, GREY[[2, 3], None], np.array([0, 1])
    )
    assert (data.part, data.notes) == (name.lower(), ())


def test_folders_beside_the_parts_are_said(tmp_path):
    for part in ("train", "test", "val", "extra"):
        picture(tmp_path / part / "a" / "1.png", GREY[0])
    assert load_data(str(tmp_path)).notes == (
        f"{tmp_path}: of its folders only train and test are read, not the "
        "folders extra, val; to measure on other images, name their folder "
        "test",
    )


def test_valid_may_be_a_class(tmp_path):
    for n, name in enumerate(("valid", "invalid")):
        picture(tmp_path / name / "1.png", GREY[n])
    data = load_data(str(tmp_path))
    assert same(data.test, GREY[[1, 0], None], np.array([0, 1])) and data.part == "test"


def test_classes_differ_between_parts(tmp_path):
    for name in ("train/a", "val/b"):
        picture(tmp_path / name / "1.png", GREY[0])
    assert (
        refusal(tmp_path)
        == f"{tmp_path}: the class a is in only one of train and val; give both the same folders"
    )


def test_images_lie_deeper_than_their_class(tmp_path):
    for n, name in enumerate(("a/1.png", "a/day/2.png", "a/day/noon/3.png", "b/4.png")):
        picture(tmp_path / name, GREY[n])
    data = load_data(str(tmp_path))
    assert same(data.test, GREY[:, None], np.array([0, 0, 0, 1])) and data.notes == ()


def test_files_that_are_not_read_are_said(tmp_path):
    picture(tmp_path / "a" / "1.png", GREY[0])
    for name in ("labels.csv", "a/notes.txt", "a/deep/more.tfrecord", "a/.1.png", "b/.gitkeep"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    suffixes = ".bmp, .gif, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, .webp"
    assert load_data(str(tmp_path)).notes == (
        f"{tmp_path}: 1 file beside the class folders is not read "
        "(labels.csv); put images into the folder of their class",
        f"{tmp_path}: 2 files in class folders are not read, being no image "
        f"({suffixes}) (a/deep/more.tfrecord, a/notes.txt); turn what should "
        "be read into one of these",
        f"{tmp_path}: 2 files that begin with a dot, or lie in such a "
        "folder, are not read (a/.1.png, b/.gitkeep); rename what should be "
        "read",
        f"{tmp_path}: 1 class folder without an image still has a number of "
        "its own (b); remove what is no class",
    )


def test_images_of_many_sizes(tmp_path):
    ramp = np.add.outer(np.arange(40), np.arange(60)).astype(np.uint8)
    picture(tmp_path / "a" / "1.png", ramp)
    picture(tmp_path / "a" / "2.png", ramp.T)
    images = load_data(str(tmp_path), sizing=Sizing(20, 16)).test
    expected = np.asarray(Image.fromarray(ramp).resize((30, 20), Image.Resampling.BILINEAR))[
        2:18, 7:23
    ]
    assert images.shape == (1, 16, 16) and (images.x[0, 0] == expected).all()
    assert load_data(str(tmp_path), sizing=Sizing(crop=40)).test.shape == (1, 40, 40)
    with pytest.raises(InputError) as e:
        load_data(str(tmp_path), sizing=Sizing(crop=41))
    assert (
        str(e.value) == f"{tmp_path / 'a' / '1.png'}: is 60x40 pixels, too small for --crop "
        "41; give --resize 41 as well, or more than that"
    )


@pytest.mark.parametrize("value", [0, 70_000, 2.5, True, "9"])
def test_sizes_are_whole_numbers(value):
    with pytest.raises(ConfigError) as e:
        Preprocess(resize=value)
    assert str(e.value) == f"--resize must be a whole number from 1 to 65535, not {value}"


def test_image_folders_that_are_refused(tmp_path):
    assert refusal(tmp_path) == (
        f"{tmp_path}: has no class folders with images (.bmp, .gif, .jpeg, "
        f".jpg, .pgm, .png, .ppm, .tif, .tiff, .webp); give {KINDS}"
    )
    one, two = tmp_path / "a" / "1.png", tmp_path / "a" / "2.png"
    picture(one, GREY[0])
    picture(two, GREY[0, :4])
    assert (
        refusal(tmp_path) == f"{two}: is 6x4 pixels, but {one} is 6x5; give images of one size, "
        "or --resize N and --crop N"
    )
    two.write_bytes(one.read_bytes()[:-30])
    assert (
        refusal(tmp_path)
        == f"{two}: is not a readable image (OSError: {_pillow_says(two)}); replace or remove it"
    )
    picture(two, GREY[0].astype(np.uint16) * 99)
    assert (
        refusal(tmp_path)
        == f"{two}: has pixels beyond 8 bits (mode I;16); give 8-bit images or a .npz file"
    )
    picture(tmp_path / "train" / "a" / "1.png", GREY[0])
    picture(tmp_path / "test" / "b" / "1.png", GREY[0])
    assert (
        refusal(tmp_path)
        == f"{tmp_path}: the class a is in only one of train and test; give both the same folders"
    )


def _pillow_says(path: Path) -> str:
    with pytest.raises(OSError) as e, Image.open(path) as image:
        image.load()
    return str(e.value)


# -- functions and the embedded set ----------------------------------------------------------------
@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes the body of a module into the current folder and gives its name; the module is
    forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(body: str) -> str:
        (tmp_path / "my_data.py").write_text(
            "import numpy as np\nx, y = np.zeros((2, 3, 3), np.uint8), [0, 4]\n" + body
        )
        sys.modules.pop("my_data", None)
        return "my_data"

    yield write
    sys.modules.pop("my_data", None)


@pytest.mark.parametrize(
    ("body", "train", "test"),
    [
        ("return x, y", None, 2),
        ("return x, y, x[:1], y[:1]", 2, 1),
        ("return {'images': x, 'labels': y}", None, 2),
        ("return {'x_train': x, 'y_train': y, 'x_test': x, 'y_test': y}", 2, 2),
        ("return (x, y), (x[:1], y[:1])", 2, 1),
        ("return (x, y), (x[:1], y[:1]), (x, y)", 2, 2),
        ("return {'train': (x, y), 'Val': (x[:1], y[:1])}", 2, 1),
        ("return {'train_images': x, 'train_labels': y}", 2, None),
        (
            "from rqtool.model.data import Data, Images; return Data('mine', "
            "None, Images(x, np.array(y)), 7)",
            None,
            2,
        ),
    ],
)
def test_a_named_function(module, body, train, test):
    path = list(sys.path)
    data = load_data(module(f"def get():\n    {body}\n") + ":get")
    assert [p and len(p) for p in (data.train, data.test)] == [train, test]
    assert data.classes == (7 if "Data" in body else 5)
    assert sys.path == path


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("def got(): pass", "my_data:get: my_data has no 'get'; did you mean 'got'?"),
        ("get = 3", "my_data:get: fails when called without arguments (TypeError: 'int' " "object is not callable); run it on its own to see where"),
        ("def get(): return 3", "my_data:get: returned int; return Data, (x, y), (x_train, " "y_train, x_test, y_test) or a dictionary of arrays"),
        ("def get(): return [[1], [2, 3]], y", "my_data:get: does not make an array (ValueError: " "setting an array element with a sequence. The " "requested array has an inhomogeneous shape "
         "after 1 dimensions. The detected shape was (2,) + inhomogeneous " "part.); give numpy arrays"),
        ("def get(): return x, y[:1]", "my_data:get: has 2 images but 1 labels; give one label " "for each image"),
        ("def get(): raise " "RuntimeError('no\\nnet')", "my_data:get: fails when called without " "arguments (RuntimeError: no); run it on " "its own to see where"),
        ("raise ValueError", "my_data:get: my_data cannot be imported (ValueError); run from its " "folder or put that on PYTHONPATH"),
    ],
)  # fmt: skip
def test_functions_that_are_refused(module, body, sentence):
    assert refusal(module(body) + ":get") == sentence


def test_the_embedded_set():
    data = load_data("demo")
    assert (data.name, data.classes) == ("demo", 10)
    assert (
        np.bincount(data.train.y).tolist() == [400] * 10
        and np.bincount(data.test.y).tolist() == [100] * 10
    )
    assert data.train.shape == data.test.shape == (1, 28, 28) and data.train.x.dtype == np.uint8


def test_the_embedded_set_is_part_of_the_official_one(shared_data):
    whole, part = load_data(str(shared_data("fashion_mnist.npz"))), load_data("demo")
    for all_images, images in ((whole.train, part.train), (whole.test, part.test)):
        known = {(x.tobytes(), y) for x, y in zip(all_images.x, all_images.y.tolist())}
        assert all((x.tobytes(), y) in known for x, y in zip(images.x, images.y.tolist()))


# -- parts -----------------------------------------------------------------------------------------
IMAGES = Images(np.arange(10, dtype=np.uint8).reshape(10, 1), np.arange(10))


def test_slices_are_images():
    assert IMAGES[2:4].x.tolist() == [[2], [3]] and IMAGES[np.array([5, 1])].y.tolist() == [5, 1]


def test_another_shape():
    images = Images(GREY[:, None], LABELS)
    assert (images.reshaped((6, 5)).x == GREY.transpose(0, 2, 1)).all()
    assert (images.reshaped((3, 10)).x == GREY.reshape(4, 3, 10)).all()
    with pytest.raises(InputError) as e:
        images.reshaped((3, 5, 6))
    assert str(e.value) == "images of 1x5x6 cannot be seen as 3x5x6: 30 values are not 90"


@given(st.integers(1, 9), st.integers(0, 5))
def test_held_out_images_are_apart(count, seed):
    rest, held = held_out(IMAGES, count, seed)
    assert len(held) == count and sorted([*rest.y, *held.y]) == list(range(10))
    assert sorted(rest.y) == list(rest.y) and sorted(held.y) == list(held.y)
    assert (subset(IMAGES, count, seed).y == held.y).all()


@pytest.mark.parametrize("count", [0, 10, 11, -1])
def test_both_sides_need_an_image(count):
    with pytest.raises(ConfigError) as e:
        held_out(IMAGES, count, 0)
    assert str(e.value) == f"{count} of 10 images cannot be held out; choose from 1 to 9"


def test_a_seed_means_the_same_images_everywhere():
    assert shuffled(8, 1).tolist() == [2, 4, 7, 5, 0, 6, 3, 1]
    assert held_out(IMAGES, 3, 0)[1].y.tolist() == sorted(shuffled(10, 0)[:3].tolist())
    assert subset(IMAGES, 99, 0) is IMAGES


def test_batches():
    assert [y.tolist() for _, y in batches(IMAGES, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [x.tolist() for x, _ in batches(IMAGES, 2, order=np.array([3, 1, 4]))] == [
        [[3], [1]],
        [[4]],
    ]


# -- preprocessing ---------------------------------------------------------------------------------
def test_pixels_by_hand():
    p = Preprocess(0.5, (1.0, 2.0), (4.0, 0.5))
    x = np.array([[[[10]], [[10]]]], np.uint8)  # (10 * .5 - 1) / 4 = 1, (10 * .5 - 2) / .5 = 6
    assert p.apply(x).ravel().tolist() == [1.0, 6.0] and p.apply(x).dtype == np.float32
    mult, add = p.affine(2)
    assert mult.tolist() == [0.125, 1.0] and add.tolist() == [-0.25, -4.0]


def test_the_default_follows_the_type():
    assert Preprocess.of(IMAGES) == Preprocess() == Preprocess(1 / 255)
    assert Preprocess.of(Images(np.zeros((1, 2), np.float32), LABELS[:1])) == Preprocess(1.0)
    assert (
        Preprocess().apply(np.arange(256, dtype=np.uint8)[:, None])[:, 0]
        == (np.arange(256) / 255).astype(np.float32)
    ).all()


def test_features_use_the_second_axis():
    assert Preprocess(1.0, (1, 2, 3)).apply(
        np.array([[1, 2, 3], [2, 3, 5]], np.uint8)
    ).tolist() == [[0, 0, 0], [1, 1, 2]]


def test_preprocessing_is_plain_data():
    p = Preprocess(0.5, (1.0, 2.0), (4.0,))
    assert Preprocess.from_dict(p.to_dict()) == p
    with pytest.raises(InputError) as e:
        Preprocess.from_dict({"scale": 1, "std": [0]})
    assert str(e.value) == (
        "the preprocessing is not readable (ConfigError: preprocessing with "
        "scale 1.0 and std (0.0,) divides by nothing; give values above 0); "
        "make the file again"
    )
    for broken in (3, {"mean": 1}, {"sigma": [1]}, {"scale": "x"}, {"std": []}, {"mean": ["nan"]}):
        with pytest.raises(InputError):
            Preprocess.from_dict(broken)


def test_preprocessing_that_does_not_fit():
    with pytest.raises(ConfigError) as e:
        Preprocess(mean=(0, 0)).affine(3)
    assert str(e.value) == "--mean has 2 values, but the images have 3 channels; give 1 or 3"
    with pytest.raises(ConfigError) as e:
        Preprocess(std=(1, 1)).apply(np.zeros((1, 1, 2, 2)))
    assert str(e.value) == "--std has 2 values, but the images have 1 channels; give 1 or 1"


def test_data_can_be_made_by_hand():
    data = Data("mine", IMAGES, None, 10)
    assert data.train is IMAGES and data.test is None
