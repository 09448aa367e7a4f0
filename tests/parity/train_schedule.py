"""Recomputes the fixture of what depends on time and iteration in training: train_schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.golden_io import Incomplete, Parameters, numbered
from tests.parity.train import Recomputed, Values, with_tolerances
from turbojax.diffusion import schedules
from turbojax.train import schedule, times


def recompute(config: dict, t: dict[str, np.ndarray]) -> Recomputed:
    values = time_values(config, t) | ema_values(config, t) | phase_values(config, t["in.phase_iteration"])
    rates = [learning_rate(**{name: numbers[0] for name, numbers in case.items()}) for case in config["lr"]]
    with jax.numpy_dtype_promotion("standard"):  # Optax divides steps, which are whole numbers
        values["lr_multiplier"] = [[rate(step) for step in t["in.lr_step"]] for rate in rates]
    for name, case in config["adamw"].items():
        inputs = {key.removeprefix(f"in.{name}."): jnp.asarray(x) for key, x in t.items() if f"in.{name}." in key}
        values |= {f"{name}.{key}": x for key, x in adamw(case, Parameters(inputs)).items()}
    return with_tolerances(config, {f"out.{key}": x for key, x in values.items()})


def time_values(config: dict, t: dict[str, np.ndarray]) -> Values:
    normal, uniform = jnp.asarray(t["in.normal"]), jnp.asarray(t["in.uniform"])
    drawn = {
        f"lognormal{i}": (times.LogNormal(c["p_mean"], c["p_std"]), normal) for i, c in enumerate(config["lognormal"])
    }
    written = numbered(t, r"out\.uniform_shift(.*)\.(?:rf|trig)$")
    drawn |= {f"uniform_shift{text}": (times.UniformShift(shift), uniform) for text, shift in written.items()}
    if missing := set(config["uniform_shift"]) - set(written.values()):
        raise Incomplete(f"no key holds results of its uniform_shift {min(missing):g}")
    out: Values = {f"{name}.rf": p.rf(draw) for name, (p, draw) in drawn.items()}
    out |= {f"{name}.trig": p.trig(draw) for name, (p, draw) in drawn.items()}
    return out | {
        "rf_to_trig": schedules.trig_from_rf(t["in.rf"]),
        "rf_to_trig_float32_input": schedules.trig_from_rf(jnp.asarray(t["in.rf"], jnp.float32)),
        "trig_to_rf": schedules.rf_from_trig(t["in.trig"]),
        **{f"shift{text}": shifted(t["in.rf"], shift) for text, shift in numbered(t, r"out\.shift(.*)$").items()},
    }


def shifted(rf: np.ndarray, shift: float) -> jax.Array:
    """Times of a shift; one that is not positive leaves them."""
    return times.UniformShift(shift).rf(rf)


def ema_values(config: dict, t: dict[str, np.ndarray]) -> Values:
    rates, last = config["ema_rates"], config["ema_weights_rate"]
    ema, averages = jnp.asarray(t["in.ema_init"]), []
    for i, weights in enumerate(t["in.ema_source"]):
        ema = schedule.ema_update(ema, jnp.asarray(weights), schedule.ema_beta(i, rate=last))
        averages.append(ema)
    return {
        "ema_exponent": [schedule.ema_exponent(rate) for rate in rates],
        "ema_beta": [[schedule.ema_beta(i, rate=rate) for i in t["in.iteration"]] for rate in rates],
        "ema_weights": averages,
        **{
            f"ema_beta_shift{text}": [schedule.ema_beta(i, rate=rates[-1], shift=int(by)) for i in t["in.iteration"]]
            for text, by in numbered(t, r"out\.ema_beta_shift(.*)$").items()
        },
    }


def phase_values(config: dict, iterations: np.ndarray) -> Values:
    renamed = [{key.replace("update_freq", "freq"): x for key, x in case.items()} for case in config["phases"]]
    rows = [[phase(schedule.Phases(**case), i) for i in iterations] for case in renamed]
    return {f"phase.{key}": [[values[key] for values in row] for row in rows] for key in rows[0][0]}


def phase(phases: schedule.Phases, iteration: int) -> Values:
    student, effective = phases.is_student(iteration), phases.effective_iteration(iteration)
    plan = phases.at(int(iteration), ema_rate=0.1)
    return {
        "is_student": student,
        "emit_cm": plan.consistency,
        "emit_dmd": plan.matching,
        "emit_critic": not student,
        "effective_iteration": effective,
        "effective_iteration_fake": phases.effective_iteration_fake(iteration),
        "n_steps_student": effective % phases.max_simulation_steps + 1,  # recorded for the critic's iterations, too
        "n_steps_critic": 0 if student else phases.simulation_steps(iteration),
        "warmup_ratio": phases.warmup_ratio(iteration),
    }


def learning_rate(warm_up_steps: int, cycle_lengths: float, f_start: float, f_max: float, f_min: float):
    return schedule.learning_rate(
        f_max, warm_up=warm_up_steps, start=f_start / f_max, end=f_min / f_max, cycle=cycle_lengths
    )


def adamw(case: dict, inputs: dict[str, jax.Array]) -> Values:
    """The weights after each step of optax's AdamW at the recorded rates; NAME has its gradients in grad_NAME."""
    b1, b2 = case["betas"]
    rates = jnp.asarray(inputs["lr"], jnp.float32)
    optimizer = optax.adamw(lambda n: rates[n], b1, b2, eps=case["eps"], weight_decay=case["weight_decay"])

    def step(carry, gradients):
        weights, state = carry
        updates, state = optimizer.update(gradients, state, weights)
        weights = optax.apply_updates(weights, updates)
        return (weights, state), weights

    names = [name.removeprefix("grad_") for name in inputs if name.startswith("grad_")]
    weights, gradients = ({name: inputs[kind + name] for name in names} for kind in ("", "grad_"))
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        _, after_each = jax.lax.scan(step, (weights, optimizer.init(weights)), gradients)
    return after_each
