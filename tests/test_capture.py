"""Capture: models in many styles become graphs that compute the same; what cannot be captured is
refused in one sentence."""

from __future__ import annotations

import json
import re

import pytest
import torch
from styles import STYLES, Model, captured, scores
from torch import nn
from torch.nn import functional as F

from rqtool.errors import InputError
from rqtool.model.capture import LIFT, VIEWS, capture
from rqtool.model.graph import Graph, Node
from rqtool.model.network import RUN, Network


@pytest.mark.parametrize("name", STYLES)
def test_a_network_computes_what_its_model_computes(name):
    """In float64, where only the order of a sum is left: evaluation, training, gradients; and the
    operations are the expected ones."""
    style, (model, network) = STYLES[name], captured(name)
    assert not model.training and not network.training
    if style.ops is not None:
        assert " ".join(node.op for node in network.graph.nodes) == style.ops
    model.double(), network.double()
    x = torch.randn(
        5, *style.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    with torch.no_grad():
        assert torch.allclose(scores(model, x), network(x), rtol=1e-11, atol=1e-12)
    if style.dropout:
        return
    model.train(), network.train()
    grads = []
    for net in (model, network):
        net.zero_grad()
        torch.manual_seed(0)
        y = scores(net, x)
        (y * torch.arange(1.0, y.numel() + 1).view(y.shape)).sum().backward()
        grads.append((y.detach(), [p.grad.clone() for p in model.parameters()]))
    assert torch.allclose(grads[0][0], grads[1][0], rtol=1e-11, atol=1e-12)
    for a, b in zip(grads[0][1], grads[1][1]):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["sequential", "pad shortcut", "tied weight"])
def test_float32_results_agree_to_the_order_of_sums(name):
    model, network = captured(name)
    x = torch.randn(3, *STYLES[name].shape)
    with torch.no_grad():
        assert torch.allclose(model(x), network(x), rtol=1e-5, atol=1e-6)


def test_the_styles_use_every_operation_there_is():
    seen = {node.op for name in STYLES for node in captured(name)[1].graph.nodes}
    assert seen == set(RUN)


def test_parameters_are_shared_and_layers_have_their_names():
    model, network = captured("sequential")
    assert [node.name for node in network.graph.convs()] == ["0", "4", "7", "9"]
    assert (
        network.layer("4").weight is model[4].weight
        and network.layer("1").weight is model[1].weight
    )
    model, network = captured("tied module")
    assert [node.name for node in network.graph.convs()] == ["a", "a@2", "c"]
    assert network.layer("a").weight is network.layer("a@2").weight is model.a.weight
    assert len(list(network.parameters())) == len(list(model.parameters()))
    model, network = captured("raw parameter")
    assert [node.name for node in network.graph.convs()] == ["kernel", "matrix"]


