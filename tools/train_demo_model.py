"""Train the float network of the demonstration on all 60,000 training images of Fashion-MNIST.

    python tools/train_demo_model.py fashion_mnist.npz rqtool/demo/demo.safetensors

Stochastic gradient descent with momentum, one cycle of the learning rate, mirrored and shifted
images. The last epoch is the one that is kept: the test images decide nothing and are measured
once, at the end. The same threads on the same machine give the same weights.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import safetensors.torch
import torch
from torch import nn

from rqtool.model.data import Images, Preprocess, batches, load_data, shuffled
from rqtool.model.zoo import ZOO
from rqtool.storage import check_writable, write_atomic


def varied(x: torch.Tensor, shift: int, generator: torch.Generator) -> torch.Tensor:
    """The batch with half of its images mirrored, and all of it shifted by up to `shift` pixels:
    float32 [N, C, H, W]."""
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    dy, dx = torch.randint(0, 2 * shift + 1, (2,), generator=generator).tolist()
    return nn.functional.pad(x, [shift] * 4)[:, :, dy : dy + x.shape[2], dx : dx + x.shape[3]]


def train(net: nn.Module, images: Images, epochs: int, batch: int, rate: float, seed: int) -> None:
    """`net`, trained in place; prints the mean loss of each epoch."""
    preprocess, generator = Preprocess.of(images), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = epochs * -(-len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.2
    )
    for epoch in range(epochs):
        net.train()
        start, losses = time.perf_counter(), []
        for x, y in batches(images, batch, order=shuffled(len(images), seed * 1000 + epoch)):
            logits = net(varied(torch.from_numpy(preprocess.apply(x)), 1, generator))
            loss = nn.functional.cross_entropy(logits, torch.from_numpy(y))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(
            f"epoch {epoch + 1}/{epochs}: loss {np.mean(losses):.4f}, "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )


@torch.no_grad()
def correct(net: nn.Module, images: Images) -> int:
    """How many images the network names rightly."""
    net.eval()
    preprocess = Preprocess.of(images)
    return sum(
        int((net(torch.from_numpy(preprocess.apply(x))).argmax(1).numpy() == y).sum())
        for x, y in batches(images, 500)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="Fashion-MNIST, official training and test images")
    parser.add_argument("out", help="the .safetensors file to write")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--rate", type=float, default=0.1, help="the highest learning rate of the cycle"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    check_writable(args.out, args.force)
    data, net = load_data(args.data), ZOO["demo"]()
    train(net, data.train, args.epochs, args.batch, args.rate, args.seed)
    print(f"{correct(net, data.test)} of {len(data.test)} test images")
    write_atomic(args.out, safetensors.torch.save(net.state_dict()), force=args.force)


if __name__ == "__main__":
    main()
