"""Help pages: plain text, options in groups, the same for every release of typer; an unknown
command gets a suggestion."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

from rqtool.errors import ConfigError, escaped, suggestion


class Command(TyperCommand):
    """A command whose options are listed under the panels they were declared with."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`--onnx=FILE` is `--onnx FILE`."""
        spread = [
            part
            for arg in args
            for part in (("--onnx", arg[7:]) if arg.startswith("--onnx=") else (arg,))
        ]
        return super().parse_args(ctx, spread)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", *(p.metavar for p in self.params if p.param_type_name == "argument")]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            sections.setdefault(_panel(param), []).append(_record(param))
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _panel(param: Any) -> str:
    if param.param_type_name == "argument":
        return "Arguments"
    return "Output" if param.name == "help" else param.rich_help_panel or "Options"


def _record(param: Any) -> tuple[str, str]:
    """(names and placeholder, help) of one parameter."""
    if param.param_type_name == "argument":
        return param.metavar, param.help
    placeholder = "" if param.is_flag else f" {param.metavar}"
    return ", ".join(param.opts) + placeholder, param.help + (
        " Required." if param.required else ""
    )


class Group(TyperGroup):
    """The commands of rqtool; without one, they are listed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands:
            raise ConfigError(
                f"there is no command '{escaped(args[0])}'; {suggestion(args[0], self.commands)}"
            )
        return super().resolve_command(ctx, args)
