"""What is shipped of the small model does what it was trained for, read as published checkpoints are."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turbojax.app.commands.train_shapes import settings
from turbojax.pipeline.text import TextEncoder
from turbojax.shapes import MODEL, SHIPPED_SIGMA_MAX, SHIPPED_TOPK
from turbojax.shapes.scene import caption, random_scene
from turbojax.shapes.text import LENGTH
from turbojax.shapes_training.evaluate import NETWORKS, QUICK, evaluate, held_out_tasks
from turbojax.shapes_training.registry import train
from turbojax.shapes_training.stages import MOST_BYTES, TRANSFORMER, Job, learn_merged
from turbojax.train.config import train_config
from turbojax.train.networks import to_host
from turbojax.train.runs import export
from turbojax.train.state import parameters
from turbojax.train.toy import write_toy_shards
from turbojax.weights.encoders import load_vae
from turbojax.weights.files import find_components
from turbojax.weights.load import load_wan
from turbojax.weights.options import NetworkOptions

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GIVEN = dict.fromkeys(("vae", "text_encoder", "tokenizer"), MODEL)


def test_size():
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= MOST_BYTES


def test_it_says_what_it_is_run_with():
    config = load_wan(MODEL / Path(NETWORKS["shipped"]).name).config
    assert (config.sla_topk, config.sigma_max) == (SHIPPED_TOPK, SHIPPED_SIGMA_MAX)


def test_autoencoder():
    pytest.importorskip("sklearn")
    from turbojax.shapes.examples import example
    from turbojax.train.autoencoder import quality

    vae = load_vae(find_components(None, GIVEN)["vae"], dtype=jnp.float32)
    found = quality(vae, [example(2**29 + i, seed=0, num_frames=9, height=80, width=80).video for i in range(3)])
    assert found.psnr > 28  # one thing fills much of so small a picture
    assert found.mean_off < 1.5
    assert found.std_off < 1


def test_text_encoder():
    where = find_components(None, GIVEN)
    text = TextEncoder.from_files(where["text_encoder"], where["tokenizer"], dtype=jnp.float32, cache=False)
    rng = np.random.default_rng(0)
    captions = [caption(random_scene(rng), rng) for _ in range(20)]
    ids, mask = text.tokenizer(captions, LENGTH)
    unknown = text.tokenizer(["qxz"], LENGTH)[0][0, 0]
    assert not (ids[mask.astype(bool)] == unknown).any()
    embeddings = np.asarray(text(captions))
    assert np.isfinite(embeddings).all()
    assert len(np.unique(embeddings.round(3), axis=0)) == len(set(captions))


@pytest.fixture
def optimized():
    """Programs compiled with care, for what runs longer than it compiles; see tests/conftest.py."""
    quick = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", quick)


@pytest.mark.usefixtures("optimized")
def test_the_whole_of_it_from_the_same_noise():
    """Four steps with SLA and int8 show what prompts ask for, whatever else is in the batch."""
    pytest.importorskip("sklearn")
    from turbojax.shapes.judge import train_judge

    judge, tasks = train_judge(examples=1500, tests=200), held_out_tasks(6, seed=0)
    settings = {"size": {"num_frames": 33, "height": 128, "width": 128}, "dtype": jnp.float32}
    ((row, videos),) = evaluate(QUICK, tasks, MODEL.parent, judge, batch=6, **settings)
    assert row["background"] == 1
    assert row["colour"] >= 5 / 6
    assert row["motion"] >= 5 / 6
    assert row["shape"] >= 5 / 6
    assert row["flagged"] == 0
    ((_, again),) = evaluate(QUICK, tasks[:3], MODEL.parent, judge, batch=3, **settings)
    assert np.abs(again.astype(int) - videos[:3]).mean() < 1


def test_the_teacher_is_the_dense_network_of_the_same_size():
    """What the next distillation begins with, beside its record."""
    teacher = load_wan(BENCHMARKS / "shapes_teacher.safetensors")
    dense = {"quant_linear": False, "attention_type": "original", "sla_topk": teacher.config.sla_topk}
    shipped = load_wan(MODEL / Path(NETWORKS["shipped"]).name, NetworkOptions(**dense))
    assert teacher.config == shipped.config
    assert {name: value.shape for name, value in parameters(teacher).items()} == {
        name: value.shape for name, value in parameters(shipped).items()
    }


def test_training_goes_on_from_it(tmp_path):
    data = write_toy_shards(tmp_path / "data", samples=4)
    config = train_config(
        recipe="sla",
        workdir=str(tmp_path / "run"),
        data=str(data),
        weights=str(MODEL / Path(NETWORKS["shipped"]).name),
        dtype="float32",
        num_steps=1,
        batch_size=2,
        sla_topk=0.5,
    )
    trained = parameters(load_wan(train(config), NetworkOptions(dtype=np.float32)))
    shipped = parameters(load_wan(config.weights, NetworkOptions(dtype=np.float32, quant_linear=False)))
    assert trained.keys() == shipped.keys()
    assert all(np.abs(trained[name] - value).max() < 1e-2 for name, value in shipped.items())


def test_what_merging_gives_is_trained(tmp_path):
    """On a teacher that is its own student merging gives SLA's network, and training moves it a little."""
    path = MODEL / Path(NETWORKS["shipped"]).name
    for stage, attention in (("rcm", "original"), ("teacher", "original"), ("sla", "sla")):
        network = load_wan(path, NetworkOptions(quant_linear=False, attention_type=attention, dtype=jnp.float32))
        (tmp_path / stage).mkdir()
        export(tmp_path / stage / TRANSFORMER, network.config, to_host(parameters(network)))
    write_toy_shards(tmp_path / "data", samples=4)
    learn_merged(Job(tmp_path, "tiny", functools.partial(settings, size="tiny", steps=0.25)))
    shipped, start, trained = (
        parameters(load_wan(file, NetworkOptions(dtype=np.float32, quant_linear=False)))
        for file in (path, tmp_path / "merged" / "start.safetensors", tmp_path / "merged" / TRANSFORMER)
    )
    assert shipped.keys() == start.keys() == trained.keys()
    for name, value in shipped.items():
        np.testing.assert_allclose(start[name], value, rtol=2**-8, err_msg=name)
    assert 0 < max(np.abs(trained[name] - value).max() for name, value in start.items()) < 1e-2
