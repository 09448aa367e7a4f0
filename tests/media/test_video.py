"""Sizes by name, and video files: what is written can be read back, and a failure leaves what was there."""

import re
import resource
import subprocess
import threading
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image, ImageSequence

from turbojax import UserError
from turbojax.media.ffmpeg import program, read_frames
from turbojax.media.video import (
    MOST_QUEUED,
    SIZES,
    check_path,
    in_a_thread,
    numbered,
    open_video,
    read_video,
    save_video,
    video_size,
)


def clip(frames: int = 5, height: int = 32, width: int = 48) -> np.ndarray:
    """Each frame of its own colours, with a gradient."""
    t, h, w = np.ogrid[:frames, :height, :width]
    red, green, blue = (40 * t + 0 * h * w) % 256, 4 * h + 0 * t * w, 200 - 3 * w - 20 * (t % 2) + 0 * h
    return np.stack(np.broadcast_arrays(red, green, blue), axis=-1).astype(np.uint8)


def test_sizes():
    for resolution, sizes in SIZES.items():
        assert list(sizes) == ["16:9", "9:16", "4:3", "3:4", "1:1"]
        for ratio, (width, height) in sizes.items():
            assert width % 16 == height % 16 == 0
            assert video_size(resolution, ratio) == (width, height)
            assert abs(width / height / Fraction(ratio.replace(":", "/")) - 1) < 0.03
            lines = int(resolution.removesuffix("p"))
            assert min(width, height) == lines or ratio == "1:1"
    with pytest.raises(UserError, match="resolution='4k' is unknown; choose 480p or 720p, or give height and width"):
        video_size("4k", "16:9")
    with pytest.raises(UserError, match="aspect_ratio='2:1' is unknown; choose one of 16:9, 9:16, 4:3, 3:4, 1:1"):
        video_size("480p", "2:1")


@pytest.mark.parametrize("size", [(5, 32, 48), (1, 16, 16), (4, 33, 47), (3, 1, 1)])
def test_mp4(tmp_path, size):
    """Odd sides get a row or column more, which H.264 needs."""
    frames, height, width = size
    video = clip(*size)
    assert save_video(video, tmp_path / "x.mp4", fps=8) == [tmp_path / "x.mp4"]
    read = np.stack(list(read_frames(tmp_path / "x.mp4", fps=8)))
    assert read.shape == (frames, height + height % 2, width + width % 2, 3)
    log = subprocess.run([program(), "-i", tmp_path / "x.mp4"], capture_output=True, text=True).stderr
    assert re.search(r"Video: h264 .*, yuv420p\(.*, 8 fps", log)
    if min(height, width) > 1:  # chroma is halved
        assert np.abs(read[:, :height, :width].astype(int) - video).mean() < 12


def test_gif(tmp_path):
    save_video(clip(), tmp_path / "x.gif", fps=10)
    with Image.open(tmp_path / "x.gif") as image:
        assert (image.n_frames, image.size, image.info["duration"], image.info["loop"]) == (5, (48, 32), 100, 0)
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    assert np.abs(np.stack(frames).astype(int) - clip()).mean() < 12


@pytest.mark.parametrize("fps", [16, 24, 30])
def test_a_gif_is_a_clip_of_all_its_frames(tmp_path, fps):
    """A frame of 1/16 s is none of hundredths: each is shown for 60 or 70 ms, and none is lost when it is read."""
    grey = np.broadcast_to((3 * np.arange(81, dtype=np.uint8))[:, None, None, None], (81, 32, 32, 3))
    save_video(grey, tmp_path / "x.gif", fps=fps)
    read = read_video(tmp_path / "x.gif", num_frames=81, height=32, width=32, fps=fps)
    np.testing.assert_array_equal(np.round(read.mean(axis=(1, 2, 3)) / 3), np.arange(81))


