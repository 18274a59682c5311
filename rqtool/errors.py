"""Every error a user can meet, each with the exit code the shell sees.

    RqError                  1   a bug in rqtool, if nothing below fits
    |- ConfigError           2   flags, presets or macro files that contradict each other
    |- InputError            3   a model, data or .rq file that cannot be read, or is refused
    |- CoverageError         4   a weight-bearing layer would be left out of the macro silently
    |- CheckError            5   training diverged, or a check (--min-acc, verify) failed
    `- StorageError          6   disk, memory, lock

A message is one sentence: the thing, the rule, the value, the way out.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class RqError(Exception):
    """The root of the tree; `exit_code` is what the shell gets."""

    exit_code = 1


class ConfigError(RqError):
    exit_code = 2


class InputError(RqError):
    exit_code = 3


class CoverageError(RqError):
    exit_code = 4


class CheckError(RqError):
    exit_code = 5


class StorageError(RqError):
    exit_code = 6


def suggestion(word: str, choices: Iterable[str]) -> str:
    """The tail of a sentence about an unknown word: the nearest known one, or all of them.

    >>> suggestion("nthu2019", ["nthu-2019", "default"])
    "did you mean 'nthu-2019'?"
    >>> suggestion("xyz", ["b", "a"])
    'choose one of a, b'
    """
    known = sorted(choices)
    near = get_close_matches(word, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(known)}"


def escaped(text: object) -> str:
    """`text` with control characters written out, so that a name from a file cannot steer a
    terminal.

    >>> escaped("a\\x1b[2J")
    'a\\\\x1b[2J'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
