"""Sizes of videos, and video files: mp4, gif and PNG frames."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image, ImageOps

from turbojax.errors import UserError
from turbojax.files import check_file, user_path, whole_files
from turbojax.media.ffmpeg import check_decoder, check_encoder, mp4_encoder, read_frames

# Width and height in pixels, as Wan and TurboDiffusion use them.
SIZES: dict[str, dict[str, tuple[int, int]]] = {
    "480p": {"16:9": (832, 480), "9:16": (480, 832), "4:3": (640, 480), "3:4": (480, 640), "1:1": (640, 640)},
    "720p": {"16:9": (1280, 720), "9:16": (720, 1280), "4:3": (960, 720), "3:4": (720, 960), "1:1": (960, 960)},
}
FORMATS = (".mp4", ".gif", ".png")
MOST_QUEUED = 8  # for the encoder; a bound on memory


def video_size(resolution: str, aspect_ratio: str) -> tuple[int, int]:
    """Width and height in pixels of a named resolution ("480p", "720p") and aspect ratio ("16:9", ...)."""
    if resolution not in SIZES:
        raise UserError(f"{resolution=} is unknown; choose {' or '.join(SIZES)}, or give height and width")
    if aspect_ratio not in SIZES[resolution]:
        raise UserError(f"{aspect_ratio=} is unknown; choose one of {', '.join(SIZES[resolution])}")
    return SIZES[resolution][aspect_ratio]


def check_path(path: str | os.PathLike) -> Path:
    """Returns the path of a video to be written; raises UserError where none can be. Tries the encoder of mp4."""
    path = user_path(path)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"output {str(path)!r} has no video format; end it in {', '.join(FORMATS)}")
    if path.is_dir():
        raise UserError(f"output {str(path)!r} is a folder; give a file name")
    check_file(path)
    if path.suffix.lower() == ".mp4":
        check_encoder()
    return path


def check_fps(fps: int) -> None:
    if fps <= 0:
        raise UserError(f"{fps=} must be positive; Wan's videos have 16")


def check_shape(shape: Sequence[int], dtype: Any) -> None:
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise UserError(f"a video is uint8 [T, H, W, 3], not {dtype} {list(shape)}")


def save_video(video: np.ndarray, path: str | os.PathLike, fps: int = 16) -> list[Path]:
    """Writes one video, uint8 `[T, H, W, 3]`, and returns the files written; see `open_video`."""
    video = np.asarray(video)
    check_shape(video.shape, video.dtype)
    with open_video(path, video.shape, fps) as append:
        append(video)
    return files_of(user_path(path), len(video))


@contextmanager
def open_video(path: str | os.PathLike, shape: Sequence[int], fps: int = 16) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields append(frames): a video that is encoded in a thread while its frames come.

    shape: `[T, H, W, 3]` of the whole video; append takes uint8 `[t, H, W, 3]`, which must not change afterwards.
    fps: frames a second. The extension decides: .mp4 (H.264), .gif, or .png for one numbered file a frame.
    The block's end waits for the encoder. A file appears whole or not at all: not if the block raises or frames are
    missing. Raises UserError if it cannot be written, there or at an append.
    """
    path = check_path(path)
    check_shape(shape, np.dtype(np.uint8))
    check_fps(fps)
    count, frame_shape = 0, tuple(shape[1:])
    with encoder(path, shape, fps) as write, in_a_thread(write) as hand_over:

        def append(frames: np.ndarray) -> None:
            nonlocal count
            check_shape(frames.shape, frames.dtype)
            count += len(frames)
            if tuple(frames.shape[1:]) != frame_shape or count > shape[0]:
                raise UserError(f"frames {list(frames.shape)} do not belong to a video {list(shape)} at frame {count}")
            hand_over(frames)

        yield append
        if count < shape[0]:
            raise UserError(f"{count} of {shape[0]} frames came")


@contextmanager
def encoder(path: Path, shape: Sequence[int], fps: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields write(frames) to the encoder of a format; the video's files take their names when the block ends well."""
    with whole_files(files_of(path, shape[0])) as parts:
        match path.suffix.lower():
            case ".mp4":
                chosen = mp4_encoder(parts[0], shape, fps)
            case ".gif":
                chosen = gif_encoder(parts[0], fps)
            case _:
                chosen = png_encoder(parts)
        with chosen as write:
            yield write


@contextmanager
def in_a_thread(write: Callable[[np.ndarray], None]) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields a function that has a thread call write, in order; what write raises is raised here, late."""
    pending: deque[Future] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="video")

    def hand_over(frames: np.ndarray) -> None:
        pending.append(pool.submit(write, frames))
        while len(pending) > MOST_QUEUED or (pending and pending[0].done()):
            pending.popleft().result()

    try:
        yield hand_over
        while pending:
            pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def gif_encoder(path: Path, fps: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Encodes at the end; each frame ends at the nearest hundredth of a second, so that GIF's errors do not add up."""
    if fps > 50:
        logging.warning("Browsers slow down a GIF of more than 50 frames a second, not %d; mp4 has no such limit", fps)
    frames: list[Image.Image] = []
    yield lambda chunk: frames.extend(Image.fromarray(frame) for frame in chunk)
    ends = [round(100 * (i + 1) / fps) for i in range(len(frames))]
    durations = [10 * (end - start) for start, end in itertools.pairwise([0, *ends])]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


@contextmanager
def png_encoder(parts: Sequence[Path]) -> Iterator[Callable[[np.ndarray], None]]:
    files = iter(parts)

    def write(frames: np.ndarray) -> None:
        for frame in frames:
            Image.fromarray(frame).save(next(files), "PNG")

    yield write


def files_of(path: Path, num_frames: int) -> list[Path]:
    """The files of one video: itself, or a numbered one a frame for .png."""
    count = num_frames if path.suffix.lower() == ".png" else 1
    return [numbered(path, i, count) for i in range(count)]


def read_video(path: str | os.PathLike, *, num_frames: int, height: int, width: int, fps: int = 16) -> np.ndarray:
    """Reads the first num_frames frames of a video at `fps` frames a second, uint8 `[num_frames, height, width, 3]`.

    Frames are the nearest in time to those of the file. They are resized to cover height x width pixels and cut around
    their centre. Raises UserError for a file that cannot be read or is too short.
    """
    path = user_path(path)
    if not path.is_file():
        raise UserError(f"{path} {'is no regular file' if path.exists() else 'does not exist'}")
    check_decoder()
    fitted: list[np.ndarray] = []
    try:
        with closing(read_frames(path, fps=fps)) as frames:
            for frame in itertools.islice(frames, num_frames):
                image = ImageOps.fit(Image.fromarray(frame), (width, height), Image.Resampling.LANCZOS)
                fitted.append(np.asarray(image))
    except OSError as error:
        raise UserError(f"{path} is no video that ffmpeg can read: {error.strerror or error}") from error
    if len(fitted) < num_frames:
        raise UserError(f"{path} has {len(fitted)} frames at {fps} frames a second, {num_frames} are needed")
    return np.stack(fitted)


def numbered(path: Path, index: int, count: int) -> Path:
    """clip.png for a single frame, else clip_0000.png, clip_0001.png, ..."""
    return path if count == 1 else path.with_name(f"{path.stem}_{index:04d}{path.suffix}")
