"""Settings of scripts: names, defaults and what they mean; here those of `scripts/generate.py`.

Files in configs/ change a few of them. Those of training are in `turbojax.train.config`.
"""

import difflib
import runpy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from turbojax.errors import UserError, quoted
from turbojax.json_reader import Integer, Mismatch, Nullable, Number, Schema

PACKAGE = Path(__file__).parent
CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"  # wheel, checkout

PROMPT = (
    "A stylish woman walks down a Tokyo street filled with warm glowing neon and animated city signage. She wears "
    "a black leather jacket, a long red dress, and black boots, and carries a black purse. The street is damp and "
    "reflective, creating a mirror effect of the colorful lights. Many pedestrians walk about."
)
KINDS = {int: "whole number", float: "number", bool: "switch: true or false"}
SWITCHES = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}


class Setting(NamedTuple):
    """A setting's name, default (a type where there is none), meaning, and what its values may be."""

    name: str
    default: Any
    meaning: str
    schema: Schema | None = None


SETTINGS: tuple[Setting, ...] = (
    Setting("prompt", PROMPT, "what the video shows; the models want long English descriptions"),
    Setting("negative_prompt", "", "what it should not show; needs guidance_scale above 1"),
    Setting("image", str, "first frame, for image to video: a file"),
    Setting("last_image", str, "last frame, for the networks that take one"),
    Setting("background", "white", "what shows through where the image is transparent: a name or #rrggbb"),
    Setting(
        "adaptive_size", True, "the video has the image's shape, at the area of the size; False squeezes the image"
    ),
    Setting("output", "outputs/video.mp4", "file to write: .mp4, .gif, or .png for numbered frames"),
    Setting("num_samples", 1, "videos of the same prompt"),
    Setting("seed", 0, "the same seed gives the same video; up to 2**64 - 1"),
    Setting("sample_index", 0, "sample to begin with: 3 with num_samples=1 makes the last of num_samples=4 alone"),
    Setting("resolution", "480p", "480p or 720p"),
    Setting("aspect_ratio", "16:9", "16:9, 9:16, 4:3, 3:4 or 1:1"),
    Setting("height", int, "pixels, a multiple of 16; instead of resolution and aspect_ratio"),
    Setting("width", int, "pixels, a multiple of 16"),
    Setting("num_frames", 81, "4 n + 1; the models were trained on up to 81"),
    Setting("fps", 16, "frames a second"),
    Setting("sampler", "rcm", "rcm for distilled models; euler or unipc for others"),
    Setting("num_inference_steps", 4, "1 to 4 with rcm, about 50 with euler and unipc"),
    Setting(
        "sigma_max", float, "first noise level of rcm, up to 1600; what the checkpoint says or 80, with an image 200"
    ),
    Setting("ode", False, "deterministic rcm steps: sharper, less robust"),
    Setting("guidance_scale", 1.0, "classifier-free guidance; 5 is usual with euler and unipc"),
    Setting("shift", 5.0, "shift of the times of euler and unipc; 3 is usual at 480p"),
    Setting("model", "wan2.1-t2v-1.3b", "network that weights=random builds, such as wan2.1-t2v-14b, wan2.2-i2v-a14b"),
    Setting("weights", str, "transformer: file (of two experts, either), folder, Hugging Face repository, or random"),
    Setting("vae", str, "file or folder; found beside the weights or downloaded if not given"),
    Setting("text_encoder", str, "likewise"),
    Setting("tokenizer", str, "likewise"),
    Setting("image_encoder", str, "likewise: CLIP, for Wan 2.1 image to video"),
    Setting("lora", str, "LoRA files, separated by commas, merged while loading; of two experts into both"),
    Setting("lora_high", str, "likewise, into the expert for high noise"),
    Setting("lora_low", str, "likewise, into the expert for low noise"),
    Setting("lora_strength", 1.0, "how strongly they count"),
    Setting("boundary", 0.9, "noise level (rectified-flow time) at which two experts change"),
    Setting("quant_linear", bool, "int8 linear layers; as the checkpoint is if not given"),
    Setting("quant_scheme", str, "block128, block128_rows, block128_weights, channel or channel_weights"),
    Setting("attention_type", str, "original, sla or sagesla; as the checkpoint is if not given"),
    Setting(
        "sla_topk", float, "fraction of key blocks that sla and sagesla attend to; what the checkpoint says or 0.1"
    ),
    Setting("sage_values", str, "how sagesla multiplies with v: float8 (the default), float8_values or exact"),
    Setting("dtype", "bfloat16", "bfloat16 or float32"),
    Setting("memory", "auto", "auto, resident, stream (weights stay in host memory), or the GPU's GB to plan for"),
    Setting("vae_tiling", "auto", "decode in overlapping tiles: on, off, or auto where memory is short"),
    Setting("cache_prompts", True, "keep text embeddings in the user's cache; a known prompt needs no text encoder"),
)

