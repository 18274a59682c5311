"""`package.module:name` -> the Python object. Importing runs code, so only what the user names on the command line comes here."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rqtool.errors import InputError, escaped, suggestion

SPEC = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_named(source: str) -> bool:
    """Whether `source` is spelled package.module:name.

    >>> is_named("my_nets:resnet"), is_named("data/images:v2.npz"), is_named("model.pt")
    (True, False, False)
    """
    return SPEC.fullmatch(source) is not None


def resolve(spec: str) -> Any:
    """The object `spec` names; the current folder can be imported from, here and for no longer.

    Raises InputError where the module cannot be imported or has no such name.
    """
    module_name, _, name = spec.partition(":")
    try:
        with _current_folder_importable():
            module = importlib.import_module(module_name)
    except Exception as e:  # a module runs its own code: anything can come out of it
        raise InputError(f"{escaped(spec)}: {escaped(module_name)} cannot be imported ({said(e)}); run from its folder or put that on PYTHONPATH") from e
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise InputError(f"{escaped(spec)}: {escaped(module_name)} has no '{escaped(name)}'; {suggestion(name, public)}")
    return getattr(module, name)


def call(spec: str, function: Any) -> Any:
    """What the user's `function` returns, called with no arguments. Raises InputError where it fails."""
    try:
        with _current_folder_importable():
            return function()
    except Exception as e:
        raise InputError(f"{escaped(spec)}: fails when called without arguments ({said(e)}); run it on its own to see where") from e


def said(e: BaseException) -> str:
    """An exception in one line: its type and the first line of what it says.

    >>> said(KeyError("a"))
    "KeyError: 'a'"
    """
    lines = str(e).strip().splitlines()
    return escaped(f"{type(e).__name__}: {lines[0]}"[:300] if lines else type(e).__name__)


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