def test_weights_that_are_buffers_work_and_stay_as_they_are():
    class Buffers(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("w", torch.randn(3, 6))
            self.register_buffer("g", torch.full((3,), 2.0))
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return F.batch_norm(
                F.linear(x, self.w),
                self.norm.running_mean,
                self.norm.running_var,
                self.g,
                None,
                False,
            )

    model = Buffers()
    network = capture(model, (6,))
    x = torch.randn(4, 6)
    assert torch.allclose(network(x), model(x), atol=1e-6)
    assert not network.layer("w").weight.requires_grad and "layers.w.weight" in network.state_dict()


@pytest.mark.parametrize("name", STYLES)
def test_graphs_are_plain_data(name):
    graph = captured(name)[1].graph
    assert Graph.from_json(json.loads(json.dumps(graph.to_json()))) == graph


def test_shapes_of_every_value_are_those_that_run():
    for name, style in STYLES.items():
        network = captured(name)[1]
        shapes = {}
        network(
            torch.zeros(2, *style.shape),
            lambda n, value: shapes.update({n: tuple(value.shape[1:])}),
        )
        assert shapes == {
            network.graph.input: style.shape,
            **{n.name: n.shape for n in network.graph.nodes},
        }


def test_dropout_draws_in_training_only():
    model, network = captured("dropout")
    x = torch.randn(3, 2, 6, 6)
    assert torch.equal(network(x), network(x))
    network.train()
    assert not torch.equal(network(x), network(x))


def test_the_mode_of_the_model_and_torch_s_random_numbers_are_left_alone():
    for training in (False, True):
        model = STYLES["sequential"]().train(training)
        before = torch.get_rng_state()
        capture(model, (2, 8, 8))
        assert model.training == training and torch.equal(torch.get_rng_state(), before)


def test_a_model_may_return_its_scores_in_a_tuple_or_a_dictionary():
    for wrapped in (
        lambda m, x: (m.a(x),),
        lambda m, x: {"scores": m.a(x)},
        lambda m, x: (m.a(x), 3),
    ):
        assert [n.op for n in capture(Model(wrapped, a=nn.Linear(6, 3)), (6,)).graph.nodes] == [
            "conv"
        ]


def test_the_list_of_operations_can_be_printed():
    assert len(LIFT) > 50 and all(isinstance(name, str) and "." in name for name in LIFT)
    assert set(LIFT) >= VIEWS


def test_a_network_drops_values_after_their_last_use_but_not_the_output():
    nodes = (
        Node("a", "relu", ("input",), (2,)),
        Node("b", "affine", ("a",), (2,), {"mult": 2.0, "add": 0.0}),
    )
    network = Network(Graph("input", (2,), "a", nodes), {})
    assert network(torch.tensor([[-1.0, 3.0]])).tolist() == [[0, 3]]


# -- refusals --------------------------------------------------------------------------------------
def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def view_then_change(m, x):
    y = m.a(x)
    y.view(-1, 3).relu_()
    return m.b(y)


def change_then_view(m, x):
    y = m.a(x)
    v = y.transpose(1, 2)
    y.relu_()
    return m.b(v)


def change_part(m, x):
    y = m.a(x)
    y[:, :2].relu_()
    return m.b(y)


def view_of_a_view(m, x):
    y = m.a(x)
    return m.b(y.flatten(1).flatten(1).relu_() + y.flatten(1))


def attention(m, x):
    return m.c(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x)).mean(1))


def other_in_training(m, x):
    return m.a(x) if m.training else 2 * m.a(x)


def fails_in_eval(m, x):
    if not m.training:
        raise ValueError("first line\nsecond line")
    return m.a(x)


def changes_its_weight(m, x):
    with torch.no_grad():
        m.a.weight.mul_(0.5)
    return m.a(x)


def with_nan(layer):
    with torch.no_grad():
        layer.weight[1, 2] = torch.nan
    return layer


