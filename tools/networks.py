"""Float networks of many kinds and their data, to judge the defaults of rqtool on.

    python tools/networks.py --shared DIR --cache DIR [--only PATTERN ...] [--seed 0]
    python tools/networks.py --list

DIR of --shared holds data/ and models/ as for tools/experiments.py. Each network is trained from
scratch on one thread in at most 90 seconds, or read where its weights are among the shared models.
Weights and data sets are kept in --cache; `load` needs nothing else. A network NAME with batch norm
has a twin NAME-folded: the same function, with each batch norm folded into the layer before it.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import io
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache as remembered
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import fx, nn

import rqtool
from rqtool.storage import write_atomic

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
FOLDED = "-folded"
TRAIN, TEST, CLASSES = 10_000, 2_000, 10


# -- building blocks -----------------------------------------------------------------------------
def norm_conv(
    into: int, out: int, size: int = 3, stride: int = 1, groups: int = 1, act: Any = nn.ReLU
) -> nn.Sequential:
    """A convolution, batch norm and an activation (None for none)."""
    conv = nn.Conv2d(into, out, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), *([] if act is None else [act()]))


class Residual(nn.Module):
    """after(shortcut(x) + body(x)); the shortcut is a convolution where the shape changes."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.after = body, shortcut, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.shortcut(x) + self.body(x))


def basic(into: int, out: int, stride: int, after: Any) -> Residual:
    """Two 3x3 convolutions beside a shortcut."""
    body = nn.Sequential(norm_conv(into, out, 3, stride), norm_conv(out, out, act=None))
    same = into == out and stride == 1
    shortcut = nn.Identity() if same else norm_conv(into, out, 1, stride, act=None)
    return Residual(body, shortcut, after())


def inverted(into: int, out: int, stride: int, expand: int = 4) -> nn.Module:
    """Expansion, depthwise convolution, linear projection; a shortcut where the shape stays."""
    wide = into * expand
    body = nn.Sequential(
        norm_conv(into, wide, 1, act=nn.ReLU6),
        norm_conv(wide, wide, 3, stride, wide, act=nn.ReLU6),
        norm_conv(wide, out, 1, act=None),
    )
    return Residual(body, nn.Identity(), nn.Identity()) if into == out and stride == 1 else body


def separable(into: int, out: int, stride: int) -> nn.Sequential:
    """A depthwise convolution and a pointwise one."""
    return nn.Sequential(norm_conv(into, into, 3, stride, into), norm_conv(into, out, 1))


def plain_conv(into: int, out: int) -> nn.Sequential:
    """A convolution and ReLU; the start of He et al. (2015), for there is no batch norm to help."""
    conv = nn.Conv2d(into, out, 3, padding=1)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return nn.Sequential(conv, nn.ReLU())


def wave_conv(into: int, out: int, size: int) -> nn.Sequential:
    conv = nn.Conv1d(into, out, size, 2, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm1d(out), nn.ReLU())


def pooled(width: int, classes: int = CLASSES, pool: Any = nn.AdaptiveAvgPool2d) -> nn.Sequential:
    """Global average pooling and a linear layer."""
    return nn.Sequential(pool(1), nn.Flatten(), nn.Linear(width, classes))


# -- the networks --------------------------------------------------------------------------------
def resnet(after: Any = nn.ReLU) -> nn.Module:
    blocks = (basic(16, 16, 2, after), basic(16, 32, 2, after), basic(32, 64, 2, after))
    last = nn.Identity() if after is nn.ReLU else nn.ReLU()
    return nn.Sequential(norm_conv(1, 16), *blocks, last, pooled(64))


def dscnn() -> nn.Module:
    shapes = ((48, 48, 1), (48, 48, 1), (48, 96, 2), (96, 96, 1), (96, 96, 1))
    blocks = (separable(*shape) for shape in shapes)
    return nn.Sequential(norm_conv(1, 48, 3, 2), *blocks, pooled(96))


def mobile() -> nn.Module:
    shapes = ((16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 32, 2), (32, 32, 1))
    first, last = norm_conv(1, 16, 3, 2, act=nn.ReLU6), norm_conv(32, 96, 1, act=nn.ReLU6)
    return nn.Sequential(first, *(inverted(*shape) for shape in shapes), last, pooled(96))


