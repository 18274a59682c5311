"""Labelled images from files, as numpy arrays; what a pixel is worth; batches. No torch, nothing
unpickled.

    source                               train                     test
    demo                                 4,000 images              1,000 images    (Fashion-MNIST, embedded)
    FILE.npz                             x_train, y_train          x_test, y_test
      or only images, labels (or x, y)   -                         images, labels
    folder of MNIST IDX files (or .gz)   train-images, -labels     t10k-images, -labels (or test-, val-)
    one IDX file of images               if named train-*          otherwise
    CIFAR-10 binary version, its folder  data_batch_1..5.bin       test_batch.bin
    folder of class folders of images    train/CLASS/*             test/CLASS/*
      or without train and test          -                         CLASS/*
    package.module:function              what the function returns, called without arguments

Names may be written in other ways (X_test, train_images, trainY; parts.py). Where there is no test
part, a validation part (val, valid, validation, dev) is measured on under its own name. What is not
read is said in a note.

Images that nobody called training images are `test`: they can be measured on, not trained on.
`load_data(source, unsplit="train")` says otherwise.

Layout: [N, F] are features; [N, H, W] gets one channel; of four axes the channels are the second,
unless only the last is 1, 3 or 4 long; `Images.own` keeps the file's order (layout.py). Whole
numbers must be 0..255 (they become uint8); floats become float32. Labels are 0, 1, 2, ... [N] or
[N, 1].
"""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from rqtool.errors import ConfigError, InputError, escaped
from rqtool.model.folders import Sizing, read_class_folders
from rqtool.model.layout import LAST, ORDERS, PLAIN, Axes, by, channel_axis, laid, orders_to
from rqtool.model.named import call, is_named, resolve, said
from rqtool.model.parts import PARTS, chosen, named, pairs, unread
from rqtool.storage import existing, read_file, reading

CHANNELS = (1, 3, 4)  # grey, colour, colour with alpha
MAX_CLASSES = 100_000
SIDE_PEAK = 65_535  # pixels of a side that --resize and --crop may ask for
Splits = dict[
    str, tuple[Any, Any]
]  # raw (images, labels) under train, unsplit, or the part to measure on: test, or val and the like
Found = tuple[Splits, list[str]]  # and what was not read, a sentence each
KINDS = (
    "a .npz file, MNIST IDX files, a CIFAR-10 binary folder, a folder of "
    "class folders, package.module:function or demo"
)


