"""Recomputes every result of golden/sampler.safetensors with turbojax's samplers."""

from functools import partial

import jax.numpy as jnp
import numpy as np

from turbojax.diffusion import RCM, Euler, Sampler, UniPC, expert_split, timesteps

# Absolute tolerances of a float32 sampler (golden README); other keys: 1e-5 of the largest expected value.
TOLERANCE = {"x": 1e-5, "sigmas": 2e-6, "net": 0.0, "timesteps_bf16": 0.0}


def recompute(config: dict, t: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, float]]:
    """{key: (value, absolute tolerance)} for all `out.*` keys; states have the dtype of `in.*.init_noise`."""
    results = {}
    for name, case in config["cases"].items():
        inputs = {key: t.get(f"in.{name}.{key}") for key in ("init_noise", "noise")}
        values = _rcm(case, config["boundary"], **inputs) if "script" in case else _flow(case, inputs["init_noise"])
        for key, value in values.items():
            expected = np.abs(t[f"out.{name}.{key}"]).max()
            results[f"out.{name}.{key}"] = np.asarray(value), TOLERANCE.get(key, 1e-5 * float(expected))
    return results


def fixture_velocity(x, timestep, c=0.1):
    """The fixture's analytic network: tanh(0.3 x) t + c x, t = timestep / 1000."""
    return jnp.tanh(0.3 * x) * (timestep / 1000).astype(x.dtype) + c * x


def _rcm(case: dict, boundary: float, init_noise: np.ndarray, noise: np.ndarray | None) -> dict:
    # The fixture's network was called with the timesteps before the rounding to bfloat16.
    sampler = RCM(case["steps"], case["sigma_max"], ode=case["ode"], round_timesteps=False)
    n, times = sampler.num_steps, sampler.times
    k = expert_split(times, boundary) if case["script"] == "i2v" else n
    low = partial(fixture_velocity, c=-0.2)
    head = sampler.sample(fixture_velocity, sampler.initial(init_noise), noise=noise, stop=k, trajectory=True)
    tail = sampler.sample(low, head[-1], noise=noise, start=k, trajectory=True)
    x_in, net = [*head[:-1], *tail[:-1]], np.arange(n) >= k
    called = zip(x_in, sampler.timesteps, net, strict=True)
    return {
        "t_steps": times,
        "timesteps": timesteps(times[:-1], rounded=False),
        "timesteps_bf16": timesteps(times[:-1]),
        "net": net.astype(np.int32),
        "x_in": np.stack(x_in),
        "v": np.stack([(low if is_low else fixture_velocity)(x, ts) for x, ts, is_low in called]),
        "x": tail[-1],
    }


def _flow(case: dict, init_noise: np.ndarray) -> dict:
    kind, keep_end = {"euler": (Euler, False), "unipc": (UniPC, True)}[case["sampler"]]
    sampler: Sampler = kind(case["steps"], case["shift"], case["sigma_max"], round_timesteps=False)
    times = sampler.times
    return {
        "sigmas": times if keep_end else times[:-1],
        "timesteps": timesteps(times[:-1], rounded=False),
        "x": sampler.sample(fixture_velocity, sampler.initial(init_noise), trajectory=True),
    }
