"""The names that people give to the parts of a data set, and which of those parts are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from rqtool.errors import InputError, escaped

# What each word means; validation parts keep their own name, for results say what was measured on.
PARTS = {
    "train": "train", "training": "train", "trn": "train", "tr": "train", "test": "test", "testing": "test", "tst": "test", "te": "test",
    "val": "val", "valid": "valid", "validation": "validation", "dev": "dev",
}  # fmt: skip
FOLDER_PARTS = {word: part for word, part in PARTS.items() if len(word) > 2}
VALIDATION = ("val", "valid", "validation", "dev")
IMAGE_WORDS = (
    "images",
    "image",
    "imgs",
    "img",
    "x",
    "data",
    "pixels",
    "features",
    "inputs",
)  # of several, the first is read
LABEL_WORDS = ("labels", "label", "y", "targets", "target")
SHOWN = 8  # names in one sentence


def _words() -> dict[str, tuple[str, str, int]]:
    """{name without case and signs: (part, "images" or "labels", rank)}; a name without a part
    belongs to "unsplit"."""
    roles = [("images", n, word) for n, word in enumerate(IMAGE_WORDS)] + [
        ("labels", n, word) for n, word in enumerate(LABEL_WORDS)
    ]
    split = {
        name: (part, role, n)
        for role, n, word in roles
        for p, part in PARTS.items()
        for name in (p + word, word + p)
    }
    return split | {word: ("unsplit", role, n) for role, n, word in roles}


NAMES = _words()


def plain(name: str) -> str:
    """
    >>> plain("X_Train"), plain("test-images")
    ('xtrain', 'testimages')
    """
    return re.sub(r"[^a-z0-9]", "", name.lower())


def named(names: Iterable[str]) -> str:
    """Names for a sentence, the first few of many."""
    found = [escaped(n) for n in names]
    return ", ".join(found[:SHOWN]) + (
        f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    )


def pairs(names: Iterable[str], where: str) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """({part: (array of images, array of labels)}, a sentence for what is not read) of arrays with
    these names.

    Raises InputError where no two of them are images and labels.
    """
    names = sorted(names)
    known = {name: NAMES[plain(name)] for name in names if plain(name) in NAMES}
    found: dict[str, dict[str, list[str]]] = {}
    for name, (part, role, _) in sorted(known.items(), key=lambda item: item[1][2]):
        found.setdefault(part, {"images": [], "labels": []})[role].append(name)
    whole = {
        part: (roles["images"][0], roles["labels"][0])
        for part, roles in found.items()
        if roles["images"] and roles["labels"]
    }
    if not whole:
        held = ", ".join(escaped(n) for n in names[:SHOWN]) or "nothing"
        raise InputError(
            f"{where}: holds {held}; name the arrays x_train, y_train, x_test, "
            "y_test, or images, labels"
        )
    kept = chosen(whole)
    read = {name for part in kept for name in whole[part]}
    return {part: whole[part] for part in kept}, unread(
        where, [n for n in names if n not in read], kept
    )


def chosen(parts: Mapping[str, object]) -> list[str]:
    """Which parts are read: train, and test or the first validation part; what is not divided only
    where there are no parts.

    >>> chosen({"dev": 0, "val": 0, "train": 0}), chosen({"unsplit": 0, "test": 0, "val": 0}), chosen({"unsplit": 0})
    (['train', 'val'], ['test'], ['unsplit'])
    """
    measured = next((p for p in ("test", *VALIDATION) if p in parts), None)
    kept = [p for p in ("train", measured) if p in parts]
    return kept or ["unsplit"]


def unread(where: str, names: list[str], kept: list[str]) -> list[str]:
    """The sentence for arrays that are left, or none."""
    if not names:
        return []
    read = (
        "images and their labels are"
        if kept == ["unsplit"]
        else f"{' and '.join(kept)} {'is' if len(kept) == 1 else 'are'}"
    )
    return [
        f"{where}: only {read} read, not {named(names)}; to measure on other "
        "images, name them x_test and their labels y_test"
    ]
