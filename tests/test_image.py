"""Images of every kind to upright 8-bit RGB, and bad ones to one sentence."""

import io

import numpy as np
import pytest
from PIL import Image

from turbojax.errors import UserError
from turbojax.image import adaptive_size, read_image, resize, to_unit

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
    with pytest.raises(UserError, match="cannot be read"):
        read_image(tmp_path)
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


def test_other_errors():
    with pytest.raises(UserError, match="no colour"):
        read_image(np.zeros((1, 1, 3), np.uint8), background="octarine")
    with pytest.raises(UserError, match=r"crop it to 10\.5 : 1"):
        adaptive_size((5000, 1), (832, 480))
