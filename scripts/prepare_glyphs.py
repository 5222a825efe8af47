#!/usr/bin/env python3
"""Draw an image data set of Chinese characters from free fonts, some images damaged more than others.

The folder is laid out for --data-dir of the other scripts: train/, validation/, test/ and test_fonts/, whose fonts are
not in the others. Each has a folder of PNG files for each character. glyphs.csv has the font and the severity in [0, 1]
of each image, and fonts.csv the fonts with their licences.

The severity of an image bounds its rotation, shear, shift, size and bending, the loss of contrast, the noise, and the
chances that neighbouring characters show and that a patch is covered. Half of the images are dark on light.
"""
import argparse
import sys
from itertools import product
from pathlib import Path
from typing import Any, List, NamedTuple, Optional, Tuple

from _args import add_args, create_parser, integer
from _common import run_script, write_csv

EXAMPLES = """examples:
  apt-get install $(scripts/prepare_glyphs.py --packages) && scripts/prepare_glyphs.py glyphs
  scripts/finetune.py --static --model cifar_resnet20 --data-dir glyphs --num-classes 2000 --input-size 1 20 20 \\
      --mean 0.5 --std 0.3 --crop-padding 2 --hflip 0"""


class Font(NamedTuple):
    """A face of a font file in /usr/share/fonts."""
    package: str
    licence: str
    file: str
    index: int = 0


NOTO, ARPHIC = 'SIL Open Font License 1.1', 'Arphic Public License'
FONTS = (
    Font('fonts-noto-cjk', NOTO, 'opentype/noto/NotoSansCJK-Regular.ttc', 2),
    Font('fonts-noto-cjk', NOTO, 'opentype/noto/NotoSansCJK-Bold.ttc', 2),
    Font('fonts-noto-cjk', NOTO, 'opentype/noto/NotoSerifCJK-Regular.ttc', 2),
    Font('fonts-noto-cjk', NOTO, 'opentype/noto/NotoSerifCJK-Bold.ttc', 2),
    Font('fonts-wqy-zenhei', 'GPL-2 with font exception', 'truetype/wqy/wqy-zenhei.ttc'),
    Font('fonts-wqy-microhei', 'Apache-2.0 or GPL-3 with font exception', 'truetype/wqy/wqy-microhei.ttc'),
    Font('fonts-arphic-uming', ARPHIC, 'truetype/arphic/uming.ttc'),
    Font('fonts-arphic-ukai', ARPHIC, 'truetype/arphic/ukai.ttc'),
    Font('fonts-arphic-gbsn00lp', ARPHIC, 'truetype/arphic-gbsn00lp/gbsn00lp.ttf'),
    Font('fonts-arphic-gkai00mp', ARPHIC, 'truetype/arphic-gkai00mp/gkai00mp.ttf'),
    Font('fonts-ipafont-gothic', 'IPA Font License 1.0', 'opentype/ipafont-gothic/ipag.ttf'),
    Font('fonts-ipafont-mincho', 'IPA Font License 1.0', 'opentype/ipafont-mincho/ipam.ttf'),
)
TEST_FONTS = (
    Font('fonts-vlgothic', 'M+ and Sazanami font licences, BSD-3-Clause', 'truetype/vlgothic/VL-Gothic-Regular.ttf'),
    Font('fonts-hanazono', 'Hanazono Font License or SIL Open Font License', 'truetype/hanazono/HanaMinA.ttf'),
)
FOLDER = Path('/usr/share/fonts')
SPLITS = {'train': 100_000, 'validation': 5_000, 'test': 10_000, 'test_fonts': 5_000}
BATCH = 1000  # images drawn at a time


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = create_parser(__doc__, EXAMPLES)
    arg = parser.add_argument
    arg('root', type=Path, metavar='ROOT', nargs='?', help='folder to write')
    arg('--packages', action='store_true', help='only print the Debian packages of the fonts')
    arg('--classes', type=integer(2), default=2000, metavar='N', help='characters, at most 2370 (default: %(default)s)')
    arg('--size', type=integer(8), default=20, metavar='PX', help='width and height of an image (default: %(default)s)')
    for split, count in SPLITS.items():
        arg(f'--{split.replace("_", "-")}', type=integer(1), default=count, metavar='N',
            help=f'images of {split} (default: %(default)s)')
    add_args(parser, 'seed')
    args = parser.parse_args(argv)
    if args.root is None and not args.packages:
        parser.error('ROOT is required, a folder to write.')
    return args


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm, trange

from timm_aig import InputError


def characters(count: int, seed: int) -> List[str]:
    """Characters of GB 2312 level 1 that Shift-JIS has too, so that Chinese and Japanese fonts have them all."""
    level_1 = (bytes(pair).decode('gb2312', 'ignore') for pair in product(range(0xB0, 0xD8), range(0xA1, 0xFF)))
    found = [char for char in level_1 if char and char.encode('shift_jis', 'ignore')]
    if count > len(found):
        raise InputError(f'must be at most {len(found)}, not {count}.', 'classes')
    return sorted(found[i] for i in np.random.default_rng(seed).permutation(len(found))[:count])


def render(font: Font, chars: List[str], size: int) -> torch.Tensor:
    """Images of characters, white on black, [C, size, size] in [0, 1].

    Raises:
        InputError: The font lacks a character.
    """
    face = ImageFont.truetype(str(FOLDER / font.file), int(size * .85), index=font.index)
    images = np.zeros((len(chars) + 1, size, size), np.uint8)
    for image, char in zip(images, [*chars, '\U0010fffd']):  # the last one is in no font
        canvas = Image.new('L', (size, size))
        ImageDraw.Draw(canvas).text((size / 2, size / 2), char, fill=255, font=face, anchor='mm')
        image[:] = np.asarray(canvas)
    missing = (images[:-1] == images[-1]).all((1, 2)) | (images[:-1].max((1, 2)) == 0)
    if missing.any():
        raise InputError(f'{FOLDER / font.file} has no {chars[int(missing.argmax())]}.')
    return torch.from_numpy(images[:-1]).float() / 255


