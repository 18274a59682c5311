"""Folders of class folders of images: which files are read, how large the images become, and what
is left."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rqtool.errors import InputError, escaped
from rqtool.model.layout import by
from rqtool.model.named import said
from rqtool.model.parts import FOLDER_PARTS, chosen, named

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
Read = tuple[Path, np.ndarray]  # a file and its pixels


@dataclass(frozen=True)
class Sizing:
    """How images of many sizes become one. resize: the length of the shorter side afterwards
    (bilinear); crop: then the side of the square that is kept from the middle; None leaves a step
    out."""

    resize: int | None = None
    crop: int | None = None


def read_class_folders(
    path: Path, where: str, kinds: str, sizing: Sizing
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """({part: (uint8 [N, C, H, W], labels int64 [N])}, what was not read, a sentence each).

    Classes are numbered in the order of their names. All grey images: one channel; otherwise all
    become RGB. kinds: what else could be given, for the sentence where there are no images.
    """
    parts, notes = _parts(path, where)
    names = {part: [p.name for p in _folders(folder)] for part, folder in parts.items()}
    _check_classes(names, where)
    files = {
        part: [(f, y) for y, n in enumerate(names[part]) for f in _images(folder / n)]
        for part, folder in parts.items()
    }
    for part, found in files.items():
        if not found:
            raise InputError(
                f"{escaped(parts[part])}: has no class folders with images "
                f"({', '.join(SUFFIXES)}); give {kinds}"
            )
    notes += [sentence for folder in parts.values() for sentence in _left(folder)]
    return _stack(
        {part: [(read_image(f, sizing), y) for f, y in found] for part, found in files.items()}
    ), notes


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _parts(path: Path, where: str) -> tuple[dict[str, Path], list[str]]:
    """({part: its folder}, a sentence where other folders are left). A folder named like a
    validation part may be a class (valid and invalid): it is a part beside train and test, or among
    parts only."""
    folders = {p: FOLDER_PARTS.get(p.name.lower()) for p in _folders(path)}
    split = {"train", "test"} & set(folders.values()) or (folders and all(folders.values()))
    if not split:
        return {"unsplit": path}, []
    found: dict[str, Path] = {}
    for folder, part in folders.items():
        if part:
            found.setdefault(part, folder)
    kept = {part: found[part] for part in chosen(found)}
    others = [p.name for p in folders if p not in kept.values()]
    return kept, _unread(where, [p.name for p in kept.values()], others)


def _unread(where: str, read: list[str], others: list[str]) -> list[str]:
    if not others:
        return []
    folders = "the folder" if len(others) == 1 else "the folders"
    return [
        f"{where}: of its folders only {' and '.join(map(escaped, read))} "
        f"{'is' if len(read) == 1 else 'are'} read, not {folders} "
        f"{named(others)}; to measure on other images, name their folder "
        "test"
    ]


def _check_classes(names: dict[str, list[str]], where: str) -> None:
    (first, one), *others = names.items()
    for part, classes in others:
        odd = sorted(set(one) ^ set(classes))
        if odd:
            raise InputError(
                f"{where}: the class {escaped(odd[0])} is in only one of {first} and "
                f"{part}; give both the same folders"
            )


# -- files -----------------------------------------------------------------------------------------
def _inside(folder: Path) -> list[Path]:
    """All files of a class folder and of the folders in it; links to folders are not followed."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(name.startswith(".") for name in path.relative_to(folder).parts)


def _images(folder: Path) -> list[Path]:
    return [
        p for p in _inside(folder) if p.suffix.lower() in SUFFIXES and not _is_hidden(p, folder)
    ]


