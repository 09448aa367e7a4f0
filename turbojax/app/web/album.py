"""The videos that were made, with the settings they were made of: files in a folder.

    20261124-181502-3fa9c1.mp4   the video
    20261124-181502-3fa9c1.jpg   its middle frame
    20261124-181502-3fa9c1.png   the image it was made from, if one was
    20261124-181502-3fa9c1.json  {"settings": {...}, "weights": ..., "seconds": {...}}

The settings are written last: a video that has none is not finished.
"""

import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from PIL import Image

from turbojax.errors import UserError
from turbojax.files import check_folder, whole_file, write_json
from turbojax.json_reader import AnyOf, Boolean, FileName, Integer, Map, Nullable, Number, Object, String, read_json
from turbojax.media.image import read_image
from turbojax.media.video import check_path

SETTING = AnyOf(
    "text, a number, true, false or null",
    *(Nullable(String()), Boolean(), Integer(-(2**63), 2**64), Number(-1e9, 1e9)),
)
RECORD = Object(
    {
        "settings": Object({"prompt": String()}, {"image": Nullable(FileName())}, others=SETTING),
        "weights": String(),
        "seconds": Map(Number(0, 1e9)),
    }
)


class Entry(NamedTuple):
    """A video's files and facts; settings are those of the page's form."""

    video: Path
    poster: Path
    settings: dict[str, Any]
    weights: str
    seconds: dict[str, float]


class Album:
    """Folder of finished videos with their settings."""

    def __init__(self, folder: Path):
        check_path(Path(folder) / "video.mp4")
        self.folder = check_folder(folder).absolute()

    def new_path(self) -> Path:
        """Returns a path for the next video; sorted by name, videos are sorted by time."""
        return self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}.mp4"

    def add(
        self,
        video: Path,
        frames: np.ndarray,
        *,
        settings: Mapping[str, Any],
        weights: str,
        seconds: Mapping[str, float],
    ) -> Entry:
        """Writes what belongs to a finished video beside it; frames: uint8 `[T, H, W, 3]`."""
        settings = dict(settings)
        if settings["image"]:
            image = video.with_suffix(".png")
            with whole_file(image) as temporary:
                Image.fromarray(read_image(settings["image"])).save(temporary)
            settings["image"] = image.name
        with whole_file(video.with_suffix(".jpg")) as temporary:
            Image.fromarray(frames[len(frames) // 2]).save(temporary, quality=90)
        record = {"settings": settings, "weights": weights, "seconds": dict(seconds)}
        write_json(video.with_suffix(".json"), record)
        return self.get(video.stem)

    def get(self, name: str) -> Entry:
        """Returns a video by its file's name without extension; raises UserError where it is gone or not readable."""
        record, video = self.folder / f"{name}.json", self.folder / f"{name}.mp4"
        found = read_json(record, RECORD, suggestion="the video's settings cannot be read", error=UserError)
        settings = found["settings"]
        if not video.is_file():
            raise UserError(f"the video {video} is gone")
        if settings.get("image"):
            settings["image"] = str(self.folder / settings["image"])
        return Entry(video, video.with_suffix(".jpg"), settings, found["weights"], found["seconds"])

    def latest(self, count: int) -> list[Entry]:
        """Returns the newest videos, newest first; a damaged one is left out with a warning."""
        entries: list[Entry] = []
        for record in sorted(self.folder.glob("[0-9]*.json"), reverse=True):
            if len(entries) == count:
                break
            try:
                entries.append(self.get(record.stem))
            except UserError as error:
                logging.warning("%s", error)
        return entries
