"""A tiny network and a tiny set of data that it learns in a minute on a CPU: for tests and for a first try.

Each of a few prompts (random text embeddings) stands for a pattern of latents, which its samples have with random
strength: what there is to learn is which pattern belongs to which prompt, and how strong it comes.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from turbojax.models.wan import WanConfig
from turbojax.train.data import DTYPES, Index, Sample, write_index, write_negative, write_shard

LATENTS = (2, 8, 8, 16)
TEXT_DIM = 64  # that of the demo's text encoder


def toy_config(**changes) -> WanConfig:
    """Returns two layers of width 64."""
    sizes = dict(dim=64, ffn_dim=128, num_heads=2, num_layers=2, freq_dim=64, text_dim=TEXT_DIM)
    return WanConfig(**(sizes | changes))


def smooth_in_time(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Damps the fast part of the time embedding in a random network's parameters.

    Its results then change with time about as smoothly as a trained network's: consistency needs their derivative.
    """
    name = "time_embedding.fc1.weight"
    half = params[name].shape[1] // 2
    frequencies = 10000.0 ** (-np.arange(half) / half)
    damping = np.tile(1 / (1 + (100 * frequencies) ** 2), 2).astype(np.float32)
    return {**params, name: 2 * damping * params[name]}


def write_toy_shards(folder: Path, *, prompts: int = 4, samples: int = 256, seed: int = 0) -> Path:
    """Writes the data as a folder of one shard; returns it."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES["float32"]
    t, h, w, c = LATENTS
    texts = rng.standard_normal((prompts + 1, 4, TEXT_DIM)).astype(dtype)
    patterns = rng.standard_normal((prompts, 1, 2, 2, c)).repeat(t, 1).repeat(h // 2, 2).repeat(w // 2, 3)
    index = Index(
        latents=LATENTS,
        text_dim=TEXT_DIM,
        dtype="float32",
        num_frames=1 + 4 * (t - 1),
        height=8 * h,
        width=8 * w,
        fps=16,
        shard_size=samples,
        vae="none: generated latents",
        text_encoder="none: generated embeddings",
        negative_prompt="negative",
    )
    drawn = zip(rng.integers(prompts, size=samples), rng.uniform(0.5, 1.5, samples), strict=True)
    rows = [
        Sample((strength * patterns[i]).astype(dtype), texts[i], f"toy {number}", f"pattern {i}")
        for number, (i, strength) in enumerate(drawn)
    ]
    write_shard(folder / "shard-00000.safetensors", index, rows)
    write_negative(folder, texts[-1])
    write_index(folder, index, {"shard-00000.safetensors": samples})
    return folder
