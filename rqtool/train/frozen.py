"""A trained network handed to program/freeze.py: its learned numbers as plain arrays."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from rqtool.hardware.macro import Macro
from rqtool.mapping.assign import Macros
from rqtool.model.network import Network
from rqtool.program.freeze import Freezer, Frozen, Norm
from rqtool.program.ir import Program
from rqtool.program.numbers import Numbers
from rqtool.train.layers import ReadLayer
from rqtool.train.rewrite import read_layers


@torch.no_grad()
def frozen_layer(layer: ReadLayer) -> Frozen:
    """The integers of one layer."""
    g, macro = layer.plan.geometry, layer.plan.macro
    weight = (
        layer.weight_codes()
        .to(torch.int8)
        .view(g.columns, g.channels // g.groups, *g.kernel)
        .numpy()
    )
    adc = layer.adc.snap()
    consts = adc.consts()
    if macro.pack == "spread":
        consts["order"] = layer.order.numpy().astype(np.int32)
    bias = np.zeros(g.columns) if layer.bias is None else layer.bias.double().numpy()
    norm = None if layer.norm is None else norm_of(layer.norm, float(layer.norm.unit))
    return Frozen(
        weight,
        int(layer.input.zero),
        float(layer.input.scale),
        layer.weights.scale.double().numpy(),
        layer.adc.unit(),
        bias,
        adc.attrs(),
        consts,
        norm,
    )


@torch.no_grad()
def norm_of(module: nn.Module, unit: float = 1.0) -> Norm:
    """Batch norm of values in units of `unit`, in eval mode, as mult and add."""
    mult = 1 / torch.sqrt(module.running_var.double() + module.eps)
    if module.weight is not None:
        mult = mult * module.weight.double()
    add = -module.running_mean.double() * mult + (
        0 if module.bias is None else module.bias.double()
    )
    return Norm((mult / unit).numpy(), add.numpy())


@torch.no_grad()
def peaks_of(network: Network, batches: Iterable[torch.Tensor]) -> dict[str, float]:
    """The largest magnitude of every value of the graph over real-valued batches."""
    peaks: dict[str, float] = {}

    def watch(name: str, value: torch.Tensor) -> None:
        peaks[name] = max(peaks.get(name, 0.0), float(value.abs().max()))

    network.eval()
    for x in batches:
        network(x, watch)
    return peaks


def lower(
    network: Network, macro: Macro | Macros, peaks: dict[str, float], pixels: Norm, whole: bool
) -> tuple[Program, Numbers]:
    """The integer program of a network, and the numbers with which train/served.py computes the
    same. peaks: as from `peaks_of` on calibration images, for the ranges of the grids; pixels: real
    = pixel * mult + add; whole: pixels are uint8, not float32."""
    layers = {name: frozen_layer(layer) for name, layer in read_layers(network).items()}
    norms = {
        n.name: norm_of(network.layer(n.name)) for n in network.graph.nodes if n.op == "batch_norm"
    }
    return Freezer(network.graph, macro, layers, norms, peaks).run(pixels, whole)


def freeze(
    network: Network, macro: Macro | Macros, peaks: dict[str, float], pixels: Norm, whole: bool
) -> Program:
    """The integer program alone; arguments as in `lower`."""
    return lower(network, macro, peaks, pixels, whole)[0]
