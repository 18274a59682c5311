"""The section "Other networks" of docs/results.md, from the rows of tools/other_networks.py.

A row is a JSON file other-NETWORK-BITS-LABEL-seedN.json. Versions stand side by side, in the order
of their labels.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

TITLE = "Other networks"
ABOUT = """\
Networks of other kinds than above, defined and trained by tools/networks.py. Every job uses the
default macro and recipe; only the bits of the ADC, the epochs and the seed are set. A name ending
in `-folded` is the same network with its batch norm folded into the layers before it. The twin is
the job with an ideal ADC. Losses are in points: "to the ADC" is twin minus fine-tuned, "to float"
is float minus fine-tuned. ± is the standard error of the mean over the runs, one for each seed; a
figure without it comes from one run. In brackets: the paired standard error over the test images,
where it was measured.

How far these figures go: a few runs tell little, and the 95 % interval of three seeds is 4.3 times
±. The float weights are those of one training; a seed changes the job and the training images it
draws. Some defaults (how weights are rounded, how columns are fitted, the rule of `--lr auto`) were
chosen while test figures of these networks, of ResNet-20 and of the demonstration were in view, so
the figures of the later version are optimistic for networks that nobody looked at.
"""
IDEAL = "ideal"
PAIRED = "adc_loss_se"


def read_rows(rows: Path) -> list[Row]:
    """All rows, in the order of their file names."""
    return [json.loads(path.read_text()) for path in sorted(rows.glob("other-*-seed*.json"))]


def section(rows: Path) -> list[str]:
    """The lines of the section; none where there are no rows."""
    found = read_rows(rows)
    if not found:
        return []
    tables = [line for bits in bits_of(found) for line in table(bits, found)]
    return [f"## {TITLE}", "", ABOUT, *versions(found), "", *tables]


def bits_of(rows: list[Row]) -> list[str]:
    """The ADCs that have rows, the ideal one first, then the most bits first."""
    return sorted({row["bits"] for row in rows}, key=lambda b: -math.inf if b == IDEAL else -int(b))


def versions(rows: list[Row]) -> list[str]:
    """A line for each version: its label and the commits its rows come from."""
    commits = defaultdict(set)
    for row in rows:
        commits[row["label"]].add(row["commit"])
    return [
        f"- {label}: commit {', '.join(sorted(found))}" for label, found in sorted(commits.items())
    ]


# -- one table -----------------------------------------------------------------------------------
def table(bits: str, rows: list[Row]) -> list[str]:
    """The table of one ADC with its title."""
    these = [row for row in rows if row["bits"] == bits]
    labels = sorted({row["label"] for row in these})
    columns = IDEAL_COLUMNS if bits == IDEAL else COLUMNS
    heads = [f"{name}, {label}" for name in columns for label in labels]
    head = ["network", "float", *heads, "training images", "epochs", "test images", "runs"]
    title = "### Ideal ADC" if bits == IDEAL else f"### {bits}-bit ADC"
    lines = [line(name, labels, columns, these) for name in sorted({r["network"] for r in these})]
    return [title, "", joined(head), "|" + "---|" * len(head), *lines, "", *refusals(these)]


def joined(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def line(network: str, labels: list[str], columns: dict[str, Callable], rows: list[Row]) -> str:
    """A network's line."""
    measured = [row for row in rows if row["network"] == network and "metrics" in row]
    runs = {label: [row for row in measured if row["label"] == label] for label in labels}
    figures = [cell(runs[label]) for cell in columns.values() for label in labels]
    sizes = [seen(measured, key) for key in ("train_images", "epochs", "test_images")]
    counts = "/".join(dict.fromkeys(str(len(runs[label])) for label in labels))
    return joined([network, figure(measured, "float_top1"), *figures, *sizes, counts])


def seen(rows: list[Row], key: str) -> str:
    """The values of a field, each once."""
    return "/".join(dict.fromkeys(f"{row[key]:,}" for row in rows))


def refusals(rows: list[Row]) -> list[str]:
    """The error messages of jobs that rqtool refused, each once."""
    said = [f"- {r['network']}, {r['label']}: {r['refused']}" for r in rows if "refused" in r]
    return ["Refused:", "", *dict.fromkeys(said), ""] if said else []


# -- one cell ------------------------------------------------------------------------------------
def figure(rows: list[Row], *keys: str) -> str:
    """The mean over runs of a metric, or of the first minus the second, with its standard error."""
    values = [difference(row["metrics"], *keys) for row in rows]
    known = [value for value in values if value is not None]
    return mean_and_error(known) if known else "–"


def difference(metrics: dict[str, Any], first: str, second: str | None = None) -> float | None:
    """A metric, or the first minus the second; None where one of them was not measured."""
    if second is None:
        return metrics.get(first)
    given = metrics.get(first), metrics.get(second)
    return None if None in given else given[0] - given[1]


def mean_and_error(values: list[float]) -> str:
    """Mean, and the standard error of the mean where there are several values.

    >>> mean_and_error([1.0, 2.0, 3.0]), mean_and_error([1.0])
    ('2.00 ± 0.58', '1.00')
    """
    mean = f"{statistics.mean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}"


def adc_loss(rows: list[Row]) -> str:
    """Twin minus fine-tuned; in brackets its paired standard error, if all runs have one."""
    found = figure(rows, "ideal_top1", "tuned_top1")
    errors = [row["metrics"].get(PAIRED) for row in rows]
    if not errors or None in errors:
        return found
    return f"{found} ({math.hypot(*errors) / len(errors):.2f})"


COLUMNS: dict[str, Callable[[list[Row]], str]] = {
    "post-training": lambda rows: figure(rows, "ptq_top1"),
    "fine-tuned": lambda rows: figure(rows, "tuned_top1"),
    "twin": lambda rows: figure(rows, "ideal_top1"),
    "loss to the ADC": adc_loss,
    "loss to float": lambda rows: figure(rows, "float_top1", "tuned_top1"),
}
IDEAL_COLUMNS: dict[str, Callable[[list[Row]], str]] = {
    "post-training": lambda rows: figure(rows, "ptq_top1"),
    "loss of post-training to float": lambda rows: figure(rows, "float_top1", "ptq_top1"),
    "fine-tuned": lambda rows: figure(rows, "tuned_top1"),
    "loss to float": lambda rows: figure(rows, "float_top1", "tuned_top1"),
}
