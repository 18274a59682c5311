"""Text from the command line as numbers; ConfigError, in one sentence, where it is none."""

from __future__ import annotations

import re

from rqtool.errors import ConfigError, escaped


def whole(flag: str, text: str | None, low: int | None = None) -> int | None:
    """
    >>> whole("--seed", "7"), whole("--seed", None)
    (7, None)
    """
    if text is None:
        return None
    value = int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else None
    if value is None or (low is not None and value < low):
        raise ConfigError(
            f"{flag} must be a whole "
            f"number{'' if low is None else f' of at least {low}'}, not "
            f"{escaped(text)}"
        )
    return value


def number(flag: str, text: str | None) -> float | None:
    """
    >>> number("--lr", "1e-3")
    0.001
    """
    return None if text is None else _float(flag, text, "a number")


def numbers(flag: str, text: str | None) -> tuple[float, ...] | None:
    """
    >>> numbers("--mean", "0.5,0.25")
    (0.5, 0.25)
    """
    return (
        None
        if text is None
        else tuple(
            _float(flag, part, "numbers with commas between them") for part in text.split(",")
        )
    )


def sizes(flag: str, text: str | None) -> tuple[int, ...] | None:
    """
    >>> sizes("--input", "3,32,32")
    (3, 32, 32)
    """
    if text is None:
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*", text):
        raise ConfigError(
            f"{flag} must be sizes with commas between them, for example "
            f"3,32,32, not {escaped(text)}"
        )
    return tuple(map(int, text.split(",")))


def _float(flag: str, text: str, wanted: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{flag} must be {wanted}, not {escaped(text)}") from None


def as_given(flag: str, text: str | None) -> str | None:
    """Text that stays text."""
    return text


def loosely(flag: str, text: str | None) -> int | float | str | None:
    """A number if it is one, else the text: `Macro` checks its own fields, and its sentences name
    the bounds.

    >>> [loosely("--adc-bits", text) for text in ("4", "2.5", "ideal")]
    [4, 2.5, 'ideal']
    """
    try:
        return whole(flag, text)
    except ConfigError:
        pass
    try:
        return number(flag, text)
    except ConfigError:
        return text
