"""Images in: files, arrays and PIL images to 8-bit RGB, and the size of the video that an image asks for.

The counterpart of `turbojax.media.video`. An image is uint8 `[H, W, 3]`; sizes are width and height in pixels.
"""

import io
import math
import os
import re
import textwrap
import warnings
from pathlib import Path

import numpy as np
from absl import logging
from PIL import Image, ImageCms, ImageColor, ImageOps, PngImagePlugin, UnidentifiedImageError

from turbojax.errors import UserError, quoted
from turbojax.files import user_path

LONGEST_SIDE = 2048  # pixels that the published networks are made for: 128 patches
URL = re.compile(r"(?i)[a-z][a-z0-9+.-]+://|data:")
REFUSED = ("EPS",)  # Pillow runs Ghostscript for it, a program on a file that nobody has checked
# What is given for an image by mistake: by its first bytes, its name and what to do.
MISTAKEN = (
    (rb".{4}ftyp(.{8})?.{0,20}(hei[cxms]|hev[cx])", "HEIC; save it as JPEG or PNG"),
    (rb".{4}ftypavi[fs]", "AVIF, which this Pillow cannot read; pip install -U pillow, or save it as JPEG or PNG"),
    (rb"\xff\x0a|.{4}JXL ", "JPEG XL; save it as JPEG or PNG"),
    (rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI ", "a video; give one of its frames as PNG or JPEG"),
    (rb"%PDF", "a PDF; save its page as PNG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "EPS; save it as PNG"),
    (rb"version https://git-lfs", "a git-lfs pointer; run git lfs pull"),
    (rb"\s*(<!--.*?-->\s*)?(<\?xml.*?<svg|<svg)", "SVG, a drawing without pixels; save it as PNG"),
    (rb"(?i)\s*<(!doctype html|html)", "a web page; download the picture on it"),
)

ImageSource = str | os.PathLike | np.ndarray | Image.Image


def read_image(source: ImageSource, *, background: str = "white") -> np.ndarray:
    """Reads any image as uint8 `[H, W, 3]`, upright.

    source: a file's path; an array `[H, W]`, `[H, W, 1]`, `[H, W, 3]` or `[H, W, 4]` of uint8, uint16 or floats in
      0..1; or a PIL image. EXIF orientation is applied, 16 bits are rounded to 8, and of an animation the first frame
      is taken.
    background: what shows through where the image is transparent, a colour by name or as "#rrggbb".

    Colours are those of sRGB, into which an ICC profile is converted; one that does not fit or is damaged is passed
    over with a warning. Raises UserError for what is missing, damaged, too large or no image.
    """
    colour = check_colour(background)
    if isinstance(source, str | os.PathLike):
        return from_file(source, colour)
    if isinstance(source, Image.Image):
        return from_pil(source, colour)
    return from_pil(as_pil(np.asarray(source)), colour)


def check_colour(background: str) -> tuple[int, ...]:
    """Returns red, green and blue of a colour by name or as "#rrggbb"; raises UserError for what is none."""
    try:
        return ImageColor.getrgb(background)[:3]
    except ValueError as error:
        raise UserError(
            f"background={quoted(background)} is no colour; give a name such as white, or #rrggbb"
        ) from error


def from_file(source: str | os.PathLike, background: tuple[int, ...]) -> np.ndarray:
    """Reads an image file; whatever Pillow raises becomes one sentence."""
    if URL.match(os.fspath(source)):
        raise UserError(f"the image {quoted(os.fspath(source))} is an address; download it, and give the file")
    path = user_path(source)
    name = repr(str(path))
    try:
        if not path.exists():
            raise UserError(f"the image {name} does not exist")
        if path.is_dir():
            raise UserError(f"the image {name} is a folder; give a file in it")
        if not path.is_file():  # a pipe would be waited for
            raise UserError(f"the image {name} is no regular file; give a JPEG or PNG")
        with warnings.catch_warnings():
            # Pillow warns from 89 million pixels on, which a photograph may have, and refuses twice as many; and of
            # damaged EXIF data, which it passes over.
            warnings.filterwarnings("ignore", module="PIL")
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.init()
            with Image.open(path, formats=[kind for kind in Image.OPEN if kind not in REFUSED]) as image:
                frames = getattr(image, "n_frames", 1)
                if frames > 1:
                    logging.info("%s has %d frames; the first is used", path, frames)
                mend_transparency(image)
                return from_pil(image, background)
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is no image that can be read{what_it_is(path)}") from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise UserError(f"the image {name} has more than {limit:.0f} million pixels; make it smaller") from error
    except UserError:
        raise
    except Exception as error:  # each of Pillow's many decoders has errors of its own
        reason = getattr(error, "strerror", None) or brief(error) or type(error).__name__
        raise UserError(f"the image {name} cannot be read, it may be cut off: {reason}") from error


def what_it_is(path: Path) -> str:
    """Names the kind of a file that is no image, and what to do with it, as the end of a sentence."""
    with path.open("rb") as file:
        start = file.read(1000)
    if not start:
        return ": it is empty; give another file"
    for pattern, kind in MISTAKEN:
        if re.match(pattern, start, re.DOTALL):
            return f": it is {kind}"
    return "; give a JPEG, PNG, WebP, GIF or TIFF"


def brief(error: Exception) -> str:
    """Returns Pillow's message on one line; it may quote the file."""
    return textwrap.shorten(str(error), 200, placeholder=" ...")


def mend_transparency(image: Image.Image) -> None:
    """Brings the transparent level of a PNG file to the bits that Pillow gives all other levels."""
    key = image.info.get("transparency")
    if isinstance(image, PngImagePlugin.PngImageFile) and key is not None and image.tile:
        match image.tile[0].args:
            case "L;2":
                image.info["transparency"] = key * 85
            case "L;4":
                image.info["transparency"] = key * 17
            case "RGB;16B":
                image.info["transparency"] = tuple(level >> 8 for level in key)


def as_pil(array: np.ndarray) -> Image.Image:
    """Returns an array as a PIL image; raises UserError for other shapes, types and values."""
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
    image = with_8_bits(ImageOps.exif_transpose(image))
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    colours = to_srgb(image)
    if alpha is not None:
        colours.putalpha(alpha)
        colours = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), colours)
    return np.array(colours.convert("RGB"))


