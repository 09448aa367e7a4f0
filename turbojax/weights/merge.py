"""Adds what a fine-tuning learned to another model: base + weight (diff_target - diff_base).

Meant for a distilled (rCM) model as base, the pretrained one as diff_base and that one tuned with SLA as diff_target,
which gives a distilled model with SLA. Tensors go through one at a time.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from turbojax.errors import CheckpointError, UserError
from turbojax.files import user_path
from turbojax.weights.convert import Summary, check_output, write_transformer
from turbojax.weights.lazy import CheckedTensors, K, LazyTensors, specs_of
from turbojax.weights.load import WanCheckpoint, open_wan
from turbojax.weights.mapped import release
from turbojax.weights.rules import TensorKey, describe, shorten
from turbojax.weights.skeleton import wan_skeleton

SLA_SETTINGS = ("attention_type", "num_heads", "sla_topk", "sla_blocks", "sage_values")  # come with the projection


class MergedTensors(LazyTensors[K]):
    """The merged tensors, each computed in float32 when it is asked for.

    A tensor that all three have in one shape is base + weight (diff_target - diff_base), in base's dtype (integers
    truncate); any other that base has is base's; one that only diff_target, or it and diff_base have, is diff_target's;
    one that only diff_base has is dropped. Base's come first.
    """

    def __init__(
        self,
        base: Mapping[K, np.ndarray],
        diff_base: Mapping[K, np.ndarray],
        diff_target: Mapping[K, np.ndarray],
        *,
        weight: float = 1.0,
    ):
        self.base, self.diff_base, self.diff_target, self.weight = base, diff_base, diff_target, weight
        specs = [specs_of(tensors) for tensors in (base, diff_base, diff_target)]
        self.specs = dict(specs[0]) | {key: spec for key, spec in specs[2].items() if key not in specs[0]}
        self.changed = {
            key for key, spec in specs[0].items() if all(key in s and s[key].shape == spec.shape for s in specs)
        }

    def __getitem__(self, key: K) -> np.ndarray:
        if key not in self.changed:
            return (self.base if key in self.base else self.diff_target)[key]
        base, low, high = self.base[key], self.diff_base[key], self.diff_target[key]
        value = high.astype(np.float32)
        value -= low.astype(np.float32)
        value *= np.float32(self.weight)
        value += base.astype(np.float32)
        for tensor in (base, low, high):
            release(tensor)
        return value.astype(base.dtype)


def merge(
    base: str | os.PathLike,
    diff_base: str | os.PathLike,
    diff_target: str | os.PathLike,
    output: str | os.PathLike,
    *,
    weight: float = 1.0,
    quantize: str | None = None,
    dtype: Any = None,
    format: str = "safetensors",
    names: str = "turbodiffusion",
    overwrite: bool = False,
) -> Summary:
    """Merges three transformers, each in any layout that `open_wan` reads, and writes the result as `convert` does.

    weight: how much of the difference is added. dtype: None keeps that of each tensor of base.
    quantize, format, names, overwrite: see `turbojax.weights.convert.convert`.

    Raises UserError for int8 checkpoints and for models of different sizes, CheckpointError for files that do not fit.
    """
    output = user_path(output)
    check_output(output, format=format, names=names, overwrite=overwrite)
    if not np.isfinite(weight):
        raise UserError(f"{weight=} must be a number")
    opened = [open_wan(path) for path in (base, diff_base, diff_target)]
    watched = [CheckedTensors(checkpoint.tensors, checksums=True) for checkpoint in opened]
    parts = [checkpoint._replace(tensors=own) for checkpoint, own in zip(opened, watched, strict=True)]
    checkpoint = merge_checkpoints(*parts, weight=weight)
    summary = write_transformer(checkpoint, output, quantize=quantize, dtype=dtype, format=format, names=names)
    for part, own in zip(parts, watched, strict=True):
        own.warn(part.what)
    return summary


def merge_checkpoints(
    base: WanCheckpoint, diff_base: WanCheckpoint, diff_target: WanCheckpoint, *, weight: float
) -> WanCheckpoint:
    """Describes the merged checkpoint; nothing of it is read yet."""
    for other in (base, diff_base, diff_target):
        if other.config.quant:
            raise UserError(
                f"{other.what} holds int8 weights; merge the unquantized checkpoints and give --quantize for the output"
            )
        if size(other) != size(base):
            raise UserError(
                f"{other.what} is {size(other)} and {base.what} {size(base)}; merge takes models of one size"
            )
    tensors = MergedTensors(base.tensors, diff_base.tensors, diff_target.tensors, weight=weight)
    added = [key for key in tensors if key not in base.tensors]
    kept = [key for key in base.tensors if key not in tensors.changed]
    logging.info("Merging: %d tensors changed, %d kept, %d added", len(tensors.changed), len(kept), len(added))
    if kept:
        logging.warning("Kept as in %s, which alone has them or has another shape: %s", base.what, names_of(kept))
    sla = diff_target if any(".proj_l." in key.target for key in added) else base
    config = dataclasses.replace(
        base.config,
        **{name: getattr(sla.config, name) for name in SLA_SETTINGS},
        dtype=tensors.specs[TensorKey("blocks.ffn.fc1.weight", 0)].dtype,
    )
    if unknown := [key for key in added if key not in wan_skeleton(config).tensor_specs()]:
        raise CheckpointError(f"{diff_target.what} has {names_of(unknown)}, which no model of {base.what}'s kind has")
    stacked = base.stacked or diff_base.stacked or diff_target.stacked
    return WanCheckpoint(config, tensors, f"the merge of {base.what}", stacked)


def size(checkpoint: WanCheckpoint) -> str:
    c = checkpoint.config
    return f"{c.num_layers} layers of width {c.dim} and {c.ffn_dim}"


def names_of(keys: list[TensorKey]) -> str:
    return shorten([describe(key) for key in keys])