# What numbers may be, before other checks say more; 0 where those have a better sentence for it.
RANGES: dict[str, Schema] = {
    "num_samples": Integer(0, 1000),
    "height": Nullable(Integer(0, 2**14)),
    "width": Nullable(Integer(0, 2**14)),
    "num_frames": Integer(0, 2**12),
    "fps": Integer(0, 1000),
    "num_inference_steps": Integer(0, 1000),
    "guidance_scale": Number(0, 1000),
    "shift": Number(0, 1000, above=True),
    "lora_strength": Number(-100, 100),
}


def base_config(settings: Sequence[Setting] = SETTINGS, **changes: Any) -> ConfigDict:
    """Makes all settings with their defaults, `changes` on top; locked, so that an unknown name is an error."""
    check_names(changes, settings)
    config = ConfigDict()
    for name, default, *_ in settings:
        config[name] = placeholder(default) if isinstance(default, type) else default
    config.lock()
    config.update(changes)
    return config


def load_config(name: str, *arguments: Any, **changes: Any) -> ConfigDict:
    """Returns what get_config(*arguments) of configs/NAME.py does, `changes` on top: a variant states only these."""
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](*arguments)
    config.update(changes)
    return config


def changed(config: ConfigDict, **changes: Any) -> ConfigDict:
    """Returns a copy with some settings changed."""
    copy = config.copy_and_resolve_references()
    copy.update(changes)
    return copy


def fields_of(dataclass: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that have the name of one of the dataclass's fields."""
    return {field.name: values[field.name] for field in fields(dataclass) if field.name in values}


def check_ranges(values: Mapping[str, Any], ranges: Mapping[str, Schema] = RANGES) -> None:
    """Raises UserError for a value that its range does not allow."""
    for name, value in values.items():
        if name in ranges:
            try:
                ranges[name].check(as_json(value), name)
            except Mismatch as error:
                raise UserError(str(error)) from error


def as_json(value: Any) -> Any:
    """Returns a setting as the schemas of JSON know it: lists for tuples, Python's numbers for NumPy's."""
    if isinstance(value, np.generic):
        return value.item()
    return list(map(as_json, value)) if isinstance(value, tuple) else value


def check_names(names: Iterable[str], settings: Sequence[Setting] = SETTINGS) -> None:
    """Raises UserError for a name that is no setting."""
    known = [setting.name for setting in settings]
    for name in names:
        if name not in known:
            raise UserError(f"there is no setting {name}{did_you_mean(name, known)}")


def parse_value(name: str, text: str, settings: Sequence[Setting] = SETTINGS) -> Any:
    """Parses a setting's value as a person types it; "none" unsets one that has no default. Raises UserError."""
    check_names([name], settings)
    default = next(setting.default for setting in settings if setting.name == name)
    kind = default if isinstance(default, type) else type(default)
    if kind is not type(default) and text.lower() == "none":
        return None
    try:
        return SWITCHES[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError) as error:
        raise UserError(f"{name}={quoted(text)} is no {KINDS[kind]}") from error


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Returns the end of a sentence on an unknown name: ", perhaps NAME" if a known one is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f", perhaps {close[0]}" if close else ""


def describe_settings(settings: Sequence[Setting] = SETTINGS) -> str:
    """Returns a line a setting for --help."""
    lines = []
    for name, default, meaning, _ in settings:
        shown = "" if isinstance(default, type) or default == "" else f" [{str(default)[:32]}]"
        lines.append(f"  --config.{name}: {meaning}{shown}")
    return "\n".join(lines)
