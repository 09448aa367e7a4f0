"""Whole runs on a tiny network: killed and resumed, gone on with, refused, and what they leave behind."""

import dataclasses
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.app.test_generate import run_all
from tests.train.test_metrics import scalars
from turbojax.errors import CheckpointError, UserError
from turbojax.files import sole_user
from turbojax.models.wan import WanConfig
from turbojax.shapes import MODEL
from turbojax.train.config import TRAIN_SETTINGS, train_config
from turbojax.train.data import open_shards
from turbojax.train.loop import train
from turbojax.train.networks import open_networks, to_host
from turbojax.train.recipes import Networks
from turbojax.train.registry import PUBLISHED
from turbojax.train.runs import check_data, export
from turbojax.train.state import parameters
from turbojax.train.toy import toy_config, write_toy_shards
from turbojax.train.videos import prepare_videos
from turbojax.weights.load import load_wan
from turbojax.weights.options import NetworkOptions
from turbojax.weights.random import random_module
from turbojax.weights.skeleton import wan_skeleton

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "scripts" / "train.py")
TOY = f"--config={ROOT / 'configs' / 'train_toy.py'}"
STEPS, EVERY = 24, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_toy_shards(tmp_path_factory.mktemp("data"), samples=32)


def saved(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(workdir / "checkpoints" / str(step) / "state")
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def steps_of(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def start(workdir: Path, data: Path, *before: str) -> subprocess.Popen:
    """Starts a run, or goes on with it, in a process of its own; programs are compiled once for all of them.

    before: what the interpreter is given before the script.
    """
    settings = {"num_steps": STEPS, "batch_size": 4, "log_every": 1, "checkpoint_every": EVERY, "keep": STEPS}
    overrides = [f"--config.{name}={value}" for name, value in (settings | {"workdir": workdir, "data": data}).items()]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "True",
        "JAX_COMPILATION_CACHE_DIR": str(data / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, *before, TRAIN, TOY, *overrides]
    return subprocess.Popen(command, env=environment, cwd=workdir.parent, stderr=subprocess.PIPE, text=True)


def signalled(workdir: Path, data: Path, number: int, step: int) -> tuple[int, str]:
    """Exit status and messages of a run that gets a signal where it reports a step."""
    run = start(workdir, data, "-m", "tests.train.signalled", str(int(number)), str(step))
    _, said = run.communicate()
    return run.returncode, said


def killed_in_a_save(workdir: Path, data: Path) -> Path:
    """Kills a run that is in the middle of writing a checkpoint; what is half written.

    It is stopped first, to see that this save is not over; if it is, the next one is awaited.
    """
    run = start(workdir, data)
    assert run.stderr
    assert any("Resuming from step" in line for line in run.stderr)  # what an earlier kill left half written is gone
    while True:
        assert run.poll() is None, "the run ended before it was caught in a save"
        for half in (workdir / "checkpoints").glob("*-tmp"):
            run.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, run.pid, os.WSTOPPED)
            if half.exists():
                run.kill()
                run.communicate()
                return half
            run.send_signal(signal.SIGCONT)
        time.sleep(0.001)


@pytest.mark.slow
def test_killed_and_resumed(tmp_path, data):
    """SIGTERM and SIGKILL at random steps and SIGKILL in the middle of a save end in the parameters of a whole run."""
    whole = start(tmp_path / "whole", data)
    _, said = whole.communicate()
    assert whole.returncode == 0, said
    workdir = tmp_path / "killed"
    first = random.randrange(1, EVERY)
    second = random.randrange(EVERY + 1, 2 * EVERY)

    status, said = signalled(workdir, data, signal.SIGTERM, first)
    assert status == 130, said
    assert "stopped" in said
    assert steps_of(workdir) == [first + 1]  # the step in hand is finished

    status, said = signalled(workdir, data, signal.SIGKILL, second)
    assert status == -signal.SIGKILL, said

    half = killed_in_a_save(workdir, data)
    assert int(half.name.partition(".")[0]) not in steps_of(workdir)

    run = start(workdir, data)
    _, said = run.communicate()
    assert run.returncode == 0, said
    expected, got = saved(tmp_path / "whole", STEPS), saved(workdir, STEPS)
    assert expected.keys() == got.keys()
    different = [name for name in expected if not np.array_equal(expected[name], got[name])]
    assert not different, (first, second, half, different)


@pytest.fixture(scope="module")
def settings(data, demo, tmp_path_factory, compiled_once):
    """Six steps with videos."""
    return {
        "workdir": str(tmp_path_factory.mktemp("run")),
        "data": str(data),
        "weights": "random",
        "model": "toy",
        "dtype": "float32",
        "num_steps": 6,
        "batch_size": 4,
        "accumulation": 2,
        "learning_rate": 1e-3,
        "log_every": 2,
        "checkpoint_every": 3,
        "sample_every": 6,
        "sample_prompts": "A red bird|A blue car",
        "sampler": "rcm",
        "num_inference_steps": 1,
        "sample_guidance": 1.0,
        **dict.fromkeys(("vae", "text_encoder", "tokenizer"), str(MODEL)),
    }


@pytest.fixture(scope="module")
def workdir(settings) -> Path:
    file = train(train_config(**settings))
    assert file == Path(settings["workdir"]) / "transformer.safetensors"
    return file.parent


def test_the_average_is_written_in_official_names(workdir):
    written = parameters(load_wan(workdir / "transformer.safetensors", NetworkOptions(dtype=np.float32)))
    arrays = saved(workdir, 6)
    for name, value in written.items():
        np.testing.assert_array_equal(value, arrays[f"['ema']['{name}']"])
    assert any((value != arrays[f"['student']['params']['{name}']"]).any() for name, value in written.items())


def test_sample_videos(workdir):
    assert sorted(path.name for path in (workdir / "videos").iterdir()) == ["step_000006_0.mp4", "step_000006_1.mp4"]


@pytest.mark.parametrize("prompts", ["A red bird||A blue car", ""])
def test_sample_videos_with_guidance(settings, data, tmp_path, prompts):
    """The data's negative prompt has fewer rows than a prompt's embedding."""
    config = train_config(**settings | {"sample_guidance": 2.0, "sample_prompts": prompts, "num_samples": 3})
    student, _ = open_networks(config, PUBLISHED)
    skeleton = Networks.of(student.config, student.config).student
    make_videos = prepare_videos(config, open_shards(data), skeleton, tmp_path)
    paths = make_videos(7, {name: jnp.asarray(value) for name, value in student.params.items()})
    assert [path.name for path in paths] == [f"step_000007_{i}.mp4" for i in range(3)]


def test_sample_videos_of_other_networks(settings, data, tmp_path):
    """A VAE or a text encoder that does not belong to the data is told before the first step."""
    student, _ = open_networks(train_config(**settings), PUBLISHED)
    skeleton = Networks.of(student.config, student.config).student
    for change, message in (
        ({"text_dim": 4096}, "text_encoder has 64 channels and the data 4096"),
        ({"latents": (2, 8, 8, 48)}, "vae has 16 channels and the data 48"),
    ):
        shards = open_shards(data)
        shards.index = dataclasses.replace(shards.index, **change)
        with pytest.raises(UserError, match=message):
            prepare_videos(train_config(**settings), shards, skeleton, tmp_path)


def test_metrics(workdir):
    shown = scalars(workdir / "metrics")
    assert {step for _, step in shown} == {2, 4, 6}
    assert {tag for tag, _ in shown} == {"loss", "student_gradient_norm", "student_learning_rate"}
    assert shown["loss", 6] > 0
    np.testing.assert_allclose(shown["student_learning_rate", 2], 0.5 * 1e-3 / 100, rtol=1e-3)  # mean of steps 0, 1


def test_a_full_disk_and_going_on(workdir, settings):
    """A longer run, with clipping, begins at the last checkpoint; a disk that is full in between gives one sentence."""
    longer = train_config(**settings | {"num_steps": 9, "sample_every": 0, "clip_norm": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(CheckpointError, match=r"cannot be written to .*; the last whole one is of step 6"):
            train(longer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps_of(workdir) == [3, 6]
    train(longer)
    assert steps_of(workdir) == [6, 9]
    assert int(saved(workdir, 9)["['step']"]) == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "sla"}, "is of a run with recipe=teacher, this one has recipe=sla; name another workdir"),
        ({"optimizer": "muon"}, "is of a run with optimizer=adamw, this one has optimizer=muon"),
        ({"attention_type": "sla"}, "is of a run with attention_type=original, this one has attention_type=sla"),
        ({"batch_size": 8}, "the run was begun with batch_size=4, not 8; give that, or another workdir"),
        ({"seed": 1}, "the run was begun with seed=0, not 1; give that, or another workdir"),
    ],
)
def test_another_run_in_the_same_folder(workdir, settings, changes, message):
    with pytest.raises(UserError, match=message):
        train(train_config(**settings | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "lora"}, 'recipe is .lora. and must be "teacher" or "sla" or "rcm" or "vae"'),
        ({"data": None}, "no data; give --config.data="),
        ({"data": "nowhere"}, "nowhere holds no index.json"),
        ({"weights": None}, "no weights; give --config.weights="),
        ({"weights": "nothing.safetensors"}, "is neither a file, a folder nor a repository"),
        ({"model": "wan3"}, "model='wan3' is unknown; choose one of wan2.1"),
        ({"workdir": None}, "no workdir"),
        ({"workdir": "/dev/null/run"}, "the folder '/dev/null/run' cannot be made"),
        ({"attention_type": "sagesla"}, "attention_type is .sagesla. and must be"),
        ({"batch_size": 0}, "batch_size is 0 and must be a whole number from 1"),
        ({"batch_size": 6, "accumulation": 4}, "batch_size=6 does not divide into accumulation=4"),
        ({"learning_rate": float("nan")}, "learning_rate is nan and must be a number above 0"),
        ({"beta2": 1.0}, "beta2 is 1.0 and must be"),
        ({"ema_rate": 0.5}, "ema_rate is 0.5 and must be"),
        ({"time_std": 0.0}, "time_std is 0.0 and must be a number above 0"),
        ({"text_dropout": 1.0}, "text_dropout is 1.0 and must be"),
        ({"dtype": "float16"}, "dtype is .float16. and must be"),
        ({"optimizer": "lion"}, 'optimizer is .lion. and must be "adamw" or "muon"'),
        ({"recipe": "rcm", "tangent": "forward"}, "tangent is .forward. and must be"),
        ({"recipe": "rcm", "tangent": "difference", "dtype": "bfloat16"}, "tangent=difference is lost in bfloat16"),
        ({"recipe": "rcm", "simulation": "random"}, "simulation is .random. and must be"),
        ({"recipe": "rcm", "simulation_steps": 5}, "simulation_steps=5: fixed times are 4"),
        ({"recipe": "rcm", "loss_scale": 0.0, "matching_scale": 0.0}, "leave nothing to learn"),
        ({"fsdp": 3}, "does not fill 1 devices"),
        ({"sampler": "ddim"}, "sampler is .ddim. and must be"),
        ({"num_inference_steps": 9}, "num_steps=9"),
    ],
)
def test_settings_that_cannot_be(settings, changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(train_config(**settings | {"workdir": str(tmp_path / "run")} | changes))


def test_a_teacher_of_other_data(settings, tmp_path):
    config = toy_config(text_dim=32)
    params = to_host(parameters(random_module(wan_skeleton(config), what="teacher")))
    teacher = export(tmp_path / "teacher.safetensors", config, params)
    with pytest.raises(UserError, match="holds text of width 64 and the network takes 32"):
        train(train_config(**settings | {"recipe": "sla", "teacher": str(teacher), "workdir": str(tmp_path / "run")}))


def test_more_data_than_before(workdir, settings, tmp_path, caplog):
    """A run goes on with samples that have been added, after one warning, and says no more when it goes on again."""
    folder = shutil.copytree(workdir, tmp_path / "run")
    newest = max(steps_of(folder))
    data = str(write_toy_shards(tmp_path / "data", samples=48))
    for steps in (1, 2):
        caplog.clear()
        changes = {"workdir": str(folder), "data": data, "num_steps": newest + steps, "sample_every": 0}
        train(train_config(**settings | changes))
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(warnings) == (1 if steps == 1 else 0)
        assert all("begun with other data, of 32 samples; it goes on with the 48" in line for line in warnings)
        assert max(steps_of(folder)) == newest + steps


def test_a_folder_in_use(settings, tmp_path):
    """Another run in the folder changes nothing there."""
    with sole_user(tmp_path / "run"):
        before = sorted((tmp_path / "run").iterdir())
        with pytest.raises(UserError, match="run' is in use by another process; wait until it has ended"):
            train(train_config(**settings | {"workdir": str(tmp_path / "run")}))
        assert sorted((tmp_path / "run").iterdir()) == before


def test_data_of_another_network(data):
    for config, message in (
        (WanConfig.t2v_1_3b(), "holds text of width 64 and the network takes 4096"),
        (WanConfig.i2v_14b(), "holds latents of 16 channels and the network takes 36"),
    ):
        with pytest.raises(UserError, match=message):
            check_data(open_shards(data), config)


def test_script(tmp_path):
    """Help lists every setting; mistakes are one sentence and exit code 2."""
    cases = {
        "help": [TRAIN, "--help"],
        "no config": [TRAIN],
        "misspelt": [TRAIN, TOY, "--config.lerning_rate=1"],
        "bad value": [TRAIN, TOY, "--config.num_steps=-1"],
        "of generate": [TRAIN, f"--config={ROOT / 'configs' / 'demo.py'}"],
    }
    results = run_all(cases, tmp_path)
    assert [code for code, _, _ in results.values()] == [0, 2, 2, 2, 2]
    assert all(f"--config.{setting.name}:" in results["help"][1] for setting in TRAIN_SETTINGS)
    for name, said in {
        "no config": "no settings; give --config=configs/NAME.py, for instance configs/train_toy.py",
        "misspelt": "there is no setting lerning_rate, perhaps learning_rate",
        "bad value": "num_steps is -1 and must be a whole number from 0",
        "of generate": "get_config() must return all settings, as configs/train_toy.py does; missing: recipe",
    }.items():
        assert said in results[name][2]
        assert "Traceback" not in results[name][2]
