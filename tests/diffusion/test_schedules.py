import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turbojax.diffusion import schedules
from turbojax.errors import UserError


def test_time_maps_are_inverse():
    s = np.linspace(0, 1, 101)
    t = schedules.trig_from_rf(s)
    assert t.dtype == np.float64
    assert t[0] == 0
    assert t[-1] == math.pi / 2
    np.testing.assert_allclose(schedules.rf_from_trig(t), s, atol=1e-15)
    np.testing.assert_allclose(np.tan(t[:-1]), s[:-1] / (1 - s[:-1]), rtol=1e-12)
    np.testing.assert_allclose(schedules.unshift_time(schedules.shift_time(s, 5.0), 5.0), s, atol=1e-15)


def test_time_maps_are_differentiable():
    s, ds = jax.jvp(schedules.rf_from_trig, (jnp.float32(0.7),), (jnp.float32(1.0),))
    assert s.dtype == jnp.float32
    np.testing.assert_allclose(s, schedules.rf_from_trig(0.7), rtol=1e-6)
    np.testing.assert_allclose(ds, 1 / (math.sin(0.7) + math.cos(0.7)) ** 2, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(schedules.trig_from_rf)(s), 0.7, rtol=1e-6)


def test_rcm_times():
    times = schedules.rcm_times(4, 80.0)
    assert times.dtype == np.float64
    np.testing.assert_allclose(
        times, [80 / 81, 0.933781061416858, 0.852895394823775, 0.608979049230431, 0.0], rtol=1e-14
    )
    np.testing.assert_allclose(schedules.rcm_times(1, 0.5), [1 / 3, 0])


def test_timesteps_are_bfloat16():
    rounded = schedules.timesteps(schedules.rcm_times(4, 80.0)[:-1])
    assert rounded.dtype == np.float32
    np.testing.assert_array_equal(rounded, [988, 932, 852, 608])
    exact = schedules.timesteps(schedules.rcm_times(4, 80.0)[:-1], rounded=False)
    np.testing.assert_allclose(exact, [987.65432835, 933.7810874, 852.89537907, 608.97904634], rtol=1e-11)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0])
@pytest.mark.parametrize("num_steps", [1, 2, 50])
def test_flow_sigmas(num_steps, shift):
    sigmas = schedules.flow_sigmas(num_steps, shift)
    assert sigmas.shape == (num_steps + 1,)
    np.testing.assert_allclose(sigmas[0], 5000 / 5001, rtol=1e-12)
    assert sigmas[-1] == 0
    assert np.all(np.diff(sigmas) < 0)


def test_expert_split():
    assert schedules.expert_split(schedules.rcm_times(4, 200.0)) == 2
    assert schedules.expert_split(schedules.rcm_times(2, 200.0)) == 2
    assert schedules.expert_split(schedules.rcm_times(1, 1.0)) == 0
    assert schedules.expert_split(np.array([0.95, 0.9, 0.8, 0.0])) == 2  # not below the boundary yet
    assert schedules.expert_split(schedules.rcm_times(4, 200.0), boundary=0.0) == 4


@pytest.mark.parametrize(
    ("call", "value"),
    [
        (lambda: schedules.rcm_times(0, 80.0), "num_steps=0"),
        (lambda: schedules.rcm_times(5, 80.0), "num_steps=5"),
        (lambda: schedules.rcm_times(2.0, 80.0), "num_steps=2.0"),
        (lambda: schedules.rcm_times(True, 80.0), "num_steps=True"),
        (lambda: schedules.rcm_times(2, 14.1), "sigma_max=14.1"),
        (lambda: schedules.rcm_times(1, 0.0), "sigma_max=0.0"),
        (lambda: schedules.rcm_times(4, math.inf), "sigma_max=inf"),
        (lambda: schedules.rcm_times(4, math.nan), "sigma_max=nan"),
        (lambda: schedules.flow_sigmas(0, 5.0), "num_steps=0"),
        (lambda: schedules.flow_sigmas(10, 0.0), "shift=0.0"),
        (lambda: schedules.flow_sigmas(10, math.nan), "shift=nan"),
        (lambda: schedules.flow_sigmas(10, 5.0, -1.0), "sigma_max=-1.0"),
        (lambda: schedules.flow_sigmas(10, 5.0, math.inf), "sigma_max=inf"),
        (lambda: schedules.expert_split(schedules.rcm_times(4, 80.0), 900), "boundary=900"),
    ],
)
def test_bad_values_are_named(call, value):
    with pytest.raises(UserError, match=value):
        call()
