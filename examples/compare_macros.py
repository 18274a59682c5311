"""One model on several macros: what each costs in reads, and what it leaves of the accuracy.

    python examples/compare_macros.py                          all macros below
    python examples/compare_macros.py default nthu-2019        some of them
    python examples/compare_macros.py --epochs 1               fine-tuned instead of calibrated only
    python examples/compare_macros.py --model m.pt --arch package.module:factory --data images.npz

The first table needs no data: reads and cycles follow from the shapes of the layers. The second one
calibrates the model on each macro and measures top-1 of the integer program. Compare macros at
the same reads per MAC, or say how many more one of them needs.
"""

from __future__ import annotations

import argparse

import rqtool

# A macro is a preset, and whatever differs from it. Add your own chip here.
MACROS = {
    "default": rqtool.Macro(),
    "column steps": rqtool.Macro(granularity="column"),
    "spread rows": rqtool.Macro(granularity="column", pack="spread"),
    "split signs": rqtool.Macro(sign_scheme="split"),
    "bit-serial": rqtool.Macro(dac_bits=1),
    "128 wordlines": rqtool.Macro(wl=128, adc_bits=6, granularity="column"),
    "nthu-2019": rqtool.make_macro("nthu-2019"),
}


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Text in columns: the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for name, *values in (head, *rows):
        cells = [v.rjust(w) for v, w in zip(values, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def cost(name: str, given: argparse.Namespace) -> tuple[str, ...]:
    """A row of the first table."""
    macro = MACROS[name]
    planned = rqtool.plan(given.model, macro, arch=given.arch, input_shape=given.input)
    totals = planned.totals
    tiles = max(row["tiles"] for row in planned.layers)
    return (
        name,
        str(macro.wl),
        str(macro.adc_bits),
        f"{tiles}",
        f"{totals['reads']:,}",
        f"{totals['cycles']:,}",
        f"{totals['reads_per_mac']:.3f}",
    )


def accuracy(name: str, given: argparse.Namespace) -> tuple[str, ...]:
    """A row of the second table. No file is written, and no twin is trained."""
    result = rqtool.quantize(
        given.model,
        given.data,
        MACROS[name],
        arch=given.arch,
        input_shape=given.input,
        recipe=rqtool.Recipe(epochs=given.epochs),
        twin=False,
    )
    clipped = max(row["clip_rate"] or 0 for row in result.layers)
    loss = result.float_top1 - result.tuned_top1
    return name, f"{result.tuned_top1:.2f}", f"{loss:.2f}", f"{100 * clipped:.2f}"


def shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare macros by reads and accuracy.")
    parser.add_argument("macros", nargs="*", metavar="MACRO", help=", ".join(MACROS))
    parser.add_argument("--model", default="demo", help="a file or a built-in network")
    parser.add_argument("--arch", help="package.module:factory of a state dictionary")
    parser.add_argument("--input", type=shape, metavar="C,H,W", help="shape of one input")
    parser.add_argument("--data", default="demo", help="labelled images")
    parser.add_argument("--epochs", type=int, default=0, help="epochs of fine-tuning (default 0)")
    given = parser.parse_args()
    names = given.macros or list(MACROS)
    if unknown := [name for name in names if name not in MACROS]:
        parser.error(f"no macro {unknown[0]!r}; use some of {', '.join(MACROS)}")

    head = ("macro", "rows on", "ADC bits", "tiles", "reads", "cycles", "reads/MAC")
    print(table(head, [cost(name, given) for name in names]), flush=True)
    head = ("macro", "top-1 %", "loss", "clipped % at most")
    print("\n" + table(head, [accuracy(name, given) for name in names]))


if __name__ == "__main__":
    main()