def plain() -> nn.Module:
    features = (
        plain_conv(1, 16), nn.MaxPool2d(2), plain_conv(16, 32), nn.MaxPool2d(2),
        plain_conv(32, 48), plain_conv(48, 48), nn.MaxPool2d(2),
    )  # fmt: skip
    head = (nn.Flatten(), nn.Linear(48 * 9, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    return nn.Sequential(*features, *head)


def signed() -> nn.Module:
    shapes = ((1, 16, 2), (16, 32, 1), (32, 32, 2), (32, 48, 1), (48, 64, 1))
    convs = (norm_conv(a, b, 3, stride, act=nn.Hardtanh) for a, b, stride in shapes)
    return nn.Sequential(*convs, pooled(64))


def mlp() -> nn.Module:
    hidden = (nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, CLASSES))


def waves() -> nn.Module:
    shapes = ((2, 24, 7), (24, 32, 5), (32, 48, 5), (48, 64, 3))
    convs = (wave_conv(*shape) for shape in shapes)
    return nn.Sequential(*convs, pooled(64, WAVES, nn.AdaptiveAvgPool1d))


@dataclass(frozen=True)
class Kind:
    """A network: what builds it, its data set, how it is trained.

    build: a function, or the name of one in reference_models.py beside `weights`.
    mean, std: of the values after division by 255, None for a network that takes them as they are.
    """

    build: Callable[[], nn.Module] | str
    data: str
    weights: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    epochs: int = 4
    images: int = 16_000
    rate: float = 4e-3
    normed: bool = True

    @property
    def preprocess(self) -> dict[str, Any]:
        """The fields of rqtool.Preprocess that are not the default of the data set."""
        return {} if self.mean is None else {"mean": self.mean, "std": self.std}


KINDS = {
    "fashion-resnet": Kind(resnet, "fashion"),
    "fashion-dscnn": Kind(dscnn, "fashion"),
    "fashion-mobile": Kind(mobile, "fashion"),
    "fashion-plain": Kind(plain, "fashion", epochs=7, rate=3e-3, normed=False),
    "fashion-linres": Kind(lambda: resnet(nn.Identity), "fashion"),
    "fashion-signed": Kind(signed, "fashion", epochs=6, mean=(0.286,), std=(0.353,)),
    "mnist-mlp": Kind(mlp, "mnist", epochs=5, images=60_000, rate=2e-3, normed=False),
    "seq-conv1d": Kind(waves, "waves", epochs=8, images=10_000),
    "mnist-lenet": Kind("lenet_bn", "mnist", "lenetbn_mnist.pt"),
    "cifar-resnet20": Kind(
        "resnet20", "cifar", "resnet20_cifar10jpeg_finetuned.pt",
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225),
    ),
}  # fmt: skip
NAMES = [name + end for name, kind in KINDS.items() for end in ("", FOLDED)[: 1 + kind.normed]]


def kind_of(name: str) -> Kind:
    return KINDS[name.removesuffix(FOLDED)]


# -- folding -------------------------------------------------------------------------------------
def fold(module: nn.Module) -> nn.Module:
    """A copy in eval mode whose batch norms are folded into the layers before them.

    A batch norm is folded where its only input is a Conv1d, Conv2d or Linear whose output goes
    nowhere else; nn.Identity takes its place. Others stay.
    """
    folded = copy.deepcopy(module).eval()
    for layer, norm in foldable(folded):
        into = folded.get_submodule(layer)
        into.weight, into.bias = folded_parameters(into, folded.get_submodule(norm))
        folded.set_submodule(norm, nn.Identity())
    return folded


def foldable(module: nn.Module) -> list[tuple[str, str]]:
    """The names of layer and batch norm of each pair that can be folded."""
    nodes = [node for node in fx.symbolic_trace(module).graph.nodes if node.op == "call_module"]
    calls = Counter(node.target for node in nodes)
    found = []
    for node in nodes:
        before = node.args[0] if node.args else None
        if before not in nodes or len(before.users) > 1:
            continue
        once = calls[before.target] == calls[node.target] == 1
        layer, norm = (module.get_submodule(n.target) for n in (before, node))
        if once and fit_together(layer, norm):
            found.append((before.target, node.target))
    return found


NORM_AFTER = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Linear: nn.BatchNorm1d}


