"""Labelled images from files, as numpy arrays; what a pixel is worth; batches. No torch, nothing unpickled.

    source                               train                     test
    demo                                 4,000 images              1,000 images    (Fashion-MNIST, embedded)
    FILE.npz                             x_train, y_train          x_test, y_test
      or only images, labels (or x, y)   -                         images, labels
    folder of MNIST IDX files (or .gz)   train-images, -labels     t10k-images, -labels
    one IDX file of images               if named train-*          otherwise
    CIFAR-10 binary version, its folder  data_batch_1..5.bin       test_batch.bin
    folder of class folders of images    train/CLASS/*             test/CLASS/*
      or without train and test          -                         CLASS/*
    package.module:function              what the function returns, called without arguments

Images that nobody called training images are `test`: they can be measured on, not trained on. `load_data(source, unsplit="train")`
says otherwise.

Layout: [N, F] are features; [N, H, W] gets one channel; of four axes the channels are the second, unless only the last is 1, 3 or 4
long. Whole numbers must be 0..255 (they become uint8); floats become float32. Labels are 0, 1, 2, ... [N] or [N, 1].
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
from rqtool.model.named import call, is_named, resolve, said
from rqtool.storage import existing, read_file, reading

CHANNELS = (1, 3, 4)  # grey, colour, colour with alpha
MAX_CLASSES = 100_000
Splits = Mapping[str, tuple[Any, Any]]  # raw (images, labels) under train, test or unsplit
SPLIT_PAIRS = {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")}
UNSPLIT_PAIRS = (("x", "y"), ("images", "labels"))  # the last of those that are there
KINDS = "a .npz file, MNIST IDX files, a CIFAR-10 binary folder, a folder of class folders, package.module:function or demo"


# -- what everything becomes -------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Images:
    """Images and their labels.

    x: uint8 or float32 [N, C, H, W], or features [N, F]; y: int64 [N].
    `images[3:9]` and `images[indices]` are Images again.
    """

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, key: slice | np.ndarray) -> Images:
        return Images(self.x[key], self.y[key])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image: (C, H, W), or (F,)."""
        return self.x.shape[1:]

    def reshaped(self, shape: tuple[int, ...]) -> Images:
        """The same values, each image in another shape of as many elements (rows of pixels as an image, a picture as a signal).

        Raises InputError where the number of elements differs.
        """
        if math.prod(shape) != math.prod(self.shape):
            raise InputError(f"images of {_by(self.shape)} cannot be seen as {_by(shape)}: {math.prod(self.shape)} values are not {math.prod(shape)}")
        return Images(self.x.reshape(len(self), *shape), self.y)


@dataclass(frozen=True, eq=False)
class Data:
    """A data set: what to train on, what to measure on, and how many classes there are. One of the two may be None.

    notes: what of the source was not read or read in a way that a user may not expect, a sentence each.
    """

    name: str
    train: Images | None
    test: Images | None
    classes: int
    notes: tuple[str, ...] = ()


def load_data(source: str, unsplit: str = "test") -> Data:
    """The data set that `source` names (see the table above).

    unsplit: "test" or "train", what images are that the source does not divide. Raises InputError for everything that cannot be
    read or is not labelled images.
    """
    if source == "demo":
        return replace(load_data(str(resources.files("rqtool.demo").joinpath("fashion.npz"))), name="demo")
    if is_named(source) and not Path(source).exists():
        return _from_function(source, unsplit)
    path, where = Path(source), escaped(source)
    with reading(path):
        return _data(path.name, where, _reader(path)(path, where), unsplit)


def _reader(path: Path) -> Callable[[Path, str], Splits]:
    """The function that reads this kind of file or folder."""
    if path.is_dir():
        return _folder_reader(path)
    if existing(path).suffix.lower() == ".npz":
        return _read_npz
    if "idx" in path.name:
        return _read_idx_file
    raise InputError(f"{escaped(path)}: is no kind of data this version reads; give {KINDS}")


