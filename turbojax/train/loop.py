"""A training run, from its settings to the trained network.

A run lives in its folder, `workdir`: checkpoints/, metrics/ (TensorBoard), curves.jsonl, videos/ and, at the end,
transformer.safetensors, of an autoencoder Wan2.1_VAE.safetensors. Started again with the same settings it goes on from
the newest checkpoint, bit for bit as if it had not stopped.
"""

import contextlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm import tqdm

from turbojax import sharding
from turbojax.errors import UserError
from turbojax.files import check_folder, sole_user, user_path, whole_file
from turbojax.models.vae import WanVAE
from turbojax.models.wan import WanConfig
from turbojax.shapes.examples import Batches, examples
from turbojax.train.autoencoder import Autoencoding, latent_statistics, normalized, quality, write_autoencoder
from turbojax.train.checkpoints import (
    Manager,
    any_process,
    check_written,
    open_checkpoints,
    restore_newest,
    save_checkpoint,
)
from turbojax.train.config import check_settings, make_optimizers, make_recipe
from turbojax.train.data import Shards, batches, open_shards
from turbojax.train.metrics import Write, metrics_writer
from turbojax.train.networks import HostParams, open_autoencoder, open_networks, place, to_host
from turbojax.train.recipes import Metrics, Networks, Recipe
from turbojax.train.state import Params, TrainState, in_compute_dtype, initial_state
from turbojax.train.step import Fixed, Optimizer, Step, make_step
from turbojax.train.toy import write_toy_shards
from turbojax.train.videos import MakeVideos, prepare_videos
from turbojax.weights.convert import write_wan
from turbojax.weights.rules import TensorKey
from turbojax.weights.skeleton import Skeleton

VAE = "Wan2.1_VAE.safetensors"
UNSEEN = 64  # videos that an autoencoder's latents are normalized by, and that its quality is told of


