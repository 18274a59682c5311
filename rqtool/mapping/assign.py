"""Which macro each layer has: a default, layers that differ from it, and layers that are kept off
it.

    Assignment      what a user asks for: a macro, fields by name or pattern, what is kept
    Macros          what follows for the layers of one network

A kept layer is computed by digital multipliers from 8-bit codes and 8-bit weights. In the integer
program it is a layer like the others whose ADC is ideal; its work is counted in MACs, not in reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from rqtool.errors import ConfigError, InputError, escaped, suggestion
from rqtool.hardware.macro import FIELDS, Macro, macro_with, make_macro, read_document
from rqtool.mapping.plan import Geometry, Plan

DIGITAL_BITS = 8  # of the codes and of the weights of a kept layer
DIGITAL_ROWS = 4096  # that are summed at once
KEEP = "keep"  # the one key of a [layers.NAME] table that is no field of a macro
EXAMPLE = "conv1:adc-bits=6,wl=64"


# -- what follows for a network --------------------------------------------------------------------
@dataclass(frozen=True)
class Macros:
    """The macro of every layer of a network.

    own: the macros of layers that have another than `default`; digital: the layers that are kept
    off the macro, each of which is in `own` with the bits it is computed in.
    """

    default: Macro
    own: Mapping[str, Macro] = field(default_factory=dict)
    digital: tuple[str, ...] = ()

    def of(self, layer: str) -> Macro:
        """The macro of a layer."""
        return self.own.get(layer, self.default)

    def plan(self, layer: str, geometry: Geometry, order: tuple[int, ...] | None = None) -> Plan:
        """The plan of a layer; raises ConfigError where its macro cannot hold it."""
        return Plan.make(layer, geometry, self.of(layer), order, layer in self.digital)

    @property
    def ideal(self) -> bool:
        """Whether every ADC is ideal."""
        return self.default.ideal and all(macro.ideal for macro in self.own.values())

    def with_ideal_adc(self) -> Macros:
        """The same with every ADC ideal: the same layers are kept, each has the same bits."""
        own = {layer: macro.with_ideal_adc() for layer, macro in self.own.items()}
        return replace(self, default=self.default.with_ideal_adc(), own=own)

    def own_fields(self) -> dict[str, dict[str, Any]]:
        """The fields of every macro in `own`, by layer."""
        return {layer: macro.to_dict() for layer, macro in self.own.items()}

    def tables(self) -> dict[str, Any]:
        """What a file says beside the default macro: "macros" and "off_macro", each left out where
        it would be empty."""
        found = {"macros": self.own_fields(), "off_macro": list(self.digital)}
        return {key: value for key, value in found.items() if value}


def read_tables(document: Mapping[str, Any]) -> dict[str, Any]:
    """The fields `own` and `digital` of what `Macros.tables` gave. Raises what forged data raises
    (TypeError, AttributeError, ConfigError)."""
    own = {layer: Macro(**fields) for layer, fields in document.get("macros", {}).items()}
    return {"own": own, "digital": tuple(document.get("off_macro", ()))}


def assigned(macro: Macro | Macros) -> Macros:
    """One macro for all layers, where no more is given."""
    return macro if isinstance(macro, Macros) else Macros(macro)


def digital_macro(rows: int, io: int) -> Macro:
    """What a kept layer of `rows` rows is described by: 8-bit codes, 8-bit weights, sums that
    nothing converts."""
    parts = -(-rows // DIGITAL_ROWS)
    bits = {"in_bits": DIGITAL_BITS, "w_bits": DIGITAL_BITS, "adc_bits": None}
    return Macro(
        wl=-(-rows // parts), io=io, granularity="layer", pack="rows", sign_scheme="signed", **bits
    )


def overridden(macro: Macro, fields: Mapping[str, Any]) -> Macro:
    """A macro with some of its fields changed. What followed from others follows from the changed
    ones: all of the input's bits at once stay all of them, a step goes with its range.

    >>> overridden(Macro(), {"in_bits": 6, "sign_scheme": "split"}).describe()[-42:]
    'rated), 6-bit inputs, 4-bit weights, split'
    """
    values = macro.to_dict()
    follows = {
        "dac_bits": macro.dac_bits == macro.in_bits,
        "cell_bits": macro.cell_bits == macro.magnitude_bits,
        "codebook": macro.codebook == ("twos" if macro.sign_scheme == "signed" else "unsigned"),
        "step": fields.get("range", macro.range) != "fixed",
    }
    values |= {name: None for name, does in follows.items() if does}
    return Macro(**{**values, **fields})


# -- what a user asks for --------------------------------------------------------------------------
@dataclass(frozen=True)
class Assignment:
    """A macro for the layers of any network.

    layers: fields that differ from `default`, by the name of a layer, a shell pattern ("layer1.*"),
    "re:" and a regular expression found in the name, "first" or "last"; later ones win. keep: what
    is kept off the macro, named alike. `macros` gives what follows for a network.
    """

    default: Macro = field(default_factory=Macro)
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    keep: tuple[str, ...] = ()

    def and_also(
        self, layers: Mapping[str, Mapping[str, Any]] | None, keep: Iterable[str]
    ) -> Assignment:
        """With more layers named, which win over those that are."""
        if isinstance(keep, str):
            keep = (keep,)
        return replace(
            self, layers=merged([*self.layers.items(), *(layers or {}).items()]),
            keep=(*self.keep, *keep),
        )  # fmt: skip

    def macros(self, rows: Mapping[str, int]) -> Macros:
        """The macro of each layer of a network whose layers, in order, have so many rows. Raises
        ConfigError where a name matches nothing, a field is unknown, fields contradict each other,
        or no layer is left on the macro."""
        fields: dict[str, dict[str, Any]] = {name: {} for name in rows}
        kept = {name for pattern in self.keep for name in matching(pattern, rows, "--keep")}
        for pattern, wanted in self.layers.items():
            found = matching(pattern, rows, "--layer")
            changes = checked(pattern, wanted)
            if changes is None:
                kept.update(found)
                continue
            for name in found:
                fields[name] |= changes
        self._refuse_idle(rows, kept)
        on_macro = {name: self._macro(name, fields[name]) for name in rows if name not in kept}
        default = _default(self.default, list(on_macro.values()))
        own = {name: macro for name, macro in on_macro.items() if macro != default}
        own |= {name: digital_macro(rows[name], default.io) for name in rows if name in kept}
        return Macros(default, own, tuple(name for name in rows if name in kept))

    def _refuse_idle(self, rows: Mapping[str, int], kept: set[str]) -> None:
        if rows and kept.issuperset(rows):
            raise ConfigError(
                "--keep keeps every layer off the macro, so there is nothing for it to do; "
                "leave at least one layer on it"
            )
        for pattern, wanted in self.layers.items():
            if not wanted.get(KEEP) and kept.issuperset(matching(pattern, rows, "--layer")):
                raise ConfigError(
                    f"--layer {escaped(pattern)} gives a macro to what --keep keeps off it; "
                    "leave one of the two out"
                )

    def _macro(self, name: str, fields: Mapping[str, Any]) -> Macro:
        try:
            return overridden(self.default, fields) if fields else self.default
        except ConfigError as e:
            raise ConfigError(f"{escaped(name)}: {e}") from e


def _default(default: Macro, used: list[Macro]) -> Macro:
    """The default of a network whose layers on the macro use these: another than was asked for
    where all are the same, or all are ideal and it is not."""
    alike = all(macro == used[0] or (macro.ideal and used[0].ideal) for macro in used)
    return used[0] if used and default not in used and alike else default


def assignment_of(macro: Macro | Assignment | None) -> Assignment:
    """The assignment that a public function was given: one macro is for all layers."""
    return macro if isinstance(macro, Assignment) else Assignment(macro or make_macro())


def merged(
    pairs: Iterable[tuple[str, Mapping[str, Any]]],
) -> dict[str, dict[str, Any]]:
    """Fields by pattern; of a pattern that comes again, the later values, in the later place."""
    found: dict[str, dict[str, Any]] = {}
    for pattern, fields in pairs:
        before = found.pop(pattern, {})
        found[pattern] = {**before, **fields} if isinstance(fields, Mapping) else fields
    return found


def matching(pattern: str, names: Iterable[str], option: str) -> tuple[str, ...]:
    """The layers that a pattern means, in order; raises ConfigError where it means none.

    >>> matching("layer?.*", ["conv1", "layer1.0", "layer2.0"], "--keep")
    ('layer1.0', 'layer2.0')
    >>> matching("last", ["conv1", "fc"], "--keep")
    ('fc',)
    """
    known = tuple(names)
    ends = {"first": known[:1], "last": known[-1:]}
    if pattern in known:
        return (pattern,)
    if pattern in ends:
        return ends[pattern]
    found = tuple(filter(_test(str(pattern), option), known))
    if not found:
        raise ConfigError(
            f"{option} {escaped(pattern)} matches no layer; {suggestion(str(pattern), known)}"
        )
    return found


def _test(pattern: str, option: str) -> Callable[[str], Any]:
    if not pattern.startswith("re:"):
        return partial(lambda shell, name: fnmatchcase(name, shell), pattern)
    try:
        return re.compile(pattern.removeprefix("re:")).search
    except re.error as e:
        raise ConfigError(
            f"{option} {escaped(pattern)} is no regular expression ({escaped(e)}); mend it, or "
            "use a shell pattern without re:"
        ) from e


def checked(pattern: str, wanted: Any) -> dict[str, Any] | None:
    """The fields for the layers of a pattern; None where they are kept off the macro."""
    if not isinstance(wanted, Mapping) or not wanted:
        raise ConfigError(
            f"--layer {escaped(pattern)} names no field of a macro; give some, for example "
            f"{EXAMPLE}"
        )
    for name in wanted:
        if name not in (*FIELDS, KEEP):
            raise ConfigError(
                f"--layer {escaped(pattern)}: a macro has no '{escaped(name)}'; "
                f"{suggestion(str(name), FIELDS)}"
            )
    if KEEP not in wanted:
        return {k: None if (k, v) == ("adc_bits", "ideal") else v for k, v in wanted.items()}
    if dict(wanted) != {KEEP: True}:
        raise ConfigError(
            f"--layer {escaped(pattern)}: keep = true stands alone, for a kept layer has no macro; "
            "leave the rest out"
        )
    return None


def read_layer(text: str, read: Callable[[str], Any] = str) -> tuple[str, dict[str, Any]]:
    """The name or pattern and the fields of one --layer. read: makes a value of text. Raises
    ConfigError where they are not written NAME:FIELD=VALUE,...

    >>> read_layer("conv1:adc-bits=6,wl=64", int)
    ('conv1', {'adc_bits': 6, 'wl': 64})
    """
    pattern, colon, rest = text.rpartition(":")
    pairs = [part.partition("=") for part in rest.split(",")]
    if not colon or not pattern or not all(name and sign and value for name, sign, value in pairs):
        raise ConfigError(
            f"--layer {escaped(text)} is not NAME:FIELD=VALUE with commas between fields; write "
            f"it like {EXAMPLE}"
        )
    return pattern, {name.replace("-", "_"): read(value) for name, _, value in pairs}


def read_keep(text: str) -> tuple[str, ...]:
    """The names and patterns of one --keep; a comma within brackets belongs to a pattern.

    >>> read_keep("first,re:conv[1,2],last")
    ('first', 're:conv[1,2]', 'last')
    """
    parts = tuple(re.split(r",(?![^\[({]*[\])}])", text))
    if not all(parts):
        raise ConfigError(
            f"--keep {escaped(text)} has an empty name; give names with commas between them, "
            "for example first,last"
        )
    return parts


def make_assignment(
    source: str | None = None,
    layers: Mapping[str, Mapping[str, Any]] | None = None,
    keep: Iterable[str] = (),
    **flags: Any,
) -> Assignment:
    """The macro of a preset name or TOML file (None: the defaults) with the flags that are not None
    laid over it, and the layers that differ: those of the file's [layers.NAME] tables, then
    `layers`. Raises as `make_macro` does.

    >>> made = make_assignment(layers={"conv1": {"adc_bits": 6}}, keep=("last",))
    >>> macros = made.macros({"conv1": 9, "conv2": 72, "fc": 128})
    >>> macros.of("conv1").adc_bits, macros.of("conv2").adc_bits, macros.digital
    (6, 4, ('fc',))
    """
    if source is None or not source.endswith(".toml"):
        return Assignment(make_macro(source, **flags)).and_also(layers, keep)
    document = read_document(Path(source))
    tables = document.get("layers", {})
    for name, table in tables.items() if isinstance(tables, dict) else [("layers", None)]:
        if not isinstance(table, dict):
            raise InputError(
                f"{escaped(source)}: layers has '{escaped(name)}', which is no table; write "
                "[layers.NAME], with a name or pattern that has dots in quotes"
            )
    return Assignment(macro_with(document["macro"], flags), tables).and_also(layers, keep)
