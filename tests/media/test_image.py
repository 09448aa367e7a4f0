"""Images of every kind to upright 8-bit RGB, and bad ones to one sentence."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from turbojax.errors import UserError
from turbojax.media.image import adaptive_size, read_image, resize, to_unit

RNG = np.random.default_rng(0)


@pytest.fixture
def picture():
    return RNG.integers(0, 256, (5, 7, 3), np.uint8)


def test_paths_arrays_and_pil_images_are_the_same(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "picture.png")
    for source in (tmp_path / "picture.png", str(tmp_path / "picture.png"), picture, Image.fromarray(picture)):
        np.testing.assert_array_equal(read_image(source), picture)
    np.testing.assert_array_equal(read_image(picture.astype(np.uint16) * 257), picture)
    np.testing.assert_array_equal(read_image(picture / np.float32(255)), picture)
    np.testing.assert_array_equal(read_image(picture[:, :, 0]), np.repeat(picture[:, :, :1], 3, axis=2))
    np.testing.assert_array_equal(read_image(picture[:, :, :1]), np.repeat(picture[:, :, :1], 3, axis=2))


UPRIGHT = {  # what each EXIF orientation does to the stored pixels
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", list(UPRIGHT))
def test_orientation(tmp_path, picture, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png"), UPRIGHT[orientation](picture))


def test_a_large_turned_photograph(tmp_path):
    photograph = Image.fromarray(RNG.integers(0, 256, (3, 4, 3), np.uint8)).resize((4000, 3000))
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    image = read_image(tmp_path / "photo.jpg")
    assert image.shape == (4000, 3000, 3)
    expected = np.rot90(np.asarray(photograph), -1)[::100, ::100]
    assert np.abs(image[::100, ::100].astype(int) - expected.astype(int)).max() <= 8  # JPEG is lossy
    assert adaptive_size((3000, 4000), (832, 480)) == (544, 736)


def test_transparency_shows_the_background(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [(10, 20, 30, 255), (200, 200, 200, 0), (255, 0, 0, 128)]
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    white = read_image(tmp_path / "alpha.png")
    assert white[0].tolist() == [[10, 20, 30], [255, 255, 255], [255, 127, 127]]
    assert read_image(rgba, background="#0000ff")[0].tolist() == [[10, 20, 30], [0, 0, 255], [128, 0, 127]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=1)
    assert read_image(tmp_path / "palette.png", background="black")[0].tolist() == [[1, 2, 3], [0, 0, 0]]
    assert read_image(Image.new("LA", (1, 1), (9, 0)), background="red")[0].tolist() == [[255, 0, 0]]


def test_cmyk_bilevel_and_16_bit(tmp_path):
    colours = np.zeros((8, 8, 3), np.uint8)
    colours[:, :4] = (250, 10, 20)
    Image.fromarray(colours).convert("CMYK").save(tmp_path / "print.jpg", quality=100, subsampling=0)
    assert Image.open(tmp_path / "print.jpg").mode == "CMYK"
    assert np.abs(read_image(tmp_path / "print.jpg").astype(int) - colours).max() <= 6
    assert read_image(Image.fromarray(np.array([[True, False]])))[0].tolist() == [[255] * 3, [0] * 3]
    deep = np.array([[0, 128, 129, 257, 32896, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


def test_the_first_frame_of_an_animation(tmp_path, caplog):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    with caplog.at_level("INFO", logger="absl"):
        image = read_image(tmp_path / "moving.gif")
    assert (image == (255, 0, 0)).all()
    assert "3 frames; the first is used" in caplog.text


def test_one_pixel():
    image = read_image(np.full((1, 1, 3), 77, np.uint8))
    assert adaptive_size((1, 1), (832, 480)) == (624, 624)
    assert (resize(image, 32, 16) == 77).all()
    assert resize(image, 32, 16).shape == (16, 32, 3)


def test_levels_to_model_range():
    assert to_unit(np.array([0, 255], np.uint8)).tolist() == [-1, 1]


def damaged_png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(file, "png")
    return file.getvalue()[:4000]


def test_bad_files_are_one_sentence(tmp_path, monkeypatch):
    contents = {"text.png": b"not an image", "cut.png": damaged_png(), "empty.jpg": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(UserError, match="does not exist"):
        read_image(tmp_path / "missing.png")
    Image.new("1", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="million pixels"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2, 2), np.uint8), r"\[2, 2, 2\]"),
        (np.zeros((0, 2, 3), np.uint8), r"\[0, 2, 3\]"),
        (np.zeros(3, np.uint8), r"\[3\]"),
        (np.zeros((2, 2, 3), np.int64), "int64"),
        (np.full((2, 2, 3), 200.0), "0..1"),
        (np.full((2, 2, 3), np.nan), "0..1"),
    ],
)
def test_bad_arrays(array, message):
    with pytest.raises(UserError, match=message):
        read_image(array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0\0\x24ftypheic\0\0\0\0mif1heic", "is HEIC; save it as JPEG or PNG"),
        (b"\0\0\0\x24ftypmif1\0\0\0\0mif1miafheic", "is HEIC"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2", "is a video; give one of its frames"),
        (b"\x1aE\xdf\xa3 webm", "is a video"),
        (b"\0\0\0\x0cJXL \r\n", "is JPEG XL"),
        (b"%PDF-1.7", "is a PDF; save its page"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is EPS; save it as PNG"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg">', "is SVG, a drawing without pixels"),
        (b"<!DOCTYPE html>\n<html>", "is a web page; download the picture"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer; run git lfs pull"),
        (b"", "is empty"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, content, message):
    (tmp_path / "given.jpg").write_bytes(content)
    with pytest.raises(UserError, match=rf"given.jpg' is no image that can be read: it {message}"):
        read_image(tmp_path / "given.jpg")


def test_folders_addresses_and_pipes_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for source, message in (
        (tmp_path, "is a folder; give a file in it"),
        (tmp_path / "pipe.png", "is no regular file"),
        ("https://example.com/cat.jpg", "'https://example.com/cat.jpg' is an address; download it"),
        ("data:image/png;base64," + 5000 * "A", "is an address"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read_image(source)
        assert len(str(error.value)) < 300


def profile(space: str, tags: dict[str, bytes]) -> bytes:
    """An ICC profile, version 2, for colours of that space."""
    table, data = b"", b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name.encode(), 128 + 4 + 12 * len(tags) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    kind, target = (b"prtr", b"Lab ") if space == "CMYK" else (b"mntr", b"XYZ ")
    head = struct.pack(">III4s4s4s", 0, 0, 0x02400000, kind, space.ljust(4).encode(), target) + bytes(12) + b"acsp"
    head += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)  # the white D50 in 1/65536
    head = head.ljust(128, b"\0")
    content = head + struct.pack(">I", len(tags)) + table + data
    return struct.pack(">I", len(content)) + content[4:]


def xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * value) for value in values))


def gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * value))


WHITE = {"wtpt": xyz(0.9642, 1.0, 0.8249)}
WIDE = profile(  # Display P3's primaries, with a plain power for its curve
    "RGB",
    WHITE
    | {"rXYZ": xyz(0.5151, 0.2412, -0.0011), "gXYZ": xyz(0.2919, 0.6922, 0.0419), "bXYZ": xyz(0.1572, 0.0666, 0.7841)}
    | {name: gamma(2.2) for name in ("rTRC", "gTRC", "bTRC")},
)
DARK_GREY = profile("GRAY", WHITE | {"kTRC": gamma(1.0)})
# Lab of the 16 corners of CMYK's cube, all of it a middle grey: the table alone decides.
INKS = profile(
    "CMYK",
    WHITE
    | {
        "A2B0": b"mft1"
        + bytes(4)
        + bytes([4, 3, 2, 0])
        + struct.pack(">9i", *(65536 * i for i in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
        + 4 * bytes(range(256))
        + 16 * bytes([137, 128, 128])
        + 3 * bytes(range(256))
    },
)


@pytest.mark.parametrize("name", ["wide.png", "wide.jpg", "wide.webp", "wide.tiff"])
def test_a_wide_profile_becomes_srgb(tmp_path, name):
    """(234, 51, 35) in Display P3 is sRGB's pure red."""
    options = {"lossless": True} if name == "wide.webp" else {"quality": 100, "subsampling": 0}
    Image.new("RGB", (16, 16), (234, 51, 35)).save(tmp_path / name, icc_profile=WIDE, **options)
    assert np.abs(read_image(tmp_path / name).astype(int) - (255, 0, 0)).max() <= 8


