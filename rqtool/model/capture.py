"""From any torch model to a Network: torch.export, then each aten operation lifted to a named node
with trainable parameters.

A module swap sees only nn.Conv2d and nn.Linear objects; the exported graph sees what runs,
functional convolutions and tied weights included. `LIFT` is the whole list of what is understood.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from math import inf
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from rqtool.errors import InputError, RqError, escaped
from rqtool.mapping.plan import Geometry
from rqtool.model import audit
from rqtool.model.graph import Graph, Node
from rqtool.model.network import Conv, Network


@dataclass
class Lifter:
    """The graph under construction; `value` maps fx nodes to value names, `tensors` placeholder
    names to parameters."""

    tensors: dict[fx.Node, tuple[str, torch.Tensor]]
    nodes: list[Node] = field(default_factory=list)
    layers: dict[str, nn.Module] = field(default_factory=dict)
    value: dict[fx.Node, str] = field(default_factory=dict)

    def emit(
        self,
        op: str,
        name: str,
        inputs: tuple[str, ...],
        shape: tuple[int, ...],
        attrs: dict[str, Any],
        module: nn.Module | None = None,
    ) -> str:
        """Add a node and say its name: `name`, or `name@2` where a layer is used twice."""
        taken = {n.name for n in self.nodes}
        unique, n = name, 1
        while unique in taken:
            n += 1
            unique = f"{name}@{n}"
        self.nodes.append(
            Node(unique, op, inputs, tuple(shape), attrs, None if module is None else unique)
        )
        if module is not None:
            self.layers[unique] = module
        return unique

    def parameter(self, node: Any, what: str) -> tuple[str, torch.Tensor]:
        """(name, tensor) of a parameter or buffer; computed weights are refused, for they would
        stay float."""
        if node not in self.tensors:
            raise InputError(
                f"{what} uses a weight that is computed while the model runs, or is "
                "neither parameter nor buffer; "
                "store the computed weight (for example with remove_parametrizations) and load that"
            )
        return self.tensors[node]

    def weight(self, node: Any, what: str) -> nn.Parameter:
        """The same for what a layer holds; a buffer stays as it is in training."""
        tensor = self.parameter(node, what)[1]
        return (
            tensor
            if isinstance(tensor, nn.Parameter)
            else nn.Parameter(tensor, requires_grad=False)
        )


@dataclass
class Call:
    """One aten call: arguments by name, per-sample shapes, and the lifter to emit into."""

    lifter: Lifter
    node: fx.Node
    args: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return sample_shape(self.node)

    def input(self, name: str = "self") -> str:
        """The value of an argument; refused where it does not come from the image (a parameter, a
        constant)."""
        return (
            self.lifter.value[self.args[name]]
            if self.args[name] in self.lifter.value
            else _refuse(self)
        )

    def input_shape(self, name: str = "self") -> tuple[int, ...]:
        return sample_shape(self.args[name]) if self.input(name) else ()

    def emit(
        self,
        op: str,
        inputs: tuple[str, ...] | None = None,
        shape: tuple[int, ...] | None = None,
        **attrs: Any,
    ) -> str:
        inputs = (self.input(),) if inputs is None else inputs
        return self.lifter.emit(
            op, self.node.name, inputs, self.shape if shape is None else shape, attrs
        )

    def reshape(self, value: str, shape: tuple[int, ...]) -> str:
        return self.lifter.emit("reshape", self.node.name, (value,), shape, {"shape": list(shape)})


def at(node: fx.Node) -> str:
    """An operation as a user finds it: its name, and in brackets the layer and the line of the
    user's own code it comes from."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]).removeprefix("L['self']").strip(".") if stack else ""
    line = _user_line(node.meta.get("stack_trace") or "")
    places = [f"layer {escaped(path)}"] * bool(path) + [line] * bool(line)
    return escaped(node.name) + (f" ({', '.join(places)})" if places else "")


