"""Settings that the configurations of the world of shapes have in common; configs/shapes_*.py say the rest."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from turbojax.errors import UserError
from turbojax.train.config import train_config

FOLDER = Path("outputs/shapes")
IMAGE, TEACHER, RCM = (str(FOLDER / stage / "transformer.safetensors") for stage in ("image", "teacher", "rcm"))
MERGED = str(FOLDER / "merged" / "start.safetensors")  # what merging alone gives
# What is smaller where only the way is to be shown.
TINY: dict[str, Any] = dict(
    model="shapes-tiny",
    num_frames=9,
    height=80,
    width=80,
    num_steps=4,
    batch_size=2,
    warmup_steps=1,
    log_every=1,
    tangent_warmup=1,
    student_every=2,
    sla_topk=0.5,
    crops=((9, 40),),
    workers=0,
    dtype="float32",
)


def check_size(size: str) -> None:
    if size not in ("full", "tiny"):
        raise UserError(f"size {size!r} is unknown; choose full or tiny")


def shapes_config(recipe: str, size: str, **changes: Any) -> ConfigDict:
    """Returns all settings, for a run in FOLDER; size: "full", or "tiny" for a few steps of tiny networks."""
    check_size(size)
    common: dict[str, Any] = dict(
        recipe=recipe,
        workdir=str(FOLDER / recipe),
        data=str(FOLDER / "data"),
        vae=str(FOLDER / "vae"),
        model="shapes",
        batch_size=64,
        accumulation=1,
        remat=True,  # what a layer keeps costs more time to write and read than to compute again
        weight_decay=0.01,
        warmup_steps=100,
        clip_norm=1.0,
        log_every=20,
        sla_topk=0.25,
    )
    config = train_config(**(common | changes))
    if size == "tiny":
        config.update(TINY)
    return config


def flow_matching(size: str, **changes: Any) -> ConfigDict:
    """Returns the settings of the two runs that learn from data."""
    optimizer = dict(optimizer="muon", learning_rate=5e-3, learning_rate_end=0.05, warmup_steps=300, beta2=0.99)
    common: dict[str, Any] = dict(time_mean=0.4, time_std=1.3, **optimizer)
    return shapes_config("teacher", size, **(common | changes))
