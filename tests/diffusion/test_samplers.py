import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex_core

from tests.golden_io import GOLDEN, load
from tests.parity.sampler import fixture_velocity, recompute
from turbojax.diffusion import RCM, Euler, Sampler, UniPC, expert_split, guide
from turbojax.errors import UserError

SHAPE = (2, 3, 4, 5)
SAMPLERS = [RCM(), RCM(ode=True), Euler(10), UniPC(10)]


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(0), SHAPE)


def numpy_velocity(x, timestep, c=0.1):
    return np.tanh(0.3 * x) * timestep / 1000 + c * x


# Against the reference's recorded numbers.


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_golden(dtype):
    config, t = load(GOLDEN / "sampler.safetensors")
    inputs = {key: v.astype(dtype) if key.startswith("in.") else v for key, v in t.items()}
    with jax.enable_x64(dtype == np.float64):
        results = recompute(config, inputs)
    assert set(results) == {key for key in t if key.startswith("out.")}
    for key, (value, tolerance) in results.items():
        assert value.shape == t[key].shape, key
        if key.endswith(".x"):
            assert value.dtype == dtype, key
        np.testing.assert_allclose(value, t[key], rtol=0, atol=tolerance, err_msg=key)


@pytest.mark.parametrize("sampler", [RCM(4, 15.0), RCM(1, 33.0), Euler(4, 3.0, 900.0), UniPC(4, 3.0)])
def test_one_program_for_samplers_with_the_same_canonical(x, sampler):
    """The times of another one are arguments."""
    assert sampler.canonical == type(sampler)(sampler.num_steps) != sampler
    key = jax.random.key(1)
    run = jax.jit(lambda x, schedule: sampler.canonical.sample(fixture_velocity, x, key=key, schedule=schedule))
    own = sampler.sample(fixture_velocity, x, key=key)
    np.testing.assert_allclose(run(x, sampler.schedule()), own, rtol=0, atol=2e-6)
    assert np.abs(run(x, sampler.canonical.schedule()) - own).max() > 1e-4
    assert run._cache_size() == 1


# Against independent float64 loops.


@pytest.mark.parametrize("sigma_max", [80.0, 200.0, 1600.0])
@pytest.mark.parametrize("ode", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_rcm_equals_loop(x, num_steps, ode, sigma_max):
    noise = np.random.default_rng(1).standard_normal((num_steps, *SHAPE), np.float32)
    sampler = RCM(num_steps, sigma_max, ode)
    actual = jax.jit(lambda x: sampler.sample(fixture_velocity, sampler.initial(x), noise=noise))(x)

    trig = [*(math.atan(sigma_max), 1.5, 1.4, 1.0)[:num_steps], 0.0]
    t = [math.sin(a) / (math.sin(a) + math.cos(a)) for a in trig]
    steps = [float(jnp.bfloat16(1000 * s)) for s in t]
    y = np.asarray(x, np.float64) * t[0]
    for i in range(num_steps):
        v = numpy_velocity(y, steps[i])
        y = y - (t[i] - t[i + 1]) * v if ode else (1 - t[i + 1]) * (y - t[i] * v) + t[i + 1] * noise[i]
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, y, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 20, 50])
def test_unipc_equals_loop(x, num_steps, shift):
    """The paper's update, written with residuals and a solve for each order, not our coefficients."""
    sampler = UniPC(num_steps, shift)
    actual = jax.jit(lambda x: sampler.sample(fixture_velocity, x))(x)

    sigma = sampler.times
    lam = [math.log((1 - s) / s) if s else math.inf for s in sigma]

    def update(x_s, i, order, m, m_new=None):
        """Step i, from i to i + 1; m: estimates, oldest first."""
        h = lam[i + 1] - lam[i]
        b_h = math.expm1(-h)
        ratios = [(lam[i - k] - lam[i]) / h for k in range(1, order)]
        slopes = [(m[-1 - k] - m[-1]) / ratios[k - 1] for k in range(1, order)]
        if m_new is not None:
            ratios, slopes = [*ratios, 1.0], [*slopes, m_new - m[-1]]
        if len(slopes) == 1:  # the published implementations fix the one weight at 1/2
            weights = [0.5]
        else:
            g, rhs = b_h, []
            for k in range(1, len(slopes) + 1):
                g = g / -h - 1 / math.factorial(k)
                rhs.append(g * math.factorial(k) / b_h)
            weights = np.linalg.solve([np.power(ratios, k) for k in range(len(slopes))], rhs) if slopes else []
        residual = sum(w * d for w, d in zip(weights, slopes, strict=True))
        return sigma[i + 1] / sigma[i] * x_s - (1 - sigma[i + 1]) * b_h * (m[-1] + residual)

    y, previous, order, estimates = np.asarray(x, np.float64), None, None, []
    for i in range(num_steps):
        estimate = y - sigma[i] * numpy_velocity(y, float(jnp.bfloat16(1000 * sigma[i])))
        if i > 0:
            y = update(previous, i - 1, order, estimates, estimate)
        estimates.append(estimate)
        order = 1 if i in (0, num_steps - 1) else 2
        previous, y = y, update(y, i, order, estimates)
    np.testing.assert_allclose(actual, y, rtol=0, atol=5e-6)


