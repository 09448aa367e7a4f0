"""Training data of the world of shapes: drawn videos through the autoencoder, captions through the text encoder.

Written as `scripts/make_shards.py` does it for videos in files, but whole batches at a time.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

from turbojax.errors import UserError
from turbojax.files import sole_user
from turbojax.models.vae import WanVAE, encode
from turbojax.pipeline.text import TextEncoder
from turbojax.shapes.examples import Sketch, sketches
from turbojax.shapes.render_jax import draw_many, stack
from turbojax.shapes.scene import BACKGROUNDS
from turbojax.shapes.text import LENGTH
from turbojax.train.autoencoder import as_pixels
from turbojax.train.data import DTYPES, Index, Sample, write_index, write_negative, write_shard
from turbojax.train.make_shards import check_folder, embed, finished

FRAMES = 1024  # that are encoded at once


def write_shapes_shards(
    folder: Path,
    vae: WanVAE,
    text: TextEncoder,
    index: Index,
    *,
    count: int,
    seed: int,
    workers: int,
    stop: threading.Event | None = None,
) -> Path:
    """Writes the first `count` examples of a seed as shards, those that are not there yet; returns the folder.

    workers: as `turbojax.shapes.examples.sketches` takes it. Raises UserError for a folder of other data, and
    KeyboardInterrupt after a shard where `stop` is set.
    """
    if count < 1 or count % index.shard_size:
        raise UserError(f"{count=} must be a multiple of {index.shard_size}, the samples of a shard")
    with sole_user(folder):
        check_folder(folder, index)
        write_negative(folder, embed(text, [index.negative_prompt], index, length=LENGTH)[0])
        names = {f"shard-{i:05}.safetensors": i for i in range(count // index.shard_size)}
        plans = {name: plan(index, seed, i) for name, i in names.items()}
        there = [name for name in names if finished(folder / name, index, plans[name])]
        missing = [name for name in names if name not in there]
        numbers = (names[name] * index.shard_size + i for name in missing for i in range(index.shard_size))
        size = {"num_frames": index.num_frames, "height": index.height, "width": index.width}
        made = sketches(numbers, seed=seed, workers=workers, **size)
        write_index(folder, index, dict.fromkeys(there, index.shard_size))
        with tqdm(
            total=count, initial=len(there) * index.shard_size, unit="video", desc="Encoding", disable=None
        ) as bar:
            for name in missing:
                if stop and stop.is_set():
                    made.close()
                    logging.info("Stopped after %d of %d videos; the same command goes on from there", bar.n, count)
                    raise KeyboardInterrupt
                own = [next(made) for _ in range(index.shard_size)]
                write_shard(folder / name, index, list(encoded(own, names[name], vae, text, index)), plan=plans[name])
                there.append(name)
                write_index(folder, index, {name: index.shard_size for name in sorted(there)})
                bar.update(index.shard_size)
    return folder


def plan(index: Index, seed: int, shard: int) -> str:
    """Tells whether a shard is of this seed, these networks and this size."""
    return hashlib.sha256(json.dumps([str(index), seed, shard]).encode()).hexdigest()


def encoded(own: list[Sketch], shard: int, vae: WanVAE, text: TextEncoder, index: Index) -> Iterator[Sample]:
    captions = [one.caption for one in own]
    latents = []
    batch = max(1, FRAMES // index.num_frames)
    for begin in range(0, len(own), batch):
        part = own[begin : begin + batch]
        behind = jnp.array([BACKGROUNDS.index(one.scene.background) for one in part])
        videos = draw_many(stack([one.things for one in part]), behind, height=index.height, width=index.width)
        latents.append(encode(vae, as_pixels(videos), chunk=videos.shape[1]))
    rows = embed(text, captions, index, length=LENGTH)
    for i, (z, row) in enumerate(zip(np.concatenate(jax.device_get(latents)), rows, strict=True)):
        number = shard * index.shard_size + i
        yield Sample(z.astype(DTYPES[index.dtype]), row, f"shapes {number}", captions[i])
