"""Sizes of videos, and video files: mp4, gif and PNG frames."""

import itertools
import os
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from PIL import Image, ImageOps

from turbojax.errors import UserError

# Width and height in pixels, as Wan and TurboDiffusion use them.
SIZES: dict[str, dict[str, tuple[int, int]]] = {
    "480p": {
        "16:9": (832, 480),
        "9:16": (480, 832),
        "4:3": (640, 480),
        "3:4": (480, 640),
        "1:1": (640, 640),
    },
    "720p": {
        "16:9": (1280, 720),
        "9:16": (720, 1280),
        "4:3": (960, 720),
        "3:4": (720, 960),
        "1:1": (960, 960),
    },
}
FORMATS = (".mp4", ".gif", ".png")


def video_size(resolution: str, aspect_ratio: str) -> tuple[int, int]:
    """Width and height in pixels of a named resolution ("480p", "720p") and aspect ratio ("16:9", ...)."""
    if resolution not in SIZES:
        raise UserError(f"{resolution=} is unknown; choose {' or '.join(SIZES)}, or give height and width")
    if aspect_ratio not in SIZES[resolution]:
        raise UserError(f"{aspect_ratio=} is unknown; choose one of {', '.join(SIZES[resolution])}")
    return SIZES[resolution][aspect_ratio]


def check_path(path: str | os.PathLike) -> Path:
    """The path of a video to be written; raises UserError where none can be."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"output {str(path)!r} has no video format; end it in {', '.join(FORMATS)}")
    if path.is_dir():
        raise UserError(f"output {str(path)!r} is a folder; give a file name")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"output {str(path)!r} cannot be written: {str(parent)!r} is no writable folder")
    return path


def check_fps(fps: int) -> None:
    if fps <= 0:
        raise UserError(f"{fps=} must be positive; Wan's videos have 16")


def make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {str(path.parent)!r} cannot be made: {error.strerror or error}") from error


def save_video(video: np.ndarray, path: str | os.PathLike, fps: int = 16) -> list[Path]:
    """Writes one video and returns the files written.

    video: uint8 `[T, H, W, 3]`; fps: frames a second. The extension decides: .mp4 (H.264), .gif, or .png for one
    numbered file a frame. A file appears whole or not at all; raises UserError if it cannot be written.
    """
    path = check_path(path)
    video = np.asarray(video)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or video.size == 0:
        raise UserError(f"a video is uint8 [T, H, W, 3], not {video.dtype} {list(video.shape)}")
    check_fps(fps)
    make_parent(path)
    if path.suffix.lower() == ".png":
        return [save_frame(frame, numbered(path, i, len(video))) for i, frame in enumerate(video)]
    with whole_file(path) as temporary:
        if path.suffix.lower() == ".gif":
            imageio.mimwrite(temporary, list(video), duration=1000 / fps, loop=0)
        else:
            write_mp4(video, temporary, fps)
    return [path]


def write_mp4(video: np.ndarray, path: Path, fps: int) -> None:
    # H.264 in yuv420p needs even sides; the last row or column is repeated where one is odd.
    video = np.pad(video, ((0, 0), (0, video.shape[1] % 2), (0, video.shape[2] % 2), (0, 0)), mode="edge")
    with starting_ffmpeg():
        imageio.mimwrite(path, list(video), fps=fps, codec="libx264", quality=8, macro_block_size=1)


@contextmanager
def starting_ffmpeg() -> Iterator[None]:
    """ffmpeg is started by fork and exec at once, which is safe; JAX warns of forks that go on running Python."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="os.fork\\(\\) was called")
        yield


def read_video(path: str | os.PathLike, *, num_frames: int, height: int, width: int, fps: int = 16) -> np.ndarray:
    """The first num_frames frames of a video at `fps` frames a second, uint8 `[num_frames, height, width, 3]`.

    Frames are the nearest in time to those of the file. They are resized to cover height x width pixels and cut around
    their centre. Raises UserError for a file that cannot be read or is too short.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    frames: list[np.ndarray] = []
    try:
        # ffmpeg's filter and not its -r, which repeats a frame and drops another at the beginning
        options = ["-vf", f"fps={fps}"]
        with starting_ffmpeg():
            reader: Any = imageio.get_reader(path, format="FFMPEG", output_params=options)
        with closing(reader):
            for frame in itertools.islice(reader, num_frames):
                fitted = ImageOps.fit(Image.fromarray(frame), (width, height), Image.Resampling.LANCZOS)
                frames.append(np.asarray(fitted))
    except (OSError, RuntimeError, ValueError, LookupError) as error:  # what imageio makes of ffmpeg's complaints
        raise UserError(f"{path} is no video that ffmpeg can read") from error
    if len(frames) < num_frames:
        raise UserError(f"{path} has {len(frames)} frames at {fps} frames a second, {num_frames} are needed")
    return np.stack(frames)


def save_frame(frame: np.ndarray, path: Path) -> Path:
    with whole_file(path) as temporary:
        imageio.imwrite(temporary, frame)
    return path


def numbered(path: Path, index: int, count: int) -> Path:
    """clip.png for a single frame, else clip_0000.png, clip_0001.png, ..."""
    return path if count == 1 else path.with_name(f"{path.stem}_{index:04d}{path.suffix}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends well, and is removed otherwise."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{str(path)!r} could not be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