def test_solvers_converge_to_the_exact_flow(x):
    """x0 ~ N(0, d^2): x_t = r z, v = (t - (1 - t) d^2) x / r^2, with r^2 = (1 - t)^2 d^2 + t^2."""
    d = 0.5

    def velocity(x, timestep):
        t = timestep / 1000
        return (t - (1 - t) * d**2) / ((1 - t) ** 2 * d**2 + t**2) * x

    def error(sampler):
        s = sampler.times[0]
        exact = d * np.asarray(x) / math.sqrt((1 - s) ** 2 * d**2 + s**2)
        return float(np.abs(sampler.sample(velocity, sampler.initial(x)) - exact).max())

    euler, unipc = ([error(kind(n, 3.0, round_timesteps=False)) for n in (10, 20, 40)] for kind in (Euler, UniPC))
    assert euler[0] > 1.7 * euler[1] > 1.7**2 * euler[2]  # order 1
    assert unipc[0] > 3 * unipc[1] > 3**2 * unipc[2]  # order 2
    assert unipc[2] < 0.1 * euler[2]


@pytest.mark.parametrize("num_steps", range(1, 51))
def test_unipc_is_finite(x, num_steps):
    sampler = UniPC(num_steps)
    for rows in sampler.coefficients():
        assert np.isfinite(rows).all()
        np.testing.assert_array_less(np.abs(rows), 10)
    assert np.isfinite(sampler.sample(fixture_velocity, x, trajectory=True)).all()


@dataclasses.dataclass(frozen=True)
class Adams(Sampler):
    """A sampler as users write it: Adams-Bashforth of order 2 on uniform times."""

    num_steps: int

    @property
    def times(self):
        return np.linspace(1.0, 0.0, self.num_steps + 1)

    def init_carry(self, state):
        return state, jnp.zeros_like(state), jnp.zeros((), state.dtype)

    def advance(self, carry, per_step, v):
        (x, before, weight), (t, t_next) = carry, per_step
        return x - (t - t_next) * ((1 + weight) * v - weight * before), v, jnp.full_like(weight, 0.5)


def test_a_sampler_of_ones_own(x):
    sampler = Adams(8)
    actual = jax.jit(lambda x: sampler.sample(fixture_velocity, sampler.initial(x)))(x)
    y, before = np.asarray(x, np.float64), None
    for i in range(8):
        v = numpy_velocity(y, float(jnp.bfloat16(1000 * sampler.times[i])))
        y = y - (v if before is None else 1.5 * v - 0.5 * before) / 8
        before = v
    np.testing.assert_allclose(actual, y, rtol=0, atol=2e-6)
    assert sampler.canonical is sampler
    with pytest.raises(UserError, match="stop=5: Adams's history"):
        sampler.sample(fixture_velocity, x, stop=5)


