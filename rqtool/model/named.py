"""`package.module:name` -> the Python object. Importing runs code, so only what the user names on
the command line comes here."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from rqtool.errors import ConfigError, InputError, escaped, suggestion

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
    return _attribute(spec, _imported(spec, module_name), module_name, name)


def call(spec: str, function: Any) -> Any:
    """What the user's `function` returns, called with no arguments. Raises InputError where it
    fails."""
    return _called(spec, function, (), {})


# -- networks --------------------------------------------------------------------------------------
ARCH = re.compile(r"(?P<place>.+?):(?P<name>[^\W\d]\w*(\.\w+)*)\s*(\((?P<given>.*)\))?", re.DOTALL)
SPELLINGS = "package.module:factory or file.py:factory"
LIBRARIES = ("timm", "torchvision")


def network_of(arch: str, builtin: tuple[str, ...]) -> nn.Module:
    """The network that `arch` names, whose code runs: package.module:NAME, path/file.py:NAME,
    timm:NAME or torchvision:NAME.

    NAME: a function or class, which is called, or a network that exists; `Class.method`, and
    literal arguments in brackets, too. Raises ConfigError where `arch` is spelled wrong, InputError
    where its code fails or gives no network.
    """
    parts = ARCH.fullmatch(arch.strip())
    if parts is None:
        _refuse_spelling(arch, builtin)
    place, name, given = parts["place"], parts["name"], parts["given"]
    spec = f"{place}:{name}"
    args, kwargs = _arguments(arch, given or "")
    if place in LIBRARIES:
        made = _from_library(spec, place, name, args, kwargs)
    else:
        named = _attribute(
            spec,
            _from_file(spec, place) if place.endswith(".py") else _imported(spec, place),
            place,
            name,
        )
        if isinstance(named, nn.Module):
            if given is not None:
                raise ConfigError(
                    f"--arch {escaped(spec)} is a network already; leave out its arguments"
                )
            return named
        made = _called(spec, named, args, kwargs)
    if not isinstance(made, nn.Module):
        raise InputError(
            f"--arch {escaped(arch)} made {escaped(type(made).__name__)}, not a "
            "torch.nn.Module; name a function that returns the network"
        )
    return made


def _refuse_spelling(arch: str, builtin: tuple[str, ...]) -> NoReturn:
    near = get_close_matches(arch, builtin, n=1, cutoff=0.75)
    told = (
        f"did you mean '{near[0]}'?"
        if near
        else f"give {SPELLINGS}, or one of {', '.join(sorted(builtin))}"
    )
    if arch.endswith(".py"):
        told = (
            f"give {escaped(arch)}:factory, with the name of the function in it "
            "that returns the network"
        )
    elif re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", arch):
        told = f"did you mean '{':'.join(arch.rsplit('.', 1))}'?"
    raise ConfigError(
        f"--arch {escaped(arch)} is neither package.module:factory nor a built-in network; {told}"
    )


def _arguments(arch: str, given: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The literal arguments in the brackets; nothing in them runs."""
    try:
        tree = ast.parse(f"f({given})", mode="eval").body
        if (
            not isinstance(tree, ast.Call)
            or not isinstance(tree.func, ast.Name)
            or any(k.arg is None for k in tree.keywords)
        ):
            raise ValueError("no call")
        return tuple(ast.literal_eval(a) for a in tree.args), {
            k.arg: ast.literal_eval(k.value) for k in tree.keywords
        }
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as e:
        raise ConfigError(
            f"--arch {escaped(arch)}: its arguments must be plain values; write "
            "them as in factory(10, width=0.5, name='small')"
        ) from e


def _imported(spec: str, module_name: str) -> Any:
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", module_name):
        raise ConfigError(
            f"--arch {escaped(spec)}: {escaped(module_name)} is no name of a "
            f"module; give {SPELLINGS}"
        )
    try:
        with _importable(os.getcwd()):
            return importlib.import_module(module_name)
    except Exception as e:  # a module runs its own code: anything can come out of it
        raise InputError(
            f"{escaped(spec)}: {escaped(module_name)} cannot be imported "
            f"({said(e)}); {_way_to_import(e, module_name)}"
        ) from e


def _way_to_import(e: Exception, module_name: str) -> str:
    lacking = (
        (getattr(e, "name", None) or "").split(".")[0] if isinstance(e, ModuleNotFoundError) else ""
    )
    if lacking and lacking != module_name.split(".")[0]:
        return f"install it, for example with pip install {escaped(lacking)}"
    return "run from its folder or put that on PYTHONPATH"


