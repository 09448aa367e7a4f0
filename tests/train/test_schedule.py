"""Times and schedules of training: what the golden fixtures leave out."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turbojax.errors import UserError
from turbojax.train.schedule import Phases, ema_exponent, ema_update, learning_rate
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


def test_learning_rate():
    """Rises from start to the peak and falls in a line to end, where it stays; constant without a fall."""
    rate = learning_rate(2e-6, warm_up=10, start=0.1, end=0.2, cycle=200)
    expected = {0: 0.1, 1: 0.19, 9: 0.91, 10: 1, 11: 1 - 0.8 / 190, 150: 1 - 0.8 * 140 / 190, 200: 0.2, 300: 0.2}
    with jax.numpy_dtype_promotion("standard"):
        steps = jnp.asarray(list(expected))
        np.testing.assert_allclose(jax.vmap(rate)(steps), 2e-6 * np.array(list(expected.values())), rtol=1e-6)
        assert learning_rate(1.0, warm_up=0)(0) == 1
        assert learning_rate(1.0)(10**6) == 1


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
        (lambda: learning_rate(1e-5, warm_up=-1), "warm_up=-1 .* from 0 on"),
        (lambda: Phases(student_freq=0), "student_freq=0"),
        (lambda: Phases(loss_scale=0.0), "without a loss"),
    ],
)
def test_values_out_of_range(make, message):
    with pytest.raises(UserError, match=message):
        make()
