"""Images in: files, arrays and PIL images to 8-bit RGB, and the size of the video that an image asks for.

The counterpart of `turbojax.video`. An image is uint8 `[H, W, 3]`; sizes are width and height in pixels.
"""

import math
import os
import warnings
from pathlib import Path

import numpy as np
from absl import logging
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from turbojax.errors import UserError
from turbojax.files import user_path

LONGEST_SIDE = 2048  # pixels that the published networks are made for: 128 patches

ImageSource = str | os.PathLike | np.ndarray | Image.Image


def read_image(source: ImageSource, *, background: str = "white") -> np.ndarray:
    """Any image as uint8 `[H, W, 3]`, upright.

    source: a file's path; an array `[H, W]`, `[H, W, 1]`, `[H, W, 3]` or `[H, W, 4]` of uint8, uint16 or floats in
      0..1; or a PIL image. EXIF orientation is applied, 16 bits are rounded to 8, and of an animation the first frame
      is taken.
    background: what shows through where the image is transparent, a colour by name or as "#rrggbb".

    Raises UserError for what is missing, damaged, too large or no image.
    """
    try:
        colour = ImageColor.getrgb(background)[:3]
    except ValueError as error:
        raise UserError(f"{background=} is no colour; give a name such as white, or #rrggbb") from error
    if isinstance(source, str | os.PathLike):
        return from_file(user_path(source), colour)
    if isinstance(source, Image.Image):
        return from_pil(source, colour)
    return from_pil(as_pil(np.asarray(source)), colour)


def from_file(path: Path, background: tuple[int, ...]) -> np.ndarray:
    """An image file; whatever Pillow raises becomes one sentence."""
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 million pixels on, which a photograph may have, and refuses twice as many.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                frames = getattr(image, "n_frames", 1)
                if frames > 1:
                    logging.info("%s has %d frames; the first is used", path, frames)
                return from_pil(image, background)
    except FileNotFoundError as error:
        raise UserError(f"the image {str(path)!r} does not exist") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{str(path)!r} is no image that can be read; give a JPEG, PNG, WebP, GIF or TIFF") from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise UserError(f"the image {str(path)!r} has more than {limit:.0f} million pixels; make it smaller") from error
    except UserError:
        raise
    except Exception as error:  # each of Pillow's many decoders has errors of its own
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the image {str(path)!r} cannot be read, it may be cut off: {reason}") from error


def as_pil(array: np.ndarray) -> Image.Image:
    """An array as a PIL image; raises UserError for other shapes, types and values."""
    if array.ndim not in (2, 3) or array.size == 0 or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise UserError(f"an image is [H, W], or [H, W, C] with 1, 3 or 4 channels, not {list(array.shape)}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype == np.uint16:
        array = to_8_bits(array)
    elif array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
        if not (array.min() >= 0 and array.max() <= 1):  # NaN, too
            raise UserError(f"an image of {array.dtype} has values in 0..1, not {array.min():.3g}..{array.max():.3g}")
        array = np.round(255 * array).astype(np.uint8)
    if array.dtype != np.uint8:
        raise UserError(f"an image is uint8, uint16 or floats in 0..1, not {array.dtype}")
    return Image.fromarray(array)


def from_pil(image: Image.Image, background: tuple[int, ...]) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # grey levels of 16 bits, "I" where Pillow holds them in 32
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise UserError(f"grey levels {levels.min()}..{levels.max()} are not of 8 or 16 bits; convert the image")
        image = Image.fromarray(to_8_bits(levels))
    if image.mode == "F":
        image = as_pil(np.asarray(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return np.array(image.convert("RGB"))


def to_8_bits(levels: np.ndarray) -> np.ndarray:
    """Levels 0..65535 to the nearest of 0..255."""
    return ((levels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def adaptive_size(image: tuple[int, int], video: tuple[int, int], *, step: int = 16) -> tuple[int, int]:
    """The width and height, multiples of `step`, that keep the image's shape at the area of a video's size.

    image, video: width and height. Raises UserError for an image so long that a side would pass LONGEST_SIDE.
    Source: TurboDiffusion, inference/wan2.2_i2v_infer.py (`adaptive_resolution`); a tie goes to the even multiple.
    """
    area, ratio = math.prod(video), image[1] / image[0]
    height, width = round(math.sqrt(area * ratio) / step) * step, round(math.sqrt(area / ratio) / step) * step
    if max(width, height) > LONGEST_SIDE:
        longest = LONGEST_SIDE**2 / area
        raise UserError(f"an image of {image[0]} x {image[1]} is too long for a video; crop it to {longest:.1f} : 1")
    return width, height


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """The image `[H, W, 3]` at that size, bilinear with antialiasing on 8-bit levels, as the models are run."""
    if image.shape[:2] == (height, width):
        return image
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def to_unit(image: np.ndarray) -> np.ndarray:
    """Levels 0..255 to float32 in [-1, 1]."""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)
