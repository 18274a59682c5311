"""The house rules, read from the source: imports point one way, heavy packages stay in their rooms,
functions stay small."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import REPOSITORY

ROOT = REPOSITORY / "rqtool"

# From the ground up; a module may import its own floor and the ones below it. A file has the floor
# of its longest prefix here.
FLOORS = [
    ("rqtool.errors",),
    ("rqtool.storage", "rqtool.hardware"),
    ("rqtool.mapping",),
    ("rqtool.program", "rqtool.program.ir", "rqtool.program.golden", "rqtool.program.numbers"),
    ("rqtool.kernels",),
    ("rqtool.model", "rqtool.demo"),
    ("rqtool.program.freeze", "rqtool.program.run"),
    ("rqtool.train",),
    ("rqtool.export", "rqtool.checkpoint", "rqtool.report"),
    ("rqtool.jobs",),
    (
        "rqtool",
        "rqtool.api",
    ),  # the public functions; `import rqtool` alone imports none of the rooms
    ("rqtool.cli", "rqtool.__main__"),
]

# Who may import a package at all, and who may do so when the module is imported.
ROOMS = {
    "onnx": ("rqtool.export", "rqtool.model"),
    "onnxruntime": ("rqtool.export",),
    "typer": ("rqtool.cli", "rqtool.report"),
    "rich": ("rqtool.cli", "rqtool.report"),
    "numba": ("rqtool.kernels",),
    "pickle": (),
}
NO_TORCH_AT_THE_TOP = (
    "rqtool.errors",
    "rqtool.storage",
    "rqtool.hardware",
    "rqtool.mapping",
    "rqtool.program.ir",
    "rqtool.program.golden",
    "rqtool.cli",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def trees() -> dict[str, ast.Module]:
    """The parsed source of every module by its dotted name."""
    return {
        module_name(path): ast.parse(path.read_text(encoding="utf-8"), str(path))
        for path in sorted(ROOT.rglob("*.py"))
    }


def under(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == p or module.startswith(p + ".") for p in prefixes)


def imported(node: ast.AST) -> list[str]:
    """The modules that one import statement names; `from a.b import c` counts as a.b.c where that
    is a module, else as a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute here"
        return [
            full if (full := f"{node.module}.{alias.name}") in trees() else node.module
            for alias in node.names
        ]
    return []


def all_imports(module: str) -> set[str]:
    return {name for node in ast.walk(trees()[module]) for name in imported(node)}


def top_imports(module: str) -> set[str]:
    """What runs when the module is imported: statements outside functions and outside `if
    TYPE_CHECKING`."""
    found, waiting = set(), list(trees()[module].body)
    while waiting:
        node = waiting.pop()
        found.update(imported(node))
        if not isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef)
        ) and "TYPE_CHECKING" not in ast.unparse(getattr(node, "test", ast.Pass())):
            waiting.extend(ast.iter_child_nodes(node))
    return found


def floor(module: str) -> int:
    places = [
        (len(prefix), n)
        for n, prefixes in enumerate(FLOORS)
        for prefix in prefixes
        if under(module, (prefix,)) and (prefix != "rqtool" or module == "rqtool")
    ]
    assert places, f"{module} has no floor in the house; give it one in {Path(__file__).name}"
    return max(places)[1]


def test_the_parser_sees_the_house():
    assert {"rqtool.errors", "rqtool.hardware.adc", "rqtool.program.golden"} <= set(trees())
    assert "rqtool.hardware.adc" in top_imports("rqtool.hardware.macro")


def test_imports_point_one_way():
    """`rqtool` itself runs before any of its modules, so its version is there for all of them."""
    upwards = [
        f"{m} imports {i}"
        for m in trees()
        for i in all_imports(m)
        if i.startswith("rqtool.") and floor(i) > floor(m)
    ]
    assert not upwards


def test_no_module_imports_itself_through_others():
    graph = {m: {i for i in top_imports(m) if i in trees()} for m in trees()}
    while leaves := [m for m, needs in graph.items() if not needs & graph.keys()]:
        for m in leaves:
            del graph[m]
    assert not graph


def test_heavy_packages_stay_in_their_rooms():
    strays = [
        f"{m} imports {i}"
        for m in trees()
        for i in all_imports(m)
        for package, rooms in ROOMS.items()
        if under(i, (package,)) and not under(m, rooms)
    ]
    assert not strays


def test_torch_is_not_imported_on_the_ground_floors():
    assert not [
        m
        for m in trees()
        if under(m, NO_TORCH_AT_THE_TOP)
        for i in top_imports(m)
        if under(i, ("torch",))
    ]