def with_8_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits or floats with levels of 8 bits; others as they are."""
    if image.mode == "La":  # grey, multiplied by its transparency; Pillow converts it to this alone
        return image.convert("LA")
    if image.mode == "F":
        levels = as_pil(np.asarray(image))
    elif image.mode.startswith("I"):  # grey levels of 16 bits, "I" where Pillow holds them in 32
        deep = np.asarray(image)
        if deep.min() < 0 or deep.max() > 65535:
            raise UserError(f"grey levels {deep.min()}..{deep.max()} are not of 8 or 16 bits; convert the image")
        levels = Image.fromarray(to_8_bits(deep))
        if isinstance(key := image.info.get("transparency"), int):  # one of 65536 levels, which 8 bits do not tell
            levels.putalpha(Image.fromarray(np.where(deep == key, 0, 255).astype(np.uint8)))
    else:
        return image
    levels.info["icc_profile"] = image.info.get("icc_profile")
    return levels


def to_srgb(image: Image.Image) -> Image.Image:
    """The colours of an image without its transparency, mode "RGB", by its ICC profile if it has one that fits."""
    profile = image.info.get("icc_profile")
    if image.mode == "LAB":
        return convert(image, ImageCms.createProfile("LAB"))
    own = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    if profile:
        try:
            given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            space = given.profile.xcolor_space.strip()
            if space == {"L": "GRAY"}.get(own, own):
                return convert(image.convert("RGBA").convert("RGB") if own == "RGB" else image.convert(own), given)
            reason = f"it is for {space}, the image is {own}"
        except (ImageCms.PyCMSError, ImportError, OSError, TypeError, ValueError) as error:
            reason = brief(error)
        logging.warning("The image's colour profile is passed over: %s", reason)
    return image.convert("RGB")


def convert(image: Image.Image, profile: ImageCms.ImageCmsProfile | ImageCms.core.CmsProfile) -> Image.Image:
    """Converts a profile's colours to sRGB's, as photo programs do by default; raises PyCMSError."""
    converted = ImageCms.profileToProfile(
        image,
        profile,
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        outputMode="RGB",
    )
    assert converted is not None  # it is where it works in place
    return converted


def to_8_bits(levels: np.ndarray) -> np.ndarray:
    """Levels 0..65535 to the nearest of 0..255."""
    return ((levels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def adaptive_size(image: tuple[int, int], video: tuple[int, int], *, step: int = 16) -> tuple[int, int]:
    """Returns width and height, multiples of `step`, that keep the image's shape at the area of a video's size.

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
    """Resizes an image `[H, W, 3]`, bilinear with antialiasing on 8-bit levels, as the models are run."""
    if image.shape[:2] == (height, width):
        return image
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def to_unit(image: np.ndarray) -> np.ndarray:
    """Levels 0..255 to float32 in [-1, 1]."""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)
