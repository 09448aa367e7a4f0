"""A training run, from its settings to the trained network.

A run lives in its folder, `workdir`: checkpoints/, metrics/ (TensorBoard), curves.jsonl, videos/ and, at the end,
transformer.safetensors, of an autoencoder Wan2.1_VAE.safetensors. Started again with the same settings it goes on from
the newest checkpoint, bit for bit as if it had not stopped.
"""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm import tqdm

from turbojax import sharding
from turbojax.files import check_folder, sole_user, user_path
from turbojax.train import checkpoints
from turbojax.train.config import check_settings, make_optimizers
from turbojax.train.metrics import Write, metrics_writer
from turbojax.train.networks import HostParams, place, to_host
from turbojax.train.recipes import Metrics
from turbojax.train.registry import PUBLISHED, Data, Registry
from turbojax.train.runs import open_autoencoder_run, open_transformer_run
from turbojax.train.state import Params, TrainState, initial_state
from turbojax.train.step import Frozen, Optimizer, Step, make_step
from turbojax.train.videos import MakeVideos


def train(config: ConfigDict, registry: Registry = PUBLISHED) -> Path:
    """Runs a training, from its newest checkpoint if there is one; returns the file with the trained network.

    registry: the networks and drawn videos that settings can name.

    Raises UserError for settings, data or files that cannot be used, or a folder that another run is using, and
    KeyboardInterrupt after SIGTERM, Ctrl-C or `max_minutes`, when a last checkpoint has been written.
    """
    check_settings(config, drawn=registry.drawn)
    workdir = check_folder(config.workdir)
    alone = sole_user(workdir) if jax.process_index() == 0 else contextlib.nullcontext()
    with alone:
        mesh = sharding.make_mesh(data=config.data_parallel, fsdp=config.fsdp, sequence=config.sequence)
        open_run = open_autoencoder_run if config.recipe == "vae" else open_transformer_run
        run = open_run(config, registry, workdir, mesh)
        optimizers = make_optimizers(config, run.recipe)
        accumulation = config.accumulation or run.accumulation
        step = make_step(run.recipe, optimizers, accumulation=accumulation, seed=config.seed)
        # What a run must have in common with the one it goes on from.
        own = {"recipe": config.recipe, "learners": sorted(optimizers), "optimizer": config.optimizer}
        signature = own | run.signature
        with (
            jax.set_mesh(mesh),
            stop_requests(config.max_minutes) as stop,
            checkpoints.open_checkpoints(workdir / "checkpoints", keep=config.keep) as manager,
            run.data() as data,
        ):
            state = restore_or_init(manager, run.params, optimizers, data, signature=signature)
            negative = None
            if run.negative is not None:
                negative = jax.device_put(run.negative, NamedSharding(mesh, PartitionSpec()))
            frozen = Frozen(place(run.teacher, run.teacher), negative)
            run = dataclasses.replace(run, params={}, teacher={})  # frees the host's copies
            make_videos = run.prepare_videos() if run.prepare_videos else None
            how: dict[str, Any] = dict(signature=signature, make_videos=make_videos)
            state = run_steps(config, step, state, frozen, data, manager, stop, **how)
            trained = to_host(state.ema)
        return run.export(trained)


def restore_or_init(
    manager: checkpoints.Manager,
    params: HostParams,
    optimizers: Mapping[str, Optimizer],
    data: Data,
    *,
    signature: Mapping[str, Any],
) -> TrainState:
    """Restores the newest checkpoint, with the data where it was then; without one, makes the state of step 0.

    signature: what kind of run this is, as `restore_newest` compares it.
    """

    def initial(params: Params) -> TrainState:
        return initial_state(params, **{name: own.transform for name, own in optimizers.items()})

    shapes = jax.eval_shape(initial, params)
    shardings = sharding.state_shardings(shapes)
    place_of = lambda spec, where: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=where)  # noqa: E731
    like = jax.tree.map(place_of, shapes, shardings)
    if restored := checkpoints.restore_newest(manager, like, run=signature):
        state, position = restored
        data.set_state(position)
        return state
    return jax.jit(initial, out_shardings=shardings)(place(params, like.student.params))


def run_steps(
    config: ConfigDict,
    step: Step,
    state: TrainState,
    frozen: Frozen,
    data: Data,
    manager: checkpoints.Manager,
    stop: threading.Event,
    *,
    signature: Mapping[str, Any],
    make_videos: MakeVideos | None = None,
) -> TrainState:
    """Takes the steps that are left, with metrics, checkpoints and sample videos; the state that goes in is used up.

    Raises KeyboardInterrupt where it was asked to stop, when a last checkpoint has been written.
    """
    start, workdir = int(state.step), user_path(config.workdir)
    look: dict[str, Any] = dict(unit="step", desc="Training", disable=None, smoothing=0.05)  # None: in a terminal alone
    with metrics_writer(workdir, start) as write, tqdm(initial=start, total=config.num_steps, **look) as bar:
        recent: list[Metrics] = []
        for i in range(start, config.num_steps):
            state, metrics = step(i, state, frozen, sharding.put_batch(next(data)))
            recent.append(metrics)
            done, stopping = i + 1, checkpoints.any_process(stop.is_set())
            bar.update()
            if done % config.log_every == 0 or done == config.num_steps:
                checkpoints.check_written(manager)
                report(bar, write, done, recent)
                recent.clear()
            if done % config.checkpoint_every == 0 or done == config.num_steps or stopping:
                checkpoints.save_checkpoint(manager, state, position=data.get_state(), run=signature)
            if stopping:
                checkpoints.check_written(manager, wait=True)
                logging.info("Stopped after step %d; the same command goes on from there", done)
                raise KeyboardInterrupt
            if make_videos and done % config.sample_every == 0:
                make_videos(done, state.ema)
    checkpoints.check_written(manager, wait=True)
    return state


@contextlib.contextmanager
def stop_requests(max_minutes: float = 0.0) -> Iterator[threading.Event]:
    """Yields an event that Ctrl-C, SIGTERM and SIGHUP set, so that the step in hand is finished and saved.

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


def report(bar: tqdm, write: Write, step: int, recent: Sequence[Metrics]) -> None:
    """Writes the means of the last steps' metrics; a step has those of the network that learned in it."""
    names = sorted({name for metrics in recent for name in metrics})
    means = {name: float(np.mean([metrics[name] for metrics in recent if name in metrics])) for name in names}
    write(step, means)
    shown = {name: f"{value:.4g}" for name, value in means.items()}
    bar.set_postfix(shown)
    if bar.disable:
        logging.info("Step %d: %s", step, ", ".join(f"{name} {value}" for name, value in shown.items()))
