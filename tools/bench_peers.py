"""Time public ways to simulate the same reads, beside rqtool's kernels and F.conv2d: `make
bench-peers`.

    python tools/bench_peers.py [--repeats 7] [--report docs/performance-peers.md]

The layer is 64 -> 64 channels, 3x3, 16x16, batch 16. The two plain torch forms compute rqtool's
codes (this is checked); aihwkit-lightning is set to tiles of as many rows and an ADC of as many
steps, its own arithmetic otherwise. It is installed in an environment of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from bench import Layer, Row, machine, ratios, table
from torch import nn
from torch.nn import functional as F

from rqtool.hardware.macro import Macro
from rqtool.storage import write_atomic

PEER = "aihwkit-lightning"
BATCH = 16


def convert(p: torch.Tensor, layer: Layer) -> torch.Tensor:
    """code - zero of float32 partial sums, with a straight-through gradient."""
    spec = layer.spec
    u = p * float(spec.rate[0, 0])
    q = torch.floor(u + 0.5).clamp(float(spec.lo[0, 0]), float(spec.hi[0, 0]))
    clipped = u.clamp(float(spec.lo[0, 0]), float(spec.hi[0, 0]))
    return clipped + (q - clipped).detach()


def tile_loop(x: torch.Tensor, w: torch.Tensor, layer: Layer) -> torch.Tensor:
    """One matrix product and one conversion a tile."""
    rows = F.unfold(x, 3, padding=1)
    return sum(convert(w[:, a:b] @ rows[:, a:b], layer) for a, b in layer.plan.tiles)


def all_at_once(x: torch.Tensor, w: torch.Tensor, layer: Layer) -> torch.Tensor:
    """All partial sums as one tensor [N, T, O, L]."""
    wl, tiles = layer.macro.wl, len(layer.plan.tiles)
    rows = F.unfold(x, 3, padding=1)
    extra = tiles * wl - rows.shape[1]
    rows = F.pad(rows, (0, 0, 0, extra)).view(x.shape[0], tiles, wl, -1)
    weights = F.pad(w, (0, extra)).view(w.shape[0], tiles, wl).transpose(0, 1)
    return convert(weights @ rows, layer).sum(1)


def peer_layer(layer: Layer) -> nn.Module | None:
    """aihwkit-lightning's convolution with tiles of as many rows and as many output steps; None
    where it is not installed."""
    try:
        from aihwkit_lightning.nn import AnalogConv2d
        from aihwkit_lightning.simulator.configs import TorchInferenceRPUConfig
    except ImportError:
        return None
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = layer.macro.wl
    config.forward.inp_res, config.forward.out_res, config.forward.out_bound = (
        2**4 - 2,
        2**4 - 2,
        10.0,
    )
    (
        config.pre_post.input_range.enable,
        config.pre_post.input_range.init_from_data,
        config.pre_post.input_range.init_value,
    ) = True, 0, 15.0
    return AnalogConv2d(layer.channels, layer.channels, 3, padding=1, bias=False, rpu_config=config)


def forms(layer: Layer, threads: int, backward: bool) -> dict[str, Callable[[], object]]:
    """Every way to run the layer once, the yardstick first."""
    x = torch.from_numpy(layer.codes[:, :, 1:-1, 1:-1].astype("float32"))
    w = torch.from_numpy(layer.weight.astype("float32"))
    gy = torch.from_numpy(layer.gy)
    peer = peer_layer(layer)

    def run(call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        def forward() -> None:
            with torch.no_grad():
                call(x, w)

        def both() -> None:
            a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
            y = call(a, b)
            y.backward(gy.view(y.shape))

        return both if backward else forward

    convolution = layer.convolutions()[int(backward)]
    ours = (
        (lambda: layer.step(layer.spec, threads)) if backward else (lambda: layer.forward(threads))
    )
    found = {
        "F.conv2d": convolution,
        "rqtool": ours,
        "torch, loop over tiles": run(lambda a, b: tile_loop(a, b, layer)),
        "torch, all partial sums at once": run(lambda a, b: all_at_once(a, b, layer)),
    }
    if peer is not None:
        peer.train(backward)
        found[f"{PEER} {metadata.version(PEER)}"] = run(lambda a, b: peer(a))
    return found


def check(layer: Layer) -> None:
    """The plain torch forms give rqtool's numbers."""
    x, w = (
        torch.from_numpy(layer.codes[:, :, 1:-1, 1:-1].astype("float32")),
        torch.from_numpy(layer.weight.astype("float32")),
    )
    from rqtool.kernels import cpu

    expected = torch.from_numpy(cpu.forward(layer.codes, layer.weight, layer.spec, 1)).flatten(2)
    for form in (tile_loop, all_at_once):
        assert torch.equal(form(x, w, layer), expected), form.__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--report", type=Path, default=Path("docs/performance-peers.md"))
    args = parser.parse_args()
    m, lines = machine(), []
    for backward, title in ((False, "Forward"), (True, "Forward and backward")):
        rows: list[Row] = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for wl in (9, 128):
                layer = Layer(Macro(wl=wl), batch=BATCH)
                check(layer)
                rows += ratios(f"wl {wl}", threads, forms(layer, threads, backward), args.repeats)
        lines += [f"## {title}, times F.conv2d", "", *table(rows), ""]
        print("\n".join(lines[-len(rows) - 6 :]), flush=True)
    head = [
        "# Beside other tools", "",
        "Written by `make bench-peers` (tools/bench_peers.py) on " f"{m['processor']}, {m['cores']} cores, torch {m['torch']}. One " f"layer: 64 -> 64 channels, 3x3, 16x16, batch {BATCH},",
        f"4/4 bits, 4-bit ADC; ratios of medians of {args.repeats} runs, all " "forms in turn in one process. The plain torch forms give rqtool's " f"codes; {PEER} has as many rows",
        "a tile and ADC steps, with its own arithmetic.", "",
    ]  # fmt: skip
    write_atomic(args.report, "\n".join(head + lines).encode(), force=True)


if __name__ == "__main__":
    main()
