"""Times and schedules of training: what the golden fixtures leave out."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turbojax.errors import UserError
from turbojax.train.schedule import LearningRate, Phases, ema_exponent, ema_update
from turbojax.train.times import LogNormal, UniformShift, discrete_times, drawn_simulation_times


@pytest.mark.parametrize("distribution", [LogNormal(0.7), UniformShift(5.0)], ids=["log-normal", "uniform"])
def test_draws_fit_their_distribution(distribution):
    """The median of the standard draws is where the distribution has its own."""
    draws = distribution.standard(jax.random.key(0), (4001,))
    middle = 0.0 if isinstance(distribution, LogNormal) else 0.5
    np.testing.assert_allclose(jnp.median(draws), middle, atol=0.06)
    trig = distribution.trig(draws)
    assert ((trig >= 0) & (trig <= jnp.pi / 2)).all()
    np.testing.assert_allclose(jnp.median(trig), distribution.trig(jnp.median(draws)), rtol=1e-6)


def test_drawn_simulation_times_never_rise():
    drawn = jnp.array([[0.9, 1.2], [1.1, 0.3], [0.5, 0.7]])
    expected = [[jnp.pi / 2, jnp.pi / 2], [0.9, 1.2], [0.9, 0.3], [0.5, 0.3]]
    np.testing.assert_allclose(drawn_simulation_times(drawn), expected, rtol=1e-6)


def test_learning_rate_is_the_same_when_traced():
    rate = LearningRate(2e-6, 10, start=0.1, end=0.2, cycle=200)
    steps = np.array([0, 1, 9, 10, 11, 150, 200, 300])
    np.testing.assert_allclose(jax.vmap(rate)(jnp.asarray(steps)), [rate(step) for step in steps], rtol=1e-6)
    assert rate(300) == pytest.approx(0.2 * 2e-6)
    assert LearningRate(1.0, 0)(0) == 1


def test_ema_keeps_its_dtype():
    ema = ema_update({"w": jnp.ones(2, jnp.float32)}, {"w": jnp.zeros(2, jnp.bfloat16)}, 0.75)
    np.testing.assert_array_equal(ema["w"], np.full(2, 0.75, np.float32))


def test_inference_does_not_import_training():
    script = "import sys, turbojax; sys.exit('turbojax.train' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogNormal(0.0, 0.0), "std=0.0"),
        (lambda: discrete_times(jnp.zeros(1), 49), "skip=49 .* from 1 to 48"),
        (lambda: ema_exponent(0.3), "rate=0.3"),
        (lambda: LearningRate(1e-5, warm_up=-1), "warm_up=-1 .* from 0 on"),
        (lambda: Phases(student_freq=0), "student_freq=0"),
        (lambda: Phases(loss_scale=0.0), "without a loss"),
    ],
)
def test_values_out_of_range(make, message):
    with pytest.raises(UserError, match=message):
        make()
