"""Uploads of the page: any file becomes an image, or an error in a sentence."""
from pathlib import Path
from typing import Union

import numpy as np
from PIL import Image, ImageOps

__all__ = ['UploadError', 'read_image']

FORMATS = ('AVIF', 'BMP', 'GIF', 'JPEG', 'MPO', 'PNG', 'PPM', 'TIFF', 'WEBP')  # Pillow reads others, such as PostScript
MAX_BYTES = 50_000_000
MAX_PIXELS = 64_000_000
MAX_ASPECT = 20  # the shorter side is resized to the model's size, so the longer one could become huge
KEPT_SIDE = 1024  # larger images are reduced to at least this shorter side; no model here takes more


class UploadError(ValueError):
    """An upload that cannot be used. The message is for the visitor of the page."""


def read_image(path: Union[str, Path]) -> Image.Image:
    """Read an uploaded file, in mode L or RGB.

    The size is checked before any pixel is decoded. The image is turned as its EXIF data say, only the first frame is
    kept, 16 bits are scaled to 8, and transparent parts become white.

    Raises:
        UploadError: Not an image, damaged, too large or too narrow. The message does not name the file.
    """
    size = Path(path).stat().st_size
    if size == 0:
        raise UploadError('the file is empty (0 bytes).')
    if size > MAX_BYTES:
        raise UploadError(f'the file has {size / 1e6:.0f} MB, the limit is {MAX_BYTES / 1e6:.0f} MB.')
    try:
        Image.init()
        opened = Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.DecompressionBombError as e:
        raise UploadError(f'the image has too many pixels, the limit is {MAX_PIXELS / 1e6:.0f} megapixels.') from e
    except Exception as e:  # decoders raise errors of any type
        raise UploadError('this is not an image that can be read. Upload a JPEG, PNG, WebP, GIF, BMP or TIFF.') from e
    with opened:
        width, height = opened.size
        if width * height > MAX_PIXELS:
            raise UploadError(f'the image has {width * height / 1e6:.0f} megapixels ({width} x {height}), '
                              f'the limit is {MAX_PIXELS / 1e6:.0f}.')
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise UploadError(f'the image is {width} x {height}, one side may be at most {MAX_ASPECT} times the other.')
        try:
            opened.seek(0)
            image = _eight_bits(ImageOps.exif_transpose(opened))
        except Exception as e:
            raise UploadError('the image is damaged or cut off, it cannot be decoded.') from e
    factor = min(image.size) // KEPT_SIDE
    return image.reduce(factor) if factor > 1 else image


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image in mode L or RGB."""
    if image.mode.startswith(('I', 'F')):  # Pillow would clip the values to 255
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float64))
        is_16_bit = image.mode != 'F' and pixels.min() >= 0 and pixels.max() < 2 ** 16
        low, high = (0, 2 ** 16 - 1) if is_16_bit else (pixels.min(), pixels.max())
        return Image.fromarray(((pixels - low) * (255 / max(high - low, 1e-12))).round().astype(np.uint8))
    if image.mode == '1':
        return image.convert('L')
    if image.has_transparency_data:
        layer = image.convert('RGBA')
        canvas = Image.new('RGBA', layer.size, 'white')
        canvas.alpha_composite(layer)
        return canvas.convert('L' if image.mode in ('LA', 'La') else 'RGB')
    return image if image.mode == 'L' else image.convert('RGB')
