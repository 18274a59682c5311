"""The text of each command's result. Every function takes the JSON data of one result and the width
of the terminal (None: a file)."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rqtool.errors import escaped
from rqtool.hardware.macro import Macro
from rqtool.report.text import number, pairs, paragraphs, table

Data = dict[str, Any]
PLAN_HEADERS = (
    "layer",
    "kind",
    "kernel",
    "rows",
    "columns",
    "tiles",
    "planes",
    "p range",
    "acc bits",
    "positions",
    "reads",
    "reads/MAC",
    "cycles",
)
CHAIN_HEADERS = ("top-1 %", "cost", "std. error", "held-out %")
CHAIN = {
    "float": "float model",
    "ideal ADC": "quantized, ideal ADC",
    "ADC": "quantized, ADC",
    "tuned": "fine-tuned",
    "frozen": "integer program",
}
TWIN_HEADERS = ("integer program", "top-1 %", "chosen state")
DIAGNOSIS_HEADERS = (
    "layer",
    "loss alone",
    "std. error",
    "regained",
    "std. error",
    "clipped %",
    "SQNR dB",
    "codes used %",
    "worst tile",
)
INTEGER_HEADERS = ("layer", "rows", "columns", "tiles", "reads/MAC", "step", "zero", "clipped %")


def _macro(data: Data) -> str:
    return Macro(**data["macro"]).describe()


def _macros(data: Data) -> list[tuple[str, str]]:
    """The macro; those of layers that have another, each with its layers; what is kept off it."""
    return [*_on_macro(data), *_off_macro(data.get("layers_off_macro", []))]


def _on_macro(data: Data) -> list[tuple[str, str]]:
    own, kept = data.get("macros", {}), data.get("layers_off_macro", [])
    return [("macro", _macro(data)), *_own(own, kept)]


def _own(macros: dict[str, Data], kept: list[Data]) -> list[tuple[str, str]]:
    names: dict[str, list[str]] = {}
    off = {row["layer"] for row in kept}
    for layer, fields in macros.items():
        if layer not in off:
            names.setdefault(Macro(**fields).describe(), []).append(escaped(layer))
    return [(f"for {', '.join(layers)}", macro) for macro, layers in names.items()]


def _off_macro(kept: list[Data]) -> list[tuple[str, str]]:
    return [("layers off the macro", _kept(kept))] if kept else []


def _kept(rows: list[Data]) -> str:
    """Kept layers with their multiply-accumulates for one image."""
    named = (f"{escaped(row['layer'])} ({row['macs']:,} digital MACs)" for row in rows)
    return ", ".join(named) or "none"


def quantized(data: Data, width: int | None = None) -> str:
    """The closing figures of `quantize`."""
    figures = (_chain(data, width), _against_the_twin(data, width))
    return paragraphs(
        pairs(_on_macro(data), width),
        *figures,
        _layers(data, width),
        pairs(_closing(data), width),
    )


def _chain(data: Data, width: int | None) -> str:
    """The networks after every step on the same images, and what each step cost against the one
    before."""
    rows = [
        (CHAIN[r["step"]], *map(number, (r["top1"], r["loss"], r["se"], r["held_out_top1"])))
        for r in data["chain"]
    ]
    return table([_images(data), *CHAIN_HEADERS], rows, width)


def _images(data: Data) -> str:
    return f"{data['metrics']['images']} {data['measured_on']} images"


def _against_the_twin(data: Data, width: int | None) -> str:
    m = data["metrics"]
    rows = [
        ("post-training", number(m["ptq_top1"]), "-"),
        ("fine-tuned", number(m["tuned_top1"]), data["chosen"]),
    ]
    twin = (
        [("ideal-ADC twin", number(m["ideal_top1"]), data["twin_chosen"])]
        if m["ideal_top1"] is not None
        else []
    )
    return table(TWIN_HEADERS, rows + twin, width)


def _loss_to_the_adc(m: Data) -> str:
    """Against a twin; `eval --diagnose` has the other loss, of the same weights."""
    if m["adc_loss"] is None:
        return "not measured (--no-twin)"
    return f"{_points(m, 'adc_loss')}, against the twin trained with an ideal ADC"


def _points(m: Data, name: str) -> str:
    """A difference in points with its paired error."""
    if m[f"{name}_se"] is None:
        return f"{number(m[name])} points"
    lo, hi = m[f"{name}_interval"]
    return (
        f"{number(m[name])} points, standard error "
        f"{number(m[f'{name}_se'])}, 95 % interval {number(lo)} to "
        f"{number(hi)}"
    )


def _layers(data: Data, width: int | None) -> str:
    return table(INTEGER_HEADERS, map(_layer_row, data["layers"]), width)


def _layer_row(r: Data) -> list[Any]:
    zero = "-" if r["zero"] is None else r["zero"]
    return [
        r["layer"],
        r["rows"],
        r["columns"],
        r["tiles"],
        number(r["reads_per_mac"]),
        number(r["step"]),
        zero,
        number(100 * r["clip_rate"]),
    ]


def _closing(data: Data) -> list[tuple[str, str]]:
    integer = "yes" if data["fully_integer"] else f"no, but for {', '.join(data['islands'])}"
    return [
        ("loss to the ADC", _loss_to_the_adc(data["metrics"])),
        ("fully integer", integer),
        ("layers off the macro", _kept(data["layers_off_macro"])),
        ("reads per MAC", number(data["metrics"]["reads_per_mac"])),
        *_how(data),
        ("file", data["out"] or "not saved"),
        *([("twin's file", data["twin_out"])] if data["twin_out"] else []),
        ("seconds", number(data["seconds"])),
        *_warnings(data),
    ]


def _warnings(data: Data) -> list[tuple[str, str]]:
    return [("warning", sentence) for sentence in data["warnings"]]


def trained(data: Data, width: int | None = None) -> str:
    """The closing figures of `train`."""
    m = data["metrics"]
    rows = [("before", number(m["before_top1"])), ("after", number(m["tuned_top1"]))]
    figures = table([_images(data), "top-1 %"], rows, width)
    before = sum(recipe["epochs"] + recipe["ideal_epochs"] for recipe in data["history"])
    closing = [
        ("gain", _points(m, "gain")),
        ("trained before", _epochs(before)),
        *_how(data),
        ("file", data["out"] or "not saved"),
        ("seconds", number(data["seconds"])),
        *_warnings(data),
    ]
    return paragraphs(
        pairs(_macros(data), width),
        figures,
        _layers(data, width),
        pairs(closing, width),
    )


def _how(data: Data) -> list[tuple[str, str]]:
    return [
        ("trained", _trained(data)),
        ("chosen", f"{data['chosen']}, by {data['held_out_images']} held-out images"),
        (
            "agreement",
            "integer program and network in floating point name the same class "
            f"on {number(data['metrics']['agreement'])} % of the images",
        ),
    ]


def _trained(data: Data) -> str:
    """Epochs, images and seed; what is not the default of the recipe is told too."""
    recipe = data["recipe"]
    before = (
        f", after {_epochs(recipe['ideal_epochs'])} with an ideal ADC"
        if recipe["ideal_epochs"]
        else ""
    )
    teacher = "" if recipe["teacher"] == "none" else f", {recipe['teacher']} teacher"
    augment = "" if recipe["augment"] == "none" else f", {recipe['augment']}"
    rate = f", learning rate {data['learning_rate']:g}" if data["learning_rate"] is not None else ""
    rolled = (
        f"; rolled back {data['roll_backs']} times, each to half the rate"
        if data["roll_backs"]
        else ""
    )
    return (
        f"{_epochs(recipe['epochs'])} on {data['train_images']} images, seed "
        f"{recipe['seed']}{before}{teacher}{augment}{rate}{rolled}"
    )


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' * (count != 1)}"


def evaluated(data: Data, width: int | None = None) -> str:
    """The figure of `eval`."""
    fused = data["fused_layers"]
    items = [
        ("file", data["source"]),
        *_macros(data),
        (
            "top-1",
            f"{number(data['metrics']['top1'])} % of {data['metrics']['images']} "
            f"{data['measured_on']} images, {data['adc']} ADC",
        ),
        (
            "reads",
            f"{sum(fused.values())} of {len(fused)} layers on the fused kernel, "
            "every code equal to the definition",
        ),
        ("seconds", number(data["seconds"])),
    ]
    return paragraphs(
        pairs(items, width), diagnosed(data["diagnosis"], width) if "diagnosis" in data else ""
    )


def diagnosed(data: Data, width: int | None = None) -> str:
    """What `eval --diagnose` found: the layers in network order, and which of them is to blame."""
    same = [number(data[name]) for name in ("adc_loss_same_weights", "adc_loss_same_weights_se")]
    figures = [
        ("all ADCs ideal", number(data["ideal_top1"]), "-", "-"),
        ("all ADCs real", number(data["real_top1"]), *same),
    ]
    accuracies = table(
        [
            f"{data['images']} {data['measured_on']} images",
            "top-1 %",
            "cost, same weights",
            "std. error",
        ],
        figures,
        width,
    )
    plots = [("plots", ", ".join(data["plots"]))] if data["plots"] else []
    closing = pairs(
        [("diagnosis", data["sentence"]), *plots, ("seconds", number(data["seconds"]))], width
    )
    return paragraphs(
        accuracies, table(DIAGNOSIS_HEADERS, map(_diagnosis_row, data["layers"]), width), closing
    )


def _diagnosis_row(r: Data) -> list[Any]:
    worst = (
        "-"
        if r["worst_tile"] is None
        else f"{r['worst_tile']} at {number(r['tiles'][r['worst_tile']]['sqnr'])} dB"
    )
    losses = [
        number(r[name]) for name in ("loss_alone", "loss_alone_se", "regained", "regained_se")
    ]
    return [
        r["layer"],
        *losses,
        _share(r["clip_rate"]),
        number(r["sqnr"]),
        _share(r["codes_used"]),
        worst,
    ]


def _share(x: float | None) -> str:
    return number(None if x is None else 100 * x)


def exported(data: Data, width: int | None = None) -> str:
    """What `export` wrote and proved."""
    items = [
        ("file", f"{data['out']}, {data['bytes']:,} bytes, {data['body']} body"),
        ("verified", _proof(data["report"])),
    ]
    return pairs(items + ([("vectors", data["vectors"])] if data["vectors"] else []), width)


def _proof(report: Data | None) -> str:
    if report is None:
        return "no (--no-verify)"
    batches = ", ".join(map(str, report["batches"]))
    return (
        f"yes: {report['integers']:,} integers of {report['tensors']} "
        f"tensors equal the definition at {len(report['levels'])} "
        "optimisation levels "
        f"of onnxruntime and batch {batches}; {report['codes']:,} codes "
        f"tried one by one; {report['reads']:,} reads replayed from the "
        "metadata"
    )


def planned(data: Data, width: int | None = None) -> str:
    """The table of `plan`."""
    totals = data["totals"]
    total = [
        "total",
        "",
        "",
        "",
        "",
        totals["tiles"],
        "",
        "",
        "",
        "",
        totals["reads"],
        number(totals["reads_per_mac"]),
        totals["cycles"],
    ]
    head = pairs(
        [
            ("model", data["source"]),
            ("input", _by(data["input_shape"])),
            *_macros(data),
            ("MACs", totals["macs"]),
        ],
        width,
    )
    return paragraphs(head, table(PLAN_HEADERS, [*map(_plan_row, data["layers"]), total], width))


def _plan_row(r: Data) -> list[Any]:
    planes, acc_bits = f"{r['input_planes']}x{r['weight_planes']}", r["acc_bound"].bit_length() + 1
    sums = f"{r['p_min']}..{r['p_max']}"
    return [
        r["layer"], r["kind"], _by(r["kernel"]), r["rows"], r["columns"], r["tiles"], planes, sums, acc_bits, r["positions"], r["reads"],
        number(r["reads_per_mac"]), r["cycles"],
    ]  # fmt: skip


def _by(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def inspected(data: Data, width: int | None = None) -> str:
    """What `inspect` found, shortened: `--json` has all of it."""
    return paragraphs(
        pairs([("file", data["source"]), ("kind", data["kind"])], width),
        INSPECTED[data["kind"]](data, width),
    )


def _weights(data: Data, width: int | None) -> str:
    rows = [(t["name"], _by(t["shape"]) or "-", t["dtype"]) for t in data["tensors"]]
    return paragraphs(
        pairs([("values", f"{data['values']:,}")], width),
        table(["tensor", "shape", "type"], rows, width),
    )


AXES = {
    (0, 1, 2): [],
    **{
        axes: [("axes", said)]
        for axes, said in (
            ((1, 2, 0), "channels last"),
            ((2, 0, 1), "the last as channels"),
            ((0, 2, 1), "the last two exchanged"),
        )
    },
}


def _rq(data: Data, width: int | None) -> str:
    shown = [
        (name, value if isinstance(value, str) else _figure(value))
        for name, value in _metrics(data["results"]).items()
    ]
    pixel = data["preprocess"]
    worth = f"(x * {pixel['scale']:.6g} - mean) / std, mean {pixel['mean']}, std {pixel['std']}"
    sizes = [f"{name} {pixel[name]}" for name in ("resize", "crop") if pixel[name]]
    about = [
        *_macros(data),
        ("pixels", worth),
        *([("images", ", ".join(sizes))] if sizes else []),
        *AXES[tuple(pixel["axes"])],
    ]
    rows = [(op["name"], op["kind"], _by(op["output"])) for op in data["ops"]]
    return paragraphs(
        pairs([*about, ("program", data["program_sha256"]), *shown], width),
        table(["operation", "kind", "output"], rows, width),
    )


def _metrics(results: Any) -> Data:
    """The figures that a file claims; they are data from a file, so nothing is taken for granted."""
    metrics = results.get("metrics") if isinstance(results, dict) else None
    return metrics if isinstance(metrics, dict) else {}


def _figure(value: Any) -> str:
    return number(value) if isinstance(value, float) else escaped(value)


def _onnx(data: Data, width: int | None) -> str:
    doc = data["metadata"]
    about = [
        ("written by", f"{doc['tool']['name']} {doc['tool']['version']}"),
        ("format", doc["format"]),
        ("program", doc["program"]["sha256"]),
    ]
    about.append(("macro", Macro(**doc["macro"]["fields"]).describe()))
    own = {r["layer"]: r["macro"]["fields"] for r in doc["layers"] if "macro" in r}
    kept = doc.get("layers_off_macro", [])
    about += [*_own(own, kept), *_off_macro(kept)]
    rows = [
        (
            layer["layer"],
            layer["kind"],
            layer["rows"]["count"],
            layer["columns"],
            layer["adc"]["kind"],
            layer["body"],
        )
        for layer in doc["layers"]
    ]
    return paragraphs(
        pairs(about, width), table(["layer", "kind", "rows", "columns", "ADC", "body"], rows, width)
    )


INSPECTED = {"weights": _weights, "rq": _rq, "onnx": _onnx}


def verified(data: Data, width: int | None = None) -> str:
    """What `verify` found right, file by file."""
    return pairs(
        [(row["source"], f"right: {VERIFIED[row['kind']].format(**row)}") for row in data["files"]],
        width,
    )


VERIFIED = {
    "rq": "every hash; the program; {integers:,} integers of {tensors} tensors "
    "equal the definition on one random image",
    "onnx": "the graph, the metadata and every hash; {codes:,} codes; "
    "{accumulators:,} accumulators of {layers} layers on one random "
    "image, in two runs",
}


def presets(data: Data, width: int | None = None) -> str:
    """The macros that have a name."""
    return paragraphs(
        *(
            pairs(
                [
                    ("preset", r["name"]),
                    ("about", r["about"]),
                    ("source", r["source"]),
                    ("macro", _macro(r)),
                ],
                width,
            )
            for r in data["presets"]
        )
    )


def operations(data: Data, width: int | None = None) -> str:
    """What `ops` lists."""
    program = [(kind, ", ".join(names)) for kind, names in data["program"].items()]
    networks = [
        (n["name"], f"{n['about']}, input {_by(n['input_shape'])}") for n in data["networks"]
    ]
    counted = Counter(name.split(".")[0].rstrip("_") for name in data["model"])
    understood = pairs([("aten", ", ".join(sorted(counted)))], width)
    titles = (
        "operations understood in a model",
        "operations of an integer program, with their attributes",
        "built-in networks",
    )
    return paragraphs(
        *(
            f"{title}\n{text}"
            for title, text in zip(
                titles, (understood, pairs(program, width), pairs(networks, width))
            )
        )
    )


def doctor(data: Data, width: int | None = None) -> str:
    """What this machine has, and how the reads will run on it."""
    versions = [(name, version or "not installed") for name, version in data["versions"].items()]
    about = [
        ("system", data["system"]),
        ("processor", data["processor"]),
        ("processors", data["cpus"]),
        ("torch threads", data["threads"]),
    ]
    reads = [
        ("reads run", data["carrier"]),
        ("for", data["reason"]),
        ("kernel cache", data["cache"] or "none"),
    ]
    return paragraphs(pairs(versions, width), pairs(about, width), pairs(reads, width))


def demo(data: Data, width: int | None = None) -> str:
    """The three results of the demo."""
    return paragraphs(
        quantized(data["quantize"], width),
        evaluated(data["eval"], width),
        exported(data["export"], width),
    )
