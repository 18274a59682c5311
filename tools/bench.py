"""Time the fused reads against the float convolutions they replace, and write docs/performance.md.

    python tools/bench.py [--only GROUP ...] [--repeats 9] [--json build/bench.json] [--report docs/performance.md]

Every figure is a ratio in one process: each repeat runs all forms of a group in turn, the yardstick
among them; what is shown is the median of a form's times over the median of the yardstick's, after
two repeats that warm up. Run it while nothing else is running.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from rqtool.hardware import adc
from rqtool.hardware.macro import Macro
from rqtool.kernels import cpu, reference, vector
from rqtool.kernels.spec import ReadSpec, Tables, free_level_spec, make_spec
from rqtool.mapping.plan import Geometry, Plan
from rqtool.mapping.planes import extract
from rqtool.model.capture import capture
from rqtool.model.data import Images
from rqtool.program.freeze import Norm
from rqtool.program.run import Runner
from rqtool.report.doctor import processor
from rqtool.storage import write_atomic
from rqtool.train.adc_state import over_rows
from rqtool.train.calibrate import calibrate, optimal_levels
from rqtool.train.distill import Teacher
from rqtool.train.finetune import Feed, Recipe, optimizer, untaught
from rqtool.train.frozen import freeze, peaks_of
from rqtool.train.relax import Relaxation, slope_tables
from rqtool.train.rewrite import read_layers, rewrite

WARM_UP = 2
TAU = 0.2
EPOCH_IMAGES = 45_000
BATCH, CHANNELS, SIZE = 64, 64, 16  # the layer of most tables: 64 -> 64 channels, 3x3, 16x16


# -- timing ----------------------------------------------------------------------------------------
def timed(forms: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each form, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats + WARM_UP):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            times[name].append(time.perf_counter() - start)
    return {name: median(t[WARM_UP:]) for name, t in times.items()}


@dataclass
class Layer:
    """One layer with codes, weights, a gradient to send back, and its float twin."""

    macro: Macro
    batch: int = BATCH
    channels: int = CHANNELS
    size: int = SIZE
    plan: Plan = field(init=False)

    def __post_init__(self) -> None:
        rng, c, n = np.random.default_rng(0), self.channels, self.size
        order = (
            tuple(np.random.default_rng(1).permutation(9 * c).tolist())
            if self.macro.pack == "spread"
            else None
        )
        self.plan = Plan.make("layer", Geometry(c, c, (3, 3), padding=(1, 1)), self.macro, order)
        self.codes = np.pad(
            rng.integers(0, self.macro.q_x + 1, (self.batch, c, n, n)).astype(np.uint8),
            ((0, 0), (0, 0), (1, 1), (1, 1)),
        )
        self.weight = rng.integers(-self.macro.q_w, self.macro.q_w + 1, (c, 9 * c)).astype(np.int32)
        self.gy = rng.standard_normal((self.batch, c, n, n)).astype(np.float32)
        self.spec, self.prepared = self._spec(), {}

    def _spec(self) -> ReadSpec:
        macro, tiles = self.macro, len(self.plan.tiles)
        if macro.levels == "free":
            p = np.arange(macro.p_min, macro.p_max + 1)
            thresholds, levels = optimal_levels(
                1e6 * np.exp(-np.abs(p) / 50), macro
            )  # many sums near 0 and a long tail, as in real layers
            spec = free_level_spec(
                self.plan,
                np.tile(thresholds, (self.channels if macro.granularity == "column" else 1, 1)),
                levels,
            )
        else:
            shape = {"layer": (1, 1), "column": (1, self.channels), "tile": (tiles, 1)}[
                macro.granularity
            ]
            mult = adc.snap(np.full(shape, 16.0 if macro.wl <= 9 else 64.0), macro.shift)
            gain = np.full(shape, 100) if macro.granularity == "tile" else np.ones((1, 1))
            spec = make_spec(self.plan, mult, np.full((1, 1), macro.zero), gain)
        return replace(spec, geometry=replace(spec.geometry, padding=(0, 0)))

    def noisy(self) -> ReadSpec:
        """The spec of a relaxed training step."""
        macro = self.macro
        mult, zero = (
            torch.tensor([[int(n)]])
            for n in (adc.snap(16.0 if macro.wl <= 9 else 64.0, macro.shift), macro.zero)
        )
        tables = slope_tables(mult, zero, macro.shift, macro.top, TAU, macro.p_min, macro.p_max)
        return replace(
            self.spec,
            tables=Tables(tables.p_min, over_rows(tables.row, self.plan), tables.slope),
            noise=Relaxation(TAU, 1).noise(),
        )

    def forward(self, threads: int, dot8: bool = True) -> None:
        """All planes, as evaluation does: weights are packed once."""
        if dot8 not in self.prepared:
            self.prepared[dot8] = [
                cpu.Prepared(extract(self.weight, b), self.spec, dot8=dot8)
                for b in self.plan.weight_planes
            ]
        for a in self.plan.input_planes:
            x = extract(self.codes, a) if len(self.plan.input_planes) > 1 else self.codes
            for plane in self.prepared[dot8]:
                cpu.run(plane, x, threads, dtype=np.int32)

    def step(self, spec: ReadSpec, threads: int, dot8: bool = True) -> None:
        cpu.forward(self.codes, self.weight, spec, threads, dot8=dot8)
        cpu.backward(self.codes, self.weight, spec, self.gy, threads, dot8=dot8)

    def chunked(self) -> None:
        with torch.no_grad():
            reference.forward(
                torch.from_numpy(self.codes).float(),
                torch.from_numpy(self.weight).float(),
                self.spec,
            )

    def convolutions(self) -> tuple[Callable, Callable]:
        """F.conv2d on the same numbers: forward, and forward with backward."""
        x = torch.from_numpy(self.codes[:, :, 1:-1, 1:-1].astype(np.float32)).requires_grad_()
        w = (
            torch.from_numpy(self.weight.astype(np.float32))
            .view(self.channels, self.channels, 3, 3)
            .requires_grad_()
        )
        gy = torch.from_numpy(self.gy)

        def forward() -> None:
            with torch.no_grad():
                F.conv2d(x, w, padding=1)

        def both() -> None:
            x.grad = w.grad = None
            F.conv2d(x, w, padding=1).backward(gy)

        return forward, both


# -- what is measured: each gives rows of (setting, threads, form, ratio, milliseconds of the yardstick) ---
Row = dict[str, object]


def ratios(setting: str, threads: int, forms: dict[str, Callable], repeats: int) -> list[Row]:
    """The first form is the yardstick."""
    times = timed(forms, repeats)
    (name, base), *others = times.items()
    return [
        {
            "setting": setting,
            "threads": threads,
            "form": n,
            "ratio": round(t / base, 3),
            "yardstick": name,
            "yardstick_ms": round(1000 * base, 2),
        }
        for n, t in others
    ]


def layer_forward(threads: int, repeats: int) -> list[Row]:
    rows = []
    for wl in (9, 128):
        layer = Layer(Macro(wl=wl))
        forms = {
            "F.conv2d": layer.convolutions()[0],
            "plain float32": lambda: layer.forward(threads, False),
        }
        if vector.DOT8:
            forms["8-bit dot products"] = lambda: layer.forward(threads)
        rows += ratios(f"wl {wl}", threads, forms, repeats)
    return rows


def layer_step(threads: int, repeats: int) -> list[Row]:
    rows = []
    for wl in (9, 128):
        layer = Layer(Macro(wl=wl))
        noisy, forms = layer.noisy(), {"F.conv2d": layer.convolutions()[1]}
        for dot8, name in ((False, "plain float32"), (True, "8-bit dot products"))[
            : 1 + vector.DOT8
        ]:
            forms[f"hard, {name}"] = lambda dot8=dot8: layer.step(layer.spec, threads, dot8)
            forms[f"relaxed, {name}"] = lambda dot8=dot8: layer.step(noisy, threads, dot8)
        rows += ratios(f"wl {wl}", threads, forms, repeats)
    return rows


PLANS = {
    "uniform, signed": {}, "step per column": {"granularity": "column"}, "step per tile": {"granularity": "tile"}, "free levels": {"levels": "free"}, "free levels, step per column": {"levels": "free", "granularity": "column"},
    "rows spread": {"pack": "spread"},
    "split": {"sign_scheme": "split"}, "offset": {"sign_scheme": "offset"}, "bit-serial inputs": {"dac_bits": 1}, "1-bit cells": {"cell_bits": 1},
}  # fmt: skip


def other_plans(threads: int, repeats: int) -> list[Row]:
    """Cost of one read against a uniform signed read."""
    rows = []
    for wl in (9, 128):
        layers = {name: Layer(Macro(wl=wl, **options)) for name, options in PLANS.items()}
        times = timed(
            {name: lambda layer=layer: layer.forward(threads) for name, layer in layers.items()},
            repeats,
        )
        per_read = {name: t / layers[name].plan.reads_per_position for name, t in times.items()}
        base = per_read["uniform, signed"]
        rows += [
            {
                "setting": f"wl {wl}",
                "threads": threads,
                "form": n,
                "ratio": round(t / base, 3),
                "yardstick": "uniform, signed",
                "yardstick_ms": round(1000 * times["uniform, signed"], 2),
            }
            for n, t in per_read.items()
        ]
    return rows


def fallback(threads: int, repeats: int) -> list[Row]:
    rows = []
    for wl in (9, 128):
        layer = Layer(Macro(wl=wl))
        rows += ratios(
            f"wl {wl}",
            threads,
            {"F.conv2d": layer.convolutions()[0], "chunked torch": layer.chunked},
            repeats,
        )
    return rows


def scaling(threads: int, repeats: int) -> list[Row]:
    """Nanoseconds a read, over rows on and channels."""
    rows = []
    for channels in (16, 64, 256):
        for wl in (9, 18, 36, 72, 144):
            layer = Layer(Macro(wl=wl), batch=64 * 64 // channels, channels=channels)
            seconds = timed({"forward": lambda: layer.forward(threads)}, repeats)["forward"]
            reads = layer.plan.reads_per_position * layer.batch * SIZE * SIZE
            macs = layer.plan.macs_per_position * layer.batch * SIZE * SIZE
            rows.append(
                {
                    "setting": f"{channels} channels, wl {wl}",
                    "threads": threads,
                    "form": "forward",
                    "ns_per_read": round(1e9 * seconds / reads, 4),
                    "ns_per_mac": round(1e9 * seconds / macs, 5),
                    "reads": reads,
                }
            )
    return rows


# -- a whole network -------------------------------------------------------------------------------
class Block(nn.Module):
    """A basic block whose shortcut drops positions and adds zero channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
        )
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, (outputs - inputs) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return F.relu(
            y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        )