def test_profiles_of_other_kinds_of_images(tmp_path, caplog):
    """Transparent ones and palettes keep what is transparent, grey and CMYK have profiles of their own."""
    Image.new("RGBA", (2, 1), (234, 51, 35, 0)).save(tmp_path / "clear.png", icc_profile=WIDE)
    assert read_image(tmp_path / "clear.png", background="#102030")[0].tolist() == 2 * [[16, 32, 48]]
    Image.new("RGBA", (2, 1), (234, 51, 35, 255)).save(tmp_path / "full.png", icc_profile=WIDE)
    palette = Image.new("RGB", (2, 1), (234, 51, 35)).quantize(2)
    palette.save(tmp_path / "palette.png", icc_profile=WIDE)
    for name in ("full.png", "palette.png"):
        assert np.abs(read_image(tmp_path / name).astype(int) - (255, 0, 0)).max() <= 8
    for mode in ("L", "LA", "I;16"):
        image = Image.fromarray(np.full((1, 1), 0x7F7F, np.uint16)) if mode == "I;16" else Image.new(mode, (1, 1), 127)
        if mode == "LA":
            image.putalpha(255)
        image.save(tmp_path / "grey.png", icc_profile=DARK_GREY)
        assert np.abs(read_image(tmp_path / "grey.png").astype(int) - 187).max() <= 1  # half of the light
    Image.new("CMYK", (8, 8), (255, 0, 200, 40)).save(tmp_path / "inks.tiff", icc_profile=INKS)
    assert np.abs(read_image(tmp_path / "inks.tiff").astype(int) - 128).max() <= 3
    assert "passed over" not in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"no profile at all", "passed over"),
        (WIDE[:200], "passed over"),
        (WIDE[:20] + b"ABCD" + WIDE[24:], "passed over"),
        (DARK_GREY, "it is for GRAY, the image is RGB"),
        (INKS, "it is for CMYK, the image is RGB"),
    ],
)
def test_a_profile_that_is_damaged_or_does_not_fit_is_passed_over(tmp_path, caplog, picture, given, message):
    Image.fromarray(picture).save(tmp_path / "odd.png", icc_profile=given)
    np.testing.assert_array_equal(read_image(tmp_path / "odd.png"), picture)
    assert message in caplog.text


