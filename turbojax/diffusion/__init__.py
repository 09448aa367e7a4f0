"""Noise schedules and samplers. They take a velocity function and import no model."""

from turbojax.diffusion.samplers import (
    RCM,
    Embed,
    Euler,
    Sampler,
    Schedule,
    UniPC,
    Velocity,
    guide,
    normal,
    unembedded,
)
from turbojax.diffusion.schedules import (
    expert_split,
    flow_sigmas,
    rcm_times,
    rf_from_trig,
    shift_time,
    timesteps,
    trig_from_rf,
    unshift_time,
)

__all__ = [
    "RCM",
    "Embed",
    "Euler",
    "Sampler",
    "Schedule",
    "UniPC",
    "Velocity",
    "expert_split",
    "flow_sigmas",
    "guide",
    "normal",
    "rcm_times",
    "rf_from_trig",
    "shift_time",
    "timesteps",
    "trig_from_rf",
    "unembedded",
    "unshift_time",
]
