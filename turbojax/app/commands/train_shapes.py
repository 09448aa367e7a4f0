"""Trains the small model of the world of shapes from nothing, and lays out what is shipped.

    python scripts/train_shapes.py --folder=outputs/shapes --minutes=8
    python scripts/train_shapes.py --folder=outputs/shapes-tiny --size=tiny

Stages: text, vae, image_data, data, image, teacher, sla, rcm, merged, ship; their settings are in
configs/shapes_*.py, and "image_data" and "data" encode drawn frames and videos. After --minutes it stops with a
checkpoint and exit code 130; the same command goes on from there, stages that are done are passed over. model/ then has
the files in the published layouts and the curves. --stages=sla,rcm runs these alone, --shipped=text,vae takes from the
package what these made, --steps=0.5 takes half the steps of each. --size=tiny shows on a CPU in minutes that the way
works.
"""

import functools
import math
import time

from absl import flags, logging
from ml_collections import ConfigDict

from turbojax.app import cli
from turbojax.config import load_config
from turbojax.errors import UserError
from turbojax.files import check_folder

try:
    from turbojax.shapes_training.stages import STAGES, Job, check_shipped, take
except ModuleNotFoundError as missing:
    cli.fail(ModuleNotFoundError(f"training needs {missing.name}; pip install 'turbojax[shapes,train]'"))

FLAGS = flags.FlagValues()
FOLDER = flags.DEFINE_string("folder", "outputs/shapes", "of all that is made", flag_values=FLAGS)
STAGE_NAMES = flags.DEFINE_list("stages", list(STAGES), "to run, in this order", flag_values=FLAGS)
SHIPPED = flags.DEFINE_list("shipped", [], "stages whose result is taken from the package", flag_values=FLAGS)
MINUTES = flags.DEFINE_float(
    "minutes", 0.0, "stop, to be gone on with, after so long; 0 for no limit", flag_values=FLAGS
)
SIZE = flags.DEFINE_enum("size", "full", ["full", "tiny"], "of networks, data and steps", flag_values=FLAGS)
STEPS = flags.DEFINE_float("steps", 1.0, "share of each stage's steps", flag_values=FLAGS)


def settings(stage: str, *, size: str, steps: float) -> ConfigDict:
    """Returns what configs/shapes_STAGE.py says."""
    config = load_config(f"shapes_{stage}", size)
    name = "steps" if stage == "text" else "num_steps"
    config[name] = max(1, round(config[name] * steps))
    return config


def main() -> None:
    start = time.monotonic()
    if unknown := [name for name in STAGE_NAMES.value + SHIPPED.value if name not in STAGES]:
        raise UserError(f"there is no stage {unknown[0]}; choose among {','.join(STAGES)}")
    for name, value in (("steps", STEPS.value), ("minutes", MINUTES.value)):
        if not 0 <= value < math.inf:
            raise UserError(f"--{name}={value} must be a number from 0 on")
    for name in SHIPPED.value:
        check_shipped(name)
    folder = check_folder(FOLDER.value)
    for name in STAGE_NAMES.value:
        if (folder / STAGES[name].last).exists():
            logging.info("%s is done", name)
            continue
        left = MINUTES.value - (time.monotonic() - start) / 60 if MINUTES.value else 0.0
        if MINUTES.value and left <= 0:
            logging.info("Stopped before %s; the same command goes on from there", name)
            raise KeyboardInterrupt
        began = time.monotonic()
        read = functools.partial(settings, size=SIZE.value, steps=STEPS.value)
        job = Job(folder, SIZE.value, read, left)
        if name in SHIPPED.value:
            take(name, job)
        else:
            STAGES[name].run(job)
        logging.info("%s took %.1f s", name, time.monotonic() - began)
