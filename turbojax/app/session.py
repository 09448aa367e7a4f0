"""Many prompts for one pipeline: typed one after another, or from a file."""

import glob
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from turbojax.app.generate import PipelineCache, read_settings
from turbojax.app.records import Records, fingerprint
from turbojax.app.signals import Terminated
from turbojax.config import SETTINGS, changed, did_you_mean, parse_value
from turbojax.errors import UserError
from turbojax.files import user_path
from turbojax.media.video import check_path, numbered
from turbojax.memory.planner import short_of_memory
from turbojax.text_files import read_text, split_lines

SHORT = {
    "topk": "sla_topk",
    "steps": "num_inference_steps",
    "sigma": "sigma_max",
    "frames": "num_frames",
    "negative": "negative_prompt",
    "guidance": "guidance_scale",
    "samples": "num_samples",
}
HELP = f"""A line is a prompt. A line that starts with / changes a setting for the videos that follow, or asks:
  /size 480p 16:9      or /size 720p, or /size 832x480 in pixels
  /seed 7              any setting by its name, see generate --help; "none" unsets it
  /steps 2             short names: {", ".join(f"{short} for {name}" for short, name in SHORT.items())}
  /show                the settings as they are
  /quit                ends the session, as Ctrl-D does; Ctrl-C stops a video"""


def interactive(config: ConfigDict, *, read: Callable[[str], str] = input, write: Callable[[str], Any] = print) -> None:
    """Makes a video of each line read until /quit or the end; the pipeline is loaded at the first and stays.

    Videos are numbered after those that are there: none is overwritten. What goes wrong is a line, and the next prompt
    follows. read: takes what to show before the line. write: takes a text to show.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  # gives `input` earlier lines by the arrow keys
    check_path(config.output)
    pipelines = PipelineCache()
    write("Type a prompt, or /help.")
    while True:
        try:
            line = read("prompt> ").strip()
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                write(command(config, line))
            elif line:
                config.prompt = line
                result = pipelines.make(config, free(check_path(config.output)))
                write(f"{', '.join(map(str, result.files))}, {sum(result.timings.values()):.1f} s")
        except EOFError:
            return
        except Terminated:
            raise
        except KeyboardInterrupt:
            write("\nstopped; /quit ends the session")
        except UnicodeDecodeError:
            write("error: the line is not UTF-8; set the terminal to UTF-8")
        except UserError as error:
            write(f"error: {error}")
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not short_of_memory(error):
                raise
            write("error: memory is not enough for this; try /memory stream, a smaller /size or fewer /frames")


def command(config: ConfigDict, line: str) -> str:
    """Does what a line such as "/seed 7" says and returns what to show; a bad value changes nothing."""
    name, _, text = line.removeprefix("/").partition(" ")
    name, text = SHORT.get(name, name), text.strip()
    if name == "help":
        return HELP
    if name == "show":
        return "\n".join(f"  {setting.name} = {value}" for setting in SETTINGS if (value := config[setting.name]) != "")
    known = [setting.name for setting in SETTINGS]
    if name != "size" and name not in known:
        raise UserError(f"there is no command /{name}{did_you_mean(name, [*known, *SHORT])}; see /help")
    if not text:
        raise UserError(f"/{name} needs a value; see /help")
    changes = size(text) if name == "size" else {name: parse_value(name, text)}
    new = changed(config, **changes)
    read_settings(new)
    check_path(new.output)
    config.update(changes)
    return ", ".join(f"{name} = {value}" for name, value in changes.items())


def size(text: str) -> dict[str, str | int | None]:
    """Returns the settings that "480p 16:9", "720p" or "832x480" stand for."""
    width, x, height = text.partition("x")
    if x:
        return {"width": parse_value("width", width), "height": parse_value("height", height)}
    resolution, _, aspect_ratio = text.partition(" ")
    shape = {"aspect_ratio": aspect_ratio.strip()} if aspect_ratio else {}
    return {"resolution": resolution, **shape, "width": None, "height": None}


def free(path: Path, preferred: int = 0) -> Path:
    """Finds a numbered path without a file, also of its samples or frames: the preferred one or the first."""
    for i in itertools.chain([preferred], itertools.count()):
        candidate = numbered(path, i, 2)
        if not glob.glob(f"{glob.escape(str(candidate.with_suffix('')))}[._]*"):
            return candidate
    raise AssertionError


def batch(config: ConfigDict, prompts_file: str | Path) -> list[Path]:
    """Makes a video of each line of a file; returns the files, those that were there before included.

    A record beside the output, video.jsonl, says which prompts are finished and with what settings: run again, these
    are left out. Videos are numbered by the lines, but none is overwritten: where one is there, of another prompt, of
    other settings or of a session, the new one takes the first free number. Empty lines and those that start with #
    count as no prompt.
    """
    prompts = read_prompts(user_path(prompts_file))
    output = check_path(config.output)
    contents = (picture.tobytes() for picture in read_settings(config)[0].pictures)
    pictures = dict(zip(("image", "last_image"), contents, strict=False))
    finished, pipelines = Records(output.with_suffix(".jsonl")), PipelineCache()
    seen: Counter[str] = Counter()
    files: list[Path] = []
    before = 0
    for i, prompt in enumerate(tqdm(prompts, desc="Prompts", unit="video", disable=None)):
        key = video_key(changed(config, prompt=prompt), pictures, seen[prompt])
        seen[prompt] += 1
        record = finished.get(key)
        if record is None:
            own = free(output, i)
            if own != numbered(output, i, 2):
                logging.info("%s is there and stays; this prompt's video is %s", numbered(output, i, 2), own.name)
            made = [path.name for path in pipelines.make(changed(config, prompt=prompt), own).files]
            record = {"key": key, "output": own.name, "prompt": prompt, "seed": config.seed, "files": made}
            finished.add(record)
        else:
            before += 1
        files += [output.parent / name for name in record["files"]]
    logging.info("%d prompts are finished, %d of them before", len(prompts), before)
    return files


def video_key(config: ConfigDict, pictures: Mapping[str, bytes], occurrence: int) -> str:
    """Names the video of these settings, wherever it is written, and of these contents of the images.

    occurrence: how often a file of prompts had the prompt before.
    """
    own = {name: value for name, value in config.to_dict().items() if name not in ("output", "memory", "cache_prompts")}
    contents = {name: hashlib.sha256(content).hexdigest() for name, content in pictures.items()}
    return fingerprint(own | contents | {"format": Path(config.output).suffix.lower(), "occurrence": occurrence})


def read_prompts(path: Path) -> list[str]:
    """Reads the prompts of a file, a line each; raises UserError if there is none."""
    lines = [line.strip() for line in split_lines(read_text(path))]
    if prompts := [line for line in lines if line and not line.startswith("#")]:
        return prompts
    raise UserError(f"{str(path)!r} has no prompt; give one a line")