# Noise, parts of a run, trajectories.


def test_key_decides_the_noise(x):
    sampler = RCM()
    a, b, c = (sampler.sample(fixture_velocity, x, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert float(jnp.abs(a - c).max()) > 0.1
    drawn = jnp.stack([jax.random.normal(jax.random.fold_in(jax.random.key(1), i), SHAPE) for i in range(4)])
    np.testing.assert_allclose(sampler.sample(fixture_velocity, x, noise=drawn), a, rtol=0, atol=1e-6)


def test_one_step_and_ode_need_no_noise(x):
    one_step, ode = RCM(1), RCM(4, ode=True)
    for sampler in (one_step, ode):
        plain = sampler.sample(fixture_velocity, x)
        np.testing.assert_array_equal(plain, sampler.sample(fixture_velocity, x, key=jax.random.key(1)))


@pytest.mark.parametrize("ode", [False, True])
@pytest.mark.parametrize("noise_from", ["key", "array"])
def test_two_experts_equal_one_run(x, ode, noise_from):
    sampler = RCM(4, 200.0, ode)
    source = {"key": jax.random.key(3)}
    if noise_from == "array":
        source = {"noise": jax.random.normal(jax.random.key(4), (4, *SHAPE))}
    k = expert_split(sampler.times)
    assert k == 2
    boundary = sampler.timesteps[k]

    def either(x, timestep):
        return jnp.where(timestep > boundary, fixture_velocity(x, timestep), fixture_velocity(x, timestep, c=-0.2))

    low = lambda x, timestep: fixture_velocity(x, timestep, c=-0.2)  # noqa: E731
    whole = sampler.sample(either, x, **source)
    high_part = sampler.sample(fixture_velocity, x, **source, stop=k)
    parts = sampler.sample(low, high_part, **source, start=k)
    np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", [RCM(), RCM(ode=True), Euler(4)], ids=str)
def test_every_split_equals_one_run(x, sampler):
    key = jax.random.key(3)
    whole = sampler.sample(fixture_velocity, x, key=key)
    for k in range(5):
        head = sampler.sample(fixture_velocity, x, key=key, stop=k)
        parts = sampler.sample(fixture_velocity, head, key=key, start=k)
        np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_trajectory(x, sampler):
    states = sampler.sample(fixture_velocity, x, key=jax.random.key(3), trajectory=True)
    assert states.shape == (sampler.num_steps + 1, *SHAPE)
    np.testing.assert_array_equal(states[0], x)
    last = sampler.sample(fixture_velocity, x, key=jax.random.key(3))
    np.testing.assert_allclose(states[-1], last, rtol=0, atol=1e-6)


@pytest.mark.parametrize("trajectory", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_loop_equals_scan(x, sampler, trajectory):
    """But for what XLA fuses of the network's last sum; in the loop the network is called with arrays."""
    options = dict(key=jax.random.key(3), trajectory=trajectory)
    network, calls = jax.jit(fixture_velocity), []

    def velocity(x, timestep):
        calls.append(float(timestep))
        return network(x, timestep)

    looped = sampler.sample(velocity, x, scan=False, **options)
    scanned = jax.jit(lambda x: sampler.sample(fixture_velocity, x, **options))(x)
    np.testing.assert_allclose(looped, scanned, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(np.float32(calls), sampler.timesteps)


# Form: one scan, settings as values, dtypes.


@pytest.mark.parametrize("trajectory", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_is_one_scan(x, sampler, trajectory):
    calls = []

    def velocity(x, timestep):
        calls.append((x.shape, x.dtype, timestep.shape, timestep.dtype))
        return fixture_velocity(x, timestep)

    def run(x, key):
        return sampler.sample(velocity, x, key=key, trajectory=trajectory)

    jaxpr = jax.make_jaxpr(jax.jit(run))(x, jax.random.key(0))
    assert calls == [(SHAPE, jnp.float32, (), jnp.float32)]
    scans = [eqn for eqn in _equations(jaxpr.jaxpr) if eqn.primitive.name == "scan"]
    assert [eqn.params["length"] for eqn in scans] == [sampler.num_steps]


@pytest.mark.parametrize("sampler", [RCM(ode=True), Euler(4), UniPC(4)], ids=str)
def test_embedded_timesteps(x, sampler):
    """velocity gets the rows of what embed makes of all timesteps at once."""
    seen = []

    def embed(timesteps):
        seen.append(timesteps)
        return {"once": timesteps / 1000, "table": jnp.stack((timesteps, timesteps), axis=1)}

    def velocity(x, row):
        assert (row["once"].shape, row["table"].shape) == ((), (2,))
        return fixture_velocity(x, row["table"][1])

    np.testing.assert_array_equal(sampler.sample(velocity, x, embed=embed), sampler.sample(fixture_velocity, x))
    np.testing.assert_array_equal(seen[0], sampler.timesteps)


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in jex_core.jaxprs_in_params(eqn.params):
            yield from _equations(sub)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_settings_are_frozen_and_hashable(sampler):
    assert hash(sampler) == hash(dataclasses.replace(sampler))
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.num_steps = 3


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_bfloat16_network_and_latents(x, sampler):
    def velocity(x, timestep):
        return fixture_velocity(x, timestep).astype(jnp.bfloat16)

    latents = sampler.initial(x.astype(jnp.bfloat16))
    result = sampler.sample(velocity, latents, key=jax.random.key(0))
    assert latents.dtype == result.dtype == jnp.float32
    assert jnp.isfinite(result).all()


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_timesteps(sampler):
    steps, exact = sampler.timesteps, dataclasses.replace(sampler, round_timesteps=False).timesteps
    assert steps.dtype == exact.dtype == np.float32
    np.testing.assert_array_equal(steps, np.asarray(jnp.asarray(exact).astype(jnp.bfloat16), np.float32))
    np.testing.assert_allclose(exact, 1000 * sampler.times[:-1], rtol=1e-7)


def test_guide():
    c, u = jnp.array([1.0, 2.0]), jnp.array([0.0, 4.0])
    np.testing.assert_array_equal(guide(c, u, 1.0), c)
    np.testing.assert_array_equal(guide(c, u, 0.0), u)
    np.testing.assert_array_equal(guide(c, u, 5.0), [5.0, -6.0])


def _sample(sampler, **options):
    return sampler.sample(fixture_velocity, jnp.zeros(SHAPE), **options)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: RCM(5), "num_steps=5.*1 to 4"),
        (lambda: RCM(4, 10.0), "sigma_max=10.0.*above 14.1"),
        (lambda: Euler(0), "num_steps=0"),
        (lambda: Euler(10, -3.0), "shift=-3.0"),
        (lambda: UniPC(10, math.inf), "shift=inf"),
        (lambda: UniPC(10, 5.0, 1e9), "sigma_max=1000000000.0.*log-SNR"),
        (lambda: UniPC(10, 5.0, 1e30), "sigma_max=1e[+]30.*log-SNR"),
        (lambda: _sample(RCM()), "give key= or noise=, or set ode=True"),
        (
            lambda: _sample(RCM(), noise=jnp.zeros((3, *SHAPE))),
            r"noise.shape=\(3, 2, 3, 4, 5\).*\(4, 2, 3, 4, 5\)",
        ),
        (lambda: _sample(RCM(ode=True), start=3, stop=2), "start=3, stop=2"),
        (lambda: _sample(RCM(ode=True), stop=5), "stop=5.*4 steps"),
        (lambda: _sample(Euler(10), start=-1), "start=-1"),
        (lambda: _sample(UniPC(10), stop=5), "stop=5.*history"),
        (lambda: Euler(10).sample(lambda x, t: x[:1], jnp.zeros(SHAPE)), r"v.shape=\(1, 3, 4, 5\)"),
    ],
)
def test_bad_values_are_named(call, match):
    with pytest.raises(UserError, match=match):
        call()
