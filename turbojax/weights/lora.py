"""LoRA files: what they add to a transformer's parameters, merged while it loads.

    W' = W + strength * (alpha / rank) * up down

Read are the diffusers naming (`transformer.blocks.0.attn1.to_q.lora_A.weight`), the original one
(`diffusion_model.blocks.0.self_attn.q.lora_down.weight`, `.alpha`, and the full differences `.diff`, `.diff_b`,
`.diff_m` of weights, biases and modulation) and kohya's (`lora_unet_blocks_0_self_attn_q.lora_down.weight`), see
`turbojax.weights.lora_files`.
"""

import dataclasses
import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from absl import logging
from jax import lax

from turbojax.errors import CheckpointError, UserError, quoted
from turbojax.files import user_path
from turbojax.models.sizes import size_of
from turbojax.models.wan import WanConfig
from turbojax.weights.io import read_tensors
from turbojax.weights.lazy import all_zero, warn_of_zeros
from turbojax.weights.lora_files import Change, LowRank, changes_of
from turbojax.weights.rules import TensorKey, describe, shorten

Expert = Literal["high", "low"]
Changes = dict[TensorKey, list[Change]]

MOST_STRENGTH = 100.0
_SECOND = "transformer_2."  # diffusers' name of the low-noise expert


@dataclasses.dataclass(frozen=True)
class LoRA:
    """A file and how strongly it counts; expert: the one of two networks that it is for, None for both.

    Raises UserError for a strength that is no number up to MOST_STRENGTH, negative ones included.
    """

    path: str | Path
    strength: float = 1.0
    expert: Expert | None = None

    def __post_init__(self):
        if not (isinstance(self.strength, numbers.Real) and abs(self.strength) <= MOST_STRENGTH):
            raise UserError(
                f"lora_strength={quoted(self.strength)} must be a number from -{MOST_STRENGTH:g} to {MOST_STRENGTH:g}"
            )


def apply_changes(value: Any, changes: Sequence[Change]) -> jax.Array:
    """Adds the changes to a parameter, in float32."""
    value = jnp.asarray(value, jnp.float32)
    for change in changes:
        if isinstance(change, LowRank):
            value = add_product(value, jnp.asarray(change.up), jnp.asarray(change.down), change.scale)
        else:
            value = value + change.scale * jnp.asarray(change.value, jnp.float32)
    return value


@jax.jit
def add_product(weight: jax.Array, up: jax.Array, down: jax.Array, scale: float) -> jax.Array:
    product = jnp.matmul(up.astype(jnp.float32), down.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return weight + scale * product


def read_loras(loras: Sequence[LoRA], config: WanConfig, *, expert: Expert | None = None) -> Changes:
    """Reads what the files change in this network, an expert of two or the only one.

    Raises CheckpointError for a file that is damaged, of another network, or of a kind that cannot be merged; warns of
    tensors that have no place.
    """
    changes: Changes = {}
    for lora in loras:
        if lora.expert in (None, expert):
            for key, change in read_lora(lora, config, expert=expert).items():
                changes.setdefault(key, []).append(change)
    return changes


def read_lora(lora: LoRA, config: WanConfig, *, expert: Expert | None = None) -> dict[TensorKey, Change]:
    """Reads one file, see `read_loras`, without changes by zero, for which int8 layers would be quantized again."""
    path = user_path(lora.path)
    stored = read_tensors(path)
    second = {name for name in stored if name.startswith(_SECOND)}
    tensors = {n: value for n, value in stored.items() if not second or (n in second) == (expert == "low")}
    network = "transformer_2" if second and expert == "low" else "transformer"
    changes, others = changes_of(path, tensors, config, strength=lora.strength, network=network)
    if not changes:
        names = shorten(sorted(tensors)) or "nothing for it"
        raise CheckpointError(f"{path.name} is no LoRA of this network: it holds {names}; see turbojax/weights/lora.py")
    if left_out := sorted(others) + (sorted(second) if expert is None else []):
        logging.warning("%s: %d parts fit nowhere and are left out: %s", path.name, len(left_out), shorten(left_out))
    changing = {key: change for key, change in changes.items() if not change.changes_nothing()}
    # Training begins with up at zero and down drawn, so up may have stayed there.
    downs = {f"down of {describe(key)}": c.down for key, c in changes.items() if isinstance(c, LowRank)}
    zeros = {name: down for name, down in downs.items() if all_zero(down)}
    share = sum(map(size_of, zeros.values())) / sum(map(size_of, tensors.values()))
    warn_of_zeros(path.name, list(zeros), tensors=len(tensors), share=share)
    logging.info("LoRA %s: %d parameters changed, strength %g", path.name, len(changing), lora.strength)
    return changing