# -- what everything becomes -----------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Images:
    """Images and their labels.

    x: uint8 or float32 [N, C, H, W], or features [N, F]; y: int64 [N]. own: the order of an image's
    axes in the file, for networks that take all values in a row. `images[3:9]` and
    `images[indices]` are Images again.
    """

    x: np.ndarray
    y: np.ndarray
    own: Axes = PLAIN

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, key: slice | np.ndarray) -> Images:
        return Images(self.x[key], self.y[key], self.own)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image: (C, H, W), or (F,)."""
        return self.x.shape[1:]

    def reshaped(self, shape: tuple[int, ...]) -> Images:
        """The same values, each image in another shape of as many elements: axes of the same
        lengths are exchanged, all else is read in the file's order (rows of pixels as an image, a
        picture as a signal).

        Raises InputError where the number of elements differs, or rows and columns of an image
        would change places.
        """
        return self.laid(orders_to(self.shape, shape, self.own)[0], shape)

    def laid(self, axes: Axes, shape: tuple[int, ...]) -> Images:
        """The images with their axes in this order (layout.py), each then in `shape`."""
        return Images(laid(self.x, axes, shape), self.y)


@dataclass(frozen=True, eq=False)
class Data:
    """A data set: what to train on, what to measure on, and how many classes there are. One of the
    two may be None.

    part: what the images to measure on are called: test, or val and the like where there is no test
    part. notes: what of the source was not read or read in a way that a user may not expect, a
    sentence each.
    """

    name: str
    train: Images | None
    test: Images | None
    classes: int
    notes: tuple[str, ...] = ()
    part: str = "test"


def load_data(source: str, unsplit: str = "test", sizing: Sizing = Sizing()) -> Data:
    """The data set that `source` names (see the table above).

    unsplit: "test" or "train", what images are that the source does not divide. sizing: how the
    images of class folders come to one size. Raises InputError for everything that cannot be read
    or is not labelled images.
    """
    if source == "demo":
        return replace(
            load_data(str(resources.files("rqtool.demo").joinpath("fashion.npz"))), name="demo"
        )
    if is_named(source) and not Path(source).exists():
        return _from_function(source, unsplit)
    path, where = Path(source), escaped(source)
    with reading(path):
        found = (
            read_class_folders(path, where, KINDS, sizing)
            if has_class_folders(source)
            else _reader(path)(path, where)
        )
        return _data(path.name, where, found, unsplit)


def has_class_folders(source: str) -> bool:
    """Whether this is a folder of image files, which are the only images that are resized and
    cropped."""
    path = Path(source)
    return path.is_dir() and _folder_reader(path) is None


def _reader(path: Path) -> Callable[[Path, str], Found]:
    """The function that reads this kind of file or folder."""
    if path.is_dir():
        return _folder_reader(path)
    if existing(path).suffix.lower() == ".npz":
        return _read_npz
    if "idx" in path.name:
        return _read_idx_file
    raise InputError(f"{escaped(path)}: is no kind of data this version reads; give {KINDS}")


def _folder_reader(path: Path) -> Callable[[Path, str], Found] | None:
    """The function for a folder; None for class folders."""
    names = {p.name for p in path.iterdir()}
    if any("idx1-ubyte" in n or "idx3-ubyte" in n for n in names):
        return _read_idx_folder
    if any(n.startswith(("data_batch_", "test_batch")) for n in names):
        return _read_cifar
    return None


# -- the one door for arrays -----------------------------------------------------------------------
def _data(name: str, where: str, found: Found, unsplit: str) -> Data:
    """Checked Data from raw arrays."""
    parts, (splits, notes) = {}, found
    for split, (x, y) in splits.items():
        label = where if split == "unsplit" else f"{where}, {split}"
        parts[unsplit if split == "unsplit" else split] = _images(
            _array(x, label), _array(y, label), label
        )
    train, part = parts.get("train"), next((p for p in parts if p != "train"), "test")
    if train is not None and part in parts:
        _check_alike(train, parts[part], where, part)
    return Data(
        name,
        train,
        parts.get(part),
        max(int(p.y.max()) + 1 for p in parts.values()),
        tuple(notes),
        part,
    )


def _array(values: Any, where: str) -> np.ndarray:
    try:
        return np.asarray(values)
    except (ValueError, TypeError) as e:  # lists of different lengths, tensors on a GPU
        raise InputError(f"{where}: does not make an array ({said(e)}); give numpy arrays") from e


def _images(x: np.ndarray, y: np.ndarray, where: str) -> Images:
    x, own = _layout(_pixels(x, where), where)
    y = _labels(y, where)
    if len(x) != len(y):
        raise InputError(
            f"{where}: has {len(x)} images but {len(y)} labels; give one label for each image"
        )
    return Images(x, y, own)


def _pixels(x: np.ndarray, where: str) -> np.ndarray:
    if x.dtype.kind not in "buif":
        raise InputError(
            f"{where}: images are {x.dtype}, not numbers; save them as uint8 or float32"
        )
    if x.size == 0:
        raise InputError(f"{where}: has no images (shape {by(x.shape)}); give at least one")
    if x.dtype.kind == "f":
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise InputError(
                f"{where}: images hold NaN, infinity or values beyond float32; clean them first"
            )
    elif x.dtype != np.uint8:
        lo, hi = int(x.min()), int(x.max())
        if lo < 0 or hi > 255:
            raise InputError(
                f"{where}: images are whole numbers from {lo} to {hi}, beyond "
                "0..255; save them as float32"
            )
        x = x.astype(np.uint8)
    return x


def _layout(x: np.ndarray, where: str) -> tuple[np.ndarray, Axes]:
    """(images [N, C, H, W] or [N, F], the order of their axes in the file)."""
    own = PLAIN
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in CHANNELS and x.shape[1] not in CHANNELS:
        x, own = x.transpose(0, 3, 1, 2), LAST
    elif x.ndim not in (2, 4):
        raise InputError(
            f"{where}: images have {x.ndim} axes ({by(x.shape)}); give [N, H, "
            "W], [N, C, H, W], [N, H, W, C] or [N, F]"
        )
    return np.require(x, requirements="CW"), own  # torch wants arrays that may be written to


def _labels(y: np.ndarray, where: str) -> np.ndarray:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or y.dtype.kind not in "buif":
        raise InputError(
            f"{where}: labels are {y.dtype} of {by(y.shape)}; give one whole number for each image"
        )
    y = y.astype(np.float64) if y.dtype.kind == "f" else y  # float16 ends below MAX_CLASSES
    if y.size and not (np.isfinite(y).all() and (y == np.floor(y)).all()):
        raise InputError(f"{where}: labels are not whole numbers; give 0, 1, 2, ...")
    if y.size and not (y.min() >= 0 and y.max() < MAX_CLASSES):
        raise InputError(
            f"{where}: labels run from {int(y.min())} to {int(y.max())}; give 0, "
            f"1, 2, ... below {MAX_CLASSES}"
        )
    return y.astype(np.int64)


def _check_alike(train: Images, test: Images, where: str, part: str) -> None:
    if train.shape != test.shape:
        raise InputError(
            f"{where}: training images are {by(train.shape)}, {part} images "
            f"{by(test.shape)}; give one shape"
        )
    if train.x.dtype != test.x.dtype:
        raise InputError(
            f"{where}: training images are {train.x.dtype}, {part} images "
            f"{test.x.dtype}; save both in one type"
        )


# -- .npz ------------------------------------------------------------------------------------------
def _read_npz(path: Path, where: str) -> Found:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")}
            found, notes = pairs(names, where)
            return {
                split: tuple(_read_npy(archive, n, where) for n in pair)
                for split, pair in found.items()
            }, notes
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        ValueError,
        NotImplementedError,
        RuntimeError,
    ) as e:
        raise InputError(
            f"{where}: is not a readable .npz file ({said(e)}); make or fetch it again"
        ) from e


def _read_npy(archive: zipfile.ZipFile, name: str, where: str) -> np.ndarray:
    """One array, its header checked against the bytes there are before any memory is asked for."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as file:
        shape, fortran, dtype = _npy_header(file)
        if dtype.hasobject:
            raise InputError(
                f"{where}: {name} holds pickled objects, which are never read; save it as numbers"
            )
        size = info.file_size - file.tell()
        if math.prod(shape) * dtype.itemsize != size or any(n < 0 for n in shape):
            raise ValueError(f"{name} has {size} bytes, not those of {dtype} {by(shape)}")
        return np.ndarray(shape, dtype, file.read(), order="F" if fortran else "C")


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"array format {version[0]}.{version[1]} is unknown")
    try:
        return readers[version](file)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as e:  # its parser is Python's own
        raise ValueError("broken array header") from e