def _user_line(trace: str) -> str:
    """The innermost line of a stack trace that is neither torch's nor ours; "" where there is none."""
    frames = [
        (file, number)
        for file, number in re.findall(r'File "([^"]+)", line (\d+)', trace)
        if not file.startswith((*OWN_CODE, "<"))
    ]
    return f"{escaped(Path(frames[-1][0]).name)} line {frames[-1][1]}" if frames else ""


OWN_CODE = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def sample_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a value without its batch axis. Raises InputError where the first axis is not
    the batch."""
    shape = node.meta["val"].shape
    if (
        not shape or not isinstance(shape[0], torch.SymInt) or not shape[0].node.expr.is_Symbol
    ):  # 2 * batch is no batch either
        raise InputError(
            f"{at(node)}: its first axis is not the batch of images; the model "
            "mixes images or drops the batch, which a macro cannot"
        )
    return tuple(int(n) for n in shape[1:])


def pair(x: Any, default: Any = None) -> tuple[int, int]:
    """(vertical, horizontal) of an aten size argument: one number, two, or none."""
    values = default if x is None or x == [] else x
    values = [values] if isinstance(values, int) else list(values)
    return (values[0], values[0]) if len(values) == 1 else tuple(values)


# -- layers with weights ---------------------------------------------------------------------------
def _layer(call: Call, geometry: Geometry) -> str:
    lifter, weight_node, bias_node = call.lifter, call.args["weight"], call.args.get("bias")
    _check_layer(call)
    weight_name, weight = (
        lifter.parameter(weight_node, at(call.node))[0],
        lifter.weight(weight_node, at(call.node)),
    )
    bias = None if bias_node is None else lifter.weight(bias_node, at(call.node))
    name = weight_name.removesuffix(".weight")
    return lifter.emit(
        "conv",
        name,
        (call.input("input"),),
        call.shape,
        {"geometry": geometry.to_dict()},
        Conv(geometry, weight, bias),
    )


def _check_layer(call: Call) -> None:
    """Refuse weights that are empty or no float32, and a bias that is not one number for each
    output."""
    weight = call.lifter.parameter(call.args["weight"], at(call.node))[1]
    bias = (
        None
        if call.args.get("bias") is None
        else call.lifter.parameter(call.args["bias"], at(call.node))[1]
    )
    if weight.numel() == 0:
        raise InputError(
            f"{at(call.node)}: its weight of shape {list(weight.shape)} is "
            "empty; give a layer with inputs and outputs"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise InputError(
            f"{at(call.node)}: its bias has shape {list(bias.shape)}, not one "
            f"number for each of {weight.shape[0]} outputs; store it in that "
            "shape"
        )


def _conv(call: Call) -> str:
    a, weight = call.args, call.lifter.parameter(call.args["weight"], at(call.node))[1]
    dims = weight.dim() - 2
    kernel = tuple(weight.shape[2:])
    stride, dilation = ([*_sized(a[name], dims)] for name in ("stride", "dilation"))
    padding = a["padding"]
    if padding == "valid":
        padding = 0
    elif padding == "same":
        padding = _same(call, kernel, dilation)
    flat = {1: lambda v, one: (one, *v), 2: lambda v, one: tuple(v)}[dims]
    geometry = Geometry(
        weight.shape[1] * a["groups"],
        weight.shape[0],
        flat(kernel, 1),
        flat(stride, 1),
        flat(_sized(padding, dims), 0),
        flat(dilation, 1),
        a["groups"],
        f"conv{dims}d",
    )
    return _layer(call, geometry)


def _sized(x: Any, dims: int) -> tuple[int, ...]:
    values = [x] if isinstance(x, int) else list(x)
    return tuple(values * dims if len(values) == 1 else values)


def _same(call: Call, kernel: tuple[int, ...], dilation: list[int]) -> list[int]:
    """The symmetric padding that keeps the size; an odd total is padded by a node of its own,
    behind."""
    totals = [d * (k - 1) for k, d in zip(kernel, dilation)]
    if any(t % 2 for t in totals):
        pads = [[0, 0]] + [[t // 2, t - t // 2] for t in totals]
        shape = tuple(n + sum(p) for n, p in zip(call.input_shape("input"), pads))
        padded = call.lifter.emit(
            "pad", f"{call.node.name}.pad", (call.input("input"),), shape, {"pads": pads}
        )
        call.lifter.value[call.args["input"]] = (
            padded  # for this call only: the walk puts the map back
        )
        return [0] * len(kernel)
    return [t // 2 for t in totals]


def _linear(call: Call) -> str:
    weight = call.lifter.parameter(call.args["weight"], at(call.node))[1]
    if weight.dim() != 2:
        raise InputError(
            f"{at(call.node)}: its weight has shape {list(weight.shape)}, not "
            "[outputs, inputs]; store it as a matrix, for example with "
            "unsqueeze(0)"
        )
    return _layer(call, Geometry(weight.shape[1], weight.shape[0], kind="linear"))


def _batch_norm(call: Call) -> str:
    a, lifter = call.args, call.lifter
    if a["running_mean"] is None:
        raise InputError(
            f"{at(call.node)}: batch norm without running statistics depends on "
            "the other images of a batch; use track_running_stats=True"
        )
    if len(call.shape) not in (1, 2, 3):
        raise InputError(
            f"{at(call.node)}: batch norm of values of shape {list(call.shape)} "
            "is not supported; only of vectors, signals and images"
        )
    mean_name, mean = lifter.parameter(a["running_mean"], at(call.node))
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d}[len(call.shape)](
        mean.numel(), eps=a["eps"], momentum=a["momentum"]
    )
    norm.running_mean, norm.running_var = mean, lifter.parameter(a["running_var"], at(call.node))[1]
    for role in ("weight", "bias"):
        if a[role] is not None:
            setattr(norm, role, lifter.weight(a[role], at(call.node)))
    attrs = {"features": mean.numel(), "eps": a["eps"], "momentum": a["momentum"]}
    return lifter.emit(
        "batch_norm",
        mean_name.removesuffix(".running_mean"),
        (call.input("input"),),
        call.shape,
        attrs,
        norm,
    )


# -- pools -----------------------------------------------------------------------------------------
def _pool(call: Call, op: str, **attrs: Any) -> str:
    """A 2-d pool, or a 1-d one between two reshapes. attrs are 2-d already."""
    shape, out = call.input_shape(), call.shape
    if len(shape) == 3:
        return call.emit(op, **attrs)
    pooled = call.emit(
        op, (call.reshape(call.input(), (shape[0], 1, shape[1])),), (out[0], 1, out[1]), **attrs
    )
    return call.reshape(pooled, out)


def _check_pool(call: Call) -> None:
    """Refuse a pool that takes the batch axis for channels: torch reads values without a channel
    axis as one image."""
    dims = (
        2
        if "2d" in _short(call.node)
        else 1
        if "1d" in _short(call.node)
        else len(call.input_shape()) - 1
    )
    if len(call.input_shape()) != dims + 1:
        raise InputError(
            f"{at(call.node)}: pools values of shape {list(call.input_shape())}, "
            "which have no channels; add that axis, for example with "
            "x.unsqueeze(1)"
        )


def _window(call: Call) -> dict[str, tuple[int, int]]:
    """kernel, stride, padding, dilation of a pool as 2-d pairs."""
    a = call.args
    flat = (
        (lambda v, one: (one, v[0])) if len(call.input_shape()) == 2 else (lambda v, one: tuple(v))
    )
    kernel = pair(a["kernel_size"])
    values = {
        "kernel": kernel,
        "stride": pair(a["stride"], kernel),
        "padding": pair(a["padding"]),
        "dilation": pair(a.get("dilation", 1)),
    }
    return {name: flat(v, 0 if name == "padding" else 1) for name, v in values.items()}


def _max_pool(call: Call) -> str:
    _check_pool(call)
    w = _window(call)
    sizes = ((1, *call.input_shape()) if len(call.input_shape()) == 2 else call.input_shape())[-2:]
    outs = ((1, *call.shape) if len(call.shape) == 2 else call.shape)[-2:]
    behind = [
        max(p, (o - 1) * s + d * (k - 1) + 1 - n - p)
        for n, o, k, s, p, d in zip(
            sizes, outs, *(w[i] for i in ("kernel", "stride", "padding", "dilation"))
        )
    ]
    pads = [[p, b] for p, b in zip(w["padding"], behind)]  # ceil_mode reaches further behind
    return _pool(
        call,
        "maxpool",
        kernel=list(w["kernel"]),
        stride=list(w["stride"]),
        padding=pads,
        dilation=list(w["dilation"]),
    )


def _avg_pool(call: Call) -> str:
    _check_pool(call)
    if call.args["ceil_mode"] or call.args.get("divisor_override"):
        raise InputError(
            f"{at(call.node)}: an average pool with ceil_mode or "
            "divisor_override is not supported; use floor mode and the window's "
            "own size"
        )
    w = _window(call)
    return _pool(
        call,
        "avgpool",
        kernel=list(w["kernel"]),
        stride=list(w["stride"]),
        padding=list(w["padding"]),
        include_pad=call.args["count_include_pad"],
    )


def _adaptive_pool(call: Call) -> str:
    _check_pool(call)
    sizes, outs = call.input_shape()[1:], call.shape[1:]
    if any(n % o for n, o in zip(sizes, outs)):
        raise InputError(
            f"{at(call.node)}: {escaped(list(sizes))} does not divide evenly "
            f"into {escaped(list(outs))} for an adaptive average pool; resize "
            "the images"
        )
    kernel = [n // o for n, o in zip(sizes, outs)]
    kernel = [1] * (2 - len(kernel)) + kernel
    return _pool(call, "avgpool", kernel=kernel, stride=kernel, padding=[0, 0], include_pad=True)


def _mean(call: Call) -> str:
    shape = call.input_shape()
    axes = sorted((a % (len(shape) + 1)) - 1 for a in call.args["dim"] or [])
    if axes != list(range(1, len(shape))) or len(shape) > 3 or len(shape) < 2:
        raise InputError(
            f"{at(call.node)}: a mean over axes {escaped(call.args['dim'])} is "
            "not supported; only a mean over all positions of an image is"
        )
    kernel = ([1] * (2 - len(axes))) + list(shape[1:])
    image = call.input()
    if len(shape) == 2:
        image = call.reshape(image, (shape[0], 1, shape[1]))
    pooled = call.emit(
        "avgpool",
        (image,),
        (shape[0], 1, 1),
        kernel=kernel,
        stride=kernel,
        padding=[0, 0],
        include_pad=True,
    )
    return call.reshape(pooled, call.shape)


# -- shapes ----------------------------------------------------------------------------------------
def _reshape(call: Call) -> str:
    return call.reshape(call.input(), call.shape)


def _permute(call: Call) -> str:
    rank = len(call.input_shape()) + 1
    if "dims" in call.args:
        order = [d % rank for d in call.args["dims"]]
    else:
        order = list(range(rank))
        i, j = call.args["dim0"] % rank, call.args["dim1"] % rank
        order[i], order[j] = order[j], order[i]
    if order[0] != 0:
        return _refuse(call)
    return call.emit("permute", axes=[d - 1 for d in order[1:]])


def _concat(call: Call) -> str:
    rank = len(call.shape) + 1
    if any(n not in call.lifter.value for n in call.args["tensors"]):
        return _refuse(call)
    inputs = tuple(call.lifter.value[n] for n in call.args["tensors"])
    return call.emit("concat", inputs, axis=call.args["dim"] % rank - 1)


def _pad(call: Call) -> str:
    if call.args.get("mode", "constant") != "constant" or call.args.get("value") not in (
        None,
        0,
        0.0,
    ):
        raise InputError(
            f"{at(call.node)}: only padding with zeros is supported, not mode "
            f"{escaped(call.args.get('mode'))} with value "
            f"{escaped(call.args.get('value'))}"
        )
    flat = call.args["pad"]
    pads = [[0, 0]] * (len(call.shape) - len(flat) // 2) + [
        list(flat[i : i + 2]) for i in range(len(flat) - 2, -1, -2)
    ]
    if any(n < 0 for p in pads for n in p):
        raise InputError(
            f"{at(call.node)}: padding by a negative number is not supported; slice instead"
        )
    return call.emit("pad", pads=pads)


def _slice(call: Call) -> str:
    axis = call.args["dim"] % (len(call.shape) + 1) - 1
    if axis < 0:
        return (
            call.input()
            if call.args["start"] in (None, 0)
            and (call.args["end"] is None or call.args["end"] >= 1 << 62)
            and call.args["step"] == 1
            else _refuse(call)
        )
    size = call.input_shape()[axis]
    start, stop, step = slice(call.args["start"], call.args["end"], call.args["step"]).indices(size)
    return call.emit("slice", axis=axis, start=start, stop=stop, step=step)


# -- values ----------------------------------------------------------------------------------------
def _affine(
    mult_of: Callable[[dict], float], add_of: Callable[[dict], float]
) -> Callable[[Call], str]:
    return lambda call: call.emit(
        "affine", mult=float(mult_of(call.args)), add=float(add_of(call.args))
    )


def _sum(sign: int) -> Callable[[Call], str]:
    def lift(call: Call) -> str:
        a, factor = call.args, call.args.get("alpha", 1) * sign
        if not isinstance(a["other"], fx.Node):
            return call.emit("affine", mult=1.0, add=float(a["other"] * factor))
        if a["other"] not in call.lifter.value or factor not in (1, -1):
            return _refuse(call)
        if not call.input_shape() == call.input_shape("other") == call.shape:
            raise InputError(
                f"{at(call.node)}: adds shapes {escaped(list(call.input_shape()))} "
                f"and {escaped(list(call.input_shape('other')))}; only equal shapes "
                "are supported"
            )
        return call.emit("add", (call.input(), call.input("other")), signs=[1, factor])

    return lift


def _scaled(divide: bool) -> Callable[[Call], str]:
    def lift(call: Call) -> str:
        other = call.args["other"]
        if isinstance(other, fx.Node) or (divide and other == 0):
            return _refuse(call)
        return call.emit("affine", mult=float(1 / other if divide else other), add=0.0)

    return lift


def _to(call: Call) -> str:
    dtype = call.node.meta["val"].dtype
    if dtype != torch.float32:
        raise InputError(
            f"{at(call.node)}: turns values into "
            f"{str(dtype).removeprefix('torch.')}, but a capture computes in "
            "float32; leave the conversion out"
        )
    return call.input()


def _tail(call: Call) -> str:
    if call.args["dim"] % (len(call.shape) + 1) != len(call.shape) or any(
        u.op != "output" for u in call.node.users
    ):
        raise InputError(
            f"{at(call.node)}: {_short(call.node)} is supported only over the "
            "classes at the very end of a model"
        )
    return call.emit("tail", name=_short(call.node))


def _short(node: fx.Node) -> str:
    return (
        str(node.target).split(".")[1]
        if "." in str(node.target)
        else getattr(node.target, "__name__", "")
    )


def _refuse(call: Call, cause: Exception | None = None) -> NoReturn:
    raise InputError(
        f"{at(call.node)}: the operation {escaped(call.node.target)} is not "
        "supported in this form; `rqtool ops` lists what is"
    ) from cause


LIFT: dict[str, Callable[[Call], str]] = {
    "conv1d.default": _conv, "conv1d.padding": _conv, "conv2d.default": _conv, "conv2d.padding": _conv, "linear.default": _linear,
    "batch_norm.default": _batch_norm,
    "relu.default": lambda c: c.emit("relu"), "relu_.default": lambda c: c.emit("relu"),
    "relu6.default": lambda c: c.emit("clamp", lo=0.0, hi=6.0), "relu6_.default": lambda c: c.emit("clamp", lo=0.0, hi=6.0),
    "hardtanh.default": lambda c: c.emit("clamp", lo=float(c.args["min_val"]), hi=float(c.args["max_val"])),
    "hardtanh_.default": lambda c: c.emit("clamp", lo=float(c.args["min_val"]), hi=float(c.args["max_val"])),
    "clamp.default": lambda c: c.emit("clamp", lo=-inf if c.args["min"] is None else c.args["min"], hi=inf if c.args["max"] is None else c.args["max"]),
    "add.Tensor": _sum(1), "add_.Tensor": _sum(1), "sub.Tensor": _sum(-1), "sub_.Tensor": _sum(-1),
    "mul.Tensor": _scaled(False), "mul_.Tensor": _scaled(False), "div.Tensor": _scaled(True), "div_.Tensor": _scaled(True),
    "neg.default": _affine(lambda a: -1, lambda a: 0),
    "max_pool1d.default": _max_pool, "max_pool2d.default": _max_pool, "avg_pool1d.default": _avg_pool, "avg_pool2d.default": _avg_pool,
    "adaptive_avg_pool1d.default": _adaptive_pool, "adaptive_avg_pool2d.default": _adaptive_pool, "mean.dim": _mean,
    "flatten.using_ints": _reshape, "view.default": _reshape, "reshape.default": _reshape, "_unsafe_view.default": _reshape,
    "squeeze.default": _reshape, "squeeze.dim": _reshape, "squeeze.dims": _reshape, "unsqueeze.default": _reshape, "unflatten.int": _reshape,
    "permute.default": _permute, "transpose.int": _permute,
    "cat.default": _concat, "concat.default": _concat, "pad.default": _pad, "constant_pad_nd.default": _pad, "slice.Tensor": _slice,
    "dropout.default": lambda c: c.emit("dropout", (c.input("input"),), p=c.args["p"]),
    "dropout_.default": lambda c: c.emit("dropout", p=c.args["p"]),
    "feature_dropout.default": lambda c: c.emit("dropout", (c.input("input"),), p=c.args["p"]),
    "softmax.int": _tail, "log_softmax.int": _tail,
    "contiguous.default": lambda c: c.input(), "clone.default": lambda c: c.input(), "alias.default": lambda c: c.input(),
    "detach.default": lambda c: c.input(), "to.dtype": _to,
}  # fmt: skip
# What may share the memory of its input.
VIEWS = {
    "flatten.using_ints", "view.default", "reshape.default", "_unsafe_view.default", "squeeze.default", "squeeze.dim", "squeeze.dims", "unsqueeze.default", "unflatten.int",
    "permute.default", "transpose.int", "slice.Tensor", "alias.default", "detach.default", "contiguous.default", "to.dtype", "dropout.default", "feature_dropout.default",
}  # fmt: skip


# -- the walk --------------------------------------------------------------------------------------
def capture(model: nn.Module, input_shape: tuple[int, ...]) -> Network:
    """The model as a Network that computes the same, shares its parameters and can be trained; in
    eval mode, float32.

    input_shape: one input without batch. Raises InputError for models that torch.export or the
    operation list cannot take, or that have no conv or linear layer; CoverageError (from the audit)
    where weight-bearing work would be left out.
    """
    if 0 in input_shape:
        raise InputError(
            f"an input of shape {list(input_shape)} is empty; give sizes of at least 1"
        )
    exported = _export(model, input_shape)
    network = _lift(exported).eval()
    if not network.graph.convs():
        raise InputError(
            "the model has no convolution and no linear layer, so there is "
            "nothing for a macro to do; check the model file"
        )
    _compare(model, network, input_shape)
    audit.check(model, network, input_shape)
    return network


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings, the log and the half-built graphs that torch.export writes before it
    raises: the exception says it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _first_line(e: Exception) -> str:
    return escaped(str(e).strip().split("\n")[0][:200])


def _export(model: nn.Module, shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    if type(model).forward is nn.Module.forward:
        raise InputError(
            f"the model, a {escaped(type(model).__name__)}, has no forward "
            "method, so it computes nothing; give the network that does"
        )
    was_training = model.training
    try:
        with _quiet():
            return torch.export.export(
                model.train(),
                (torch.zeros(2, *shape),),
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            )
    except Exception as e:  # torch.export raises many kinds; the reason is its first line
        raise InputError(
            f"the model cannot run on inputs of shape {list(shape)}, or "
            f"torch.export cannot follow it: {_first_line(e)}"
        ) from e
    finally:
        model.train(was_training)


def _lift(exported: torch.export.ExportedProgram) -> Network:
    signature, graph = exported.graph_signature, exported.graph
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    state = {**dict(exported.named_parameters()), **dict(exported.named_buffers())}
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    lifter = Lifter(
        {n: (names[n.name], state[names[n.name]]) for n in placeholders if n.name in names}
    )
    inputs = [n for n in placeholders if n.name in signature.user_inputs]
    order = {n: i for i, n in enumerate(graph.nodes)}
    lifter.value[inputs[0]] = "input"
    _refuse_missing(graph, inputs[0])
    for node in graph.nodes:
        if node.op == "call_function":
            _lift_call(lifter, node, order)
    output = _single_output(lifter, graph.output_node())
    return Network(
        Graph("input", sample_shape(inputs[0]), output, tuple(lifter.nodes)), lifter.layers
    )


SIZES = (
    torch.SymInt,
    torch.SymBool,
    int,
    bool,
)  # what of a graph are sizes and assertions, not values


def _refuse_missing(graph: fx.Graph, image: fx.Node) -> None:
    """Name every operation that is not in LIFT, among those whose values depend on the image."""
    reached, missing = {image}, {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if (
            node.op == "call_function"
            and any(n in reached for n in node.all_input_nodes)
            and value is not None
            and not isinstance(value, SIZES)
        ):
            reached.add(node)
            if _aten(node) not in LIFT and _short(node) != "getitem":
                missing.setdefault(_aten(node), node)
    if len(missing) == 1:
        name, node = next(iter(missing.items()))
        raise InputError(
            f"{at(node)}: the operation aten.{escaped(name)} is not supported; "
            "`rqtool ops` lists what is"
        )
    if missing:
        listed = ", ".join(f"aten.{escaped(name)} at {at(node)}" for name, node in missing.items())
        raise InputError(
            f"{len(missing)} operations are not supported: {listed}; `rqtool ops` lists what is"
        )


def _single_output(lifter: Lifter, node: fx.Node) -> str:
    """The value that the model returns."""
    outputs = [
        n
        for n in node.args[0]
        if isinstance(n, fx.Node) and isinstance(n.meta.get("val"), torch.Tensor)
    ]
    if len(outputs) != 1:
        raise InputError(
            f"the model returns {len(outputs)} tensors; wrap it so that it "
            "returns the class scores only"
        )
    if outputs[0] not in lifter.value:
        raise InputError(
            "the model returns a tensor that does not depend on the image; check the model file"
        )
    return lifter.value[outputs[0]]


def _aten(node: fx.Node) -> str:
    """What a node calls: "relu_.default", without the library's name."""
    return str(node.target).removeprefix("aten.")


