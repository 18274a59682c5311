"""Write the embedded data set: a balanced part of Fashion-MNIST, 400 training and 100 test images
of each class.

    python tools/make_demo_data.py fashion_mnist.npz rqtool/demo/fashion.npz

The first argument is anything `rqtool` reads as data and that holds the official training and test
images. The same source gives the same bytes.
"""

from __future__ import annotations

import argparse
import io

import numpy as np

from rqtool.model.data import Images, load_data, shuffled
from rqtool.storage import write_atomic


def balanced(images: Images, per_class: int, seed: int) -> Images:
    """`per_class` images of every class, drawn with the seed, in their old order."""
    order = shuffled(len(images), seed)
    chosen = [order[images.y[order] == label][:per_class] for label in np.unique(images.y)]
    return images[np.sort(np.concatenate(chosen))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="Fashion-MNIST, official training and test images")
    parser.add_argument("out", help="the .npz file to write")
    parser.add_argument("--train-per-class", type=int, default=400)
    parser.add_argument("--test-per-class", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    args = parser.parse_args()
    data = load_data(args.data)
    train, test = (
        balanced(data.train, args.train_per_class, args.seed),
        balanced(data.test, args.test_per_class, args.seed),
    )
    file = io.BytesIO()
    np.savez_compressed(
        file,
        x_train=train.x[:, 0],
        y_train=train.y.astype(np.uint8),
        x_test=test.x[:, 0],
        y_test=test.y.astype(np.uint8),
    )
    write_atomic(args.out, file.getvalue(), force=args.force)
    print(f"{len(train)} training and {len(test)} test images, {len(file.getvalue())} bytes")


if __name__ == "__main__":
    main()
