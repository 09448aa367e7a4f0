"""A rectified-flow network as a TrigFlow one: x_t = cos(t) x0 + sin(t) eps, t in [0, pi/2].

B batch; latents are `[B, T, H, W, C]` or any other `[B, ...]`, times `[B]`. All arithmetic is float32.
Source: rCM, arXiv 2510.08431, eq. 3; sCM, arXiv 2410.11081.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from turbojax.diffusion.samplers import guide

# velocity(x, timesteps, text) -> v = eps - x0. x, v: [B, T, H, W, C]; timesteps: float32 [B], 0..1000; text: whatever
# the network takes besides, without tangents. Rounding of timesteps and activations is the network's matter.
Velocity = Callable[[jax.Array, jax.Array, Any], jax.Array]


class Coefficients(NamedTuple):
    """x0 = c_skip x + c_out N(c_in x, c_noise), each like t."""

    c_skip: jax.Array
    c_in: jax.Array
    c_out: jax.Array
    c_noise: jax.Array


def coefficients(t: jax.Array) -> Coefficients:
    """Returns c_skip = c_in = 1 / d, c_out = -sin t / d, c_noise = 1000 sin t / d, with d = cos t + sin t."""
    c_in = 1 / (jnp.cos(t) + jnp.sin(t))
    s = jnp.sin(t) * c_in
    return Coefficients(c_in, c_in, -s, 1000 * s)


def like(t: jax.Array, x: jax.Array) -> jax.Array:
    """Reshapes t `[B]` with trailing axes of one, as many as x `[B, ...]` has."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def diffuse(x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """Returns x_t = cos(t) x0 + sin(t) eps; x0 and eps `[B, ...]`, t `[B]`."""
    t = like(t, x0)
    return jnp.cos(t) * x0 + jnp.sin(t) * eps


def velocity(network: Velocity, x: jax.Array, t: jax.Array, text: Any) -> jax.Array:
    """Returns TrigFlow velocity F = dx/dt = ((cos t - sin t) x + N) / (cos t + sin t), float32 like x.

    It equals (cos t x - x0) / sin t, but divides by no sine: exact, with all its derivatives, at t = 0.
    """
    _, c_in, _, c_noise = coefficients(t)
    c_in, angle = like(c_in, x), like(t, x)
    n = network(c_in * x, c_noise, text).astype(jnp.float32)
    return c_in * ((jnp.cos(angle) - jnp.sin(angle)) * x + n)


def denoise(network: Velocity, x: jax.Array, t: jax.Array, text: Any) -> jax.Array:
    """Returns the network's x0 = c_skip x + c_out N(c_in x, c_noise), float32 like x."""
    c = coefficients(t)
    n = network(like(c.c_in, x) * x, c.c_noise, text).astype(jnp.float32)
    return like(c.c_skip, x) * x + like(c.c_out, x) * n


def guided(network: Velocity, negative: Any, scale: float) -> Velocity:
    """Puts the network under guidance N_u + w (N_c - N_u), N_u under the negative prompt; w <= 1 is the prompt alone.

    F and x0 are affine in N, so guiding N guides them.
    """
    if scale <= 1:
        return network
    return lambda x, timesteps, text: guide(network(x, timesteps, text), network(x, timesteps, negative), scale)