def _folder_reader(path: Path) -> Callable[[Path, str], Splits]:
    names = {p.name for p in path.iterdir()}
    if any("idx1-ubyte" in n or "idx3-ubyte" in n for n in names):
        return _read_idx_folder
    if any(n.startswith(("data_batch_", "test_batch")) for n in names):
        return _read_cifar
    return _read_class_folders


# -- the one door for arrays -------------------------------------------------------------------------------------------
def _data(name: str, where: str, splits: Splits, unsplit: str) -> Data:
    """Checked Data from raw arrays."""
    parts = {}
    for split, (x, y) in splits.items():
        label = where if split == "unsplit" else f"{where}, {split}"
        parts[unsplit if split == "unsplit" else split] = _images(_array(x, label), _array(y, label), label)
    train, test = parts.get("train"), parts.get("test")
    if train is not None and test is not None:
        _check_alike(train, test, where)
    return Data(name, train, test, max(int(p.y.max()) + 1 for p in parts.values()))


def _array(values: Any, where: str) -> np.ndarray:
    try:
        return np.asarray(values)
    except (ValueError, TypeError) as e:  # lists of different lengths, tensors on a GPU
        raise InputError(f"{where}: does not make an array ({said(e)}); give numpy arrays") from e


def _images(x: np.ndarray, y: np.ndarray, where: str) -> Images:
    x = _layout(_pixels(x, where), where)
    y = _labels(y, where)
    if len(x) != len(y):
        raise InputError(f"{where}: has {len(x)} images but {len(y)} labels; give one label for each image")
    return Images(x, y)


def _pixels(x: np.ndarray, where: str) -> np.ndarray:
    if x.dtype.kind not in "buif":
        raise InputError(f"{where}: images are {x.dtype}, not numbers; save them as uint8 or float32")
    if x.size == 0:
        raise InputError(f"{where}: has no images (shape {_by(x.shape)}); give at least one")
    if x.dtype.kind == "f":
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise InputError(f"{where}: images hold NaN, infinity or values beyond float32; clean them first")
    elif x.dtype != np.uint8:
        lo, hi = int(x.min()), int(x.max())
        if lo < 0 or hi > 255:
            raise InputError(f"{where}: images are whole numbers from {lo} to {hi}, beyond 0..255; save them as float32")
        x = x.astype(np.uint8)
    return x


def _layout(x: np.ndarray, where: str) -> np.ndarray:
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in CHANNELS and x.shape[1] not in CHANNELS:
        x = x.transpose(0, 3, 1, 2)
    elif x.ndim not in (2, 4):
        raise InputError(f"{where}: images have {x.ndim} axes ({_by(x.shape)}); give [N, H, W], [N, C, H, W], [N, H, W, C] or [N, F]")
    return np.require(x, requirements="CW")  # torch wants arrays that may be written to


def _labels(y: np.ndarray, where: str) -> np.ndarray:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or y.dtype.kind not in "buif":
        raise InputError(f"{where}: labels are {y.dtype} of {_by(y.shape)}; give one whole number for each image")
    y = y.astype(np.float64) if y.dtype.kind == "f" else y  # float16 ends below MAX_CLASSES
    if y.size and not (np.isfinite(y).all() and (y == np.floor(y)).all()):
        raise InputError(f"{where}: labels are not whole numbers; give 0, 1, 2, ...")
    if y.size and not (y.min() >= 0 and y.max() < MAX_CLASSES):
        raise InputError(f"{where}: labels run from {int(y.min())} to {int(y.max())}; give 0, 1, 2, ... below {MAX_CLASSES}")
    return y.astype(np.int64)


def _check_alike(train: Images, test: Images, where: str) -> None:
    if train.shape != test.shape:
        raise InputError(f"{where}: training images are {_by(train.shape)}, test images {_by(test.shape)}; give one shape")
    if train.x.dtype != test.x.dtype:
        raise InputError(f"{where}: training images are {train.x.dtype}, test images {test.x.dtype}; save both in one type")


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"