def _from_file(spec: str, place: str) -> Any:
    """The module in a file; one of a package is imported as part of it, for the sake of its
    relative imports."""
    path = Path(place).expanduser()
    if not path.is_file():
        raise InputError(
            f"{escaped(spec)}: {escaped(place)} is no file; check its name and "
            "the folder you are in"
        )
    path = path.resolve()
    folder, parts = path.parent, [path.stem]
    while (folder / "__init__.py").is_file():
        folder, parts = folder.parent, [folder.name, *parts]
    name = ".".join(parts)
    known = sys.modules.get(name)
    if known is not None and Path(getattr(known, "__file__", None) or "").resolve() == path:
        return known
    try:
        with _importable(str(folder), os.getcwd()):
            return (
                importlib.import_module(name)
                if len(parts) > 1
                else _loaded(name if known is None else f"{name}_of_arch", path)
            )
    except Exception as e:
        raise InputError(
            f"{escaped(spec)}: {escaped(place)} cannot be imported ({said(e)}); "
            f"{_way_to_import(e, name)}"
        ) from e


def _loaded(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _attribute(spec: str, module: Any, place: str, name: str) -> Any:
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = (
                [n for n in vars(found) if not n.startswith("_")]
                if hasattr(found, "__dict__")
                else []
            )
            told = suggestion(part, public) if public else "check the name"
            raise InputError(f"{escaped(spec)}: {escaped(place)} has no '{escaped(name)}'; {told}")
        found = getattr(found, part)
    return found


def _called(spec: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    _check_call(spec, function, args, kwargs)
    how = f"with ({_spelled(args, kwargs)})" if args or kwargs else "without arguments"
    try:
        with _importable(os.getcwd(), *_folder_of(function)):
            return function(*args, **kwargs)
    except Exception as e:
        raise InputError(
            f"{escaped(spec)}: fails when called {how} ({said(e)}); run it on its own to see where"
        ) from e


def _folder_of(function: Any) -> list[str]:
    """Where the file of a function lies: what it imports while it runs may lie there, too."""
    file = getattr(sys.modules.get(getattr(function, "__module__", None) or ""), "__file__", None)
    return [str(Path(file).resolve().parent)] if file else []


def _check_call(spec: str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Say which arguments a function needs, before it is called without them."""
    try:
        signature = inspect.signature(function)
    except (
        TypeError,
        ValueError,
    ):  # a built-in, or nothing that can be called: calling it says why
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as e:
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = [
            p.name
            for p in signature.parameters.values()
            if p.default is p.empty and p.kind not in kinds
        ]
        shown = ", ".join(f"{name}=..." for name in needed)
        told = f"give them, as in {escaped(spec)}({shown})" if needed else "leave them out"
        raise InputError(
            f"{escaped(spec)}: cannot be called with ({_spelled(args, kwargs)}), "
            f"for it takes {escaped(signature)} ({escaped(e)}); {told}"
        ) from e


def _spelled(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return escaped(", ".join([*map(repr, args), *(f"{k}={v!r}" for k, v in kwargs.items())]))


def _from_library(
    spec: str, library: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A network of timm or torchvision by its name there, with fresh weights."""
    try:
        module = importlib.import_module("timm" if library == "timm" else "torchvision.models")
    except Exception as e:
        raise InputError(
            f"{escaped(spec)}: {library} cannot be imported ({said(e)}); install "
            f"it, for example with pip install {library}"
        ) from e
    make = module.create_model if library == "timm" else module.get_model
    fresh = {"pretrained": False} if library == "timm" else {"weights": None}
    return _called(spec, make, (name, *args), {**fresh, **kwargs})


def said(e: BaseException) -> str:
    """An exception in one line: its type and the first line of what it says.

    >>> said(KeyError("a"))
    "KeyError: 'a'"
    """
    lines = str(e).strip().splitlines()
    return escaped(f"{type(e).__name__}: {lines[0]}"[:300] if lines else type(e).__name__)


@contextmanager
def _importable(*folders: str) -> Iterator[None]:
    """`folders` can be imported from, the first one first."""
    added = list(reversed(folders))
    for folder in added:
        sys.path.insert(0, folder)
    try:
        yield
    finally:
        for folder in added:
            if folder in sys.path:
                sys.path.remove(folder)
