"""Recomputes every result of golden/sampler.safetensors with turbojax's samplers."""

import re
from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np

from tests.golden_io import Incomplete, Parameters
from turbojax.diffusion import RCM, Euler, Sampler, UniPC, expert_split, timesteps

Velocity = Callable[..., jnp.ndarray]
NUMBER = r"-?\d+(?:\.\d+)?"

# Absolute tolerances of a float32 sampler (golden README); other keys: 1e-5 of the largest expected value.
TOLERANCE = {"x": 1e-5, "sigmas": 2e-6, "net": 0.0, "timesteps_bf16": 0.0}


def recompute(config: dict, t: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, float]]:
    """{key: (value, absolute tolerance)} for all `out.*` keys; states have the dtype of `in.*.init_noise`."""
    results = {}
    for name, case in config["cases"].items():
        start = t[f"in.{name}.init_noise"]
        if "script" in case:
            noise = t.get(f"in.{name}.noise") if case["ode"] else t[f"in.{name}.noise"]
            values = _rcm(case, config, start, noise)
        else:
            values = _flow(case, config, start)
        for key, value in values.items():
            if f"out.{name}.{key}" not in t:
                continue
            expected = np.abs(t[f"out.{name}.{key}"]).max(initial=0.0)
            results[f"out.{name}.{key}"] = np.asarray(value), TOLERANCE.get(key, 1e-5 * float(expected))
    return results


def fixture_velocity(x, timestep, c=0.1, slope=0.3):
    """The fixture's analytic network: tanh(slope x) t + c x, t = timestep / 1000."""
    return jnp.tanh(slope * x) * (timestep / 1000).astype(x.dtype) + c * x


def networks(config: dict) -> tuple[Velocity, Velocity]:
    """The network, or the one for high noise, and the one for low noise, of the numbers in the fixture's sentence."""
    sentence = config["fake_network"]
    slope = re.search(rf"tanh\(({NUMBER}) \*? ?x\)", sentence)
    offsets = re.findall(rf"\bc = ({NUMBER})", sentence)
    if slope is None or not offsets:
        raise Incomplete(f"its network, {sentence!r}, is not tanh(A * x) * t + c * x with c = B")
    high, low = (partial(fixture_velocity, c=float(c), slope=float(slope[1])) for c in (offsets[0], offsets[-1]))
    return high, low


def _rcm(case: dict, config: dict, init_noise: np.ndarray, noise: np.ndarray | None) -> dict:
    # The fixture's network was called with the timesteps before the rounding to bfloat16.
    sampler = RCM(case["steps"], case["sigma_max"], ode=case["ode"], round_timesteps=False)
    n, times = sampler.num_steps, sampler.times
    k = expert_split(times, config["boundary"]) if case["script"] == "i2v" else n
    high, low = networks(config)
    head = sampler.sample(high, sampler.initial(init_noise), noise=noise, stop=k, trajectory=True)
    tail = sampler.sample(low, head[-1], noise=noise, start=k, trajectory=True)
    x_in, net = [*head[:-1], *tail[:-1]], np.arange(n) >= k
    called = zip(x_in, sampler.timesteps, net, strict=True)
    return {
        "t_steps": times,
        "timesteps": timesteps(times[:-1], rounded=False),
        "timesteps_bf16": timesteps(times[:-1]),
        "net": net.astype(np.int32),
        "x_in": np.stack(x_in),
        "v": np.stack([(low if is_low else high)(x, ts) for x, ts, is_low in called]),
        "x": tail[-1],
    }


def _flow(case: dict, config: dict, init_noise: np.ndarray) -> dict:
    kind, keep_end = Parameters(euler=(Euler, False), unipc=(UniPC, True))[case["sampler"]]
    sampler: Sampler = kind(case["steps"], case["shift"], case["sigma_max"], round_timesteps=False)
    times = sampler.times
    return {
        "sigmas": times if keep_end else times[:-1],
        "timesteps": timesteps(times[:-1], rounded=False),
        "x": sampler.sample(networks(config)[0], sampler.initial(init_noise), trajectory=True),
    }
