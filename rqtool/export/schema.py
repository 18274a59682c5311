"""The JSON Schema of the metadata document, and a validator for the few keywords that it uses.

docs/rqtool.reram-1.schema.json is this schema, written out; a test keeps them equal.
"""

from __future__ import annotations

from typing import Any

from rqtool.errors import InputError, escaped

FORMAT = "rqtool.reram/1"

INTEGER: dict[str, Any] = {"type": "integer"}
NATURAL: dict[str, Any] = {"type": "integer", "minimum": 0}
SHIFT: dict[str, Any] = {"type": "integer", "minimum": 1, "maximum": 31}
CODE: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 255}
POSITIVE: dict[str, Any] = {"type": "integer", "minimum": 1}
TEXT: dict[str, Any] = {"type": "string"}
TRUTH: dict[str, Any] = {"type": "boolean"}
SHA256: dict[str, Any] = {"type": "string", "minLength": 64, "maxLength": 64}
OBJECT: dict[str, Any] = {"type": "object"}


def _maybe(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "type": [schema["type"], "null"]}


def _list(items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


def _record(may_miss: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    """An object with exactly these keys, of which some may be missing."""
    return {
        "type": "object",
        "properties": properties,
        "required": sorted(set(properties) - set(may_miss)),
        "additionalProperties": False,
    }


TABLE = _list(_list(NATURAL, minItems=1), minItems=1)
PAIR = _list(NATURAL, minItems=2, maxItems=2)
SIZES = _list(POSITIVE, minItems=2, maxItems=2)
DTYPE: dict[str, Any] = {"type": "string", "enum": ["float32", "uint8", "int32"]}
END = {
    "tensor": TEXT,
    "dtype": DTYPE,
    "shape": _list(NATURAL),
    "lo": _maybe(INTEGER),
    "hi": _maybe(INTEGER),
}
GEOMETRY = _record(
    channels=POSITIVE, columns=POSITIVE, kernel=SIZES, stride=SIZES, padding=PAIR, dilation=SIZES, groups=POSITIVE,
    kind={"type": "string", "enum": ["conv1d", "conv2d", "linear"]},
)  # fmt: skip
INPUT_PLANES = _record(factor=_list(POSITIVE), shift=_list(NATURAL), bits=_list(POSITIVE))
WEIGHT_PLANES = _record(
    factor=_list(INTEGER), shift=_list(NATURAL), bits=_list(POSITIVE),
    part=_list({"type": "string", "enum": ["all", "positive", "negative", "offset"]}),
)  # fmt: skip
INPUT = _record(tensor=TEXT, bits=POSITIVE, signed=TRUTH, zero=NATURAL, planes=INPUT_PLANES)
WEIGHT = _record(
    tensor=TEXT, layout=_list(TEXT), bits=POSITIVE, sign_scheme={"type": "string", "enum": ["signed", "split", "offset"]}, cell_bits=POSITIVE,
    offset=NATURAL, zero_point=NATURAL, span=POSITIVE, first_channel=_list(NATURAL, minItems=1), planes=WEIGHT_PLANES, sha256=SHA256,
)  # fmt: skip
STEPS = _record(
    mult=_list(POSITIVE, minItems=1), zero=_list(CODE), thresholds=_list(_list(INTEGER)),
    clip_lo=_list(INTEGER), clip_hi=_list(INTEGER), step=_list({"type": "number"}),
)  # fmt: skip
ADC = _record(
    kind={"type": "string", "enum": ["uniform", "free", "ideal"]}, bits=_maybe(POSITIVE), codebook=_maybe(TEXT), shift=_maybe(SHIFT), top=_maybe(CODE),
    tie_free=TRUTH, steps=_maybe(STEPS), step_of=_maybe(TABLE), gain=_maybe(TABLE), thresholds=_maybe(_list(_list(INTEGER), minItems=1)), levels=_maybe(_list(INTEGER)),
)  # fmt: skip
READS = _record(
    tile=_list(NATURAL), serial=_list(NATURAL), plane=_list(NATURAL), group=_list(NATURAL),
    polarity=_list({"type": "string", "enum": ["all", "positive", "negative", "offset"]}), slice=_list(NATURAL), factor=_list(INTEGER),
    row_start=_list(NATURAL), row_stop=_list(POSITIVE), col_start=_list(NATURAL), col_stop=_list(POSITIVE), p_min=_list(INTEGER), p_max=_list(INTEGER),
)  # fmt: skip
ACC = _record(tensor=TEXT, bits=POSITIVE, bound=NATURAL, scale=_maybe(_list({"type": "number"})))
REQUANT = _record(
    node=TEXT,
    shift=NATURAL,
    lo=INTEGER,
    hi=INTEGER,
    add=TEXT,
    mult=_list(TEXT),
    inputs=_list(TEXT),
    output=TEXT,
)
MACRO = _record(sha256=SHA256, fields=OBJECT)
OFF_MACRO = _list(_record(layer=TEXT, macs=POSITIVE), minItems=1)
LAYER = _record(
    may_miss=("macro",), macro=MACRO,
    layer=TEXT, node=TEXT, kind={"type": "string", "enum": ["conv1d", "conv2d", "linear"]}, body={"type": "string", "enum": ["qlinear", "explicit"]},
    geometry=GEOMETRY, rows=_record(order=_list(TEXT), count=POSITIVE, wordlines=POSITIVE, taken=_maybe(_list(NATURAL))), columns=POSITIVE, io=POSITIVE, io_ranges=_list(PAIR, minItems=1),
    input=INPUT, weight=WEIGHT, adc=ADC, reads=READS, acc=ACC, requant=_list(REQUANT),
)  # fmt: skip
DOCUMENT = _record(
    may_miss=("layers_off_macro",), layers_off_macro=OFF_MACRO,
    format={"type": "string", "enum": [FORMAT]}, tool=_record(name=TEXT, version=TEXT), body={"type": "string", "enum": ["qlinear", "explicit"]},
    macro=_record(preset=_maybe(TEXT), sha256=SHA256, fields=OBJECT), program=_record(sha256=SHA256, meta=OBJECT), graph_sha256=SHA256,
    input=_record(**END), output=_record(**END, scale=_maybe({"type": "number"})),
    constants={"type": "object", "additionalProperties": SHA256}, layers=_list(LAYER),
)  # fmt: skip
SCHEMA = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": FORMAT, **DOCUMENT}

PYTHON_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
LIMITS = {  # keyword -> (whether a value breaks it, in words)
    "enum": (lambda v, limit: v not in limit, "is not one of"),
    "minimum": (lambda v, limit: v < limit, "is below"),
    "maximum": (lambda v, limit: v > limit, "is above"),
    "minItems": (lambda v, limit: len(v) < limit, "has fewer items than"),
    "maxItems": (lambda v, limit: len(v) > limit, "has more items than"),
    "minLength": (lambda v, limit: len(v) < limit, "is shorter than"),
    "maxLength": (lambda v, limit: len(v) > limit, "is longer than"),
}


def validate_schema(value: Any, schema: dict[str, Any] = SCHEMA, where: str = "document") -> None:
    """Raise InputError, naming the place, where `value` (parsed JSON) does not follow `schema`."""
    types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    if not any(_is(value, name) for name in types):
        _refuse(where, f"is not of type {' or '.join(types)}")
    if value is None:
        return
    for keyword, (breaks, words) in LIMITS.items():
        if keyword in schema and breaks(value, schema[keyword]):
            _refuse(where, f"{words} {schema[keyword]}")
    if isinstance(value, list) and "items" in schema:
        for n, item in enumerate(value):
            validate_schema(item, schema["items"], f"{where}[{n}]")
    if isinstance(value, dict):
        _validate_object(value, schema, where)


def _validate_object(value: dict[str, Any], schema: dict[str, Any], where: str) -> None:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name in schema.get("required", ()):
        if name not in value:
            _refuse(where, f"has no {name}")
    for name, item in value.items():
        if name in properties:
            validate_schema(item, properties[name], f"{where}.{name}")
        elif others is False:
            _refuse(where, f"has an unknown {name}")
        elif isinstance(others, dict):
            validate_schema(item, others, f"{where}.{name}")


def _is(value: Any, name: str) -> bool:
    """JSON's own types: true is no integer."""
    return isinstance(value, PYTHON_TYPES[name]) and (
        name == "boolean" or not isinstance(value, bool)
    )


def _refuse(where: str, what: str) -> None:
    raise InputError(f"metadata {FORMAT}: {escaped(where)} {escaped(what)}; export the file again")
