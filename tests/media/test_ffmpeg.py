"""Colours of what is written and read, and an ffmpeg that is not there, is another program, or fails."""

import fcntl
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from turbojax import UserError
from turbojax.app import generate, session
from turbojax.app.ablation import ablate
from turbojax.app.commands import make_shards
from turbojax.app.web.album import Album
from turbojax.config import base_config
from turbojax.media import ffmpeg
from turbojax.media.image import read_image
from turbojax.media.video import check_path, read_video, save_video
from turbojax.train import videos

RGB = "c8283c 28c83c 3c28c8 fadc1e ff0000 00ffff 808080 090909"
COLOURS = np.frombuffer(bytes.fromhex(RGB), np.uint8).reshape(-1, 3)
SIZES = [(1280, 720), (832, 480), (128, 128)]


def flat(width: int, height: int) -> np.ndarray:
    """A frame for each colour."""
    return np.broadcast_to(COLOURS[:, None, None], (len(COLOURS), height, width, 3))


def decoded(path: Path, width: int, height: int, options: str = "") -> np.ndarray:
    """The middle pixels of a file's frames as ffmpeg itself converts them; options: of its filter scale."""
    filters = ["-vf", f"scale={options}"] if options else []
    command = [ffmpeg.program(), "-loglevel", "error", "-i", str(path), *filters, "-f", "rawvideo", "-pix_fmt", "rgb24"]
    content = subprocess.run([*command, "-"], capture_output=True, check=True).stdout
    return np.frombuffer(content, np.uint8).reshape(-1, height, width, 3)[:, height // 2, width // 2].astype(int)


def encode(video: np.ndarray, path: Path, *options: str) -> None:
    """A video file of somebody else."""
    height, width = video.shape[1:3]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "16", "-i", "-"]
    command = [ffmpeg.program(), "-y", "-loglevel", "error", *source, "-crf", "8", *options, str(path)]
    subprocess.run(command, input=video.tobytes(), check=True)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_decoders_that_read_tags_and_that_guess_see_the_same_colours(tmp_path, width, height):
    save_video(flat(width, height), tmp_path / "x.mp4")
    guess = "bt709" if height >= 720 else "bt601"  # of browsers and players
    for options in ("", f"in_color_matrix={guess}:in_range=limited"):
        seen = decoded(tmp_path / "x.mp4", width, height, options)
        assert np.abs(seen - COLOURS).max() <= 3, (options, seen)
    own = read_video(tmp_path / "x.mp4", num_frames=len(COLOURS), height=16, width=16)[:, 8, 8].astype(int)
    assert np.abs(own - COLOURS).max() <= 1
    log = subprocess.run([ffmpeg.program(), "-i", str(tmp_path / "x.mp4")], capture_output=True, text=True).stderr
    assert ("yuv420p(tv, bt709, " if height >= 720 else "yuv420p(tv, smpte170m/bt709/bt709, ") in log


