"""Draws many scenes at once on JAX's device, where one process of `turbojax.shapes.render` takes 0.1 s a video."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from turbojax.shapes.render import Placed, background, coverage, outlines
from turbojax.shapes.scene import BACKGROUNDS

AWAY = 1e5  # pixels, where nothing is seen


def stack(placed: Sequence[Sequence[Placed]]) -> Placed:
    """Stacks the things of many scenes, each value with leading axes `[B, 2]`."""
    pairs = []
    for things in placed:
        unseen = things[0]._replace(centre=things[0].centre + AWAY)  # stands for a second thing that is not there
        pairs.append([np.stack(both) for both in zip(*(*things, unseen)[:2], strict=True)])
    return Placed(*(np.stack(values) for values in zip(*pairs, strict=True)))


@functools.partial(jax.jit, static_argnames=("height", "width"))
def draw_many(things: Placed, behind: jax.Array, *, height: int, width: int) -> jax.Array:
    """Draws the videos, uint8 `[B, T, H, W, 3]`, that `turbojax.shapes.render.draw` makes, within a level for rounding.

    things: of `stack`; behind: indices into BACKGROUNDS `[B]`.
    """
    levels = jnp.stack([background(name, height, width) for name in BACKGROUNDS])[..., None]
    y, x = jnp.mgrid[:height, :width].astype(jnp.float32)

    def frame(things: Placed, behind: jax.Array, t: jax.Array) -> jax.Array:
        pixels = jnp.broadcast_to(levels[behind], (height, width, 3))
        for i in range(things.outline.shape[0]):
            thing = Placed(*(value[i] for value in things))
            distance = functools.partial(jax.lax.switch, thing.outline, outlines(thing.ink))
            covered = coverage(thing, t, x, y, distance)[..., None]
            pixels += covered * (thing.colour[None, None] - pixels)
        return jnp.round(pixels).astype(jnp.uint8)

    frames = jax.vmap(frame, (None, None, 0))
    return jax.vmap(frames, (0, 0, None))(things, behind, jnp.arange(things.radius.shape[-1]))
