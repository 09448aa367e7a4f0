"""Videos with their settings: read as they were written, and no torn one shown."""

import json

import numpy as np
import pytest
from PIL import Image

from turbojax import UserError
from turbojax.app.web.album import Album
from turbojax.shapes.demo import demo_picture


def add(album, **settings):
    video = album.new_path()
    video.write_bytes(b"video")
    frames = np.zeros((5, 16, 24, 3), np.uint8)
    return album.add(video, frames, settings={"prompt": "A cat", "image": None} | settings, weights="w", seconds={})


def test_settings_and_the_image_stay_with_the_video(tmp_path):
    picture = tmp_path / "upload.png"
    Image.fromarray(demo_picture()).save(picture)
    album = Album(tmp_path / "videos")
    entry = add(album, image=str(picture), seed=3)
    picture.unlink()
    again = Album(tmp_path / "videos").get(entry.video.stem)
    assert again == entry
    assert again.settings["seed"] == 3
    np.testing.assert_array_equal(np.asarray(Image.open(again.settings["image"])), demo_picture())


def test_only_finished_videos_are_shown(tmp_path):
    album = Album(tmp_path)
    whole, damaged, gone = (add(album) for _ in range(3))
    damaged.video.with_suffix(".json").write_text('{"settings": ')
    gone.video.unlink()
    album.new_path().write_bytes(b"a video that is not finished")
    assert album.latest(10) == [whole]
    assert album.latest(0) == []
    with pytest.raises(UserError, match="cannot be read"):
        album.get(damaged.video.stem)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"image": None}}, r"settings\.prompt is missing"),
        ({"settings": {"prompt": ["a"]}}, r"settings\.prompt is \['a'\] and must be text"),
        ({"settings": {"prompt": "a", "image": "../../etc/passwd"}}, r"settings\.image is '\.\./"),
        ({"settings": {"prompt": "a", "seed": {"a": 1}}}, r"settings\.seed is {'a': 1} and must be text, a number"),
        ({"seconds": {"diffusion": "fast"}}, r"seconds\['diffusion'\] is 'fast'"),
        ({"weights": None}, "weights is None"),
        ({"more": 1}, "unknown field 'more'"),
        ("[" * 100_000, "nested 100000 deep"),
    ],
)
def test_damaged_settings(tmp_path, change, message):
    album = Album(tmp_path)
    record = add(album, seed=2**64 - 1).video.with_suffix(".json")
    found = json.loads(record.read_text())
    record.write_text(change if isinstance(change, str) else json.dumps(found | change))
    with pytest.raises(UserError, match=message):
        album.get(record.stem)
    assert album.latest(3) == []