# -- MNIST IDX -------------------------------------------------------------------------------------
IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def _read_idx(path: Path) -> np.ndarray:
    """An IDX file: two zero bytes, a type, the number of axes, their lengths (big-endian), the
    values."""
    where, data = escaped(path), read_file(path)
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as e:
            raise InputError(
                f"{where}: is not a readable gzip file ({said(e)}); make or fetch it again"
            ) from e
    start = 4 + 4 * (data[3] if len(data) > 3 else 0)
    if data[:2] != b"\0\0" or len(data) < start or data[2] not in IDX_TYPES:
        raise InputError(
            f"{where}: is not an IDX file (it begins with {data[:4].hex(' ')}); fetch it again"
        )
    shape, dtype = (
        tuple(int(n) for n in np.frombuffer(data[4:start], ">u4")),
        np.dtype(IDX_TYPES[data[2]]),
    )
    if len(data) - start != math.prod(shape) * dtype.itemsize:
        raise InputError(
            f"{where}: has {len(data) - start} bytes of data, but its header "
            f"says {by(shape)} of {dtype.itemsize}; fetch it again"
        )
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def _labels_beside(images: Path) -> Path:
    return images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))


IDX_PARTS = {
    "train": "train",
    "t10k": "test",
    "test": "test",
    "val": "val",
    "valid": "valid",
    "validation": "validation",
    "dev": "dev",
}


