"""Small models in the styles people write: each captured exactly, and together they use every
operation a graph can have."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from rqtool.model.capture import capture
from rqtool.model.network import Network


class Model(nn.Module):
    """Parts by name and a forward function over them."""

    def __init__(self, forward: Callable, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


@dataclass(frozen=True)
class Style:
    """How to build a model, the shape of one input, and the operations its graph shall have, in
    order (None: not compared)."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    ops: str | None = None
    dropout: bool = False

    def __call__(self) -> nn.Module:
        """The model with the same random weights each time, batch norm with statistics of its own."""
        torch.manual_seed(1)
        model = self.build()
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.5, 2)
                if m.weight is not None:
                    nn.init.uniform_(m.weight, 0.5, 1.5)
                    nn.init.normal_(m.bias, 0, 0.2)
        return model.eval()


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 7),
        nn.ReLU(),
        nn.Linear(7, 4),
    )


def raw_parameter() -> nn.Module:
    def forward(m, x):
        x = F.relu(F.conv2d(x, m.kernel, m.bias, padding=1))
        return F.linear(x.flatten(1), m.matrix)

    return Model(
        forward,
        kernel=nn.Parameter(torch.randn(3, 2, 3, 3) / 4),
        bias=nn.Parameter(torch.randn(3) / 4),
        matrix=nn.Parameter(torch.randn(4, 3 * 36) / 10),
    )


def in_place() -> nn.Module:
    def forward(m, x):
        y = m.a(x)
        y = F.relu(y, inplace=True)
        z = m.b(y)
        z *= 0.5
        z -= 0.1
        z += y
        z.relu_()
        return m.c(z.flatten(1))

    return Model(
        forward,
        a=nn.Conv2d(2, 4, 3, padding=1),
        b=nn.Conv2d(4, 4, 3, padding=1),
        c=nn.Linear(4 * 36, 4),
    )


def shape_control_flow() -> nn.Module:
    def forward(m, x):
        if x.size(2) > 5:
            x = F.max_pool2d(x, 2)
        for _ in range(x.shape[1]):
            x = F.relu(m.a(x))
        return m.c(x.view(x.size(0), -1))

    return Model(forward, a=nn.Conv2d(2, 2, 3, padding=1), c=nn.Linear(18, 4))


def tied() -> nn.Module:
    def forward(m, x):
        x = F.relu(m.norm(m.a(x)))
        return m.c(F.relu(m.norm(m.a(x))).flatten(1))

    return Model(
        forward, a=nn.Conv2d(2, 2, 3, padding=1), norm=nn.BatchNorm2d(2), c=nn.Linear(72, 4)
    )


def tied_weight() -> nn.Module:
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)
    b.weight = a.weight
    return nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), nn.Linear(6, 3))


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 6, 5, 2, 2, groups=3),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.MaxPool1d(3, 2, 1),
        nn.Conv1d(6, 4, 3, padding="same", dilation=2),
        nn.AvgPool1d(2),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def tokens() -> nn.Module:
    """Linear layers on a 3-d input, and a mean over its positions."""

    def forward(m, x):
        x = F.relu(m.a(x))
        return m.c(m.b(x).transpose(1, 2).mean(-1))

    return Model(forward, a=nn.Linear(5, 8), b=nn.Linear(8, 6), c=nn.Linear(6, 3))


def patches() -> nn.Module:
    """Linear on a 4-d input: an image with its channels last."""

    def forward(m, x):
        return m.c(F.relu(m.a(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2).mean((2, 3)))

    return Model(forward, a=nn.Linear(2, 5), c=nn.Linear(5, 3))


def same_even() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 4, padding="same"),
        nn.ReLU(),
        nn.Conv2d(4, 3, (2, 3), padding="same", dilation=(3, 1)),
        nn.Flatten(),
        nn.Linear(3 * 49, 3),
    )


def ceil_pools() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2, 1, dilation=2),
        nn.Flatten(),
        nn.Linear(3, 3),
    )


def average_pools() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(2, 1, 1, count_include_pad=False),
        nn.AdaptiveAvgPool2d((3, 1)),
        nn.Flatten(),
        nn.Linear(9, 3),
    )


def global_mean() -> nn.Module:
    def forward(m, x):
        return m.c(F.relu(m.a(x)).mean((2, 3)))

    return Model(forward, a=nn.Conv2d(2, 5, 3, 2), c=nn.Linear(5, 3))


def with_dropout() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.Dropout2d(0.2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(64, 3),
    )


def norm_after_relu() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4, affine=False),
        nn.Flatten(),
        nn.Linear(16, 3),
        nn.BatchNorm1d(3),
    )


def log_softmax() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3), nn.LogSoftmax(-1)
    )


def softmax() -> nn.Module:
    def forward(m, x):
        return F.softmax(20 * m.c(x.flatten(1)), 1)

    return Model(forward, c=nn.Linear(72, 3))


def branches() -> nn.Module:
    def forward(m, x):
        x = F.relu(m.stem(x))
        y = torch.cat([F.relu(m.a(x)), m.b(x), F.avg_pool2d(x, 3, 1, 1)], 1)
        return m.c(y.mean((2, 3)))

    return Model(
        forward,
        stem=nn.Conv2d(2, 3, 3),
        a=nn.Conv2d(3, 2, 1),
        b=nn.Conv2d(3, 4, 3, padding=1),
        c=nn.Linear(9, 3),
    )


