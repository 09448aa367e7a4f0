"""A sampler of one's own: a frozen dataclass with its times and one step; the rest has defaults.

    python examples/own_sampler.py

This one is between rCM's deterministic and its stochastic form. With x0 = x - t v and eps = x + (1 - t) v,

    x <- (1 - t') x0 + t' (sqrt(1 - fresh^2) eps + fresh eps'),    eps' drawn in every step
"""

import dataclasses

import jax
import jax.numpy as jnp

from turbojax import TurboVideoPipeline
from turbojax.diffusion import Sampler
from turbojax.diffusion.samplers import normal
from turbojax.diffusion.schedules import rcm_times
from turbojax.shapes import MODEL


@dataclasses.dataclass(frozen=True)
class PartlyFresh(Sampler):
    fresh: float = 0.5
    num_steps: int = 4
    sigma_max: float = 1600.0

    @property
    def times(self):
        return rcm_times(self.num_steps, self.sigma_max)

    def step_noise(self, state, steps, key, noise):
        return (jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(steps.start, steps.stop)),)

    def advance(self, carry, per_step, v):
        (x,), (t, t_next, key) = carry, per_step
        x0, eps = x - t * v, x + (1 - t) * v
        eps = (1 - self.fresh**2) ** 0.5 * eps + self.fresh * normal(key, x.shape)
        return ((1 - t_next) * x0 + t_next * eps,)


def main(folder: str = "outputs/examples", **size: int) -> None:
    size = {"height": 128, "width": 128, "num_frames": 33} | size
    pipe = TurboVideoPipeline.from_pretrained(MODEL, dtype=jnp.float32)
    for fresh in (0.0, 0.5, 1.0):
        output = f"{folder}/fresh_{fresh}.mp4"
        sampler = PartlyFresh(fresh)
        result = pipe("a red star moving up right on a white background", sampler=sampler, output=output, **size)
        print(sampler, result.files[0], f"{result.timings['diffusion']:.2f} s")


if __name__ == "__main__":
    main()
