"""Values of the form as settings, checked before anything waits for the GPU."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from turbojax.app.generate import read_settings
from turbojax.config import changed, parse_value
from turbojax.errors import UserError
from turbojax.media.video import SIZES

NAMES = (
    *("prompt", "negative_prompt", "image", "resolution", "aspect_ratio", "num_frames", "num_inference_steps", "seed"),
    *("quant_linear", "attention_type", "sla_topk", "sigma_max", "ode", "guidance_scale"),
)
AS_STARTED = "as started"  # the choice of what the server's configuration says
LONGEST_PROMPT = 4000  # characters; the text encoder reads 512 tokens
MOST_FRAMES = 241  # at 16 frames a second, 15 seconds


def resolutions(config: ConfigDict) -> list[str]:
    """Returns the choices; the first is the one that the server was started with."""
    own = [] if config.width is None or config.height is None else [f"{config.width} x {config.height}"]
    return own + sorted(SIZES, key=lambda name: name != config.resolution)


def first_values(config: ConfigDict) -> dict[str, Any]:
    """Returns the first values of the form."""
    values = {name: config[name] for name in NAMES}
    return values | {"resolution": resolutions(config)[0], "quant_linear": AS_STARTED, "attention_type": AS_STARTED}


def read_form(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """Returns the server's configuration with the values of a form; raises UserError for what no video can be made of.

    values: by NAMES, an empty field as None or ""; image: a file.
    """
    changes = {name: parse(name, values[name]) for name in NAMES if name not in ("resolution", "image")}
    for name in ("quant_linear", "attention_type"):
        changes[name] = config[name] if values[name] == AS_STARTED else changes[name]
    if changes["quant_linear"] is False:
        changes["quant_scheme"] = None  # the server's, which the form does not show
    if values["resolution"] in SIZES:
        changes |= {"resolution": values["resolution"], "width": None, "height": None}
    elif values["resolution"] not in resolutions(config):
        raise UserError(f"resolution={values['resolution']!r} is unknown; choose {', '.join(resolutions(config))}")
    for name in ("prompt", "negative_prompt"):
        if len(changes[name]) > LONGEST_PROMPT:
            raise UserError(
                f"the {name.replace('_', ' ')} has {len(changes[name])} characters; give at most {LONGEST_PROMPT}"
            )
    if not changes["prompt"].strip():
        raise UserError("the prompt is empty; describe what the video shows")
    if changes["num_frames"] > MOST_FRAMES:
        raise UserError(f"num_frames={changes['num_frames']} is too many; give at most {MOST_FRAMES}")
    if changes["negative_prompt"].strip() and changes["guidance_scale"] == 1:
        raise UserError("a negative prompt needs guidance; set the guidance scale above 1, or leave it empty")
    new = changed(config, **changes, image=values["image"] or None)
    read_settings(new)
    return new


def parse(name: str, value: Any) -> Any:
    """Parses a field's value as the setting's type; a number may come as a float."""
    if name in ("prompt", "negative_prompt"):
        return str(value or "")
    if value in (None, ""):
        if name in ("sla_topk", "sigma_max"):
            return None
        raise UserError(f"{name} is empty; give a value")
    if value == AS_STARTED:
        return None
    return parse_value(name, f"{value:.0f}" if isinstance(value, float) and value.is_integer() else str(value))
