"""Losses: tangents against differences, who takes the gradient, the ends of time, values that are not finite."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden_io import GOLDEN, load
from tests.parity.wan import build
from turbojax.diffusion import schedules
from turbojax.errors import UserError
from turbojax.kernels import attention
from turbojax.train import losses, times, trigflow

SHAPE = (2, 1, 2, 3, 4)
PARAMS = {"a": jnp.float32(0.7), "b": jnp.float32(-1.1), "c": jnp.float32(0.4)}
TEACHER = {"a": jnp.float32(0.5), "b": jnp.float32(-0.2), "c": jnp.float32(0.1)}
TEXT, NEGATIVE = jnp.linspace(-1, 1, 4), jnp.linspace(2, -1, 4)
SKIPS_SAMPLES = {"exact", "difference_in_time", "difference", "distribution_matching"}


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


X0, EPS, NOISE, T = normal(1), normal(2), normal(3, (4, *SHAPE)), jnp.array([0.4, 1.3])


def network(params: dict, x: jax.Array, timesteps: jax.Array, text: jax.Array) -> jax.Array:
    """A velocity in which parameters, position, time and text all matter."""
    s = trigflow.like(timesteps / 1000, x)
    return params["a"] * x + params["b"] * jnp.tanh(x) * s + params["c"] * text[None, None, None, None]


def velocity(params: dict) -> trigflow.Velocity:
    return functools.partial(network, params)


@jax.jit
def all_losses(student: dict, frozen: dict, teacher: dict, eps: jax.Array, t: jax.Array) -> dict[str, losses.Loss]:
    """Every loss by its name, with parameters for each of the three roles."""
    student, frozen, teacher = velocity(student), velocity(frozen), velocity(teacher)
    s = schedules.rf_from_trig(t)
    tangents: tuple[losses.Tangent, ...] = ("exact", "difference_in_time", "difference")
    simulate = functools.partial(losses.simulate, noise=NOISE, times=times.fixed_simulation_times(2), text=TEXT)
    grid = times.discrete_times(s, 3)
    return {
        "flow_matching": losses.flow_matching(student, X0, eps, s, TEXT),
        "white_box": losses.white_box(student, teacher, X0, eps, s, TEXT),
        **{
            tangent: losses.consistency(student, frozen, teacher, X0, eps, t, TEXT, warmup=0.5, tangent=tangent)
            for tangent in tangents
        },
        "discrete_consistency": losses.discrete_consistency(student, frozen, teacher, X0, eps, grid, TEXT),
        "distribution_matching": losses.distribution_matching(
            simulate(student, frozen, num_steps=3), frozen, teacher, eps, t, TEXT
        ),
        "fake_score": losses.fake_score(simulate(frozen, frozen, num_steps=3), student, eps, t, TEXT),
    }


@jax.jit
def gradients(t: jax.Array) -> dict[str, tuple[dict, dict, dict]]:
    """Gradient of each loss in the parameters of student, frozen and teacher."""
    values = lambda *roles: {name: value for name, (value, _) in all_losses(*roles, EPS, t).items()}  # noqa: E731
    return jax.jacrev(values, argnums=(0, 1, 2))(PARAMS, PARAMS, TEACHER)


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("kind", ["scm", "sla"], ids=["dense", "sla"])
def test_exact_tangent_is_the_limit_of_differences(monkeypatch, kind):
    """Of the whole network, with attention in blocks of queries, at several blocks of keys."""
    monkeypatch.setattr(attention, "SCORES_IN_MEMORY", 2 * 32 * 5)
    config, t = load(GOLDEN / f"train_{kind}.safetensors")
    model = build(config | {"SparseLinearAttention": {"topk": 0.5, "BLKQ": 8, "BLKK": 8}}, t, prefix="w.student.")
    assert (model.config.attention_type == "sla") == (kind == "sla")
    graph, state = nnx.split(model)
    student = lambda x, timesteps, text: nnx.merge(graph, state)(x, timesteps, text)  # noqa: E731
    x, F_teacher, text = normal(1, (1, 2, 8, 8, 16)), normal(2, (1, 2, 8, 8, 16)), normal(3, (1, 4, 24))
    time, ratio, h = jnp.array([1.1]), math.cos(1.1) * math.sin(1.1), 8e-4
    F = jax.jit(lambda x, t: trigflow.velocity(student, x, t, text))
    central = lambda h: (F(x + h * F_teacher, time + h) - F(x - h * F_teacher, time - h)) / (2 * h)  # noqa: E731
    expected = ratio * (4 * central(h / 2) - central(h)) / 3  # without the error in h^2
    exact = functools.partial(losses.velocity_tangent, student, tangent="exact", step=1e-4)
    tangent = jax.jit(lambda x, t: exact(x, t, text, F_teacher))(x, time)
    assert np.linalg.norm(tangent - expected) < 1e-3 * np.linalg.norm(expected)


def test_only_the_student_takes_a_gradient():
    for name, (student, *others) in gradients(T).items():
        assert all(g != 0 for g in jax.tree.leaves(student)), name
        assert all(g == 0 for g in jax.tree.leaves(others)), name


def test_consistency_moves_the_velocity_along_g():
    aux = all_losses(PARAMS, PARAMS, TEACHER, EPS, T)["exact"][1]
    _, pull = jax.vjp(lambda params: trigflow.velocity(velocity(params), aux["xt"], T, TEXT), PARAMS)
    (expected,) = pull(-200 * aux["g"])
    for key, value in gradients(T)["exact"][0].items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-5)


def test_the_ends_of_time():
    t = jnp.array([0.0, math.pi / 2])
    found = all_losses(PARAMS, PARAMS, TEACHER, EPS, t), gradients(t)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    x0 = trigflow.denoise(velocity(PARAMS), X0, t, TEXT)
    np.testing.assert_array_equal(x0[0], X0[0])


def test_samples_that_are_not_finite():
    """Where the reference drops a sample its loss is 0; elsewhere NaN shows. The other sample is the same."""
    clean, poisoned = (all_losses(PARAMS, PARAMS, TEACHER, eps, T) for eps in (EPS, EPS.at[0, 0, 0, 0, 0].set(jnp.nan)))
    for name, (_, aux) in poisoned.items():
        np.testing.assert_array_equal(aux["loss"][1], clean[name][1]["loss"][1])
        if name in SKIPS_SAMPLES:
            assert aux["loss"][0] == 0
            assert aux["finite"].tolist() == [False, True]
        else:
            assert np.isnan(aux["loss"][0])


def test_the_number_of_simulated_steps_may_be_traced():
    student, frozen = velocity(PARAMS), velocity(PARAMS | {"b": jnp.float32(0.3)})
    steps = times.drawn_simulation_times(jnp.array([[0.9, 1.2], [1.1, 0.3], [0.5, 0.5]]))
    simulate = functools.partial(losses.simulate, student, frozen, text=TEXT)
    traced = jax.jit(simulate)
    for n in range(1, 5):
        sample = traced(noise=NOISE, times=steps, num_steps=n)
        np.testing.assert_allclose(sample, simulate(noise=NOISE[:n], times=steps[:n], num_steps=n), atol=1e-6)


def test_guidance():
    c, u = (network(PARAMS, X0, 1000 * T, text) for text in (TEXT, NEGATIVE))
    guided = trigflow.guided(velocity(PARAMS), NEGATIVE, 5.0)(X0, 1000 * T, TEXT)
    np.testing.assert_allclose(guided, u + 5 * (c - u), atol=1e-5)
    np.testing.assert_array_equal(trigflow.guided(velocity(PARAMS), NEGATIVE, 1.0)(X0, 1000 * T, TEXT), c)


def test_unknown_tangent():
    with pytest.raises(UserError, match="exact, difference_in_time or difference"):
        losses.velocity_tangent(velocity(PARAMS), X0, T, TEXT, EPS, tangent="jvp", step=1e-4)