def _in_place(node: fx.Node) -> bool:
    return node.op == "call_function" and _aten(node).split(".")[0].endswith("_")


def _lift_call(lifter: Lifter, node: fx.Node, order: dict[fx.Node, int]) -> None:
    name, value = _aten(node), node.meta.get("val")
    if not any(
        n in lifter.value for n in node.all_input_nodes
    ):  # batch norm's counter, a computed weight: what uses it is refused
        if _in_place(node):
            lifter.tensors.pop(node.args[0], None)
        return
    if value is None or isinstance(value, SIZES):
        return  # sizes and assertions
    if name not in LIFT:
        raise InputError(
            f"{at(node)}: the operation aten.{escaped(name)} is not supported; "
            "`rqtool ops` lists what is"
        )
    args = {a.name: a.default_value for a in node.target._schema.arguments}
    args.update(zip(args, node.args))
    args.update(node.kwargs)
    if _in_place(node):
        _check_alias(node, order)
    before = dict(lifter.value)
    try:
        result = LIFT[name](Call(lifter, node, args))
    except RqError:
        raise
    except Exception as e:  # arguments of a kind that the operation's own lift does not know
        _refuse(Call(lifter, node, args), e)
    lifter.value = {**before, node: result}
    if _in_place(node):
        lifter.value[node.args[0]] = result  # later uses of the input see the changed value