@pytest.mark.parametrize(
    "module",
    [
        "rqtool",
        "rqtool.errors",
        "rqtool.hardware.macro",
        "rqtool.mapping.plan",
        "rqtool.program.golden",
        "rqtool.cli.main",
    ],
)
def test_importing_it_does_not_import_torch(module):
    heavy = (
        f"import {module}, sys; print([m for m in ('torch', 'onnx', "
        "'onnxruntime', 'numba') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-W", "error", "-c", heavy], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


def test_the_ground_floor_needs_numpy_at_most():
    allowed = sys.stdlib_module_names | {"numpy", "rqtool"}
    for module in [
        m for m in trees() if under(m, ("rqtool.errors", "rqtool.hardware", "rqtool.mapping"))
    ]:
        assert {i.split(".")[0] for i in all_imports(module)} <= allowed, module


# -- functions -------------------------------------------------------------------------------------
def lines_of_code(function: ast.FunctionDef) -> int:
    """Lines from `def` to the end, the docstring left out."""
    first = function.body[0]
    text = (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )
    return (
        function.end_lineno
        - function.lineno
        + 1
        - (first.end_lineno - first.lineno + 1 if text else 0)
    )


def functions() -> dict[str, int]:
    return {
        f"{m}.{node.name}:{node.lineno}": lines_of_code(node)
        for m, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }


def test_functions_are_small():
    lengths = functions()
    assert statistics.median(lengths.values()) <= 10
    long = sorted(((n, name) for name, n in lengths.items() if n >= 40), reverse=True)
    assert len(long) <= 0.1 * len(lengths), long


# -- names and calls that do not occur -------------------------------------------------------------
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
WRITES = {
    ".write_text",
    ".write_bytes",
    ".tofile",
    "save_file",
    "save_model",
    "torch.save",
    "onnx.save",
    "onnx.save_model",
    "np.save",
}
UNFINISHED = (
    "raise NotImplemented" + "Error",
    "TO" + "DO",
    "FIX" + "ME",
    "xf" + "ail",
    "breakpoint" + "(",
)


def calls(module: str) -> list[ast.Call]:
    return [node for node in ast.walk(trees()[module]) if isinstance(node, ast.Call)]


def spellings(call: ast.Call) -> set[str]:
    """The ways to name what a call calls: `a.b.f(x)` is a.b.f, .f and f where nothing stands before
    it."""
    return {ast.unparse(call.func)} | (
        {"." + call.func.attr} if isinstance(call.func, ast.Attribute) else set()
    )


def opens_for_writing(call: ast.Call) -> bool:
    """open(..., "wb") and the like, path.open("w") included."""
    if not spellings(call) & {"open", ".open"}:
        return False
    modes = [
        a.value
        for a in [*call.args, *(k.value for k in call.keywords if k.arg == "mode")]
        if isinstance(a, ast.Constant)
    ]
    return any(
        isinstance(mode, str) and re.fullmatch(r"[rwaxbt+]*[wax+][rwaxbt+]*", mode)
        for mode in modes
    )


def test_nothing_is_executed_from_text():
    assert not [
        f"{m}:{call.lineno}"
        for m in trees()
        for call in calls(m)
        if spellings(call) & FORBIDDEN_CALLS
    ]


def test_only_storage_writes_files():
    others = [m for m in trees() if m != "rqtool.storage"]
    assert not [
        f"{m}:{call.lineno}"
        for m in others
        for call in calls(m)
        if spellings(call) & WRITES or opens_for_writing(call)
    ]


def reads_environment(module: str) -> bool:
    """os.environ or os.getenv, in any spelling."""
    return any(
        getattr(node, "attr", getattr(node, "id", "")) in ("environ", "getenv")
        for node in ast.walk(trees()[module])
    )


def test_the_environment_is_read_by_the_command_line_only():
    assert not [
        m for m in trees() if reads_environment(m) and not under(m, ("rqtool.cli", "rqtool.report"))
    ]


def sources() -> list[Path]:
    """Every text file of the project that a person reads."""
    named = [
        p
        for folder in ("rqtool", "tests", "docs", "examples", "tools")
        for p in (REPOSITORY / folder).rglob("*")
        if p.suffix in (".py", ".md", ".toml")
    ]
    return [
        p
        for p in [
            *named,
            REPOSITORY / "README.md",
            REPOSITORY / "Makefile",
            REPOSITORY / "pyproject.toml",
            REPOSITORY / ".ci" / "run",
        ]
        if p.exists()
    ]


@pytest.mark.parametrize("word", UNFINISHED)
def test_nothing_is_left_unfinished(word):
    assert not [str(p) for p in sources() if word in p.read_text(encoding="utf-8")]


def test_no_paths_of_one_machine():
    absolute = re.compile(r"(?<![\w.])/(work|root|home|tmp)/")
    assert not [str(p) for p in sources() if absolute.search(p.read_text(encoding="utf-8"))]


def test_every_module_says_what_it_is():
    assert not [m for m, tree in trees().items() if not ast.get_docstring(tree)]
