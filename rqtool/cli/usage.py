"""Sentences for what cannot be parsed, with the nearest command or option. typer's own classes
changed homes between releases, so they are known by their family and name."""

from __future__ import annotations

from typing import Any

import typer

from rqtool.errors import escaped, suggestion

USAGE_ERROR = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "UsageError")


def is_usage_error(e: BaseException) -> bool:
    return isinstance(e, USAGE_ERROR)


def usage_sentence(e: Any, command: str) -> str:
    """One sentence: what is wrong with the words after `command` ("rqtool plan"), and where the way
    out is told."""
    kind, way_out = type(e).__name__, f"see {command} --help"
    if kind == "NoSuchOption":
        return (
            f"{command} has no option {escaped(e.option_name)}; "
            f"{_near_option(e.option_name, e.ctx) or way_out}"
        )
    if kind == "MissingParameter":
        return f"{command} needs {_spelled(e.param)}; {way_out}"
    if kind == "BadOptionUsage":
        return (
            f"{escaped(e.option_name)} "
            f"{'needs a value' if 'requires' in e.message else 'takes no value'}; {way_out}"
        )
    said = escaped(e.message).rstrip(".")
    return f"{command}: {said[:1].lower()}{said[1:]}; {way_out}"


def _near_option(name: str, context: Any) -> str | None:
    known = [
        spelling
        for p in context.command.get_params(context)
        for spelling in p.opts
        if spelling.startswith("--")
    ]
    told = suggestion(name, known)
    return told if told.startswith("did you") else None


def _spelled(param: Any) -> str:
    return " ".join(
        part
        for part in (param.opts[0] if param.opts[0].startswith("-") else "", param.metavar)
        if part
    )
