#!/usr/bin/env python3
"""Lay out Fashion-MNIST as torchvision reads it: from Debian's dataset-fashion-mnist, or downloaded by torchvision."""
import argparse
import gzip
import sys
import zlib
from pathlib import Path
from typing import List, Optional

from _args import create_parser
from _common import open_folder, run_script

SOURCE = Path('/usr/share/datasets/fashion-mnist')

EXAMPLES = """examples:
  apt-get install dataset-fashion-mnist && scripts/prepare_fashion_mnist.py data
  scripts/prepare_fashion_mnist.py data                     # downloads it, without that package
  scripts/prepare_fashion_mnist.py data --source my/gz      # a folder of the four .gz files

Then pass --dataset torch/fashion_mnist --data-dir data to the other scripts."""


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = create_parser(__doc__, EXAMPLES)
    parser.add_argument('root', type=Path, metavar='ROOT', help='folder to write')
    parser.add_argument(
        '--source', type=Path, default=SOURCE, metavar='DIR',
        help='folder of the four .gz files; without it they are downloaded (default: %(default)s)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

from torchvision.datasets import FashionMNIST
from torchvision.datasets.utils import extract_archive

from timm_aig import InputError

MAGIC = {'images': 2051, 'labels': 2049}  # first number of a file of the MNIST format


def unpack(source: Path, root: Path) -> None:
    """Unpack the four files of source into root/FashionMNIST/raw, once all of them are known to be good.

    Debian compresses the files anew, so torchvision's checksums do not fit.
    """
    for name, _ in FashionMNIST.resources:
        try:
            with gzip.open(source / name) as file:
                content = file.read()
        except (EOFError, OSError, zlib.error) as e:
            raise InputError(f'{source / name} cannot be read: {e}', 'source') from e
        if int.from_bytes(content[:4], 'big') != MAGIC[name.split('-')[1]]:
            raise InputError(f'{source / name} is not a file of images or labels.', 'source')
    raw = root / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True, exist_ok=True)
    for name, _ in FashionMNIST.resources:
        extract_archive(str(source / name), str(raw))


def run(args: argparse.Namespace) -> None:
    if not args.source.is_dir() and args.source != SOURCE:  # a mistyped one is no wish to download
        raise InputError(f'must be a folder, {str(args.source)!r} is not.', 'source')
    open_folder(args.root, 'ROOT')
    if args.source.is_dir():
        unpack(args.source, args.root)
    try:
        sizes = [
            len(FashionMNIST(str(args.root), train=train, download=not args.source.is_dir()))
            for train in (True, False)]
    except (RuntimeError, ValueError) as e:  # torchvision's, for a download or a file of another size
        raise InputError(str(e)) from e
    print(f'{sizes[0]} training and {sizes[1]} test images in {args.root}: '
          f'--dataset torch/fashion_mnist --data-dir {args.root}')


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
