"""Uploads of the page: any file becomes an image, or an error in a sentence."""
from pathlib import Path
from typing import List, Tuple, Union

import numpy as np
from PIL import Image, ImageOps

__all__ = ['UploadError', 'read_image']

FORMATS = ('AVIF', 'BMP', 'GIF', 'JPEG', 'MPO', 'PNG', 'PPM', 'TIFF', 'WEBP')
MAX_BYTES = 50_000_000
MAX_PIXELS = 64_000_000
MAX_ASPECT = 20  # the shorter side is resized to the model's size, so the longer one could become huge
KEPT_SIDE = 1024  # larger images are reduced to at least this shorter side; no model here takes more
SEVERAL = {'GIF': 'animated', 'PNG': 'animated', 'WEBP': 'animated', 'AVIF': 'animated', 'TIFF': 'of several pages'}


class UploadError(ValueError):
    """An upload that cannot be used. The message is for the visitor of the page."""


def read_image(path: Union[str, Path]) -> Tuple[Image.Image, List[str]]:
    """Read an uploaded file.

    The size is checked before any pixel is decoded. The image is turned as its EXIF data say, only the first frame is
    kept, 16 bits are scaled to 8, and transparent parts become white.

    Args:
        path: The file. Messages never name it.

    Returns:
        The image, mode L or RGB, and notes for the visitor on how it was converted.

    Raises:
        UploadError: Not an image, damaged, too large or too narrow.
    """
    size = Path(path).stat().st_size
    if size == 0:
        raise UploadError('the file is empty (0 bytes).')
    if size > MAX_BYTES:
        raise UploadError(f'the file has {size / 1e6:.0f} MB, the limit is {MAX_BYTES / 1e6:.0f} MB.')
    try:
        opened = Image.open(path, formats=[name for name in FORMATS if name in _installed()])
    except Image.DecompressionBombError as e:
        raise UploadError(f'the image has more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} megapixels, '
                          f'the limit is {MAX_PIXELS / 1e6:.0f}.') from e
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
            return _decode(opened)
        except Exception as e:
            raise UploadError('the image is damaged or cut off, it cannot be decoded.') from e


def _installed() -> List[str]:
    Image.init()
    return list(Image.OPEN)


def _decode(opened: Image.Image) -> Tuple[Image.Image, List[str]]:
    notes = []
    frames = getattr(opened, 'n_frames', 1)
    if frames > 1 and opened.format in SEVERAL:
        notes.append(f'The image is {SEVERAL[opened.format]}: the first of {frames} is used.')
    opened.seek(0)
    opened.load()
    upright = ImageOps.exif_transpose(opened)
    if opened.getexif().get(0x0112, 1) != 1:
        notes.append('The image is turned as its EXIF data say.')
    image, note = _eight_bits(upright)
    if note:
        notes.append(note)
    factor = min(image.size) // KEPT_SIDE
    return (image.reduce(factor) if factor > 1 else image), notes


def _eight_bits(image: Image.Image) -> Tuple[Image.Image, str]:
    """The image in mode L or RGB, and a note on how it was converted, if necessary."""
    if image.mode in ('L', 'RGB'):
        return image, ''
    if image.mode.startswith('I') or image.mode == 'F':
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float64))
        low, high = 0., 65535.
        note = 'The image has 16 bits a pixel, scaled to 8.'
        if not image.mode.startswith('I;16') and (image.mode == 'F' or pixels.min() < 0 or pixels.max() > high):
            low, high = pixels.min(), pixels.max()
            note = 'The image has 32 bits a pixel, its range is scaled to 8.'
        scaled = (pixels - low) * (255 / max(high - low, 1e-12))
        return Image.fromarray(scaled.round().astype(np.uint8)), note
    if image.mode == '1':
        return image.convert('L'), ''
    if image.mode in ('LA', 'La', 'PA', 'RGBA', 'RGBa') or 'transparency' in image.info:
        layer = image.convert('RGBA')
        canvas = Image.new('RGBA', layer.size, 'white')
        canvas.alpha_composite(layer)
        note = 'Transparent parts are taken as white.' if layer.getextrema()[3][0] < 255 else ''
        return canvas.convert('L' if image.mode in ('LA', 'La') else 'RGB'), note
    note = 'The image has CMYK inks, converted to RGB.' if image.mode == 'CMYK' else ''
    return image.convert('RGB'), note