# -- .npz --------------------------------------------------------------------------------------------------------------
def _read_npz(path: Path, where: str) -> Splits:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")}
            pairs = _npz_pairs(names, where)
            return {split: tuple(_read_npy(archive, n, where) for n in pair) for split, pair in pairs.items()}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as e:
        raise InputError(f"{where}: is not a readable .npz file ({said(e)}); make or fetch it again") from e


def _npz_pairs(names: set[str], where: str) -> dict[str, tuple[str, str]]:
    pairs = {split: pair for split, pair in SPLIT_PAIRS.items() if set(pair) <= names}
    pairs = pairs or {"unsplit": pair for pair in UNSPLIT_PAIRS if set(pair) <= names}
    if not pairs:
        held = ", ".join(escaped(n) for n in sorted(names)[:8]) or "nothing"
        raise InputError(f"{where}: holds {held}; name the arrays x_train, y_train, x_test, y_test, or images, labels")
    return pairs


def _read_npy(archive: zipfile.ZipFile, name: str, where: str) -> np.ndarray:
    """One array, its header checked against the bytes there are before any memory is asked for."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as file:
        shape, fortran, dtype = _npy_header(file)
        if dtype.hasobject:
            raise InputError(f"{where}: {name} holds pickled objects, which are never read; save it as numbers")
        size = info.file_size - file.tell()
        if math.prod(shape) * dtype.itemsize != size or any(n < 0 for n in shape):
            raise ValueError(f"{name} has {size} bytes, not those of {dtype} {_by(shape)}")
        return np.ndarray(shape, dtype, file.read(), order="F" if fortran else "C")


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"array format {version[0]}.{version[1]} is unknown")
    try:
        return readers[version](file)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as e:  # its parser is Python's own
        raise ValueError("broken array header") from e


# -- MNIST IDX ---------------------------------------------------------------------------------------------------------
IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def _read_idx(path: Path) -> np.ndarray:
    """An IDX file: two zero bytes, a type, the number of axes, their lengths (big-endian), the values."""
    where, data = escaped(path), read_file(path)
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as e:
            raise InputError(f"{where}: is not a readable gzip file ({said(e)}); make or fetch it again") from e
    start = 4 + 4 * (data[3] if len(data) > 3 else 0)
    if data[:2] != b"\0\0" or len(data) < start or data[2] not in IDX_TYPES:
        raise InputError(f"{where}: is not an IDX file (it begins with {data[:4].hex(' ')}); fetch it again")
    shape, dtype = tuple(int(n) for n in np.frombuffer(data[4:start], ">u4")), np.dtype(IDX_TYPES[data[2]])
    if len(data) - start != math.prod(shape) * dtype.itemsize:
        raise InputError(f"{where}: has {len(data) - start} bytes of data, but its header says {_by(shape)} of {dtype.itemsize}; fetch it again")
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def _labels_beside(images: Path) -> Path:
    return images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))


def _read_idx_file(path: Path, where: str) -> Splits:
    if "idx3" not in path.name:
        raise InputError(f"{where}: is not named like a file of images (...images-idx3-ubyte); give that one, its labels are found beside it")
    split = "train" if path.name.startswith("train") else "test" if path.name.startswith("t10k") else "unsplit"
    return {split: (_read_idx(path), _read_idx(_labels_beside(path)))}


def _read_idx_folder(path: Path, where: str) -> Splits:
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        found = sorted(p for p in path.iterdir() if p.name.startswith(f"{prefix}-images") and "idx3" in p.name)
        if found:
            splits |= _read_idx_file(found[0], where)
    if not splits:
        raise InputError(f"{where}: has neither train-images-idx3-ubyte nor t10k-images-idx3-ubyte (or .gz); give the four MNIST files their names")
    return splits


# -- CIFAR-10 ----------------------------------------------------------------------------------------------------------
CIFAR_RECORD = 1 + 3 * 32 * 32


def _read_cifar(path: Path, where: str) -> Splits:
    if not any(path.glob("*_batch*.bin")):
        raise InputError(f"{where}: is the Python version of CIFAR-10 (pickles, never read); fetch the binary version")
    splits = {}
    if any(path.glob("data_batch_*.bin")):
        splits["train"] = _cifar_split([path / f"data_batch_{n}.bin" for n in range(1, 6)])
    if (path / "test_batch.bin").exists():
        splits["test"] = _cifar_split([path / "test_batch.bin"])
    return splits


def _cifar_split(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    records = np.concatenate([_cifar_records(p) for p in paths])
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def _cifar_records(path: Path) -> np.ndarray:
    data = np.frombuffer(read_file(path), np.uint8)
    if data.size % CIFAR_RECORD:
        raise InputError(f"{escaped(path)}: has {data.size} bytes, not whole records of {CIFAR_RECORD}; fetch it again")
    records = data.reshape(-1, CIFAR_RECORD)
    if records[:, 0].max() > 9:
        raise InputError(f"{escaped(path)}: has the label {records[:, 0].max()}, but CIFAR-10 has 0..9; fetch it again")
    return records


# -- folders of class folders ------------------------------------------------------------------------------------------
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def _visible_folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _read_class_folders(path: Path, where: str) -> Splits:
    """Classes are numbered in the order of their names. All grey images: one channel; otherwise all become RGB."""
    parts = {s: path / s for s in ("train", "test") if (path / s).is_dir()} or {"unsplit": path}
    names = {split: [p.name for p in _visible_folders(folder)] for split, folder in parts.items()}
    if len({tuple(n) for n in names.values()}) > 1:
        odd = sorted(set(names["train"]) ^ set(names["test"]))
        raise InputError(f"{where}: the class {escaped(odd[0])} is in only one of train and test; give both the same folders")
    files = {split: [(f, y) for y, n in enumerate(names[split]) for f in _image_files(folder / n)] for split, folder in parts.items()}
    for split, found in files.items():
        if not found:
            raise InputError(f"{escaped(parts[split])}: has no class folders with images ({', '.join(SUFFIXES)}); give {KINDS}")
    return _stack({split: [(_read_image(f), y) for f, y in found] for split, found in files.items()})


def _image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def _read_image(path: Path) -> tuple[Path, np.ndarray]:
    """(path, uint8 [H, W] or [H, W, 3]); alpha is dropped."""
    from PIL import Image  # late: it is needed for image folders only

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise InputError(f"{escaped(path)}: has pixels beyond 8 bits (mode {image.mode}); give 8-bit images or a .npz file")
            return path, np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise InputError(f"{escaped(path)}: is not a readable image ({said(e)}); replace or remove it") from e


def _stack(splits: dict[str, list[tuple[tuple[Path, np.ndarray], int]]]) -> Splits:
    """Arrays [N, C, H, W] of every split, or InputError naming the first image of another size."""
    images = [image for found in splits.values() for image, _ in found]
    (first, model), colour = images[0], any(a.ndim == 3 for _, a in images)
    for path, a in images:
        if a.shape[:2] != model.shape[:2]:
            raise InputError(f"{escaped(path)}: is {_by(a.shape[1::-1])} pixels, but {escaped(first)} is {_by(model.shape[1::-1])}; give images of one size")

    def planes(a: np.ndarray) -> np.ndarray:
        return a.transpose(2, 0, 1) if a.ndim == 3 else np.repeat(a[None], 3 if colour else 1, axis=0)

    return {split: (np.stack([planes(a) for (_, a), _ in found]), np.array([y for _, y in found])) for split, found in splits.items()}


# -- Python functions --------------------------------------------------------------------------------------------------
def _from_function(source: str, unsplit: str) -> Data:
    """Data, (x, y), (x_train, y_train, x_test, y_test), or a dictionary of arrays named as in a .npz file."""
    function = resolve(source)
    result = call(source, function)
    where = escaped(source)
    if isinstance(result, Data):
        return result
    if isinstance(result, Mapping):
        pairs = _npz_pairs({str(k) for k in result}, where)
        return _data(source, where, {split: (result[x], result[y]) for split, (x, y) in pairs.items()}, unsplit)
    if isinstance(result, (tuple, list)) and len(result) == 2:
        return _data(source, where, {"unsplit": tuple(result)}, unsplit)
    if isinstance(result, (tuple, list)) and len(result) == 4:
        return _data(source, where, {"train": tuple(result[:2]), "test": tuple(result[2:])}, unsplit)
    _refuse_result(where, result)


def _refuse_result(where: str, result: Any) -> NoReturn:
    raise InputError(f"{where}: returned {type(result).__name__}; return Data, (x, y), (x_train, y_train, x_test, y_test) or a dictionary of arrays")


# -- parts of a data set -----------------------------------------------------------------------------------------------
def held_out(images: Images, count: int, seed: int) -> tuple[Images, Images]:
    """(the rest, `count` held-out images), both in their old order; the same for a seed on every machine and numpy version.

    Raises ConfigError unless at least one image stays on each side.
    """
    if not 0 < count < len(images):
        raise ConfigError(f"{count} of {len(images)} images cannot be held out; choose from 1 to {len(images) - 1}")
    order = shuffled(len(images), seed)
    return images[np.sort(order[count:])], images[np.sort(order[:count])]


def subset(images: Images, count: int, seed: int) -> Images:
    """`count` images drawn without replacement, in their old order; all of them where there are no more."""
    return images if count >= len(images) else held_out(images, count, seed)[1]


def shuffled(count: int, seed: int) -> np.ndarray:
    """A permutation int64 [count], made from the raw stream of PCG64, which numpy never changes (its shuffles it may).

    >>> shuffled(5, seed=0).tolist()
    [3, 2, 1, 0, 4]
    """
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def batches(images: Images, size: int, *, order: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Consecutive (x, y) of `size` images, the last one shorter, in the given order of indices (default: as they are)."""
    for start in range(0, len(images) if order is None else len(order), size):
        part = images[start : start + size] if order is None else images[order[start : start + size]]
        yield part.x, part.y