def draw(
        glyphs: torch.Tensor, font: torch.Tensor, label: torch.Tensor, severity: torch.Tensor,
        generator: torch.Generator,
) -> torch.Tensor:
    """Damaged images.

    Args:
        glyphs: Characters [fonts, classes, 2 * S, 2 * S] in [0, 1].
        font, label: Which glyph each image shows, [B].
        severity: In [0, 1], [B].
        generator: For all random numbers.

    Returns:
        Images [B, 1, S, S] in [0, 1].
    """
    batch, size = len(label), glyphs.shape[-1]
    level = severity.view(-1, 1, 1, 1)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape or (batch, 1, 1, 1), generator=generator)

    def spread(most: float) -> torch.Tensor:
        return severity * most * (2 * uniform(batch) - 1)

    x = glyphs[font, label][:, None]
    zero, one = torch.zeros(batch), torch.ones(batch)
    for side in (-1, 1):  # neighbours in a line of text
        other = glyphs[font, torch.randint(glyphs.shape[1], (batch,), generator=generator)][:, None]
        shift = side * (1.9 - .5 * severity * uniform(batch))
        other = F.grid_sample(other, grid(one, zero, shift, zero, one, zero, size), align_corners=False)
        x = torch.maximum(x, other * (uniform() < level))

    angle, scale = spread(.5), 1 / (1 + severity * (.5 * uniform(batch) - .4))
    cos, sin = angle.cos() * scale, angle.sin() * scale
    where = grid(cos, spread(.3) - sin, spread(.2), sin, cos, spread(.2), size)
    bend = F.interpolate(torch.randn(batch, 2, 4, 4, generator=generator), (size, size), mode='bicubic')
    where = where + .06 * level * uniform() * bend.permute(0, 2, 3, 1)
    x = F.avg_pool2d(F.grid_sample(x, where, align_corners=False), 2)

    x = x * (1 - .7 * level * uniform()) + .3 * level * uniform()
    at = (torch.arange(size // 2) + .5) / (size // 2)
    half = .075 + .125 * level * uniform()
    covered = ((at[:, None] - uniform()).abs() < half) & ((at - uniform()).abs() < half) & (uniform() < level)
    x = torch.where(covered, uniform(*x.shape), x)
    x = x + .2 * level * uniform() * torch.randn(x.shape, generator=generator)
    return torch.where(uniform() < .5, x, 1 - x).clamp(0, 1)


def grid(*matrix: Any) -> torch.Tensor:
    """Where to sample images [B, 1, size, size]: six entries [B] of an affine matrix, then the size."""
    *entries, size = matrix
    return F.affine_grid(torch.stack(entries, 1).view(-1, 2, 3), [len(entries[0]), 1, size, size], align_corners=False)


def write_split(
        root: Path, split: str, count: int, fonts: Tuple[Font, ...], glyphs: torch.Tensor, names: List[str],
        generator: torch.Generator,
) -> List[List[Any]]:
    """Write the images of a split; every character has the same number of them, or one more.

    Returns:
        Rows of glyphs.csv.
    """
    for name in names:
        (root / split / name).mkdir(parents=True)
    rows = []
    for start in trange(0, count, BATCH, desc=split, unit='batch'):
        label = torch.arange(start, min(start + BATCH, count)) % len(names)
        font = torch.randint(len(fonts), label.shape, generator=generator)
        severity = torch.rand(label.shape, generator=generator)
        images = (draw(glyphs, font, label, severity, generator)[:, 0] * 255).round().byte().numpy()
        for i, image in enumerate(images):
            file = f'{split}/{names[label[i]]}/{start + i:06}.png'
            Image.fromarray(image).save(root / file)
            rows.append([file, Path(fonts[font[i]].file).name, f'{severity[i]:.4f}'])
    return rows


def run(args: argparse.Namespace) -> None:
    if args.packages:
        print(' '.join(sorted({font.package for font in FONTS + TEST_FONTS})))
        return
    missing = sorted({font.package for font in FONTS + TEST_FONTS if not (FOLDER / font.file).is_file()})
    if missing:
        raise InputError(f'fonts are missing: apt-get install {" ".join(missing)}')
    if args.root.is_file() or (args.root.exists() and any(args.root.iterdir())):
        raise InputError(f'must be a new or empty folder, {args.root} is not.', 'root')
    chars = characters(args.classes, args.seed)
    glyphs = {some: torch.stack([render(font, chars, 2 * args.size) for font in tqdm(some, 'render', unit='font')])
              for some in (FONTS, TEST_FONTS)}
    generator = torch.Generator().manual_seed(args.seed)
    counts = {split: getattr(args, split) for split in SPLITS}
    rows = []
    for split, count in counts.items():
        fonts = TEST_FONTS if split == 'test_fonts' else FONTS
        names = [f'U+{ord(char):04X}' for char in chars]
        rows += write_split(args.root, split, count, fonts, glyphs[fonts], names, generator)
    write_csv(args.root / 'fonts.csv', ['font', 'package', 'licence', 'splits'], [
        [Path(font.file).name, font.package, font.licence, 'test_fonts' if font in TEST_FONTS else 'the others']
        for font in FONTS + TEST_FONTS])
    write_csv(args.root / 'glyphs.csv', ['image', 'font', 'severity'], rows)
    print(f'{", ".join(f"{count} {split}" for split, count in counts.items())} images of {len(chars)} characters in '
          f'{args.root}: --data-dir {args.root}')


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
