"""`rqtool`: the commands, and what the shell gets when one of them fails."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from rqtool import __version__
from rqtool.cli import about, demo, evaluate, export, inspect, plan, quantize, train, verify
from rqtool.cli.help import Command, Group
from rqtool.cli.options import option
from rqtool.cli.output import help_width, open_streams, say, silence_stdout, write_result
from rqtool.cli.usage import is_usage_error, usage_sentence
from rqtool.errors import RqError, StorageError, escaped

COMMANDS = {
    "quantize": quantize.quantize, "train": train.train, "eval": evaluate.evaluate, "export": export.export, "verify": verify.verify, "plan": plan.plan,
    "inspect": inspect.inspect, "presets": about.presets, "ops": about.ops, "doctor": about.doctor, "demo": demo.demo,
}  # fmt: skip

PATIENCE = "1000"  # looks of a waiting thread before it sleeps


def _version(asked: bool) -> None:
    if asked:
        write_result(f"rqtool {__version__}")
        raise typer.Exit()


def top(
    version: Annotated[
        bool,
        option("--version", callback=_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Compress trained networks for ReRAM computing-in-memory chips, with the ADC of every read in
    the arithmetic."""


def _app() -> Any:
    app = typer.Typer(
        add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, cls=Group
    )
    app.callback()(top)
    for name, command in COMMANDS.items():
        app.command(name, cls=Command)(command)
    return typer.main.get_command(app)


def sleep_soon() -> None:
    """Let threads of GNU OpenMP that wait for each other sleep soon, unless the user has said how
    they wait. By default they stay awake, and where another process is busy they keep the very
    thread that they wait for from its core. Read when torch loads the library."""
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = PATIENCE


class Terminated(BaseException):
    """SIGTERM came."""


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. 0 is right; the others are in docs/cli.md."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug, as_json = (name in args for name in ("--debug", "--json"))
    open_streams()
    sleep_soon()
    with _sigterm(), warnings.catch_warnings():
        if not debug and not sys.warnoptions:
            warnings.simplefilter("ignore")  # of torch and others, about themselves
        try:
            return _invoke(args)
        except BrokenPipeError:
            silence_stdout()
            return 0
        except BaseException as e:
            return _failed(e, args, debug, as_json)


def _invoke(args: list[str]) -> int:
    app = _app()
    try:
        with app.make_context("rqtool", args, terminal_width=help_width()) as context:
            app.invoke(context)
    except typer.Exit as e:
        sys.stdout.flush()
        return e.exit_code
    return 0


@contextmanager
def _sigterm() -> Iterator[None]:
    """SIGTERM becomes an exception, so that temporary files go and the exit code says what
    happened."""

    def stop(*_: Any) -> NoReturn:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _failed(e: BaseException, args: list[str], debug: bool, as_json: bool) -> int:
    """Say what happened: a sentence on stderr, with --json also an object on stdout; the exit code."""
    code, message = explain(
        e, " ".join(["rqtool", *args[: args[0] in COMMANDS]]) if args else "rqtool"
    )
    message = escaped(message)
    if debug:
        say("".join(traceback.format_exception(e)).rstrip())
    say(f"error: {message}")
    if as_json:
        try:
            write_result(
                json.dumps(
                    {"error": {"kind": type(e).__name__, "message": message, "exit_code": code}}
                )
            )
        except StorageError as full:
            say(f"error: {full}")
    return code


def explain(e: BaseException, command: str) -> tuple[int, str]:
    """(exit code, sentence) of whatever ended `command`, "rqtool" or "rqtool NAME"."""
    if isinstance(e, RqError):
        return e.exit_code, str(e)
    if is_usage_error(e):
        return 2, usage_sentence(e, command)
    if isinstance(e, KeyboardInterrupt):
        return 130, "interrupted; files that were not finished are not there"
    if isinstance(e, Terminated):
        return 143, "terminated; files that were not finished are not there"
    if isinstance(e, MemoryError) or "allocate memory" in str(e):
        return 6, "the memory does not suffice; give a smaller --batch, or free memory"
    if isinstance(e, OSError) and e.errno == errno.ENOSPC:
        return 6, "there is no space left on the disk; free some and run the command again"
    if isinstance(e, SystemExit):
        return (
            3,
            f"code that --arch or --data names ended the program ({e.code}); let it return instead",
        )
    said = str(e).strip().splitlines()
    return (
        1,
        "this is a bug in rqtool "
        f"({type(e).__name__}{': ' + said[0] if said else ''}); please "
        "report it with what the same command prints with --debug",
    )
