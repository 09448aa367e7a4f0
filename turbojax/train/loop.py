"""A training run, from its settings to the trained network.

A run lives in its folder, `workdir`: checkpoints/, metrics/ (TensorBoard), videos/ and, at the end,
transformer.safetensors. Started again with the same settings it goes on from the newest checkpoint, bit for bit as if
it had not stopped.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm import tqdm

from turbojax import sharding
from turbojax.errors import UserError
from turbojax.models.wan import WanConfig
from turbojax.train.checkpoints import check_written, open_checkpoints, restore_newest, save_checkpoint
from turbojax.train.config import check_settings, make_optimizers, make_recipe
from turbojax.train.data import Shards, batches, open_shards
from turbojax.train.networks import open_networks, place, to_host
from turbojax.train.recipes import Metrics, Networks
from turbojax.train.state import Params, TrainState, initial_state
from turbojax.train.step import Fixed, make_step
from turbojax.train.toy import write_toy_shards
from turbojax.train.videos import prepare_videos
from turbojax.video import make_parent
from turbojax.weights.convert import write_wan
from turbojax.weights.rules import Entry


def train(config: ConfigDict) -> Path:
    """Runs a training, from its newest checkpoint if there is one; returns the file with the trained network.

    Raises UserError for settings, data or files that cannot be used, and KeyboardInterrupt after SIGTERM or Ctrl-C,
    when a last checkpoint has been written.
    """
    check_settings(config)
    recipe = make_recipe(config)
    workdir = Path(config.workdir).expanduser()
    make_parent(workdir / "checkpoints")
    mesh = sharding.make_mesh(data=config.data_parallel, fsdp=config.fsdp, sequence=config.sequence)
    shards = open_data(config, workdir)
    student, teacher = open_networks(config)
    check_data(shards, student.config)

    networks = Networks.of(student.config, (teacher or student).config)
    optimizers = make_optimizers(config, recipe)
    samples = config.batch_size // (mesh.shape[sharding.DATA] * mesh.shape[sharding.FSDP])  # of a step on a device
    step = make_step(recipe, networks, optimizers, accumulation=config.accumulation or samples or 1, seed=config.seed)
    run = {"recipe": config.recipe, "learners": sorted(optimizers), **network_size(student.config)}
    network_config = student.config

    with (
        jax.set_mesh(mesh),
        stop_requests() as stop,
        open_checkpoints(workdir / "checkpoints", keep=config.keep) as checkpoints,
    ):
        share, shares = sharding.batch_share()
        data = batches(
            shards, batch_size=config.batch_size, seed=config.seed, process_index=share, process_count=shares
        )

        def begin(params: Params) -> TrainState:
            return initial_state(params, **{name: own.transform for name, own in optimizers.items()})

        like = with_shardings(jax.eval_shape(begin, student.params))
        if restored := restore_newest(checkpoints, like, run=run):
            state, position = restored
            data.set_state(position)
        else:
            params = place(student.params, like.student.params)
            state = jax.jit(begin, out_shardings=jax.tree.map(lambda spec: spec.sharding, like))(params)
            del params
        negative = jax.device_put(shards.negative(), NamedSharding(mesh, PartitionSpec()))
        fixed = Fixed(place(teacher.params, networks.teacher.specs) if teacher else {}, negative)
        del student, teacher  # the host's copies
        make_videos = (
            prepare_videos(config, shards, networks.student, workdir / "videos") if config.sample_every else None
        )

        start = int(state.step)
        with metrics_writer(workdir / "metrics", start) as write, progress(start, config.num_steps) as bar:
            recent: list[Metrics] = []
            for i in range(start, config.num_steps):
                state, metrics = step(i, state, fixed, sharding.put_batch(next(data)))
                recent.append(metrics)
                done, stopping = i + 1, any_process(stop.is_set())
                bar.update()
                if done % config.log_every == 0 or done == config.num_steps:
                    check_written(checkpoints)
                    report(bar, write, done, recent)
                    recent.clear()
                if done % config.checkpoint_every == 0 or done == config.num_steps or stopping:
                    save_checkpoint(checkpoints, state, position=data.get_state(), run=run)
                if stopping:
                    check_written(checkpoints, wait=True)
                    logging.info("Stopped after step %d; the same command goes on from there", done)
                    raise KeyboardInterrupt
                if make_videos and done % config.sample_every == 0:
                    make_videos(done, state.ema)
        check_written(checkpoints, wait=True)
        return export(workdir / "transformer.safetensors", network_config, state.ema)


def open_data(config: ConfigDict, workdir: Path) -> Shards:
    return open_shards(write_toy_shards(workdir / "toy_data") if config.data == "toy" else config.data)


def check_data(shards: Shards, config: WanConfig) -> None:
    """Raises UserError where data and network do not belong together."""
    channels, text_dim = shards.index.latents[-1], shards.index.text_dim
    if channels != config.in_channels:
        raise UserError(
            f"{shards.folder} holds latents of {channels} channels and the network takes {config.in_channels}; "
            "take a text-to-video network and the VAE that belongs to it"
        )
    if text_dim != config.text_dim:
        raise UserError(
            f"{shards.folder} holds text of width {text_dim} and the network takes {config.text_dim}; "
            "make the data with the network's text encoder"
        )


def network_size(config: WanConfig) -> dict[str, str | int | None]:
    """What two runs must have in common for one to take the other's checkpoints."""
    names = ("dim", "ffn_dim", "num_heads", "num_layers", "in_channels", "text_dim", "clip_dim", "attention_type")
    return {name: getattr(config, name) for name in names}