def _memory(node: fx.Node) -> fx.Node:
    """The node that first made the memory of a value, back through views and changes in place."""
    while node.op == "call_function" and (_aten(node) in VIEWS or _in_place(node)):
        node = node.args[0]
    return node


def _check_alias(node: fx.Node, order: dict[fx.Node, int]) -> None:
    """Refuse an in-place change that another name of the same memory would see later."""
    changed, memory = node.args[0], _memory(node.args[0])
    others = [
        n for n in order if n is not changed and order[n] < order[node] and _memory(n) is memory
    ]
    seen = [user for n in others for user in n.users if order[user] > order[node]]
    if seen:
        raise InputError(
            f"{at(node)}: changes a tensor in place while a view of it is used "
            f"later by {at(seen[0])}; write it out of place"
        )


def _eval(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The scores of a model in eval mode, the one tensor among what it returns."""
    was_training = model.training
    try:
        with _quiet():
            return next(
                t for t in tree_leaves(model.eval()(x.clone())) if isinstance(t, torch.Tensor)
            )
    except Exception as e:  # the model's own code runs here
        raise InputError(
            "the model can be captured, but fails in eval mode on images of "
            f"shape {list(x.shape[1:])}: {_first_line(e)}"
        ) from e
    finally:
        model.train(was_training)


@torch.no_grad()
def _compare(model: nn.Module, network: Network, shape: tuple[int, ...]) -> None:
    """Refuse a capture that does not compute what the model computes, on random inputs in eval
    mode."""
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    expected = _eval(model, x)
    if expected.dtype != torch.float32:
        raise InputError(
            f"the model returns {str(expected.dtype).removeprefix('torch.')}, "
            "not float32 scores; let it return the scores themselves in "
            "float32"
        )
    try:
        got = network(x)
    except (
        RuntimeError,
        TypeError,
        ValueError,
        IndexError,
    ) as e:  # a form that the lifts let through
        raise InputError(
            "the captured graph cannot be computed in float32 on inputs of "
            f"shape {list(shape)}: {_first_line(e)}"
        ) from e
    if not torch.isfinite(expected).all():
        raise InputError(
            "the model's scores of random images are not finite numbers; look "
            "for infinity or NaN in the model file"
        )
    if expected.shape != got.shape or not torch.allclose(
        expected, got, rtol=1e-3, atol=1e-4 * (1 + float(expected.abs().max()))
    ):
        raise InputError(
            "the captured graph does not compute what the model computes in eval "
            "mode; the model behaves differently in training, export it without "
            "that branch"
        )
