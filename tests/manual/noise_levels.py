"""At which noise levels shape, colour and motion are decided in the small model's world: what training has to visit.

    python -m tests.manual.noise_levels --output=benchmarks/cpu/shapes_noise_levels.json

z_i are the latents of N scenes of one thing before black. Noise is put on one of them, and Bayes' rule says how sure
each of its properties still is, with the N as all that there can be:

    p(i | z_j + sigma e) ~ exp(-|z_j + sigma e - z_i|^2 / (2 sigma^2))

A property is decided where the probability of its right value rises from that of a guess to one. "itself" is the
probability of the one scene: where it is near one, the N are too few to say more. Twelve minutes on two cores.
"""

import datetime
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from tqdm import tqdm

from turbojax.files import whole_file
from turbojax.models.vae import WanVAE, encode
from turbojax.shapes import MODEL
from turbojax.shapes.render import render
from turbojax.shapes.scene import Scene, Thing, random_scene
from turbojax.train.autoencoder import as_pixels
from turbojax.weights.encoders import load_vae
from turbojax.weights.files import find_components

OUTPUT = flags.DEFINE_string("output", "outputs/noise_levels.json", "file to write")
SCENES = flags.DEFINE_integer("scenes", 1000, "how many")
SEED = flags.DEFINE_integer("seed", 0, "of scenes and noise")
FRAMES = (33, 1)
LEVELS = np.exp(np.arange(-1.0, 6.01, 0.5))
NOISY = 200  # scenes that noise is put on
PROPERTIES = ("shape", "colour", "motion")


def latents(vae: WanVAE, scenes: list[Scene], num_frames: int) -> np.ndarray:
    """Float32 `[N, features]`."""
    rows = []
    for i, scene in enumerate(tqdm(scenes, desc=f"{num_frames} frames", disable=None)):
        video = render(scene, np.random.default_rng((SEED.value, i)), num_frames=num_frames)
        rows.append(np.asarray(encode(vae, jnp.asarray(as_pixels(video[None])))).ravel())
    return np.stack(rows)


def posteriors(z: np.ndarray, sigma: float, rng: np.random.Generator) -> Iterator[tuple[int, np.ndarray]]:
    """The number of a scene, and the probabilities `[N]` of all scenes given it with noise."""
    products = z @ z.T
    squares = np.diag(products)
    for j in rng.choice(len(z), min(NOISY, len(z)), replace=False):
        noise = rng.standard_normal(z.shape[1], np.float32)
        distances = squares[j] + squares - 2 * products[j] + 2 * sigma * (noise @ z[j] - z @ noise)
        weights = np.exp((distances.min() - distances) / (2 * sigma**2))
        yield j, weights / weights.sum()


def decided(z: np.ndarray, things: list[Thing], sigma: float) -> dict[str, float]:
    """The mean probability of each property's right value."""
    values = {name: np.array([getattr(thing, name) for thing in things]) for name in PROPERTIES}
    found = [
        {name: p[value == value[j]].sum() for name, value in values.items()} | {"itself": p[j]}
        for j, p in posteriors(z, sigma, np.random.default_rng(SEED.value))
    ]
    return {name: round(float(np.mean([one[name] for one in found])), 3) for name in found[0]}


def main(_: list[str]) -> None:
    vae = load_vae(find_components(None, {"vae": MODEL})["vae"], dtype=jnp.float32)
    rng = np.random.default_rng(SEED.value)
    scenes = [Scene(random_scene(rng, two=0).things, "black") for _ in range(SCENES.value)]
    things = [scene.things[0] for scene in scenes]
    result = {}
    for num_frames in FRAMES:
        z = latents(vae, scenes, num_frames)
        rows = [{"log_sigma": round(float(np.log(s)), 2), **decided(z, things, s)} for s in LEVELS]
        result[f"{num_frames} frames of 128 x 128"] = rows
        for row in rows:
            print(num_frames, row, flush=True)
    content = {
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__},
        "date": datetime.date.today().isoformat(),
        "command": "python -m tests.manual.noise_levels",
        "scenes": SCENES.value,
        "seed": SEED.value,
        "result": result,
    }
    with whole_file(Path(OUTPUT.value)) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
