"""The program ffmpeg, which writes mp4 and reads videos: how it is found, tried and run, and the colours on both sides.

imageio-ffmpeg brings the program; IMAGEIO_FFMPEG_EXE names another. As a process it can be stopped, and a hostile file
that crashes it does not end ours; PyAV would run the same libraries in this process.

Between RGB and the YUV of a file stands a matrix: BT.601's or BT.709's. A file says which, and a decoder that does not
look guesses by the size. So the one that is guessed is written, and said.
"""

import fcntl
import functools
import os
import re
import signal
import subprocess
import tempfile
import textwrap
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

import imageio_ffmpeg
import numpy as np
from absl import logging

from turbojax.errors import UserError

X264 = ("-preset", "superfast", "-crf", "12")  # fast, and 44 dB; docs/notes/vae.md has the alternatives
PIPE_BYTES = 2**20  # of the pipe to the encoder, where the system allows it
MOST_PIXELS = 2**26  # of a frame that is read: 8192 x 8192
MATRICES = ("bt709", "smpte170m", "bt470bg", "fcc", "smpte240m", "bt2020nc", "bt2020ncl", "bt2020c")
HDR = ("smpte2084", "arib-std-b67")
STREAM = re.compile(
    r"Stream #.*: Video: .*?, \w+(\((?P<colours>[^)\n]*)\))?, (?P<width>\d+)x(?P<height>\d+)(?P<rest>.*)"
)


def program() -> str:
    """Returns the path of ffmpeg, which may be no such program; raises OSError where none is found."""
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise OSError("there is no ffmpeg") from error


def check_encoder() -> None:
    """Encodes two frames in memory, once for each program; raises UserError with what to do where that fails."""
    suggestion = "end the output in .gif or .png, or set IMAGEIO_FFMPEG_EXE to an ffmpeg with libx264"
    check(try_encoder, "mp4 cannot be written", suggestion)


@functools.cache
def try_encoder(path: str) -> None:
    with starting(path):
        target = ["-f", "mp4", "-movflags", "frag_keyframe+empty_moov", "pipe:1"]  # as a stream, which needs no file
        command = [path, *h264(16, 16, fps=16), *target]
        done = subprocess.run(command, input=bytes(2 * 16 * 16 * 3), capture_output=True, start_new_session=True)
    if done.returncode or b"ftyp" not in done.stdout[:16]:
        raise OSError(f"{path!r} cannot encode two frames ({reason(done.stderr, done.returncode)})")


def check_decoder() -> None:
    """Raises UserError where there is no ffmpeg that starts."""
    check(try_decoder, "videos cannot be read", "pip install imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE to an ffmpeg")


def check(trial: Callable[[str], None], consequence: str, suggestion: str) -> None:
    """Tries the program; raises UserError with its reason, what cannot be done without it, and what to do."""
    try:
        trial(program())
    except OSError as error:
        raise UserError(f"{consequence}: {error.strerror or error}; {suggestion}") from error


@functools.cache
def try_decoder(path: str) -> None:
    with starting(path):
        done = subprocess.run([path, "-version"], capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode or not done.stdout.startswith(b"ffmpeg"):
        raise OSError(f"{path!r} is no ffmpeg")


@contextmanager
def starting(path: str) -> Iterator[None]:
    """Names the program where it cannot be started."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path!r} cannot be started ({error.strerror or error})") from error


def guessed_matrix(width: int, height: int) -> str:
    """The matrix that decoders take where a file names none: BT.601 for standard definition, BT.709 for more.

    Players differ on sizes between 576 and 720 lines and agree outside them.
    """
    return "smpte170m" if width < 1280 and height <= 576 else "bt709"


def h264(width: int, height: int, *, fps: int) -> list[str]:
    """ffmpeg's arguments from frames as bytes, RGB, on its standard input to H.264; the target is left to be named."""
    matrix = guessed_matrix(width, height)
    # Without accurate_rnd each round of decoding and encoding darkens the colours.
    to_yuv = f"scale=out_color_matrix={matrix}:out_range=limited:flags=accurate_rnd"
    tags = f"setparams=range=limited:colorspace={matrix}:color_primaries=bt709:color_trc=bt709"
    return [
        *("-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"),
        *("-r", str(fps), "-i", "pipe:0", "-vf", f"{to_yuv},format=yuv420p,{tags}", "-c:v", "libx264", *X264),
        *("-color_range", "tv", "-colorspace", matrix, "-color_primaries", "bt709", "-color_trc", "bt709"),
    ]


@contextmanager
def mp4_encoder(path: Path, shape: Sequence[int], fps: int) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields write(frames), uint8 `[t, H, W, 3]`, to ffmpeg as a process; raises OSError with what it says."""
    _, height, width, _ = shape
    even = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))  # the last row or column again, since yuv420p halves both
    command = [program(), *h264(width + width % 2, height + height % 2, fps=fps), "-f", "mp4", url(path)]
    with tempfile.TemporaryFile() as messages, running(command, messages, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        pipe = process.stdin
        enlarge(pipe)

        def ended() -> OSError:
            messages.seek(0)
            return OSError(reason(messages.read(), process.wait()))

        def write(frames: np.ndarray) -> None:
            padded = np.pad(frames, even, mode="edge") if height % 2 or width % 2 else frames
            try:
                pipe.write(np.ascontiguousarray(padded).data)
            except BrokenPipeError as error:
                raise ended() from error

        yield write
        with suppress(BrokenPipeError):
            pipe.close()
        if process.wait() or not path.stat().st_size:
            raise ended()


def url(path: str | os.PathLike) -> str:
    """A path as ffmpeg takes it for a file whatever its name: "cat:1.mp4" alone is the protocol "cat"."""
    return f"file:{os.fspath(path)}"


@contextmanager
def running(
    command: Sequence[str], messages: IO[bytes], *, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs ffmpeg as a process that ends with the block; what it prints goes to messages."""
    with starting(command[0]):
        # In a session of its own: ctrl-C is for this process, which ends the other.
        process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=messages, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):
                if pipe:
                    pipe.close()