def _read_idx_file(path: Path, where: str) -> Found:
    if "idx3" not in path.name:
        raise InputError(
            f"{where}: is not named like a file of images "
            "(...images-idx3-ubyte); give that one, its labels are found beside "
            "it"
        )
    split = {"train": "train", "test": "test"}.get(_idx_part(path) or "", "unsplit")
    return {split: (_read_idx(path), _read_idx(_labels_beside(path)))}, []


def _idx_part(path: Path) -> str | None:
    """The part of a data set that an IDX file of images holds, by its name."""
    return IDX_PARTS.get(path.name.partition("-images")[0]) if "idx3" in path.name else None


def _read_idx_folder(path: Path, where: str) -> Found:
    files: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        if _idx_part(file):
            files.setdefault(_idx_part(file), file)
    if not files:
        raise InputError(
            f"{where}: has neither train-images-idx3-ubyte nor "
            "t10k-images-idx3-ubyte (or .gz); give the four MNIST files their "
            "names"
        )
    kept = chosen(files)
    others = sorted(
        p.name
        for p in path.iterdir()
        if "idx3" in p.name and p not in [files[part] for part in kept]
    )
    return {
        part: (_read_idx(files[part]), _read_idx(_labels_beside(files[part]))) for part in kept
    }, unread_files(where, others, kept)


def unread_files(where: str, names: list[str], kept: list[str]) -> list[str]:
    """The sentence for files of images that are left, or none."""
    if not names:
        return []
    return [
        f"{where}: only {' and '.join(kept)} "
        f"{'is' if len(kept) == 1 else 'are'} read, not {named(names)}; give "
        "such a file by its own name to measure on it"
    ]


# -- CIFAR-10 --------------------------------------------------------------------------------------
CIFAR_RECORD = 1 + 3 * 32 * 32


def _read_cifar(path: Path, where: str) -> Found:
    if not any(path.glob("*_batch*.bin")):
        raise InputError(
            f"{where}: is the Python version of CIFAR-10 (pickles, never read); "
            "fetch the binary version"
        )
    splits = {}
    if any(path.glob("data_batch_*.bin")):
        splits["train"] = _cifar_split([path / f"data_batch_{n}.bin" for n in range(1, 6)])
    if (path / "test_batch.bin").exists():
        splits["test"] = _cifar_split([path / "test_batch.bin"])
    return splits, []


