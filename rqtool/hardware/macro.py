"""The frozen description of one ReRAM macro: from flags, a preset or a TOML file, checked where it
is made.

planes, tiles and reads follow from it (mapping/), codes follow from it (adc.py); nothing else is
configured anywhere.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

from rqtool.errors import ConfigError, InputError, escaped, suggestion
from rqtool.hardware import adc

SIGN_SCHEMES = ("signed", "split", "offset")
GRANULARITIES = ("layer", "column", "tile")
RANGES = ("full", "calibrated", "fixed")
LEVELS = ("uniform", "free")
PACKS = ("rows", "kernels", "spread")

CHOICES = {
    "sign_scheme": SIGN_SCHEMES,
    "codebook": adc.CODEBOOKS,
    "granularity": GRANULARITIES,
    "range": RANGES,
    "levels": LEVELS,
    "pack": PACKS,
}
WHOLE = {
    "wl": (1, 4096),
    "io": (1, 4096),
    "adc_bits": (1, 8),
    "in_bits": (1, 8),
    "w_bits": (2, 8),
    "dac_bits": (1, 8),
    "cell_bits": (1, 8),
}


@dataclass(frozen=True)
class Macro:
    """One ReRAM array with its wordline drivers, columns and ADCs.

    Raises ConfigError, in one sentence with the way out, where the values cannot be built together.

    >>> Macro().p_max, Macro().zero, Macro().top
    (945, 8, 15)
    """

    wl: int = 9  # rows that are on at once in one read
    io: int = 8  # columns read at once; sets cycles, never codes
    adc_bits: int | None = 4  # None: an ideal ADC, code(p) = p
    in_bits: int = 4  # input codes 0 .. 2**in_bits - 1
    w_bits: int = 4  # weights -Qw .. Qw, Qw = 2**(w_bits-1) - 1
    dac_bits: int | None = None  # input bits per read; None: all of them
    cell_bits: int | None = None  # weight bits per column; None: all of them
    sign_scheme: str = "signed"
    codebook: str | None = None  # None: twos for signed reads, unsigned for the others
    granularity: str = "layer"  # who shares a step
    range: str = "calibrated"
    step: float | None = None  # partial-sum units per code, with range "fixed" only
    levels: str = "uniform"
    pack: str = "rows"

    def __post_init__(self) -> None:
        _check_types(self)
        defaults = {
            "dac_bits": self.in_bits if self.dac_bits is None else self.dac_bits,
            "cell_bits": self.magnitude_bits if self.cell_bits is None else self.cell_bits,
            "codebook": ("twos" if self.sign_scheme == "signed" else "unsigned")
            if self.codebook is None
            else self.codebook,
            "step": None
            if self.step is None
            else float(self.step),  # 2 and 2.0 are one macro, with one digest
        }
        for name, value in defaults.items():
            object.__setattr__(self, name, value)
        _check_together(self)

    # -- weights and inputs ------------------------------------------------------------------------
    @property
    def q_w(self) -> int:
        """The largest weight magnitude, 2**(w_bits-1) - 1."""
        return (1 << (self.w_bits - 1)) - 1

    @property
    def q_x(self) -> int:
        """The largest input code, 2**in_bits - 1."""
        return (1 << self.in_bits) - 1

    @property
    def weight_offset(self) -> int:
        """What the offset scheme adds to a weight: 2**(w_bits-1); 0 for the others."""
        return 1 << (self.w_bits - 1) if self.sign_scheme == "offset" else 0

    @property
    def magnitude_bits(self) -> int:
        """Bits of a weight that cells hold: w_bits - 1 beside a sign, w_bits with an offset."""
        return self.w_bits if self.sign_scheme == "offset" else self.w_bits - 1

    # -- partial sums ------------------------------------------------------------------------------
    @property
    def p_max(self) -> int:
        """The largest partial sum a read of `wl` rows can give, over all planes."""
        x = (1 << self.dac_bits) - 1
        w = min((1 << self.cell_bits) - 1, self.q_w + self.weight_offset)
        return self.wl * x * w

    @property
    def p_min(self) -> int:
        """The smallest: -p_max for signed reads, 0 for split and offset."""
        return -self.p_max if self.sign_scheme == "signed" else 0

    # -- the ADC -----------------------------------------------------------------------------------
    @property
    def ideal(self) -> bool:
        return self.adc_bits is None

    @property
    def shift(self) -> int:
        """S of the uniform ADC's integer form."""
        return adc.shift_for(self.p_max)

    @property
    def top(self) -> int:
        """The highest code."""
        return adc.top_code(self.adc_bits, self.codebook)

    @property
    def zero(self) -> int:
        """The code book's code of p = 0."""
        return adc.default_zero(self.adc_bits, self.codebook)

    # -- in and out --------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Plain data, every field, ready for JSON; `Macro(**d)` is the way back."""
        return asdict(self)

    def sha256(self) -> str:
        """A digest of the effective configuration (sorted JSON), to name it in files."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def with_ideal_adc(self) -> Macro:
        """The same macro with code(p) = p: the twin that shows what the ADC alone costs."""
        return replace(self, adc_bits=None, levels="uniform", range="calibrated", step=None)

    def describe(self) -> str:
        """One line for tables and logs.

        >>> Macro().describe()
        '9 wordlines, 8 I/O, 4-bit ADC (twos, layer, calibrated), 4-bit inputs, 4-bit weights, signed'
        """
        reads = (
            "ideal ADC"
            if self.ideal
            else f"{self.adc_bits}-bit ADC ({self.codebook}, {self.granularity}, {self.range})"
        )
        extras = [f"{self.dac_bits}-bit DAC"] * (self.dac_bits < self.in_bits)
        extras += [f"{self.cell_bits}-bit cells"] * (self.cell_bits < self.magnitude_bits)
        extras += (
            ["free levels"] * (self.levels == "free")
            + ["whole kernels"] * (self.pack == "kernels")
            + ["rows spread"] * (self.pack == "spread")
        )
        parts = [
            f"{self.wl} wordlines",
            f"{self.io} I/O",
            reads,
            f"{self.in_bits}-bit inputs",
            f"{self.w_bits}-bit weights",
            self.sign_scheme,
        ]
        return ", ".join(parts + extras)


ABOUT = ("about", "source")  # what a preset says of itself
TABLES = ("macro", "layers")  # of a TOML file
FIELDS = tuple(f.name for f in fields(Macro))


def flag(name: str) -> str:
    """The command-line spelling of a field: `adc_bits` -> `--adc-bits`."""
    return "--" + name.replace("_", "-")


def _check_types(m: Macro) -> None:
    for name, choices in CHOICES.items():
        value = getattr(m, name)
        if value not in choices and not (name == "codebook" and value is None):
            raise ConfigError(
                f"{flag(name)} {escaped(value)} is not known; {suggestion(str(value), choices)}"
            )
    for name, (lo, hi) in WHOLE.items():
        value = getattr(m, name)
        if value is None and name in ("adc_bits", "dac_bits", "cell_bits"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not lo <= value <= hi:
            raise ConfigError(
                f"{flag(name)} must be a whole number from {lo} to {hi}, not {escaped(value)}"
            )
    if m.step is not None and (
        isinstance(m.step, bool) or not isinstance(m.step, (int, float)) or not 1 <= m.step <= 32767
    ):
        raise ConfigError(
            f"--step must be from 1 to 32767 partial-sum units per code, not {escaped(m.step)}"
        )


def _check_together(m: Macro) -> None:
    if m.dac_bits > m.in_bits:
        raise ConfigError(
            f"--dac-bits {m.dac_bits} is more than the {m.in_bits} bits of an "
            "input; lower it or raise --in-bits"
        )
    if m.cell_bits > m.magnitude_bits:
        held = f"{m.magnitude_bits} bit{'s' * (m.magnitude_bits > 1)}"
        raise ConfigError(
            f"--cell-bits {m.cell_bits} is more than the {held} a {m.w_bits}-bit "
            f"{m.sign_scheme} weight keeps in cells; lower it or raise "
            "--w-bits"
        )
    if (m.range == "fixed") != (m.step is not None):
        raise ConfigError("--range fixed and --step S belong together; give both or neither")
    if m.ideal:
        return
    if m.codebook == "unsigned" and m.sign_scheme == "signed":
        raise ConfigError(
            "--codebook unsigned has no code below zero, but --sign-scheme "
            "signed reads negative partial sums; use --codebook twos or "
            "--sign-scheme split"
        )
    if m.codebook == "sign-magnitude" and m.adc_bits == 1:
        raise ConfigError(
            "--codebook sign-magnitude with --adc-bits 1 has a single code; use "
            "--adc-bits 2 or --codebook twos"
        )
    if m.levels == "free" and m.range != "calibrated":
        raise ConfigError(
            "--levels free are placed on a layer's own histogram; use them with --range calibrated"
        )
    if m.levels == "free" and m.granularity == "tile":
        raise ConfigError(
            "--levels free are whole numbers that add up over the tiles, which "
            "therefore share a step; use them with --granularity layer or "
            "column"
        )
    if not adc.float32_exact(m.p_max, m.shift, m.adc_bits):
        raise ConfigError(
            f"{m.wl} wordlines x {m.dac_bits}-bit inputs x {m.cell_bits}-bit "
            f"cells sum to {m.p_max}, beyond the "
            f"{2 ** (adc.FLOAT32_BITS - m.adc_bits - 1) - 1} "
            f"that a {m.adc_bits}-bit ADC is exact for; lower --wl, --dac-bits or --cell-bits"
        )


# -- presets and files -----------------------------------------------------------------------------
def preset_names() -> tuple[str, ...]:
    """The names `--macro` understands, sorted."""
    return tuple(
        sorted(
            p.name.removesuffix(".toml")
            for p in resources.files("rqtool.hardware").joinpath("presets").iterdir()
            if p.name.endswith(".toml")
        )
    )


def preset(name: str) -> dict[str, Any]:
    """The parsed preset: {"about": str, "source": str, "macro": {...}}. Raises ConfigError with a
    suggestion for an unknown name."""
    if name not in preset_names():
        raise ConfigError(
            f"there is no preset '{escaped(name)}'; {suggestion(name, preset_names())}"
        )
    return tomllib.loads(
        resources.files("rqtool.hardware")
        .joinpath("presets", f"{name}.toml")
        .read_text(encoding="utf-8")
    )


def presets() -> list[dict[str, Any]]:
    """Every preset: name, about, source, and the macro it makes.

    >>> [row["name"] for row in presets()]
    ['default', 'nthu-2019']
    """
    rows = ((name, preset(name)) for name in preset_names())
    return [
        {
            "name": name,
            "about": table["about"],
            "source": table["source"],
            "macro": Macro(**table["macro"]).to_dict(),
        }
        for name, table in rows
    ]


def read_toml(path: Path) -> dict[str, Any]:
    """The [macro] table of a TOML file that describes one macro. Raises InputError where it cannot
    be read or parsed, or has tables for layers."""
    document = read_document(path)
    if "layers" in document:
        raise InputError(
            f"{escaped(path)}: has tables [layers.NAME], which one macro does not hold; read it "
            "with make_assignment"
        )
    return document["macro"]


def read_document(path: Path) -> dict[str, Any]:
    """A TOML file with a [macro] table, and perhaps [layers.NAME] tables. Raises InputError where
    it cannot be read or parsed, or says what nothing reads."""
    try:
        document = tomllib.loads(text_of(path))
    except OSError as e:
        raise InputError(
            f"{escaped(path)}: cannot be read ({e.strerror}); give a readable TOML file"
        ) from e
    except (
        ValueError,
        RecursionError,
    ) as e:  # not UTF-8, not TOML, a number of 5000 digits, 5000 open brackets
        raise InputError(
            f"{escaped(path)}: is not TOML ({escaped(e)}); see docs/hardware.md for an example"
        ) from e
    table = document.get("macro")
    if not isinstance(table, dict):
        near = get_close_matches(
            "macro", [k for k in document if isinstance(document[k], dict)], n=1
        )
        way_out = (
            f"did you mean [macro] with [{escaped(near[0])}]?"
            if near
            else "see docs/hardware.md for an example"
        )
        raise InputError(f"{escaped(path)}: has no [macro] table; {way_out}")
    for key, value in document.items():
        if key not in (*TABLES, *ABOUT):
            what = (
                f"a table [{escaped(key)}]"
                if isinstance(value, (dict, list))
                else f"a key '{escaped(key)}' outside of [macro]"
            )
            way_out = (
                "move it below [macro]"
                if key in FIELDS
                else "did you mean [layers.NAME]?"
                if isinstance(value, dict) and get_close_matches(key, ["layers"])
                else "leave it out, or write it as a comment"
            )
            raise InputError(f"{escaped(path)}: has {what}, which nothing reads; {way_out}")
    return document


def text_of(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark. Raises InputError for UTF-16,
    OSError and ValueError as reading does."""
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{escaped(path)}: is written in UTF-16; save it as UTF-8")
    return data.decode("utf-8-sig").replace("\r\n", "\n")


def make_macro(source: str | None = None, **flags: Any) -> Macro:
    """The macro of a preset name or TOML file (None: the preset `default`) with the flags that are
    not None laid over it.

    Raises ConfigError for unknown keys (with a suggestion), contradictions and unknown presets;
    InputError for unreadable files.

    >>> make_macro("nthu-2019", io=16).describe()
    '9 wordlines, 16 I/O, 4-bit ADC (sign-magnitude, layer, calibrated), 2-bit inputs, 3-bit weights, signed'
    """
    if source is not None and source.endswith(".toml"):
        return macro_with(read_toml(Path(source)), flags)
    return macro_with(preset("default" if source is None else source)["macro"], flags)


def macro_with(table: dict[str, Any], flags: dict[str, Any]) -> Macro:
    """The macro of a table with the flags that are not None laid over it; raises ConfigError for
    unknown keys and contradictions."""
    table = {**table, **{k: v for k, v in flags.items() if v is not None}}
    for key in table:
        if key not in FIELDS:
            raise ConfigError(f"a macro has no '{escaped(key)}'; {suggestion(key, FIELDS)}")
    if table.get("adc_bits") == "ideal":
        table["adc_bits"] = None
    return Macro(**table)