def enlarge(pipe: IO[bytes]) -> None:
    """Gives a pipe room for a frame, where the system knows that and this user has not too many large ones."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def reason(messages: bytes, status: int) -> str:
    """Returns ffmpeg's messages at its end, on one line."""
    text = re.sub(r"\[[^]\n]* @ 0x[0-9a-f]+\] ", "", messages.decode(errors="replace"))  # where in its memory
    text = textwrap.shorten(text, 300, placeholder=" ...")
    return text or ("ffmpeg ended early" if status >= 0 else f"ffmpeg was ended by {signal.Signals(-status).name}")


class Stream(NamedTuple):
    """A file's video as ffmpeg describes it: pixels, and the matrix and transfer function that the file names."""

    width: int
    height: int
    matrix: str | None
    transfer: str | None


def source(path: Path) -> list[str]:
    """ffmpeg's arguments for a file to read; a playlist in it may name other files, but no addresses."""
    return ["-protocol_whitelist", "file", "-i", url(path)]


def describe(path: Path) -> Stream:
    """Describes the video in a file; raises OSError where ffmpeg finds none."""
    command = [program(), "-hide_banner", *source(path)]
    with starting(command[0]):
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, start_new_session=True)
    text = done.stderr.decode(errors="replace")
    for found in STREAM.finditer(text):
        if "(attached pic)" not in found["rest"]:  # the cover of an album
            return Stream(int(found["width"]), int(found["height"]), *named_colours(found["colours"] or ""))
    raise OSError("it has no video" if "Input #0" in text else reason(done.stderr, done.returncode))


def named_colours(text: str) -> tuple[str | None, str | None]:
    """Matrix and transfer function of "tv, bt709, progressive" or "tv, smpte170m/bt709/bt709"; None where unknown."""
    for part in text.split(", "):
        matrix, _, rest = part.partition("/")
        if rest or matrix in MATRICES:
            transfer = rest.partition("/")[2] if rest else matrix
            return matrix if matrix in MATRICES else None, transfer or None
    return None, None


def read_frames(path: Path, *, fps: int) -> Generator[np.ndarray]:
    """Yields the frames of a video file at that many a second, those nearest in time, uint8 `[H, W, 3]`.

    Colours are converted by the matrix and range that the file names, else by those that players guess. Raises OSError
    for a file that ffmpeg cannot read.
    """
    stream = describe(path)
    if stream.width * stream.height > MOST_PIXELS:
        raise OSError(f"its frames of {stream.width} x {stream.height} are too large")
    if stream.transfer in HDR:
        logging.warning("%s is HDR (%s), which is read as if it were not: colours are pale", path, stream.transfer)
    guess = "" if stream.matrix else f"in_color_matrix={guessed_matrix(stream.width, stream.height)}:"
    # The filter and not ffmpeg's -r, which repeats a frame and drops another at the beginning.
    filters = f"fps={fps},scale={guess}flags=accurate_rnd+full_chroma_int+full_chroma_inp"
    command = [program(), "-loglevel", "error", *source(path), "-map", "0:V:0"]
    command += ["-vf", filters, "-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe", "pipe:1"]
    with tempfile.TemporaryFile() as messages, running(command, messages, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while (frame := read_ppm(process.stdout)) is not None:
            yield frame
        if process.wait():
            messages.seek(0)
            raise OSError(reason(messages.read(), process.returncode))


def read_ppm(stream: IO[bytes]) -> np.ndarray | None:
    """Reads the next frame of a stream of PPM images, which say their size, uint8 `[H, W, 3]`; None at the end."""
    lines = [stream.readline() for _ in range(3)]
    if not lines[2]:
        return None
    width, height = map(int, lines[1].split())
    content = stream.read(height * width * 3)
    return np.frombuffer(content, np.uint8).reshape(height, width, 3) if len(content) == height * width * 3 else None