class Data(Protocol):
    """Batches of this process, without end, from any position on."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> dict[str, int]: ...

    def set_state(self, state: Mapping[str, int]) -> None: ...


def train(config: ConfigDict) -> Path:
    """Runs a training, from its newest checkpoint if there is one; returns the file with the trained network.

    Raises UserError for settings, data or files that cannot be used, or a folder that another run is using, and
    KeyboardInterrupt after SIGTERM, Ctrl-C or `max_minutes`, when a last checkpoint has been written.
    """
    check_settings(config)
    recipe = make_recipe(config)
    workdir = check_folder(config.workdir)
    alone = sole_user(workdir) if jax.process_index() == 0 else contextlib.nullcontext()
    with alone:
        if isinstance(recipe, Autoencoding):
            return train_autoencoder(config, recipe, workdir)
        return train_transformer(config, recipe, workdir)


def train_transformer(config: ConfigDict, recipe: Recipe, workdir: Path) -> Path:
    """`train` of a video network, on shards of latents and text."""
    mesh = sharding.make_mesh(data=config.data_parallel, fsdp=config.fsdp, sequence=config.sequence)
    shards = open_data(config, workdir)
    student, teacher = open_networks(config)
    for network in (student, teacher):
        if network:
            check_data(shards, network.config)

    networks = Networks.of(student.config, (teacher or student).config)
    optimizers = make_optimizers(config, recipe)
    samples = config.batch_size // (mesh.shape[sharding.DATA] * mesh.shape[sharding.FSDP])  # of a step on a device
    step = make_step(recipe, networks, optimizers, accumulation=config.accumulation or samples or 1, seed=config.seed)
    run = run_kind(config, optimizers) | network_size(student.config)
    network_config = student.config

    with (
        jax.set_mesh(mesh),
        stop_requests(config.max_minutes) as stop,
        open_checkpoints(workdir / "checkpoints", keep=config.keep) as checkpoints,
    ):
        share, shares = sharding.batch_share()
        data = batches(
            shards, batch_size=config.batch_size, seed=config.seed, process_index=share, process_count=shares
        )
        state = begin(checkpoints, student.params, optimizers, data, run=run)
        negative = jax.device_put(shards.negative(), NamedSharding(mesh, PartitionSpec()))
        fixed = Fixed(place(teacher.params, networks.teacher.specs) if teacher else {}, negative)
        del student, teacher  # the host's copies
        make_videos = (
            prepare_videos(config, shards, networks.student, workdir / "videos") if config.sample_every else None
        )
        state = run_steps(config, step, state, fixed, data, checkpoints, stop, run=run, make_videos=make_videos)
        return export(workdir / "transformer.safetensors", network_config, state.ema)


def train_autoencoder(config: ConfigDict, recipe: Autoencoding, workdir: Path) -> Path:
    """`train` of an autoencoder, on videos that are drawn as it goes."""
    mesh = sharding.make_mesh(data=config.data_parallel, fsdp=config.fsdp, sequence=config.sequence)
    skeleton, params = open_autoencoder(config)
    optimizers = make_optimizers(config, recipe)
    networks = Networks(skeleton, skeleton, skeleton)
    step = make_step(recipe, networks, optimizers, accumulation=config.accumulation or 1, seed=config.seed)
    size = {"num_frames": config.num_frames, "height": config.height, "width": config.width}
    drawn = size | {"seed": config.seed, "workers": config.workers}
    run = run_kind(config, optimizers) | {"parameters": sum(v.size for v in params.values())}
    with (
        jax.set_mesh(mesh),
        stop_requests(config.max_minutes) as stop,
        open_checkpoints(workdir / "checkpoints", keep=config.keep) as checkpoints,
        contextlib.closing(
            Batches(batch_size=config.batch_size, share=sharding.batch_share(), crops=config.crops, **drawn)
        ) as data,
    ):
        state = begin(checkpoints, params, optimizers, data, run=run)
        nothing = jax.device_put(np.zeros(0, np.float32), NamedSharding(mesh, PartitionSpec()))
        state = run_steps(config, step, state, Fixed({}, nothing), data, checkpoints, stop, run=run)
        trained = to_host(state.ema)
    unseen = examples(range(2**30, 2**30 + UNSEEN), **drawn | {"workers": 0})
    return export_autoencoder(workdir, skeleton, trained, [one.video for one in unseen])


def export_autoencoder(
    workdir: Path, skeleton: Skeleton, params: Mapping[str, np.ndarray], videos: list[np.ndarray]
) -> Path:
    """Normalizes the latents by what they are for these videos and writes checkpoint and quality."""

    def module(params: Mapping[str, np.ndarray]) -> WanVAE:
        return skeleton.fill(in_compute_dtype(skeleton, {name: jnp.asarray(value) for name, value in params.items()}))

    trained = module(params)
    final = normalized(params, *latent_statistics(trained, videos), trained.config)
    found = quality(module(final), videos)
    path = workdir / VAE
    if jax.process_index() == 0:
        write_autoencoder(path, skeleton, final)
        with whole_file(workdir / "quality.json") as temporary:
            temporary.write_text(json.dumps(found._asdict(), indent=1) + "\n")
        logging.info("Wrote the average of the weights to %s; reconstructions have %.1f dB", path, found.psnr)
    return path


def run_kind(config: ConfigDict, optimizers: Mapping[str, Optimizer]) -> dict[str, Any]:
    """What a run must have in common with the one it goes on from, besides the network."""
    return {"recipe": config.recipe, "learners": sorted(optimizers), "optimizer": config.optimizer}


def begin(
    checkpoints: Manager, params: HostParams, optimizers: Mapping[str, Optimizer], data: Data, *, run: Mapping[str, Any]
) -> TrainState:
    """The newest checkpoint's state, with the data where it was then; without one, the state before the first step.

    run: what kind of run this is, as `restore_newest` compares it.
    """

    def initial(params: Params) -> TrainState:
        return initial_state(params, **{name: own.transform for name, own in optimizers.items()})

    like = with_shardings(jax.eval_shape(initial, params))
    if restored := restore_newest(checkpoints, like, run=run):
        state, position = restored
        data.set_state(position)
        return state
    return jax.jit(initial, out_shardings=jax.tree.map(lambda spec: spec.sharding, like))(
        place(params, like.student.params)
    )


def run_steps(
    config: ConfigDict,
    step: Step,
    state: TrainState,
    fixed: Fixed,
    data: Data,
    checkpoints: Manager,
    stop: threading.Event,
    *,
    run: Mapping[str, Any],
    make_videos: MakeVideos | None = None,
) -> TrainState:
    """The steps that are left, with metrics, checkpoints and sample videos on the way; the state that goes in is used
    up.

    Raises KeyboardInterrupt where it was asked to stop, when a last checkpoint has been written.
    """
    start, workdir = int(state.step), user_path(config.workdir)
    with metrics_writer(workdir, start) as write, progress(start, config.num_steps) as bar:
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
    return state


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
def stop_requests(max_minutes: float = 0.0) -> Iterator[threading.Event]:
    """An event that Ctrl-C, SIGTERM and SIGHUP set, so that the step in hand is finished and saved.

    The next signal stops at once. max_minutes: it sets itself after that long; 0 for never.
    """
    stop = threading.Event()

    def request(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        logging.info("Stopping after this step, with a checkpoint; once more stops at once")
        stop.set()

    with contextlib.ExitStack() as undo:
        if max_minutes:
            timer = threading.Timer(60 * max_minutes, stop.set)
            undo.callback(timer.cancel)
            timer.daemon = True
            timer.start()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                    undo.callback(signal.signal, number, signal.signal(number, request))
        yield stop


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

    def piece(entry: TensorKey) -> np.ndarray:
        return whole[entry.target] if entry.layer is None else whole[entry.target][entry.layer]

    if jax.process_index() == 0:
        write_wan(path, config, piece, dtype=config.dtype)
        logging.info("Wrote the average of the weights to %s", path)
    return path