# -- what a pixel is worth ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Preprocess:
    """What the network sees of a pixel: real[c] = (pixel * scale - mean[c]) / std[c]. One mean or std serves every channel.

    Raises ConfigError for values that are not finite, a scale or std that is not positive.
    """

    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))
        object.__setattr__(self, "scale", float(self.scale))
        if not all(map(math.isfinite, (self.scale, *self.mean, *self.std))):
            raise ConfigError(f"preprocessing with scale {self.scale}, mean {self.mean}, std {self.std} is not finite; give numbers")
        if self.scale <= 0 or not self.std or min(self.std) <= 0:
            raise ConfigError(f"preprocessing with scale {self.scale} and std {self.std} divides by nothing; give values above 0")

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

    def _channelwise(self, name: str, channels: int) -> np.ndarray:
        values = getattr(self, name)
        if len(values) not in (1, channels):
            raise ConfigError(f"--{name} has {len(values)} values, but the images have {channels} channels; give 1 or {channels}")
        return np.broadcast_to(np.array(values, np.float64), (channels,))

    def apply(self, x: np.ndarray) -> np.ndarray:
        """float32, the shape of x [N, C, ...]: computed in float64 and rounded once."""
        mult, add = (a.reshape(-1, *[1] * (x.ndim - 2)) for a in self.affine(x.shape[1]))
        return (x * mult + add).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; `from_dict` is the way back."""
        return {"scale": self.scale, "mean": list(self.mean), "std": list(self.std)}

    @staticmethod
    def from_dict(d: Any) -> Preprocess:
        """The preprocessing again; raises InputError where the data does not describe one."""
        try:
            return Preprocess(**d)
        except (TypeError, ValueError, ConfigError) as e:
            raise InputError(f"the preprocessing is not readable ({said(e)}); make the file again") from e
