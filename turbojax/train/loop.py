"""A training run from its settings to the trained network; `train` reads top to bottom.

A run lives in its folder, `workdir`: checkpoints/, metrics/ (TensorBoard), videos/ and, at the end, transformer.safetensors.
Started again with the same settings it goes on from the newest checkpoint, bit for bit as if it had not stopped.
"""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from turbojax import sharding
from turbojax.errors import UserError
from turbojax.models.wan import WanConfig
from turbojax.train import videos
from turbojax.train.checkpoints import check_written, open_checkpoints, restore_newest, save_checkpoint
from turbojax.train.config import check_settings, make_optimizer, make_recipe
from turbojax.train.data import Shards, batches, open_shards
from turbojax.train.networks import Source, open_networks, place, to_host
from turbojax.train.state import Params, Trained, TrainState, initial_state
from turbojax.train.step import Fixed, Metrics, Networks, Recipe, make_step
from turbojax.train.toy import write_toy_shards
from turbojax.video import make_folder
from turbojax.weights.convert import write_wan


def train(config: ConfigDict) -> Path:
    """Runs a training, from its newest checkpoint if there is one; returns the file with the trained network.

    Raises UserError for settings, data or files that cannot be used, and KeyboardInterrupt after a SIGTERM or Ctrl-C, once
    a last checkpoint is written.
    """
    check_settings(config)
    recipe = make_recipe(config)
    mesh = sharding.make_mesh(data=config.data_parallel, fsdp=config.fsdp, sequence=config.sequence)
    with jax.set_mesh(mesh):
        return run(config, recipe)