def resnet20() -> nn.Module:
    """ResNet-20 for 32x32 colour images (He et al. 2016, section 4.2), with fresh weights."""
    torch.manual_seed(0)
    widths = [16] * 4 + [32] * 3 + [64] * 3
    blocks = [Block(a, b, 1 if a == b else 2) for a, b in zip(widths, widths[1:])]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class Resnet:
    """The network as float, as a trainable constrained one, and as an integer program, with one
    batch of random images."""

    def __init__(self, macro: Macro, batch: int = 128) -> None:
        rng, self.norm = np.random.default_rng(0), Norm(np.full(3, 1 / 255), np.zeros(3))
        self.images = Images(
            rng.integers(0, 256, (batch, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, batch)
        )
        feed = Feed(self.images, self.norm.mult, self.norm.add)
        self.x, self.labels = feed.real(slice(None)), feed.labels(slice(None))
        self.macro, self.network = macro, capture(resnet20().eval(), (3, 32, 32))
        self.rewritten = rewrite(self.network, macro)
        calibrate(self.rewritten, self.x, self.network)

    def runner(self) -> Callable[[], object]:
        program = freeze(
            self.rewritten, self.macro, peaks_of(self.rewritten, [self.x]), self.norm, True
        )
        run, pixels = Runner(program), torch.from_numpy(self.images.x)
        return lambda: run(pixels)

    def float_forward(self) -> None:
        with torch.no_grad():
            self.network.eval()(self.x)

    def step(
        self, network: nn.Module, relaxed: bool = False, teacher: Teacher | None = None
    ) -> Callable[[], None]:
        optim = optimizer(network, Recipe().weight_decay)
        for n, layer in enumerate(read_layers(network).values()):
            layer.relaxation = Relaxation(TAU, n) if relaxed else None
        loss = partial(teacher.lesson, index=np.arange(len(self.labels))) if teacher else untaught

        def one() -> None:
            network.train()
            optim.zero_grad(set_to_none=True)
            loss(network, self.x, self.labels).backward()
            optim.step()

        return one


def network_evaluation(threads: int, repeats: int) -> list[Row]:
    net = Resnet(Macro())
    return ratios(
        "ResNet-20, batch 128, wl 9",
        threads,
        {"float": net.float_forward, "integer program": net.runner()},
        repeats,
    )


def network_step(threads: int, repeats: int) -> list[Row]:
    rows = []
    for relaxed, name in ((False, "hard"), (True, "relaxed")):
        net = Resnet(Macro())
        forms = {
            "float": net.step(net.network),
            f"through the ADC, {name}": net.step(net.rewritten, relaxed),
        }
        rows += ratios("ResNet-20, batch 128, wl 9", threads, forms, repeats)
    return rows


def epoch(threads: int, repeats: int) -> list[Row]:
    """Minutes of an epoch, as its steps are timed: the images that are trained on when a tenth of
    CIFAR-10 is held out, in full batches."""
    hard, free = Resnet(Macro()), Resnet(Macro(levels="free"))
    noisy, taught = Resnet(Macro()), Resnet(Macro())
    forms = {
        "float": hard.step(hard.network), "hard": hard.step(hard.rewritten), "relaxed": noisy.step(noisy.rewritten, True), "hard, learned free levels": free.step(free.rewritten),
        "hard, float teacher matched": taught.step(taught.rewritten, teacher=Teacher(taught.network, 0.9, 2.0, match=100.0)),
    }  # fmt: skip
    steps = EPOCH_IMAGES // len(hard.labels)
    return [
        {
            "setting": f"ResNet-20, {steps} steps of batch 128, wl 9",
            "threads": threads,
            "form": n,
            "minutes": round(steps * s / 60, 2),
        }
        for n, s in timed(forms, repeats).items()
    ]


def memory(threads: int, repeats: int) -> list[Row]:
    """Peak resident memory of three steps, the median over processes of their own, forms in turn:
    what glibc keeps of freed memory differs from one process to the next by more than a step does,
    so it is measured once more with an allocator that gives it back at once."""
    settings = {
        "": (repeats, {}),
        ", freed memory given back at once": (
            min(repeats, 3),
            {"MALLOC_TRIM_THRESHOLD_": "1000000"},
        ),
    }
    rows = []
    for setting, (times, env) in settings.items():
        peaks: dict[str, list[float]] = {
            "float": [],
            "through the ADC, hard": [],
            "through the ADC, relaxed": [],
        }
        for _ in range(times):
            for form, found in peaks.items():
                command = [sys.executable, __file__, "--peak", form, "--threads", str(threads)]
                found.append(
                    float(
                        subprocess.run(
                            command,
                            env={**os.environ, **env},
                            check=True,
                            capture_output=True,
                            text=True,
                        ).stdout
                    )
                )
        base = median(peaks.pop("float"))
        rows += [
            {
                "setting": f"ResNet-20, batch 128, wl 9{setting}",
                "threads": threads,
                "form": n,
                "mb_above_float": round(median(p) - base, 1),
                "float_mb": round(base, 1),
                "peaks_mb": p,
            }
            for n, p in peaks.items()
        ]
    return rows


def peak(form: str) -> float:
    """Megabytes that this process held at most, in three steps of one form; Linux counts them
    (getrusage would count the parent's, too)."""
    net = Resnet(Macro())
    step = (
        net.step(net.network)
        if form == "float"
        else net.step(net.rewritten, form.endswith("relaxed"))
    )
    for _ in range(3):
        step()
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024


def first_use(threads: int, repeats: int) -> list[Row]:
    """Seconds of a first training call with an empty folder for compiled code, and with a full one."""
    code = (
        "import time, numpy as np; import examples_bench as b; l = "
        "b.Layer(b.Macro(), batch=4); t = time.perf_counter(); "
        "l.step(l.spec, 1); l.forward(1); print(time.perf_counter() - t)"
    )
    rows, folder = [], Path("build") / f"numba-{os.getpid()}"
    for form in ("compiled", "from the cache"):
        env = {**os.environ, "NUMBA_CACHE_DIR": str(folder)}
        loader = (
            "import sys, importlib.util as u; s = "
            f"u.spec_from_file_location('examples_bench', {__file__!r}); m = "
            "u.module_from_spec(s); sys.modules['examples_bench'] = m; "
            f"s.loader.exec_module(m); {code}"
        )
        out = subprocess.run(
            [sys.executable, "-c", loader], env=env, check=True, capture_output=True, text=True
        ).stdout
        rows.append(
            {
                "setting": "first forward and step of a process",
                "threads": 1,
                "form": form,
                "seconds": round(float(out), 2),
            }
        )
    return rows


GROUPS: dict[str, tuple[Callable[[int, int], list[Row]], tuple[int, ...], str]] = {
    "forward": (
        layer_forward,
        (1, 2),
        "Forward, one layer: 64 -> 64 channels, 3x3, 16x16, batch 64, 4/4 "
        "bits, 4-bit ADC; times F.conv2d (NCHW, float32)",
    ),
    "step": (
        layer_step,
        (1, 2),
        "Training step, the same layer: forward and backward with partial "
        "sums computed again; times F.conv2d forward and backward",
    ),
    "plans": (
        other_plans,
        (1,),
        "Other plans: the cost of one read, times a uniform signed read with a step per layer",
    ),
    "evaluation": (
        network_evaluation,
        (1, 2),
        "A whole network: the integer program, times the float model",
    ),
    "training": (
        network_step,
        (1, 2),
        "A whole network: a fine-tuning step with AdamW, times the same step of the float model",
    ),
    "epoch": (epoch, (2,), "Minutes of an epoch of fine-tuning, beside the float network's"),
    "memory": (memory, (2,), "Peak memory of a fine-tuning step, in MB above the float step's"),
    "fallback": (
        fallback,
        (1,),
        "Without compiled kernels: chunked torch, forward, the layer of the "
        "first table; times F.conv2d",
    ),
    "scaling": (
        scaling,
        (1, 2),
        "Scaling: nanoseconds a read (3x3, 16x16), 8-bit dot products where the processor has them",
    ),
    "first use": (first_use, (1,), "First use of a process, in seconds"),
}


# -- the report ------------------------------------------------------------------------------------
def machine() -> dict[str, object]:
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "dot8": vector.DOT8,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def table(rows: list[Row]) -> list[str]:
    """Markdown: settings and forms down, threads across."""
    value = next(
        key
        for key in ("ratio", "ns_per_read", "mb_above_float", "minutes", "seconds")
        if key in rows[0]
    )
    threads = sorted({r["threads"] for r in rows})
    found = {(r["setting"], r["form"], r["threads"]): r for r in rows}
    lines = [
        "| setting | form | " + " | ".join(f"{t} thread{'s' * (t > 1)}" for t in threads) + " |",
        "|" + "---|" * (2 + len(threads)),
    ]
    for setting, form in dict.fromkeys((r["setting"], r["form"]) for r in rows):
        cells = [found[setting, form, t][value] for t in threads if (setting, form, t) in found]
        lines.append(
            f"| {setting} | {form} | "
            + " | ".join(f"{c:g}" if value != "ratio" else f"{c:.2f}" for c in cells)
            + " |"
        )
    return lines


def report(result: dict) -> str:
    m = result["machine"]
    lines = [
        "# Performance", "",
        f"Written by `make bench` (tools/bench.py) on {m['processor']}, " f"{m['cores']} cores, torch {m['torch']}, Python {m['python']}; " f"8-bit dot products: {'yes' if m['dot8'] else 'no'}.",
        f"Ratios of medians of {result['repeats']} runs, all forms of a " "table in turn in one process. Forms are exact: their codes are the " "ADC's own to the last one.", "",
    ]  # fmt: skip
    for name, (_, _, title) in GROUPS.items():
        if name in result["rows"]:
            lines += [f"## {title}", "", *table(result["rows"][name]), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--report", type=Path, default=Path("docs/performance.md"))
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        torch.set_num_threads(args.threads)
        print(peak(args.peak))
        return
    old = json.loads(args.json.read_text())["rows"] if args.json.exists() else {}
    result = {"machine": machine(), "repeats": args.repeats, "rows": old}
    for name in args.only:
        measure, threads, _ = GROUPS[name]
        result["rows"][name] = []
        for count in threads:
            torch.set_num_threads(count)
            result["rows"][name] += measure(count, args.repeats)
        print(f"## {name}", *table(result["rows"][name]), sep="\n", flush=True)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.json, json.dumps(result, indent=1).encode(), force=True)
    write_atomic(args.report, report(result).encode(), force=True)


if __name__ == "__main__":
    main()