ops = "`rqtool ops` lists what is"
batch = (
    "its first axis is not the batch of images; the model mixes images "
    "or drops the batch, which a macro cannot"
)
computed = (
    "uses a weight that is computed while the model runs, or is neither "
    "parameter nor buffer; store the computed weight (for example with "
    "remove_parametrizations) and load that"
)
view = "write it out of place"
REFUSED = {
    "gelu": (lambda: nn.Sequential(nn.Linear(6, 3), nn.GELU()), (6,), "gelu: the operation " "aten.gelu.default is not " f"supported; {ops}"),
    "matmul with a parameter": (lambda: Model(lambda m, x: m.a(x @ m.w), w=weight(6, 3), a=nn.Linear(3, 2)), (6,), "matmul: the " "operation " f"aten.matmul.default is not supported; {ops}"),
    "weight_norm": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))), (6,), f"linear {computed}"),
    "spectral norm by hand": (lambda: Model(lambda m, x: F.linear(x, m.w / m.w.norm()), w=weight(3, 6)), (6,), f"linear {computed}"),
    "weight changed while running": (lambda: Model(changes_its_weight, a=nn.Linear(6, 3)), (6,), f"linear {computed}"),
    "attention": (lambda: Model(attention, q=nn.Linear(6, 4), k=nn.Linear(6, 4), v=nn.Linear(6, 4), c=nn.Linear(4, 2)), (5, 6), f"scaled_dot_product_attention: the operation aten.scaled_dot_product_attention.default is not supported; {ops}"),
    "view, then change": (lambda: Model(view_then_change, a=nn.Linear(6, 3), b=nn.Linear(3, 2)), (6,), "relu_: " "changes a " "tensor in " "place while " "a view of " "it is used " "later by " "linear_1; " f"{view}"),
    "change, then view": (lambda: Model(change_then_view, a=nn.Linear(6, 3), b=nn.Linear(4, 2)), (4, 6), "relu_: " "changes a " "tensor in " "place while " "a view of " "it is used " "later by " "linear_1; " f"{view}"),
    "change of a part": (lambda: Model(change_part, a=nn.Linear(6, 3), b=nn.Linear(3, 2)), (6,), "relu_: " "changes a " "tensor in " "place while " "a view of " "it is used " "later by " "linear_1; " f"{view}"),
    "view of a view": (lambda: Model(view_of_a_view, a=nn.Conv2d(1, 1, 1), b=nn.Linear(16, 2)), (1, 4, 4), "relu_: " "changes a " "tensor in " "place while " "a view of " "it is used " "later by " "flatten_2; " f"{view}"),
    "no weights": (lambda: nn.Sequential(nn.ReLU()), (6,), "the model has no convolution and no " "linear layer, so there is nothing " "for a macro to do; check the model " "file"),
    "nothing at all": (nn.Identity, (6,), "the model has no convolution and no linear layer, so " "there is nothing for a macro to do; check the model " "file"),
    "wrong shape": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), (1, 8, 8), "the model cannot run " "on inputs of shape " "[1, 8, 8], or " "torch.export cannot " "follow it: Given " "groups=1, weight of " "size [4, 3, 3, 3], " "expected input[s31, " "1, 8, 8] to have 3 " "channels, but got 1 " "channels instead"),
    "two tensors": (lambda: Model(lambda m, x: (m.a(x), m.b(x)), a=nn.Linear(6, 3), b=nn.Linear(6, 2)), (6,), "the model " "returns 2 " "tensors; " "wrap it so " "that it " "returns the " "class " "scores " "only"),
    "a parameter": (lambda: Model(lambda m, x: m.a.weight, a=nn.Linear(6, 3)), (6,), "the model " "returns a " "tensor that " "does not " "depend on " "the image; " "check the " "model file"),
    "two inputs": (lambda: ModelOfTwo(), (6,), "the model cannot run on inputs of shape [6], or " "torch.export cannot follow it: missing a " "required argument: 'y'"),
    "other in training": (lambda: Model(other_in_training, a=nn.Linear(6, 3)), (6,), "the " "captured " "graph does " "not compute " "what the " "model " "computes in " "eval mode; " "the model " "behaves " "differently " "in " "training, " "export it " "without " "that " "branch"),
    "fails in eval": (lambda: Model(fails_in_eval, a=nn.Linear(6, 3)), (6,), "the model can be " "captured, but " "fails in eval mode " "on images of shape " "[6]: first line"),
    "float64": (lambda: nn.Linear(6, 3).double(), (6,), "the model can be captured, but fails in " "eval mode on images of shape [6]: mat1 " "and mat2 must have the same dtype, but " "got Float and Double"),
    "weights that are no numbers": (lambda: Model(lambda m, x: m.a(x), a=with_nan(nn.Linear(6, 3))), (6,), "the model's " "scores of " "random " "images are " "not finite " "numbers; " "look for " "infinity or " "NaN in the " "model file"),
    "chunk": (lambda: Model(lambda m, x: m.a(x.chunk(2, 1)[0]), a=nn.Linear(3, 2)), (6,), "chunk: the " "operation " f"aten.chunk.default is not supported; {ops}"),
    "adaptive max pool": (lambda: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(1, 2)), (1, 6, 6), f"adaptive_max_pool2d: the operation aten.adaptive_max_pool2d.default is not supported; {ops}"),
    "parameter added": (lambda: Model(lambda m, x: m.a(m.p + x), a=nn.Linear(6, 2), p=weight(6)), (6,), "add: the " "operation " f"aten.add.Tensor is not supported in this form; {ops}"),
    "computed parameter added": (lambda: Model(lambda m, x: m.a(x - F.relu(m.p)), a=nn.Linear(6, 2), p=weight(6)), (6,), "sub: the " "operation " f"aten.sub.Tensor is not supported in this form; {ops}"),
    "parameter multiplied": (lambda: Model(lambda m, x: m.a(x * m.p), a=nn.Linear(6, 2), p=weight(6)), (6,), "mul: the " "operation " f"aten.mul.Tensor is not supported in this form; {ops}"),
    "parameter joined": (lambda: Model(lambda m, x: m.a(torch.cat([x, m.p.expand(x.size(0), 6)], 1)), a=nn.Linear(12, 2), p=weight(1, 6)), (6,), "cat: the " "operation " f"aten.cat.default is not supported in this form; {ops}"),
    "product of values": (lambda: Model(lambda m, x: m.a(x * x), a=nn.Linear(6, 2)), (6,), "mul: the " "operation " f"aten.mul.Tensor is not supported in this form; {ops}"),
    "weighted sum": (lambda: Model(lambda m, x: m.a(torch.add(x, x, alpha=2)), a=nn.Linear(6, 2)), (6,), "add: the " "operation " f"aten.add.Tensor is not supported in this form; {ops}"),
    "division by zero": (lambda: Model(lambda m, x: m.a(x / 0), a=nn.Linear(6, 2)), (6,), "div: the " "operation " f"aten.div.Tensor is not supported in this form; {ops}"),
    "broadcast sum": (lambda: Model(lambda m, x: m.a((x + x.mean((2, 3), keepdim=True)).flatten(1)), a=nn.Linear(32, 2)), (2, 4, 4), "add: adds " "shapes [2, " "4, 4] and " "[2, 1, 1]; " "only equal " "shapes are " "supported"),
    "images merged": (lambda: Model(lambda m, x: m.a(x.view(-1, 3)), a=nn.Linear(3, 2)), (6,), f"view: {batch}"),
    "images added": (lambda: Model(lambda m, x: m.a(F.pad(x, (0, 0, 1, 1))), a=nn.Linear(6, 2)), (6,), f"pad: {batch}"),
    "images swapped": (lambda: Model(lambda m, x: m.a(x.permute(1, 0, 2)), a=nn.Linear(6, 2)), (5, 6), "permute: " "the " "operation " f"aten.permute.default is not supported in this form; {ops}"),
    "mean of the batch": (lambda: Model(lambda m, x: m.a(x - x.mean(0)), a=nn.Linear(6, 2)), (6,), "mean: a " "mean over " "axes [0] is " "not " "supported; " "only a mean " "over all " "positions " "of an image " "is"),
    "batch norm without statistics": (lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False)), (6,), "batch_norm: " "batch norm " "without " "running " "statistics " "depends on " "the other " "images of a " "batch; use " "track_running_stats=True"),
    "softmax inside": (lambda: nn.Sequential(nn.Linear(6, 3), nn.Softmax(1), nn.Linear(3, 2)), (6,), "softmax: " "softmax is " "supported " "only over " "the classes " "at the very " "end of a " "model"),
    "reflected padding": (lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), (1, 4, 4), "pad: only " "padding " "with zeros " "is " "supported, " "not mode " "reflect " "with value " "None"),
    "padding with ones": (lambda: Model(lambda m, x: m.a(F.pad(x, (1, 0), value=1.0)), a=nn.Linear(7, 2)), (6,), "pad: only " "padding " "with zeros " "is " "supported, " "not mode " "constant " "with value " "1.0"),
    "negative padding": (lambda: Model(lambda m, x: m.a(F.pad(x, (-1, 0))), a=nn.Linear(5, 2)), (6,), "pad: " "padding by " "a negative " "number is " "not " "supported; " "slice " "instead"),
    "average pool, ceil mode": (lambda: nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(9, 2)), (1, 5, 5), "avg_pool2d: " "an average " "pool with " "ceil_mode " "or " "divisor_override is not supported; use floor mode and the window's own size"),
    "uneven adaptive pool": (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9, 2)), (1, 4, 4), "adaptive_avg_pool2d: [4, 4] does not divide evenly into [3, 3] for an adaptive average pool; resize the images"),
}  # fmt: skip


PLACE = (
    r" \((layer [^()]*|(layer [^()]*, )?\w+\.py line " r"\d+)\)"
)  # of an operation, in the user's own code


class ModelOfTwo(nn.Module):
    def forward(self, x, y):
        return x + y


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_is_refused_in_one_sentence(name, capfd):
    build, shape, sentence = REFUSED[name]
    torch.manual_seed(0)
    model = build()
    with pytest.raises(InputError) as e:
        capture(model, shape)
    assert re.sub(PLACE, "", str(e.value)) == sentence
    assert capfd.readouterr() == ("", "")
    assert model.training  # as it came