def with_shardings(state: TrainState) -> TrainState:
    """Shapes with where each array belongs on the mesh in force."""
    place = lambda spec, where: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=where)  # noqa: E731
    return jax.tree.map(place, state, sharding.state_shardings(state))


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set, so that the step in hand is finished and saved; the next stops at once."""
    stop = threading.Event()

    def request(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        logging.info("Stopping after this step, with a checkpoint; once more stops at once")
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process: all stop at the same step."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(flag)).any())


Write = Callable[[int, Mapping[str, float]], None]


@contextlib.contextmanager
def metrics_writer(folder: Path, start: int) -> Iterator[Write]:
    """write(step, metrics) for TensorBoard; what a run that was killed wrote past `start` no longer counts."""
    if jax.process_index() > 0:
        yield lambda step, metrics: None
        return
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError("metrics need tensorboardX; pip install 'turbojax[train]'") from error
    with SummaryWriter(str(folder), purge_step=start + 1) as writer:

        def write(step: int, metrics: Mapping[str, float]) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)

        yield write


def progress(start: int, num_steps: int) -> tqdm:
    """A bar with loss and steps a second, where someone is watching."""
    return tqdm(initial=start, total=num_steps, unit="step", desc="Training", disable=None, smoothing=0.05)


def report(bar: tqdm, write: Write, step: int, recent: Sequence[Metrics]) -> None:
    """Writes the means of the last steps' metrics; a step has those of the network that learned in it."""
    names = sorted({name for metrics in recent for name in metrics})
    means = {name: float(np.mean([metrics[name] for metrics in recent if name in metrics])) for name in names}
    write(step, means)
    shown = {name: f"{value:.4g}" for name, value in means.items()}
    bar.set_postfix(shown)
    if bar.disable:
        logging.info("Step %d: %s", step, ", ".join(f"{name} {value}" for name, value in shown.items()))


def export(path: Path, config: WanConfig, params: Params) -> Path:
    """Writes a network as a checkpoint in the official names, which `scripts/generate.py` takes."""
    whole = to_host(params)

    def piece(entry: Entry) -> np.ndarray:
        return whole[entry.target] if entry.layer is None else whole[entry.target][entry.layer]

    if jax.process_index() == 0:
        write_wan(path, config, piece, dtype=config.dtype)
        logging.info("Wrote the average of the weights to %s", path)
    return path
