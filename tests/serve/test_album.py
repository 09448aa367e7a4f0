"""Videos with their settings: read as they were written, and no torn one shown."""

import numpy as np
import pytest
from PIL import Image

from turbojax import UserError
from turbojax.demo import demo_picture
from turbojax.serve.album import Album


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
