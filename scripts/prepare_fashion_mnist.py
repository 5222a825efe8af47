#!/usr/bin/env python3
"""Lay out Fashion-MNIST as torchvision reads it: from Debian's dataset-fashion-mnist, or downloaded by torchvision."""
import argparse
import gzip
import sys
import zlib
from pathlib import Path
from typing import List, Optional

from torchvision.datasets import FashionMNIST
from torchvision.datasets.utils import extract_archive

EXAMPLES = """examples:
  apt-get install dataset-fashion-mnist && scripts/prepare_fashion_mnist.py data
  scripts/prepare_fashion_mnist.py data --source downloads

Then --dataset torch/fashion_mnist --data-dir data.
exit code: 0 done, 2 the files are not there or not the right ones"""

MAGIC = {'images': 2051, 'labels': 2049}  # first number of a file of the MNIST format


def prepare(root: Path, source: Path) -> None:
    """Unpack the four files of source into root/FashionMNIST/raw, or let torchvision download them."""
    if not source.is_dir():
        FashionMNIST(str(root), download=True)
        return
    for name, _ in FashionMNIST.resources:  # Debian compresses them anew, so torchvision's checksums do not serve
        try:
            with gzip.open(source / name) as file:
                content = file.read()
        except (EOFError, zlib.error) as e:
            raise ValueError(f'--source: {source / name} is torn: {e}') from e
        if int.from_bytes(content[:4], 'big') != MAGIC[name.split('-')[1]]:
            raise ValueError(f'--source: {source / name} is not a file of images or labels.')
    raw = root / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True, exist_ok=True)
    for name, _ in FashionMNIST.resources:
        extract_archive(str(source / name), str(raw))


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', type=Path, help='folder to write to')
    parser.add_argument(
        '--source', type=Path, default='/usr/share/datasets/fashion-mnist', metavar='DIR',
        help='where the four .gz files are; without it they are downloaded (default: %(default)s)')
    args = parser.parse_args(argv)
    try:
        args.root.mkdir(parents=True, exist_ok=True)
        prepare(args.root, args.source)
        sizes = [len(FashionMNIST(str(args.root), train=train)) for train in (True, False)]
    except (OSError, RuntimeError, ValueError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    print(f'{sizes[0]} training and {sizes[1]} test images in {args.root}: '
          f'--dataset torch/fashion_mnist --data-dir {args.root}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