@pytest.mark.parametrize(("width", "height"), [(1280, 64), (128, 128)])  # by BT.709 and BT.601
def test_a_chain_of_last_frames_does_not_drift(tmp_path, width, height):
    """Colours that are not flat, eight times a video, its last frame, a picture and the next video of it."""
    y, x = np.mgrid[:height, :width]
    red, green = 255 * x / (width - 1), 255 * y / (height - 1)
    first = np.stack((red, green, 255 - red), axis=-1).round().astype(np.uint8)
    picture = first
    for _ in range(8):
        save_video(np.broadcast_to(picture, (2, *picture.shape)), tmp_path / "x.mp4")
        last = read_video(tmp_path / "x.mp4", num_frames=2, height=height, width=width)[-1:]
        (file,) = save_video(last, tmp_path / "last.png")
        picture = read_image(file)
    difference = picture.astype(int) - first
    assert np.abs(difference.mean(axis=(0, 1))).max() < 0.5
    assert np.abs(difference).max() <= 8  # H.264 is lossy


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((1280, 720), ("-vf", "scale=out_color_matrix=bt709", "-pix_fmt", "yuv420p")),
        ((320, 240), ("-vf", "scale=out_color_matrix=bt601", "-pix_fmt", "yuv420p")),
        ((320, 240), ("-vf", "scale=out_color_matrix=bt709,setparams=colorspace=bt709", "-pix_fmt", "yuv420p")),
        ((1280, 720), ("-vf", "scale=out_color_matrix=bt601,setparams=colorspace=smpte170m", "-pix_fmt", "yuv420p")),
        (
            (320, 240),
            (
                "-vf",
                "scale=out_range=full:out_color_matrix=bt709,setparams=colorspace=bt709:range=full",
                "-pix_fmt",
                "yuv420p",
            ),
        ),
        ((320, 240), ("-pix_fmt", "yuvj420p", "-c:v", "mjpeg", "-q:v", "1")),
        ((320, 240), ("-c:v", "libx264rgb")),
        ((320, 240), ("-pix_fmt", "gray")),
    ],
    ids=["HD, a guess", "SD, a guess", "SD, BT.709", "HD, BT.601", "full range", "JPEG", "RGB", "grey"],
)
def test_reading_takes_the_tags_or_the_usual_guess(tmp_path, size, options):
    width, height = size
    path = tmp_path / ("x.avi" if "mjpeg" in options else "x.mp4")
    encode(flat(width, height), path, *options)
    read = read_video(path, num_frames=len(COLOURS), height=height, width=width)[:, height // 2, width // 2].astype(int)
    expected = COLOURS.astype(int)
    if "gray" in options:
        expected = np.repeat((COLOURS @ [0.299, 0.587, 0.114])[:, None], 3, axis=1)
    assert np.abs(read - expected).max() <= 3, read


def test_hdr_is_told(tmp_path, caplog):
    tags = "setparams=colorspace=bt2020nc:color_primaries=bt2020:color_trc=smpte2084"
    encode(flat(64, 64), tmp_path / "x.mp4", "-vf", f"scale=out_color_matrix=bt2020,{tags}", "-pix_fmt", "yuv420p")
    read_video(tmp_path / "x.mp4", num_frames=2, height=64, width=64)
    assert "is HDR (smpte2084)" in caplog.text


@pytest.mark.parametrize(
    "name", ["x.m4v", "x.ts", "x.mpg", "x.mkv", "x.mov", "x.avi", "x.webm", "X.MP4", "noname", "-x.mp4"]
)
def test_containers(tmp_path, monkeypatch, name):
    """A format that ffmpeg knows is read whatever its name."""
    monkeypatch.chdir(tmp_path)
    codec = {"x.mpg": "mpeg2video", "x.webm": "libvpx"}.get(name, "libx264")
    kind = {"noname": "mp4", "x.ts": "mpegts", "x.mpg": "mpeg", "x.mkv": "matroska", "x.avi": "avi", "x.webm": "webm"}
    options = (
        "-c:v",
        codec,
        "-pix_fmt",
        "yuv420p",
        "-r",
        "25" if name == "x.mpg" else "16",
        "-f",
        kind.get(name, "mp4"),
    )
    encode(flat(64, 64).repeat(2, axis=0), Path(f"file:{name}"), *options)
    assert read_video(name, num_frames=9, height=32, width=32).shape == (9, 32, 32, 3)


def test_names_that_look_like_addresses_and_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cat:1.mp4", "http:x.mp4", "-y.mp4", "a%03d.mp4", "cat:1.gif", "é ü.mp4"):
        assert save_video(flat(32, 32), name) == [Path(name)]
        assert read_video(name, num_frames=len(COLOURS), height=32, width=32).shape == (len(COLOURS), 32, 32, 3)


def test_a_playlist_fetches_nothing(tmp_path):
    (tmp_path / "x.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n")
    with pytest.raises(UserError, match="is no video that ffmpeg can read"):
        read_video(tmp_path / "x.mp4", num_frames=1, height=16, width=16)


def script(program: Path, text: str) -> str:
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    return str(program)


def test_no_encoder_is_told_before_the_work(tmp_path, monkeypatch):
    """And .gif and .png need none."""
    for exe, message in (
        ("/nonexistent", "'/nonexistent' cannot be started .No such file"),
        (str(tmp_path), "cannot be started .Permission denied"),
        ("/bin/true", "'/bin/true' cannot encode two frames .ffmpeg ended early"),
        (script(tmp_path / "old", "echo Unknown encoder libx264 >&2; exit 1"), "Unknown encoder libx264"),
        (script(tmp_path / "killed", "kill -9 $$"), "ffmpeg was ended by SIGKILL"),
    ):
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", exe)
        ffmpeg.try_encoder.cache_clear()
        with pytest.raises(UserError, match=rf"mp4 cannot be written: .*{message}.*; end the output in .gif or .png"):
            check_path(tmp_path / "x.mp4")
        assert check_path(tmp_path / "x.gif")
        assert save_video(flat(16, 16), tmp_path / "x.png")


def test_no_program_at_all(tmp_path, monkeypatch):
    save_video(flat(16, 16), tmp_path / "x.mp4")

    def none() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(ffmpeg.imageio_ffmpeg, "get_ffmpeg_exe", none)
    with pytest.raises(UserError, match=r"mp4 cannot be written: there is no ffmpeg; end the output in .gif or .png"):
        check_path(tmp_path / "x.mp4")
    with pytest.raises(UserError, match="videos cannot be read: there is no ffmpeg; pip install imageio-ffmpeg"):
        read_video(tmp_path / "x.mp4", num_frames=1, height=16, width=16)


def test_a_large_pipe_that_is_refused(tmp_path, monkeypatch):
    real = fcntl.fcntl

    def refuse(descriptor, command, *arguments):
        if command == fcntl.F_SETPIPE_SZ:
            raise PermissionError(1, "Operation not permitted")
        return real(descriptor, command, *arguments)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert save_video(flat(320, 240), tmp_path / "x.mp4") == [tmp_path / "x.mp4"]
    assert os.listdir(tmp_path) == ["x.mp4"]


@pytest.mark.parametrize("work", ["generate", "batch", "interactive", "ablate", "page", "training", "make_shards"])
def test_what_needs_ffmpeg_says_so_before_anything_is_loaded(tmp_path, monkeypatch, work):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nonexistent")
    monkeypatch.setattr(generate, "load_pipeline", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(videos, "load_vae", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(make_shards, "load_encoders", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    (tmp_path / "captions.csv").write_text("file,caption\nx.mp4,a red circle\n")
    config = base_config(weights="demo", output=str(tmp_path / "out" / "x.mp4"))
    flags = make_shards.FLAGS
    calls = {
        "generate": lambda: generate.generate(config),
        "batch": lambda: session.batch(config, tmp_path / "prompts.txt"),
        "interactive": lambda: session.interactive(config, read=lambda _: pytest.fail("asked")),
        "ablate": lambda: ablate(config, {"sla_topk": [0.1]}, tmp_path / "out"),
        "page": lambda: Album(tmp_path / "out"),
        "training": lambda: videos.prepare_videos(config, None, None, tmp_path / "out"),
        "make_shards": make_shards.main,
    }
    flags(["make_shards", f"--videos={tmp_path}", f"--output={tmp_path / 'out'}", "--weights=demo"])
    with pytest.raises(UserError, match=r"'/nonexistent' cannot be started \(No such file or directory\)"):
        calls[work]()
    assert not (tmp_path / "out").exists()
