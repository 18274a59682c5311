"""The macro's description: defaults that follow from others, every refusal word for word, presets,
files, flags."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rqtool.errors import (
    CheckError,
    ConfigError,
    CoverageError,
    InputError,
    RqError,
    StorageError,
    escaped,
    suggestion,
)
from rqtool.hardware import macro as macros
from rqtool.hardware.macro import (
    FIELDS,
    WHOLE,
    Macro,
    flag,
    make_macro,
    preset,
    preset_names,
    read_toml,
)


def refusal(**fields) -> str:
    with pytest.raises(ConfigError) as caught:
        Macro(**fields)
    return str(caught.value)


# -- what follows from the fields ------------------------------------------------------------------
def test_defaults():
    m = Macro()
    assert (m.wl, m.io, m.adc_bits, m.in_bits, m.w_bits) == (9, 8, 4, 4, 4)
    assert (m.dac_bits, m.cell_bits, m.codebook) == (4, 3, "twos")
    assert (m.q_x, m.q_w, m.weight_offset, m.magnitude_bits) == (15, 7, 0, 3)
    assert (m.p_min, m.p_max, m.shift, m.zero, m.top, m.ideal) == (-945, 945, 15, 8, 15, False)


@pytest.mark.parametrize(
    ("fields", "p_min", "p_max", "zero", "top"),
    [
        ({"in_bits": 2, "w_bits": 3, "codebook": "sign-magnitude"}, -81, 81, 7, 14),
        ({"sign_scheme": "split"}, 0, 945, 0, 15),
        ({"sign_scheme": "offset"}, 0, 2025, 0, 15),
        ({"sign_scheme": "offset", "cell_bits": 1, "dac_bits": 1}, 0, 9, 0, 15),
        ({"dac_bits": 2, "cell_bits": 2, "adc_bits": 3}, -81, 81, 4, 7),
        ({"wl": 128, "adc_bits": 8}, -13440, 13440, 128, 255),
        ({"w_bits": 2, "in_bits": 1, "wl": 1, "adc_bits": 1}, -1, 1, 1, 1),
    ],
)
def test_ranges_and_codes_by_hand(fields, p_min, p_max, zero, top):
    m = Macro(**fields)
    assert (m.p_min, m.p_max, m.zero, m.top) == (p_min, p_max, zero, top)


def test_a_larger_array_has_a_larger_shift():
    assert [Macro(wl=wl).shift for wl in (156, 157, 312, 313)] == [
        15,
        16,
        16,
        17,
    ]  # 157 * 105 = 16485 passes 2**14


def test_one_line_description():
    assert (
        Macro().describe() == "9 wordlines, 8 I/O, 4-bit ADC (twos, layer, calibrated), 4-bit "
        "inputs, 4-bit weights, signed"
    )
    every = Macro(dac_bits=1, cell_bits=1, sign_scheme="split", levels="free", pack="kernels")
    assert every.describe() == (
        "9 wordlines, 8 I/O, 4-bit ADC (unsigned, layer, calibrated), 4-bit " "inputs, 4-bit weights, split, "
        "1-bit DAC, 1-bit cells, free levels, whole kernels"
    )  # fmt: skip
    assert (
        Macro(adc_bits=None).describe()
        == "9 wordlines, 8 I/O, ideal ADC, 4-bit inputs, 4-bit weights, signed"
    )


def test_the_ideal_twin_differs_in_its_adc_only():
    m = Macro(wl=16, sign_scheme="split", range="fixed", step=3.0)
    twin = m.with_ideal_adc()
    assert (
        twin.ideal
        and twin.describe() == "16 wordlines, 8 I/O, ideal ADC, 4-bit inputs, 4-bit weights, split"
    )
    assert replace(twin, adc_bits=4, range="fixed", step=3.0) == m


def test_a_macro_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Macro().wl = 10


# -- plain data and back ---------------------------------------------------------------------------
any_fields = st.fixed_dictionaries(
    {},
    optional={
        **{name: st.integers(lo, min(hi, 300)) for name, (lo, hi) in WHOLE.items()},
        **{name: st.sampled_from(choices) for name, choices in macros.CHOICES.items()},
        "adc_bits": st.none() | st.integers(1, 8),
        "step": st.none() | st.floats(1, 1000) | st.integers(1, 1000),
    },
)


@given(any_fields)
def test_a_macro_comes_back_from_json(fields):
    try:
        m = Macro(**fields)
    except ConfigError:
        assume(False)
    back = Macro(**json.loads(json.dumps(m.to_dict())))
    assert back == m and back.sha256() == m.sha256()
    assert tuple(m.to_dict()) == FIELDS


@given(any_fields)
def test_any_fields_give_a_macro_or_one_sentence(fields):
    try:
        assert Macro(**fields).describe()
    except ConfigError as e:
        assert str(e).startswith(("--", f"{fields.get('wl', 9)} wordlines")) and "\n" not in str(e)


def test_the_digest_names_the_configuration():
    assert Macro().sha256() == Macro(dac_bits=4, codebook="twos").sha256()
    assert Macro().sha256() != Macro(io=16).sha256()
    assert Macro(range="fixed", step=2).sha256() == Macro(range="fixed", step=2.0).sha256()


# -- refusals, word for word -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"sign_scheme": "signd"}, "--sign-scheme signd is not known; did you mean 'signed'?"),
        ({"sign_scheme": "x"}, "--sign-scheme x is not known; choose one of offset, signed, split"),
        ({"codebook": "two"}, "--codebook two is not known; did you mean 'twos'?"),
        ({"granularity": "columns"}, "--granularity columns is not known; did you mean 'column'?"),
        ({"range": "auto"}, "--range auto is not known; choose one of calibrated, fixed, full"),
        ({"levels": None}, "--levels None is not known; choose one of free, uniform"),
        ({"pack": "kernel"}, "--pack kernel is not known; did you mean 'kernels'?"),
        ({"pack": "\x1b[2J"}, "--pack \\x1b[2J is not known; choose one of kernels, rows, spread"),
        (
            {"sign_scheme": ["signed"]},
            "--sign-scheme ['signed'] is not known; did you mean 'signed'?",
        ),
        ({"wl": 0}, "--wl must be a whole number from 1 to 4096, not 0"),
        ({"wl": 9.0}, "--wl must be a whole number from 1 to 4096, not 9.0"),
        ({"wl": None}, "--wl must be a whole number from 1 to 4096, not None"),
        ({"io": 4097}, "--io must be a whole number from 1 to 4096, not 4097"),
        ({"adc_bits": 9}, "--adc-bits must be a whole number from 1 to 8, not 9"),
        ({"in_bits": True}, "--in-bits must be a whole number from 1 to 8, not True"),
        ({"w_bits": 1}, "--w-bits must be a whole number from 2 to 8, not 1"),
        ({"dac_bits": 0}, "--dac-bits must be a whole number from 1 to 8, not 0"),
        ({"cell_bits": "2"}, "--cell-bits must be a whole number from 1 to 8, not 2"),
        (
            {"dac_bits": 5},
            "--dac-bits 5 is more than the 4 bits of an input; lower it or raise --in-bits",
        ),
        (
            {"cell_bits": 4},
            "--cell-bits 4 is more than the 3 bits a 4-bit signed weight keeps "
            "in cells; lower it or raise --w-bits",
        ),
        (
            {"w_bits": 2, "cell_bits": 2},
            "--cell-bits 2 is more than the 1 bit a 2-bit signed weight keeps in "
            "cells; lower it or raise --w-bits",
        ),
        (
            {"cell_bits": 5, "sign_scheme": "offset"},
            "--cell-bits 5 is more than the 4 bits a 4-bit offset weight keeps "
            "in cells; lower it or raise --w-bits",
        ),
        ({"range": "fixed"}, "--range fixed and --step S belong together; give both or neither"),
        ({"step": 4.0}, "--range fixed and --step S belong together; give both or neither"),
        (
            {"range": "fixed", "step": 0.5},
            "--step must be from 1 to 32767 partial-sum units per code, not 0.5",
        ),
        (
            {"range": "fixed", "step": 32768},
            "--step must be from 1 to 32767 partial-sum units per code, not 32768",
        ),
        (
            {"range": "fixed", "step": float("nan")},
            "--step must be from 1 to 32767 partial-sum units per code, not nan",
        ),
        (
            {"range": "fixed", "step": True},
            "--step must be from 1 to 32767 partial-sum units per code, not True",
        ),
        (
            {"range": "fixed", "step": "4"},
            "--step must be from 1 to 32767 partial-sum units per code, not 4",
        ),
        (
            {"codebook": "unsigned"},
            "--codebook unsigned has no code below zero, but --sign-scheme "
            "signed reads negative partial sums; use --codebook twos or "
            "--sign-scheme split",
        ),
        (
            {"codebook": "sign-magnitude", "adc_bits": 1},
            "--codebook sign-magnitude with --adc-bits 1 has a single code; use "
            "--adc-bits 2 or --codebook twos",
        ),
        (
            {"levels": "free", "range": "full"},
            "--levels free are placed on a layer's own histogram; use them with --range calibrated",
        ),
        (
            {"levels": "free", "granularity": "tile"},
            "--levels free are whole numbers that add up over the tiles, which "
            "therefore share a step; use them with --granularity layer or "
            "column",
        ),
        (
            {"wl": 256, "adc_bits": 8},
            "256 wordlines x 4-bit inputs x 3-bit cells sum to 26880, beyond the "
            "16383 that a 8-bit ADC is exact for; lower --wl, --dac-bits or "
            "--cell-bits",
        ),
    ],
)
def test_refusals(fields, sentence):
    assert refusal(**fields) == sentence


@pytest.mark.parametrize(("wl", "bits"), [(156, 8), (312, 7), (624, 6), (1248, 5), (2496, 4)])
def test_the_exactness_bound_is_the_one_the_sentence_names(wl, bits):
    assert Macro(wl=wl, adc_bits=bits).p_max <= 2 ** (22 - bits) - 1
    assert f"beyond the {2 ** (22 - bits) - 1} that" in refusal(wl=wl + 1, adc_bits=bits)


def test_an_ideal_adc_has_no_exactness_bound():
    assert Macro(wl=4096, in_bits=8, w_bits=8, adc_bits=None).p_max == 4096 * 255 * 127


# -- presets, files and flags ----------------------------------------------------------------------
def test_presets_say_what_they_are_and_where_they_come_from():
    assert preset_names() == ("default", "nthu-2019")
    for name in preset_names():
        document = preset(name)
        assert (
            set(document) == {"about", "source", "macro"}
            and document["about"]
            and document["source"]
        )
        assert make_macro(name) == Macro(**document["macro"])


def test_no_preset_is_the_default_one():
    """What costs a chip nothing is on; a macro that is made by hand has it where it says so."""
    assert make_macro("default") == make_macro() == Macro(granularity="column", pack="spread")


def test_the_2019_macro_by_our_reading():
    m = make_macro("nthu-2019")
    assert (m.wl, m.io, m.in_bits, m.w_bits, m.codebook) == (9, 8, 2, 3, "sign-magnitude")
    assert (m.p_min, m.p_max, m.zero, m.top) == (-81, 81, 7, 14)


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes, name: str = "mine.toml") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_a_file_gives_the_macro_and_flags_win(write):
    path = write('about = "mine"\n[macro]\nwl = 16\nin_bits = 2\nadc_bits = 5\n')
    assert make_macro(path) == Macro(wl=16, in_bits=2, adc_bits=5)
    assert make_macro(path, adc_bits=3, wl=None) == Macro(wl=16, in_bits=2, adc_bits=3)


def test_flags_win_over_a_preset():
    assert make_macro("nthu-2019", wl=18, codebook="twos") == Macro(wl=18, in_bits=2, w_bits=3)


def test_the_word_ideal_means_no_adc(write):
    assert make_macro(adc_bits="ideal") == replace(make_macro(), adc_bits=None)
    path = write('[macro]\nadc_bits = "ideal"\n')
    assert make_macro(path) == Macro(adc_bits=None)
    assert make_macro(path, adc_bits=4) == Macro()


def test_every_macro_can_be_written_as_a_file(write):
    m = Macro(wl=18, dac_bits=2, sign_scheme="split", range="fixed", step=7.25)
    lines = [f"{k} = {json.dumps(v)}" for k, v in m.to_dict().items() if v is not None]
    assert make_macro(write("[macro]\n" + "\n".join(lines))) == m


def config_error(*args, **flags) -> str:
    with pytest.raises(ConfigError) as caught:
        make_macro(*args, **flags)
    return str(caught.value)


def test_unknown_names_get_a_suggestion(write):
    assert config_error("nthu2019") == "there is no preset 'nthu2019'; did you mean 'nthu-2019'?"
    assert config_error("isscc") == "there is no preset 'isscc'; choose one of default, nthu-2019"
    assert (
        config_error("\x1b[2J") == "there is no preset '\\x1b[2J'; choose one of default, nthu-2019"
    )
    assert config_error(adc_bit=3) == "a macro has no 'adc_bit'; did you mean 'adc_bits'?"
    assert (
        config_error(write('[macro]\n"w\\u001bl" = 3\n'))
        == "a macro has no 'w\\x1bl'; did you mean 'wl'?"
    )


def file_error(path: str) -> str:
    with pytest.raises(InputError) as caught:
        read_toml(Path(path))
    return str(caught.value).replace(path, "FILE")


def test_unreadable_files_are_refused(write, tmp_path):
    assert (
        file_error(str(tmp_path / "none.toml"))
        == "FILE: cannot be read (No such file or directory); give a readable TOML file"
    )
    assert (
        file_error(str(tmp_path))
        == "FILE: cannot be read (Is a directory); give a readable TOML file"
    )
    assert (
        file_error(write("wl = 9\n"))
        == "FILE: has no [macro] table; see docs/hardware.md for an example"
    )
    assert (
        file_error(write("macro = 9\n"))
        == "FILE: has no [macro] table; see docs/hardware.md for an example"
    )


@pytest.mark.parametrize(
    "text",
    [
        b"x =",
        b"\xff\xff",
        b"[macro]\nwl = 9\nwl = 9\n",
        b"[macro]\nwl = " + b"1" * 5000,
        b"a = " + b"[" * 20000,
        b'a = "\x00"',
    ],
    ids=["no value", "no UTF-8", "twice", "5000 digits", "20000 brackets", "control character"],
)
def test_what_is_not_toml_is_refused_in_one_sentence(write, text):
    sentence = file_error(write(text))
    assert sentence.startswith("FILE: is not TOML (") and sentence.endswith(
        "); see docs/hardware.md for an example"
    )
    assert sentence.isprintable()


def test_flags_are_spelled_like_fields():
    assert [flag(name) for name in ("wl", "adc_bits", "sign_scheme")] == [
        "--wl",
        "--adc-bits",
        "--sign-scheme",
    ]


# -- the tree of errors ----------------------------------------------------------------------------
def test_exit_codes():
    codes = {
        RqError: 1,
        ConfigError: 2,
        InputError: 3,
        CoverageError: 4,
        CheckError: 5,
        StorageError: 6,
    }
    assert {e: e.exit_code for e in codes} == codes
    assert all(issubclass(e, RqError) for e in codes)


def test_suggestion_and_escaped():
    assert suggestion("adcbits", ["adc_bits", "in_bits"]) == "did you mean 'adc_bits'?"
    assert suggestion("", ["b", "a"]) == "choose one of a, b"
    assert escaped("a\tb\nc\u202e\x7fü 漢") == "a\\tb\\nc\\u202e\\x7fü 漢"