def _cifar_split(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    records = np.concatenate([_cifar_records(p) for p in paths])
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def _cifar_records(path: Path) -> np.ndarray:
    data = np.frombuffer(read_file(path), np.uint8)
    if data.size % CIFAR_RECORD:
        raise InputError(
            f"{escaped(path)}: has {data.size} bytes, not whole records of "
            f"{CIFAR_RECORD}; fetch it again"
        )
    records = data.reshape(-1, CIFAR_RECORD)
    if records[:, 0].max() > 9:
        raise InputError(
            f"{escaped(path)}: has the label {records[:, 0].max()}, but CIFAR-10 "
            "has 0..9; fetch it again"
        )
    return records


# -- Python functions ------------------------------------------------------------------------------
def _from_function(source: str, unsplit: str) -> Data:
    """Data, (x, y), (x_train, y_train, x_test, y_test), ((x_train, y_train), (x_test, y_test)), or
    a dictionary of arrays named as in a
    .npz file or of such pairs named as parts."""
    function = resolve(source)
    result = call(source, function)
    where = escaped(source)
    if isinstance(result, Data):
        return result
    if isinstance(result, Mapping):
        return _data(source, where, _from_mapping(result, where), unsplit)
    if (
        isinstance(result, (tuple, list))
        and len(result) in (2, 3)
        and all(_is_pair(part) for part in result)
    ):
        return _data(
            source,
            where,
            _from_parts(
                dict(
                    zip(("train", "val", "test") if len(result) == 3 else ("train", "test"), result)
                ),
                where,
            ),
            unsplit,
        )
    if isinstance(result, (tuple, list)) and len(result) == 2:
        return _data(source, where, ({"unsplit": tuple(result)}, []), unsplit)
    if isinstance(result, (tuple, list)) and len(result) == 4:
        return _data(
            source, where, ({"train": tuple(result[:2]), "test": tuple(result[2:])}, []), unsplit
        )
    _refuse_result(where, result)


def _is_pair(part: Any) -> bool:
    return isinstance(part, tuple) and len(part) == 2


def _from_mapping(result: Mapping, where: str) -> Found:
    """Arrays by name, or pairs of arrays by part."""
    if result and all(
        _is_pair(part) and str(name).lower() in PARTS for name, part in result.items()
    ):
        return _from_parts({PARTS[str(name).lower()]: part for name, part in result.items()}, where)
    names = {str(k): k for k in result}
    found, notes = pairs(names, where)
    return {split: (result[names[x]], result[names[y]]) for split, (x, y) in found.items()}, notes


def _from_parts(parts: Splits, where: str) -> Found:
    kept = chosen(parts)
    return {part: parts[part] for part in kept}, unread(
        where, [p for p in parts if p not in kept], kept
    )


def _refuse_result(where: str, result: Any) -> NoReturn:
    raise InputError(
        f"{where}: returned {type(result).__name__}; return Data, (x, y), "
        "(x_train, y_train, x_test, y_test) or a dictionary of arrays"
    )


# -- parts of a data set ---------------------------------------------------------------------------
def held_out(images: Images, count: int, seed: int) -> tuple[Images, Images]:
    """(the rest, `count` held-out images), both in their old order; the same for a seed on every
    machine and numpy version.

    Raises ConfigError unless at least one image stays on each side.
    """
    if not 0 < count < len(images):
        raise ConfigError(
            f"{count} of {len(images)} images cannot be held out; choose from 1 "
            f"to {len(images) - 1}"
        )
    order = shuffled(len(images), seed)
    return images[np.sort(order[count:])], images[np.sort(order[:count])]


def subset(images: Images, count: int, seed: int) -> Images:
    """`count` images drawn without replacement, in their old order; all of them where there are no
    more."""
    return images if count >= len(images) else held_out(images, count, seed)[1]


def shuffled(count: int, seed: int) -> np.ndarray:
    """A permutation int64 [count], made from the raw stream of PCG64, which numpy never changes
    (its shuffles it may).

    >>> shuffled(5, seed=0).tolist()
    [3, 2, 1, 0, 4]
    """
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def batches(
    images: Images, size: int, *, order: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Consecutive (x, y) of `size` images, the last one shorter, in the given order of indices
    (default: as they are)."""
    for start in range(0, len(images) if order is None else len(order), size):
        part = (
            images[start : start + size] if order is None else images[order[start : start + size]]
        )
        yield part.x, part.y


# -- what a pixel is worth -------------------------------------------------------------------------
@dataclass(frozen=True)
class Preprocess:
    """What the network sees of a pixel: real[c] = (pixel * scale - mean[c]) / std[c]. One mean or
    std serves every channel.

    axes: where the axes of an image go on their way into the network (layout.py). resize, crop: how
    files of images come to one size (folders.Sizing). Raises ConfigError for values that are not
    finite, a scale or std that is not positive, and for sizes below 1.
    """

    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    axes: Axes = PLAIN
    resize: int | None = None
    crop: int | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))
        object.__setattr__(self, "scale", float(self.scale))
        object.__setattr__(self, "axes", tuple(self.axes))
        if not all(map(math.isfinite, (self.scale, *self.mean, *self.std))):
            raise ConfigError(
                f"preprocessing with scale {self.scale}, mean {self.mean}, std "
                f"{self.std} is not finite; give numbers"
            )
        if self.scale <= 0 or not self.std or min(self.std) <= 0:
            raise ConfigError(
                f"preprocessing with scale {self.scale} and std {self.std} divides "
                "by nothing; give values above 0"
            )
        if self.axes not in ORDERS:
            raise ConfigError(
                f"preprocessing with the order of axes {escaped(self.axes)} is not "
                f"known; give one of {', '.join(map(str, ORDERS))}"
            )
        for name in ("resize", "crop"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= SIDE_PEAK
            ):
                raise ConfigError(
                    f"--{name} must be a whole number from 1 to {SIDE_PEAK}, not {escaped(value)}"
                )

    @property
    def sizing(self) -> Sizing:
        """How files of images come to one size."""
        return Sizing(self.resize, self.crop)

    @staticmethod
    def of(images: Images) -> Preprocess:
        """The default: 0..255 becomes 0..1, floats stay as they are."""
        return Preprocess(1 / 255 if images.x.dtype == np.uint8 else 1.0)

    def affine(self, channels: int) -> tuple[np.ndarray, np.ndarray]:
        """(mult, add), float64 [channels] both: real = pixel * mult + add.

        Raises ConfigError where mean or std is neither one value nor one per channel.

        >>> Preprocess(1.0, (10.0,), (4.0, 2.0)).affine(2)
        (array([0.25, 0.5 ]), array([-2.5, -5. ]))
        """
        mean, std = (self._channelwise(name, channels) for name in ("mean", "std"))
        return self.scale / std, -mean / std

    def factors(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """(mult, add), float64 of as many axes as one input of the network in `shape`, to which
        they broadcast.

        Each channel has its own value along the axis that holds the channels; where all values are
        in a row, at each of its places. Raises ConfigError where mean or std fits no axis.

        >>> [a.shape for a in Preprocess(mean=(1, 2, 3), axes=(1, 2, 0)).factors((8, 9, 3))]
        [(1, 1, 3), (1, 1, 3)]
        """
        given = max(len(self.mean), len(self.std))
        if len(shape) == 1 and given > 1 and shape[0] % given == 0:
            mult, add = self.affine(given)
            spread = np.tile if self.axes == LAST else np.repeat
            return spread(mult, shape[0] // given), spread(add, shape[0] // given)
        axis = channel_axis(self.axes, shape, given)
        return tuple(
            a.reshape([-1 if n == axis else 1 for n in range(len(shape))])
            for a in self.affine(shape[axis])
        )

    def _channelwise(self, name: str, channels: int) -> np.ndarray:
        values = getattr(self, name)
        if len(values) not in (1, channels):
            raise ConfigError(
                f"--{name} has {len(values)} values, but the images have {channels} "
                f"channels; give 1 or {channels}"
            )
        return np.broadcast_to(np.array(values, np.float64), (channels,))

    def apply(self, x: np.ndarray) -> np.ndarray:
        """float32, the shape of x [N, C, ...]: computed in float64 and rounded once."""
        mult, add = (a.reshape(-1, *[1] * (x.ndim - 2)) for a in self.affine(x.shape[1]))
        return (x * mult + add).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; `from_dict` is the way back."""
        sizes = {"resize": self.resize, "crop": self.crop}
        return {
            "scale": self.scale,
            "mean": list(self.mean),
            "std": list(self.std),
            "axes": list(self.axes),
            **sizes,
        }

    @staticmethod
    def from_dict(d: Any) -> Preprocess:
        """The preprocessing again; raises InputError where the data does not describe one."""
        try:
            return Preprocess(**d)
        except (TypeError, ValueError, ConfigError) as e:
            raise InputError(
                f"the preprocessing is not readable ({said(e)}); make the file again"
            ) from e