def fit_together(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether `norm` is a batch norm with statistics of its own for the outputs of `layer`."""
    return type(norm) is NORM_AFTER.get(type(layer)) and norm.running_mean is not None


@torch.no_grad()
def folded_parameters(layer: nn.Module, norm: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of the one layer that does what `layer` and then `norm` do, in float64."""
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.double()
    shift = 0.0 if layer.bias is None else layer.bias.double()
    bias = (shift - norm.running_mean.double()) * gain
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    weight = layer.weight.double() * gain.view(-1, *(1,) * (layer.weight.dim() - 1))
    return nn.Parameter(weight.float()), nn.Parameter(bias.float())


# -- the data sets -------------------------------------------------------------------------------
WAVES, LENGTH = 6, 128


def wave_images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy waveforms of six classes: float32 [N, 2, 128], and int64 labels.

    sine, square, sawtooth, rising and falling chirp, a sine that swells and fades. Frequency, phase
    and loudness are drawn for each; the second channel is the first, turned and weaker.
    """
    draw = np.random.default_rng([2026, seed])
    label = draw.integers(0, WAVES, count)
    spans = ((3, 9), (0, 1), (0.6, 1.2))
    cycles, phase, loud = (draw.uniform(*span, (count, 1)) for span in spans)
    lag = draw.uniform(0.1, 0.4, (count, 1))
    both = np.stack([wave_shapes(label, cycles, p) for p in (phase, phase + lag)], 1)
    noisy = both * loud[:, None] * np.array([[1.0], [0.7]]) + draw.normal(0, NOISE, both.shape)
    return noisy.astype(np.float32), label.astype(np.int64)


NOISE = 0.7


def wave_shapes(label: np.ndarray, cycles: np.ndarray, phase: np.ndarray) -> np.ndarray:
    """float64 [N, 128], each row in the shape of its label."""
    t = np.arange(LENGTH) / LENGTH
    turn, bend = cycles * t + phase, 0.6 * cycles * (t * t - t)
    angle, up, down = (2 * np.pi * turns for turns in (turn, turn + bend, turn - bend))
    saw = 1.7 * (turn % 1) - 0.85
    swell = 1.4 * np.sin(angle) * np.sin(np.pi * t)
    shapes = (np.sin(angle), 0.8 * np.sign(np.sin(angle)), saw, np.sin(up), np.sin(down), swell)
    return np.stack(shapes)[label, np.arange(len(label))]


def read_waves(shared: Path) -> dict[str, np.ndarray]:
    (x, y), (x_test, y_test) = wave_images(20_000, 0), wave_images(10_000, 1)
    return {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test}


def read_images(shared: Path, file: str) -> dict[str, np.ndarray]:
    """uint8 [N, 1, H, W] and labels."""
    with np.load(shared / "data" / file) as z:
        found = {name: z[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    return {n: a[:, None] if n[0] == "x" else a.astype(np.int64) for n, a in found.items()}


def read_cifar(shared: Path) -> dict[str, np.ndarray]:
    """uint8 [N, 3, 32, 32] and labels, decoded from JPEG files back to back."""
    found = {}
    with np.load(shared / "data" / "cifar10_jpeg75.npz") as z:
        for part in ("train", "test"):
            found[f"x_{part}"] = decoded(z[f"{part}_jpeg"], z[f"{part}_offsets"])
            found[f"y_{part}"] = z[f"{part}_labels"].astype(np.int64)
    return found


def decoded(jpeg: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    files = (io.BytesIO(jpeg[a:b].tobytes()) for a, b in zip(offsets, offsets[1:]))
    images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    return np.stack(images).transpose(0, 3, 1, 2)


READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    "fashion": lambda shared: read_images(shared, "fashion_mnist.npz"),
    "mnist": lambda shared: read_images(shared, "mnist.npz"),
    "waves": read_waves,
    "cifar": read_cifar,
}


@remembered
def arrays(data: str, cache: Path, shared: Path = SHARED) -> dict[str, np.ndarray]:
    """x_train, y_train, x_test, y_test of a data set, kept as a file in `cache`."""
    path = cache / f"{data}.npz"
    if not path.exists():
        buffer = io.BytesIO()
        np.savez(buffer, **READERS[data](shared))
        write_atomic(path, buffer.getvalue(), force=True)
    with np.load(path) as z:
        return dict(z)


def some(x: np.ndarray, y: np.ndarray, count: int, seed: int) -> rqtool.Images:
    """So many images, drawn by seed."""
    chosen = np.random.default_rng([seed, 7]).permutation(len(y))[:count]
    return rqtool.Images(np.ascontiguousarray(x[chosen]), y[chosen])


def data_of(
    name: str, cache: Path, seed: int = 0, train: int = TRAIN, test: int = TEST
) -> rqtool.Data:
    """`train` training images, drawn by `seed` from all, and the first `test` test images."""
    data = arrays(kind_of(name).data, cache)
    images = some(data["x_train"], data["y_train"], train, seed)
    measured = rqtool.Images(data["x_test"][:test], data["y_test"][:test])
    return rqtool.Data(kind_of(name).data, images, measured, int(data["y_train"].max()) + 1)


# -- training and loading ------------------------------------------------------------------------
def real(x: np.ndarray, kind: Kind) -> torch.Tensor:
    """What the network takes of pixels."""
    values = torch.from_numpy(x).float() / (255 if x.dtype == np.uint8 else 1)
    if kind.mean is None:
        return values
    mean, std = (torch.tensor(a).view(-1, 1, 1) for a in (kind.mean, kind.std))
    return (values - mean) / std


def train(name: str, seed: int, cache: Path, shared: Path = SHARED) -> nn.Module:
    """The network, trained on one thread or with its shared weights; kept in `cache`."""
    kind, path = kind_of(name), weights_path(name, seed, cache)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data = arrays(kind.data, cache, shared)
    if kind.weights is None:
        net = kind.build()
        fit(net, some(data["x_train"], data["y_train"], kind.images, seed + 100), kind, seed)
    else:
        net = reference(kind, shared)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    write_atomic(path, buffer.getvalue(), force=True)
    return net.eval()


def fit(net: nn.Module, images: rqtool.Images, kind: Kind, seed: int) -> None:
    """AdamW, one cycle of the learning rate, batches of 128."""
    x, y = real(images.x, kind), torch.from_numpy(images.y)
    if x.dim() == 4:  # twice as fast on a CPU
        net, x = (a.to(memory_format=torch.channels_last) for a in (net, x))
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    steps = len(y) // 128
    total = kind.epochs * steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, kind.rate, total, pct_start=0.25)
    order = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(kind.epochs):
        for index in torch.randperm(len(y), generator=order)[: steps * 128].view(steps, 128):
            loss = nn.functional.cross_entropy(net(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def reference(kind: Kind, shared: Path) -> nn.Module:
    """A network of reference_models.py with its weights."""
    net = built(kind, shared)
    state = torch.load(shared / "models" / kind.weights, weights_only=True, map_location="cpu")
    net.load_state_dict(state)
    return net


def built(kind: Kind, shared: Path) -> nn.Module:
    """The network with the weights it starts from."""
    return kind.build() if callable(kind.build) else getattr(reference_models(shared), kind.build)()


@remembered
def reference_models(shared: Path) -> Any:
    path = shared / "models" / "reference_models.py"
    spec = importlib.util.spec_from_file_location("reference_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights_path(name: str, seed: int, cache: Path) -> Path:
    return cache / f"{name.removesuffix(FOLDED)}-seed{seed}.pt"


def load(
    name: str, cache: Path | str, seed: int = 0, train: int = TRAIN, test: int = TEST,
    shared: Path | str = SHARED, draw: int | None = None,
) -> tuple[nn.Module, rqtool.Data, dict[str, Any]]:  # fmt: skip
    """(network in eval mode, its data, fields for `preprocess`) from what `train` keeps in `cache`.

    seed: of the weights, and of the training images drawn unless `draw` is given. train, test:
    numbers of images. shared: where reference_models.py is, which some of the networks need.
    """
    kind, cache = kind_of(name), Path(cache)
    net, path = built(kind, Path(shared)), weights_path(name, seed, cache)
    net.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    net = fold(net) if name.endswith(FOLDED) else net.eval()
    return net, data_of(name, cache, seed if draw is None else draw, train, test), kind.preprocess


@torch.no_grad()
def accuracy(net: nn.Module, name: str, images: rqtool.Images) -> float:
    """top-1 in percent."""
    net.eval()
    parts = [slice(k, k + 500) for k in range(0, len(images), 500)]
    found = [net(real(images.x[part], kind_of(name))).argmax(1).numpy() for part in parts]
    return 100 * float((np.concatenate(found) == images.y).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=SHARED, metavar="DIR")
    parser.add_argument("--cache", type=Path, metavar="DIR")
    parser.add_argument("--only", nargs="*", default=["*"], metavar="PATTERN")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if args.list:
        print(*NAMES, sep="\n")
        return
    if args.cache is None:
        parser.error("--cache DIR says where weights and data are kept")
    args.cache.mkdir(parents=True, exist_ok=True)
    for name in (n for n in KINDS if any(fnmatch(n, pattern) for pattern in args.only)):
        started = time.monotonic()
        net = train(name, args.seed, args.cache, args.shared)
        seconds = round(time.monotonic() - started, 1)
        top1 = accuracy(net, name, data_of(name, args.cache, args.seed, test=10_000).test)
        row = {"name": name, "seed": args.seed, "float_top1": top1, "seconds": seconds}
        path = args.cache / f"{name}-seed{args.seed}.json"
        write_atomic(path, json.dumps(row).encode() + b"\n", force=True)
        print(row, flush=True)


if __name__ == "__main__":
    main()