def test_damaged_profiles_of_every_kind_give_a_picture(picture):
    """A seeded sample of damage: any profile, any mode, no error."""
    rng = np.random.default_rng(0)
    for i in range(300):
        given = bytearray([WIDE, DARK_GREY, INKS][i % 3])
        for _ in range(rng.integers(1, 6)):
            given[rng.integers(len(given))] = rng.integers(256)
        image = Image.fromarray(picture).convert(["RGB", "L", "CMYK", "RGBA", "P"][i % 5])
        image.info["icc_profile"] = bytes(given[: rng.integers(1, len(given) + 1)] if i % 2 else given)
        assert read_image(image).shape == picture.shape


def test_srgb_and_no_profile_are_the_same(picture):
    image = Image.fromarray(picture)
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(read_image(image), picture)


def png(depth: int, kind: int, row: bytes, width: int, clear: bytes) -> bytes:
    """A PNG file of one row whose level or colour `clear` is transparent."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0)
    chunks = (b"IHDR", header), (b"tRNS", clear), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (png(16, 0, struct.pack(">3H", 1000, 1001, 65535), 3, struct.pack(">H", 1001)), [4, "clear", 255]),
        (png(4, 0, bytes([0x0F, 0x50]), 3, struct.pack(">H", 15)), [0, "clear", 85]),
        (png(2, 0, bytes([0b00110100]), 3, struct.pack(">H", 1)), [0, 255, "clear"]),
        (png(1, 0, bytes([0b01000000]), 2, struct.pack(">H", 1)), [0, "clear"]),
        (
            png(16, 2, struct.pack(">6H", 300, 300, 300, 9000, 9000, 9000), 2, struct.pack(">3H", *3 * [300])),
            ["clear", 35],
        ),
    ],
)
def test_one_transparent_level(tmp_path, file, expected):
    """The transparent level is one of those that the file's bits have."""
    (tmp_path / "key.png").write_bytes(file)
    read = read_image(tmp_path / "key.png", background="#010203")[0].tolist()
    assert read == [[1, 2, 3] if level == "clear" else 3 * [level] for level in expected]


def test_other_modes():
    assert np.ptp(read_image(Image.new("LAB", (1, 1), (128, 128, 128)))) <= 2
    assert read_image(Image.new("LA", (1, 1), (100, 128)).convert("La"), background="black")[0, 0].tolist() == 3 * [50]
    assert read_image(Image.new("F", (1, 1), 0.5))[0, 0].tolist() == 3 * [128]


def test_damaged_exif_is_passed_over(tmp_path, picture, recwarn):
    for exif in (b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"x"):
        Image.fromarray(picture).save(tmp_path / "odd.jpg", exif=exif)
        assert read_image(tmp_path / "odd.jpg").shape == picture.shape
    assert not recwarn


def test_other_errors():
    with pytest.raises(UserError, match="no colour"):
        read_image(np.zeros((1, 1, 3), np.uint8), background="octarine")
    with pytest.raises(UserError, match=r"crop it to 10\.5 : 1"):
        adaptive_size((5000, 1), (832, 480))