def _left(part: Path) -> list[str]:
    """What of a folder of class folders is not read: a sentence for each kind."""
    folders, where = _folders(part), escaped(part)
    loose = [p for p in part.iterdir() if p.is_file() and not p.name.startswith(".")]
    inside = [p for p in part.rglob("*") if p.is_file() and p.parent != part]
    hidden = [p for p in part.rglob("*") if p.is_file() and _is_hidden(p, part)]
    others = [p for p in inside if not _is_hidden(p, part) and p.suffix.lower() not in SUFFIXES]
    empty = [p for p in folders if not _images(p)]
    return [
        *_left_kind(
            where,
            loose,
            "beside the class folders {is} not read",
            "put images into the folder of their class",
            part,
        ),
        *_left_kind(
            where,
            others,
            f"in class folders {{is}} not read, being no image ({', '.join(SUFFIXES)})",
            "turn what should be read into one of these",
            part,
        ),
        *_left_kind(
            where,
            hidden,
            "that begin{s} with a dot, or lie{s} in such a folder, {is} not read",
            "rename what should be read",
            part,
        ),
        *_left_kind(
            where,
            empty,
            "without an image still {has} a number of {its} own",
            "remove what is no class",
            part,
            "class folder",
        ),
    ]


def _left_kind(
    where: str, paths: list[Path], what: str, way: str, part: Path, kind: str = "file"
) -> list[str]:
    if not paths:
        return []
    one = len(paths) == 1
    words = what.format(
        **(
            {"is": "is", "has": "has", "its": "its", "s": "s"}
            if one
            else {"is": "are", "has": "have", "its": "their", "s": ""}
        )
    )
    return [
        f"{where}: {len(paths)} {kind}{'' if one else 's'} {words} "
        f"({named(str(p.relative_to(part)) for p in sorted(paths))}); "
        f"{way}"
    ]


# -- pixels ----------------------------------------------------------------------------------------
def read_image(path: Path, sizing: Sizing = Sizing()) -> Read:
    """(path, uint8 [H, W] or [H, W, 3]); alpha is dropped."""
    from PIL import Image  # late: it is needed for image folders only

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _opened(Image, path, sizing)
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as e:
        raise InputError(
            f"{escaped(path)}: is not a readable image ({said(e)}); replace or remove it"
        ) from e


def _opened(Image: object, path: Path, sizing: Sizing) -> Read:
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise InputError(
                f"{escaped(path)}: has pixels beyond 8 bits (mode {image.mode}); "
                "give 8-bit images or a .npz file"
            )
        return path, np.asarray(
            _sized(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"), path, sizing)
        )


def _sized(image: object, path: Path, sizing: Sizing) -> object:
    """The shorter side resized, then the middle cut out."""
    width, height = image.size
    if sizing.resize is not None:
        n, short = sizing.resize, min(width, height)
        width, height = (n if side == short else n * side // short for side in (width, height))
        image = image.resize((width, height), 2)  # bilinear
    if sizing.crop is None:
        return image
    n = sizing.crop
    if min(width, height) < n:
        raise InputError(
            f"{escaped(path)}: is {width}x{height} pixels, too small for --crop "
            f"{n}; give --resize {n} as well, or more than that"
        )
    left, top = round((width - n) / 2), round((height - n) / 2)
    return image.crop((left, top, left + n, top + n))


def _stack(parts: dict[str, list[tuple[Read, int]]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Arrays [N, C, H, W] of every part, or InputError naming the first image of another size."""
    images = [image for found in parts.values() for image, _ in found]
    (first, model), colour = images[0], any(a.ndim == 3 for _, a in images)
    for path, a in images:
        if a.shape[:2] != model.shape[:2]:
            raise InputError(
                f"{escaped(path)}: is {by(a.shape[1::-1])} pixels, but "
                f"{escaped(first)} is {by(model.shape[1::-1])}; "
                "give images of one size, or --resize N and --crop N"
            )
    return {
        part: (_planes(found, colour), np.array([y for _, y in found]))
        for part, found in parts.items()
    }


def _planes(found: list[tuple[Read, int]], colour: bool) -> np.ndarray:
    """uint8 [N, C, H, W], filled image by image."""
    h, w = found[0][0][1].shape[:2]
    x = np.empty((len(found), 3 if colour else 1, h, w), np.uint8)
    for place, ((_, a), _) in zip(x, found):
        place[:] = a.transpose(2, 0, 1) if a.ndim == 3 else a
    return x
