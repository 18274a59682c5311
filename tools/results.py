"""docs/results.md and its plots, from the rows that tools/experiments.py has finished.

python tools/results.py [--rows docs/results] [--docs docs]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs import DISTILL_WEIGHT, EXPERIMENTS, FINE, MODES, RANGES, TASKS, TRIED, WIDE
from lines import lines_svg

from rqtool.storage import write_atomic
from rqtool.train.paired import over_seeds

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))
import other_table

DOCS = ROOT / "docs"
HEAD = f"""# Results

Written by `make experiments` (tools/experiments.py and tools/results.py) from the rows in docs/results/, a file for each run. top-1 in
percent on the test images (10,000 in every data set), by the integer program; ± is half the range over the runs, one for each seed 0, 1, ...
The loss is a mean over the runs, in points, beside its "error over seeds" (the standard error of that mean, sd / sqrt(runs)) and its "paired error"
(the standard error of one run's loss, because of the images: twin and network see the same ones; the mean over the runs, and a dash where rows were
made before it was kept). The 95 % interval is Student's t over seeds, or that of the images where there is one run. A "goal" is met only where the whole
interval is at or below it, missed only where all of it is above, and open otherwise.
No layer is kept off the macro, reads are signed. Selection is on held-out training images. The ideal-ADC twin starts from the same weights
and is trained for as many epochs with the same seed; the loss is twin minus fine-tuned, in points. "Agreement" is the smallest share of test
images over the runs on which the integer program and the served network in floating point name the same class. A teacher is the float
network (weight {DISTILL_WEIGHT} of the loss unless said) and teaches the twin, too; "matched" says how much what enters each layer of it counts at first.
"""
ABOUT = {
    FINE: "With a step (and zero) for each column, which costs a chip nothing; " "with one for the layer; with free levels; with rows spread (`--pack " "spread`), which costs no read and no cell. `nthu-2019`: 2-bit " "inputs, sign + 2-bit weights, 15 codes.",
    MODES: "A step for the layer, no teacher, the same budget; what is chosen " "from this table is in [training.md](training.md).",
    RANGES: "No training (batch norm is re-estimated where held-out images say " "so). The twin is not trained either.",
    WIDE: "A step for each column.",
    TRIED: "One thing changed at a time from the job `fashion-2-spread` above; " "where the teacher or the images change, so does the twin.",
}  # fmt: skip
COLUMNS = (
    "job",
    "setting",
    "recipe",
    "reads per MAC",
    "epochs",
    "runs",
    "float",
    "post-training",
    "fine-tuned",
    "ideal-ADC twin",
    "loss",
    "error over seeds",
    "paired error",
    "95 % interval",
    "goal",
    "agreement",
    "minutes",
    "commit",
)
NOTE = (
    "Minutes are those of the last run of a job with all its "
    "measurements, and with the twin where that was trained too; on one "
    "thread, often beside other work. They are no timing."
)


def read_rows(rows: Path, kind: str = "metrics") -> dict[str, list[dict[str, Any]]]:
    """The finished rows of each job that has any, by seed; kind: those with "metrics", or those of
    jobs that rqtool "refused"."""
    found = {
        name: [json.loads(path.read_text()) for path in sorted(rows.glob(f"{name}-seed*.json"))]
        for name in EXPERIMENTS
    }
    return {
        name: those
        for name, results in found.items()
        if (those := [result for result in results if kind in result])
    }


def values(results: list[dict[str, Any]], key: str) -> list[float]:
    return [result["metrics"][key] for result in results]


def spread(numbers: list[float]) -> str:
    """Mean, and half the range where there are several."""
    mean = f"{statistics.mean(numbers):.2f}"
    return mean if len(numbers) == 1 else f"{mean} ± {(max(numbers) - min(numbers)) / 2:.2f}"


def setting_cell(macro: dict[str, Any]) -> str:
    shared = f"step per {macro['granularity']}"
    levels = (
        shared
        if macro["levels"] == "uniform"
        else "free levels"
        if macro["granularity"] == "layer"
        else f"free levels, {shared}"
    )
    extra = ["full range"] * (macro["range"] == "full") + ["rows spread"] * (
        macro["pack"] == "spread"
    )
    return ", ".join(
        [
            f"{macro['wl']} rows on",
            f"{macro['in_bits']}/{macro['w_bits']} bits",
            f"{macro['adc_bits']}-bit ADC",
            macro["codebook"],
            levels,
            *extra,
        ]
    )


def recipe_cell(recipe: dict[str, Any]) -> str:
    """The mode, and what is not the default of a recipe."""
    if not recipe["epochs"]:
        return {"error": "least squared error", "peak": "largest sum", "percentile": "99.9 %"}[
            recipe["calibration"]
        ]
    extra = {
        "teacher": "{} teacher",
        "augment": "{}",
        "ideal_epochs": "{} of the epochs with an ideal ADC first",
        "zero": "zeros {}",
        "match": "matched {:g}",
    }
    told = [
        text.format(recipe[key])
        for key, text in extra.items()
        if recipe.get(key, 0) not in ("none", "fixed", 0)
    ]
    return ", ".join([recipe["mode"], *told])


def loss_cells(results: list[dict[str, Any]], goal: float | None) -> list[str]:
    """The loss, its error over seeds, its paired error, its interval, and whether that says that a
    goal is met."""
    seeds, errors = (
        over_seeds(values(results, "adc_loss")),
        [r["metrics"].get("adc_loss_se") for r in results],
    )
    interval = (
        seeds.interval if len(results) > 1 else results[0]["metrics"].get("adc_loss_interval")
    )
    paired_error = None if None in errors else statistics.mean(errors)
    ends = "-" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
    return [
        f"{seeds.mean:.2f}",
        figure(seeds.se),
        figure(paired_error),
        ends,
        verdict(interval, goal),
    ]


def figure(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}"


def verdict(interval: Sequence[float] | None, goal: float | None) -> str:
    """Whether a loss is at or below its goal, as far as the interval says.

    >>> [verdict(ends, 0.3) for ends in ((-0.1, 0.3), (0.1, 0.4), (0.31, 0.5), None)], verdict((0, 1), None)
    (['<= 0.30: met', '<= 0.30: open', '<= 0.30: missed', '<= 0.30: open'], '-')
    """
    if goal is None:
        return "-"
    said = (
        "open"
        if interval is None
        else "met"
        if interval[1] <= goal
        else "missed"
        if interval[0] > goal
        else "open"
    )
    return f"<= {goal:.2f}: {said}"


def row(name: str, results: list[dict[str, Any]]) -> str:
    macro, recipe = results[0]["macro"], results[0]["recipe"]
    figures = [
        spread(values(results, key))
        for key in ("float_top1", "ptq_top1", "tuned_top1", "ideal_top1")
    ]
    figures += loss_cells(results, EXPERIMENTS[name].goal())
    cells = [
        name,
        setting_cell(macro),
        recipe_cell(recipe),
        f"{results[0]['metrics']['reads_per_mac']:.4f}",
        str(recipe["epochs"] + recipe["ideal_epochs"]),
        str(len(results)),
    ]
    cells += [
        *figures,
        f"{min(values(results, 'agreement')):.2f}",
        f"{results[-1]['seconds'] / 60:.0f}",
        ", ".join(sorted({r["commit"] for r in results})),
    ]
    return "| " + " | ".join(cells) + " |"


def table(found: dict[str, list[dict[str, Any]]], section: str, task: str) -> list[str]:
    """The lines of one table with its title; none where nothing is finished."""
    rows = [
        row(name, results)
        for name, results in found.items()
        if (EXPERIMENTS[name].section, EXPERIMENTS[name].task) == (section, task)
    ]
    return (
        [
            f"### {TASKS[task].title}",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|" + "---|" * len(COLUMNS),
            *rows,
            "",
        ]
        if rows
        else []
    )


def refusals(refused: dict[str, list[dict[str, Any]]], section: str, task: str) -> list[str]:
    """What rqtool said of the jobs of a table that it would not do, once for each job."""
    said = [
        f"- {name}: {results[0]['refused']}"
        for name, results in refused.items()
        if (EXPERIMENTS[name].section, EXPERIMENTS[name].task) == (section, task)
    ]
    return ["Refused:", "", *said, ""] if said else []


def report(
    found: dict[str, list[dict[str, Any]]],
    refused: dict[str, list[dict[str, Any]]],
    plots: list[str],
    others: list[str],
) -> str:
    """docs/results.md; plots: files beside it; others: the lines of the section on other networks."""
    lines = [HEAD, NOTE, "", *(f"![{name.removesuffix('.svg')}]({name})\n" for name in plots)]
    for section, about in ABOUT.items():
        tables = [
            line
            for task in TASKS
            for line in table(found, section, task) + refusals(refused, section, task)
        ]
        lines += [f"## {section}", "", about, "", *tables] if tables else []
    return "\n".join([*lines, *others])


def plot(found: dict[str, list[dict[str, Any]]], task: str) -> str | None:
    """Top-1 against the bits of the ADC as SVG, None where no job of the task is fine-tuned: a line
    for each way, with the range over seeds."""
    tuned = {
        "fine-tuned, rows spread": "{}-{}-spread",
        "fine-tuned, step per column": "{}-{}",
        "fine-tuned, free levels": "{}-{}-free",
    }
    ways = tuned | {
        "post-training, rows spread": "{}-{}-ptq-spread-column",
        "post-training, step per column": "{}-{}-ptq-column",
    }
    lines = {
        way: {
            b: values(found[n], "tuned_top1")
            for b in (2, 3, 4)
            if (n := name.format(task, b)) in found
        }
        for way, name in ways.items()
    }
    twins = {
        b: values(found[n], "ideal_top1")
        for name in reversed(tuned.values())
        for b in (2, 3, 4)
        if (n := name.format(task, b)) in found
    }
    lines = {
        way: points for way, points in {**lines, "twin with an ideal ADC": twins}.items() if points
    }
    return (
        lines_svg(
            f"{TASKS[task].title}: top-1 against the bits of the ADC",
            "bits of the ADC (9 rows on, 4/4 bits)",
            "top-1 on the test images, %",
            lines,
        )
        if twins
        else None
    )


def write(rows: Path, docs: Path) -> None:
    """Write the page and its plots anew."""
    found = read_rows(rows)
    plots = {f"results-{task}.svg": svg for task in TASKS if (svg := plot(found, task))}
    for name, svg in plots.items():
        write_atomic(docs / name, svg.encode(), force=True)
    page = report(found, read_rows(rows, "refused"), list(plots), other_table.section(rows))
    write_atomic(docs / "results.md", page.encode(), force=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=DOCS / "results")
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args()
    write(args.rows, args.docs)