def pad_shortcut() -> nn.Module:
    """The parameter-free shortcut of ResNets for CIFAR-10: every second position, channels padded
    with zeros."""

    def forward(m, x):
        x = F.relu(m.n1(m.stem(x)))
        y = m.n3(m.b(F.relu(m.n2(m.a(x)))))
        y = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2)))
        return m.c(F.avg_pool2d(y, 3).view(-1, 6))

    return Model(forward, stem=nn.Conv2d(2, 3, 3, padding=1, bias=False), n1=nn.BatchNorm2d(3), a=nn.Conv2d(3, 6, 3, 2, 1, bias=False), n2=nn.BatchNorm2d(6), b=nn.Conv2d(6, 6, 3, padding=1, bias=False), n3=nn.BatchNorm2d(6), c=nn.Linear(6, 4))  # fmt: skip


def mobile() -> nn.Module:
    """Depthwise and pointwise convolutions, clamps, an inverted residual."""

    def forward(m, x):
        x = F.relu6(m.stem(x))
        y = F.hardtanh(m.wide(x), -0.5, 2.0)
        y = m.narrow(F.relu6(m.depth(y)))
        return m.c((x + y).clamp(max=4.0).flatten(2).mean(2))

    return Model(
        forward,
        stem=nn.Conv2d(2, 4, 3, 2, 1),
        wide=nn.Conv2d(4, 8, 1),
        depth=nn.Conv2d(8, 8, 3, padding=1, groups=8),
        narrow=nn.Conv2d(8, 4, 1),
        c=nn.Linear(4, 3),
    )


def arithmetic() -> nn.Module:
    """Numbers and signs: (x - mean) / std in the model, differences, a negative, a triple sum."""

    def forward(m, x):
        x = (x - 0.45) / 0.22
        y, z = m.a(x), m.b(x)
        d = torch.relu(y - z) + 1
        return m.c((d + y + (-z) + 2 * x[:, :1]).flatten(1))

    return Model(forward, a=nn.Conv2d(2, 1, 3, padding=1), b=nn.Conv2d(2, 1, 1), c=nn.Linear(36, 3))


def squeezed() -> nn.Module:
    def forward(m, x):
        x = m.a(x.unsqueeze(1)).squeeze(2)
        return m.c(F.relu(x).unflatten(1, (2, 2)).flatten(1))

    return Model(forward, a=nn.Conv2d(1, 4, (3, 2)), c=nn.Linear(16, 3))


def one_layer() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 5))


STYLES = {
    "sequential": Style(
        sequential, (2, 8, 8), "conv batch_norm relu maxpool conv relu reshape conv relu conv"
    ),
    "raw parameter": Style(raw_parameter, (2, 6, 6), "conv relu reshape conv"),
    "in place": Style(in_place, (2, 6, 6), "conv relu conv affine affine add relu reshape conv"),
    "shape control flow": Style(
        shape_control_flow, (2, 6, 6), "maxpool conv relu conv relu reshape conv"
    ),
    "tied module": Style(tied, (2, 6, 6), "conv batch_norm relu conv batch_norm relu reshape conv"),
    "tied weight": Style(tied_weight, (6,), "conv relu conv relu conv"),
    "conv1d": Style(conv1d, (3, 24), None),
    "tokens": Style(tokens, (7, 5), None),
    "patches": Style(patches, (2, 3, 4), "permute conv relu permute avgpool reshape conv"),
    "same padding, even kernels": Style(
        same_even, (2, 7, 7), "pad conv relu pad conv reshape conv"
    ),
    "ceil mode": Style(ceil_pools, (2, 10, 10), "conv maxpool maxpool maxpool reshape conv"),
    "average pools": Style(
        average_pools, (2, 10, 9), "conv relu avgpool avgpool avgpool reshape conv"
    ),
    "global mean": Style(global_mean, (2, 8, 7), "conv relu avgpool reshape conv"),
    "dropout": Style(
        with_dropout, (2, 6, 6), "conv dropout relu reshape dropout conv", dropout=True
    ),
    "norm after relu": Style(
        norm_after_relu, (2, 6, 6), "conv relu batch_norm conv batch_norm reshape conv batch_norm"
    ),
    "log softmax": Style(log_softmax, (2, 6, 6), "conv relu reshape conv tail"),
    "softmax": Style(softmax, (2, 6, 6), "reshape conv affine tail"),
    "branches": Style(
        branches, (2, 8, 8), "conv relu conv relu conv avgpool concat avgpool reshape conv"
    ),
    "pad shortcut": Style(pad_shortcut, (2, 6, 6), None),
    "mobile": Style(mobile, (2, 9, 9), None),
    "arithmetic": Style(arithmetic, (2, 6, 6), None),
    "squeezed": Style(squeezed, (3, 5), None),
    "one layer": Style(one_layer, (2, 6, 6), "reshape conv"),
}


@cache
def _captured(name: str) -> tuple[nn.Module, Network]:
    model = STYLES[name]()
    return model, capture(model, STYLES[name].shape)


def captured(name: str) -> tuple[nn.Module, Network]:
    """A style's model and its network: copies of their own, which share their parameters."""
    return deepcopy(_captured(name))


def scores(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a model says, without what torch says of even kernels with padding="same"."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
        return model(x.clone())