def test_png(tmp_path):
    video = clip()
    written = save_video(video, tmp_path / "deep" / "x.png")
    assert written == [tmp_path / "deep" / f"x_{i:04}.png" for i in range(5)]
    np.testing.assert_array_equal([np.asarray(Image.open(path)) for path in written], video)
    assert save_video(video[:1], tmp_path / "one.png") == [tmp_path / "one.png"]


def test_numbered(tmp_path):
    assert numbered(tmp_path / "a.b.mp4", 7, 12) == tmp_path / "a.b_0007.mp4"
    assert numbered(tmp_path / "a.mp4", 0, 1) == tmp_path / "a.mp4"


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (clip().astype(np.float32), r"not float32 \[5, 32, 48, 3\]"),
        (clip()[0], r"not uint8 \[32, 48, 3\]"),
        (clip()[..., :1], r"not uint8 \[5, 32, 48, 1\]"),
        (clip()[:0], r"not uint8 \[0, 32, 48, 3\]"),
        (clip()[None], r"not uint8 \[1, 5, 32, 48, 3\]"),
    ],
)
def test_what_is_no_video(tmp_path, video, message):
    with pytest.raises(UserError, match=rf"a video is uint8 \[T, H, W, 3\], {message}"):
        save_video(video, tmp_path / "x.mp4")
    assert not list(tmp_path.iterdir())


def test_paths(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    for path, message in (
        ("x.avi", "has no video format; end it in .mp4, .gif, .png"),
        ("x", "has no video format"),
        ("", "has no video format"),
        ("folder.mp4", "is a folder; give a file name"),
        ("file/x.mp4", "cannot be written: Not a directory"),
        ("file/deeper/x.mp4", "cannot be written: Not a directory"),
    ):
        with pytest.raises(UserError, match=message):
            save_video(clip(), tmp_path / path if path else path)
    assert check_path(tmp_path / "new" / "x.MP4") == tmp_path / "new" / "x.MP4"
    for fps in (0, -16):
        with pytest.raises(UserError, match=f"fps={fps} must be positive"):
            save_video(clip(), tmp_path / "x.mp4", fps=fps)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.mp4"]


@pytest.mark.parametrize("name", ["x.mp4", "x.gif", "x.png"])
def test_frames_may_come_in_pieces(tmp_path, name):
    video = clip()
    with open_video(tmp_path / "pieces" / name, video.shape) as append:
        for piece in (video[:1], video[1:3], video[3:]):
            append(piece)
    whole = save_video(video, tmp_path / "whole" / name)
    pieces = sorted((tmp_path / "pieces").iterdir())
    assert [path.read_bytes() for path in pieces] == [path.read_bytes() for path in whole]
    assert [path.name for path in pieces] == [path.name for path in whole]


@pytest.fixture
def little_room():
    """No file of more than 10 kB can be written, by this process or ffmpeg."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize("name", ["x.mp4", "x.gif", "x_0001.png"])
def test_a_full_disk_leaves_what_was_there(tmp_path, name):
    """Numbered frames, too, come all or none: the first four of these would fit."""
    old = tmp_path / name
    old.write_bytes(b"the old video")
    video = np.zeros((6, 64, 64, 3), np.uint8)
    video[4:] = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3))
    with pytest.raises(UserError, match=r"cannot be written: (File too large|ffmpeg was ended by SIGXFSZ)"):
        save_video(video, tmp_path / name.replace("_0001", ""))
    assert old.read_bytes() == b"the old video"
    assert list(tmp_path.iterdir()) == [old]


def test_a_frame_whose_name_a_folder_has(tmp_path):
    (tmp_path / "x_0002.png").mkdir()
    with pytest.raises(UserError, match=r"x_0002.png' cannot be written: it is no regular file"):
        save_video(clip(), tmp_path / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["x_0002.png"]


def append_all(path, shape, frames, error):
    with open_video(path, shape) as append:
        for piece in frames:
            append(piece)
        if error is KeyboardInterrupt:
            raise error


@pytest.mark.parametrize("name", ["x.mp4", "x.gif", "x.png"])
def test_what_is_begun_and_not_ended_leaves_what_was_there(tmp_path, name):
    old = tmp_path / name
    old.write_bytes(b"the old video")
    video = clip(1)
    for frames, error, message in (
        ((), KeyboardInterrupt, None),
        ((), UserError, "0 of 1 frames came"),
        ((video, video), UserError, r"\[1, 32, 48, 3\] do not belong to a video \[1, 32, 48, 3\] at frame 2"),
        ((video[:, :16],), UserError, r"\[1, 16, 48, 3\] do not belong"),
        ((video[0],), UserError, r"a video is uint8 \[T, H, W, 3\]"),
    ):
        with pytest.raises(error, match=message):
            append_all(old, video.shape, frames, error)
        assert list(tmp_path.iterdir()) == [old]
    assert old.read_bytes() == b"the old video"


def test_encoding_waits_for_nobody():
    """Chunks are taken while the encoder is busy, up to a number; what it raises comes out."""
    go, written = threading.Event(), []

    def write(piece):
        assert go.wait(300)
        written.append(piece)
        if piece == "bad":
            raise OSError("bad")

    with in_a_thread(write) as hand_over:
        for i in range(MOST_QUEUED):
            hand_over(i)
        assert written == []
        go.set()
        hand_over("last")
    assert written == [*range(MOST_QUEUED), "last"]
    with pytest.raises(OSError, match="bad"):
        hand_over_all(write, ["bad", "more"])


def hand_over_all(write, pieces):
    with in_a_thread(write) as hand_over:
        for piece in pieces:
            hand_over(piece)


@pytest.mark.parametrize("fps", [8, 16, 24, 32])
def test_reading_takes_the_frames_nearest_in_time(tmp_path, fps):
    grey = np.broadcast_to((10 * np.arange(24, dtype=np.uint8))[:, None, None, None], (24, 32, 32, 3))
    save_video(grey, tmp_path / "x.mp4", fps=fps)
    read = read_video(tmp_path / "x.mp4", num_frames=9, height=32, width=32)
    assert (read.shape, read.dtype) == ((9, 32, 32, 3), np.uint8)
    taken = np.round(read.mean(axis=(1, 2, 3)) / 10)
    assert taken[0] == 0
    assert np.abs(taken / fps - np.arange(9) / 16).max() <= 0.5 / min(fps, 16)


def test_reading_covers_the_size_and_cuts_around_the_centre(tmp_path):
    video = np.zeros((2, 32, 96, 3), np.uint8)
    video[:, :, 32:64] = 200  # the middle square
    save_video(video, tmp_path / "x.mp4")
    read = read_video(tmp_path / "x.mp4", num_frames=2, height=16, width=16).astype(int)
    assert np.abs(read[:, :, 2:-2] - 200).max() < 12
    wide = read_video(tmp_path / "x.mp4", num_frames=2, height=16, width=48).astype(int)
    assert wide[:, :, :14].max() < 12
    assert np.abs(wide[:, :, 18:30] - 200).max() < 12


def test_what_cannot_be_read(tmp_path):
    save_video(clip(5), tmp_path / "whole.mp4")
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:300])
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name, message in (
        ("cut.mp4", "is no video that ffmpeg can read"),
        ("empty.mp4", "is no video that ffmpeg can read"),
        ("nothing.mp4", "does not exist"),
        ("whole.mp4", "has 5 frames at 16 frames a second, 9 are needed"),
    ):
        with pytest.raises(UserError, match=f"{name} {message}"):
            read_video(tmp_path / name, num_frames=9, height=32, width=32)


def test_an_old_video_is_replaced(tmp_path):
    for frames in (5, 3):
        save_video(clip(frames), tmp_path / "x.gif")
    with Image.open(tmp_path / "x.gif") as image:
        assert image.n_frames == 3
