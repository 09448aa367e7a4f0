"""The parity program takes what a case is from the fixture: folders of the format with other cases pass, too.

Fixtures are changed in a way whose results are known: renamed, repeated along the batch, cut to other axes, or with
other numbers put in and the results computed here in NumPy.
"""

import itertools
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.golden_io import GOLDEN, Incomplete, load, number
from tests.parity import compare
from tests.parity import train as parity_train

pytestmark = pytest.mark.usefixtures("exact_matmuls")


def read(stem):
    """(config, tensors as they are stored) of a fixture."""
    with safe_open(GOLDEN / f"{stem}.safetensors", "np") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def check(folder, stem, config, tensors):
    """Every output of a fixture that is written to the folder; returns how many."""
    path = folder / f"{stem}.safetensors"
    tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    save_file(tensors, path, {"config": json.dumps(config)})
    rows = list(compare.check_file(path))
    assert [row for row in rows if not row[-1]] == []
    return len(rows)


def renamed(names, config, tensors, where="cases"):
    """Cases under other names, in the settings, the keys and the tolerances."""

    def other(key):
        parts = key.split(".")
        return ".".join(f"another-{part}" if part in names else part for part in parts)

    changed = config | {where: {f"another-{name}": config[where][name] for name in names}}
    if "tolerance" in config:
        changed["tolerance"] = {other(key): value for key, value in config["tolerance"].items()}
    return changed, {other(key): value for key, value in tensors.items()}


def without(tensors, *names):
    """Without the cases of these names."""
    return {key: value for key, value in tensors.items() if not set(key.split(".")) & set(names)}


def only_cases(config, tensors, *names):
    left = set(config["cases"]) - set(names)
    config = config | {"cases": {name: config["cases"][name] for name in names}}
    if "tolerance" in config:
        config["tolerance"] = without(config["tolerance"], *left)
    return config, without(tensors, *left)


@pytest.mark.parametrize(
    ("stem", "cases"),
    [("sampler", ("i2v_4step_sde", "unipc_shift3")), ("sla", ("b",)), ("sagesla", ("a",)), ("vae", ("z1",))],
)
def test_other_names(stem, cases, tmp_path):
    config, tensors = renamed(cases, *only_cases(*read(stem), *cases))
    assert check(tmp_path, stem, config, tensors) > 0


def test_other_networks_of_a_sampler(tmp_path):
    """v(x, t) = tanh(0.7 x) t + 0.25 x, three steps of Euler with shift 2."""
    config, tensors = only_cases(*read("sampler"), "euler_shift3")
    config["fake_network"] = "v(x, t) = tanh(0.7 * x) * t + c * x with t = timesteps / 1000 and c = 0.25"
    config["cases"] = {"few": {"sampler": "euler", "steps": 3, "shift": 2.0, "sigma_max": 50.0}}
    x = tensors["in.euler_shift3.init_noise"].repeat(2, axis=0)
    first = 50 / 51
    times = np.append(np.linspace(first / (2 - first), 0, 4)[:-1], 0.0)
    times = 2 * times / (1 + times)
    states, inputs = [x], {"in.few.init_noise": x}
    for now, then in itertools.pairwise(times):
        velocity = np.tanh(0.7 * states[-1]) * now + 0.25 * states[-1]
        states.append(states[-1] + (then - now) * velocity)
    expected = {"out.few.sigmas": times[:-1], "out.few.timesteps": 1000 * times[:-1], "out.few.x": np.stack(states)}
    if tensors["out.euler_shift3.x"].ndim == x.ndim:
        expected["out.few.x"] = states[-1]
    assert check(tmp_path, "sampler", config, inputs | expected) == 3


def test_rows_in_several_axes(tmp_path):
    config, tensors = read("int8_linear")
    for key in ("in.x", "out.x_q", "out.y", "out.y_f32", "out.y_bf16"):
        tensors[key] = tensors[key].reshape(2, 7, 10, -1)
    assert check(tmp_path, "int8_linear", config, tensors) == 7
    tensors["out.x_q"] = tensors["out.x_q"].reshape(140, -1)
    assert check(tmp_path, "int8_linear", config, tensors) == 7


@pytest.mark.parametrize("text", ["-0p5", "m0p5", "-0.5"])
def test_a_negative_weight_of_a_merge(text, tmp_path):
    config, tensors = read("merge")
    _, values = load(GOLDEN / "merge.safetensors")
    changed = {key: value for key, value in tensors.items() if key.startswith("in.")}
    dtypes = {key: value for key, value in config["dtypes"].items() if key.startswith("in.")}
    tolerance = {}
    for key, whole in tensors.items():
        if not key.startswith("out.w1."):
            continue
        name = key.removeprefix("out.w1.")
        three = [values.get(f"in.{who}.{name}") for who in ("base", "diff_base", "diff_target")]
        new = f"out.w{text}.{name}"
        changed[new], dtypes[new], tolerance[new] = whole, config["dtypes"][key], config["tolerance"][key]
        if all(x is not None and x.shape == three[0].shape for x in three):
            base, diff_base, diff_target = (x.astype(np.float32) for x in three)
            merged = base + np.float32(-0.5) * (diff_target - diff_base)
            kind = config["dtypes"][key]
            changed[new] = np.asarray(jnp.asarray(merged).astype(kind)).astype(whole.dtype)
    config |= {"w": [-0.5], "dtypes": dtypes, "tolerance": tolerance}
    assert check(tmp_path, "merge", config, changed) == len(tolerance) > 10


def test_other_shifts(tmp_path):
    config, tensors = read("train_schedule")
    for key in [key for key in tensors if re.match(r"out\.(uniform_)?shift|out\.ema_beta_shift", key)]:
        del tensors[key], config["tolerance"][key]
    uniform, rf, step = tensors["in.uniform"].astype(np.float64), tensors["in.rf"], tensors["in.iteration"]
    s = 2.5 * uniform / (1 + 1.5 * uniform)
    i = step + 7.0
    kept = np.where(i < 1, 0, (1 - 1 / (i + 1)) ** (tensors["out.ema_exponent"][-1] + 1))
    new = {"uniform_shift2p5.rf": s, "uniform_shift2p5.trig": np.arctan2(s, 1 - s)}
    new |= {"uniform_shift-1.rf": uniform, "uniform_shift-1.trig": np.arctan2(uniform, 1 - uniform)}
    new |= {"shift2p5": 2.5 * rf / (1 + 1.5 * rf), "shift-2": rf, "ema_beta_shift7": kept}
    config["uniform_shift"] = [2.5, -1.0]
    config["tolerance"] |= {f"out.{key}": 5e-6 for key in new}
    config, tensors = renamed(("adamw_sla",), config, tensors | {f"out.{k}": x for k, x in new.items()}, "adamw")
    config["tolerance"] = without(config["tolerance"], "adamw_distill")
    assert check(tmp_path, "train_schedule", config, without(tensors, "adamw_distill")) > len(new)


def test_a_discrete_step_without_guidance(tmp_path):
    """As a guided one whose negative prompt is the prompt."""
    config, tensors = only_cases(*read("train_dmd"), "dcm_skip3")
    kept = {key: value for key, value in tensors.items() if not key.startswith("out.")}
    _, values = load(GOLDEN / "train_dmd.safetensors")
    guided = parity_train.recompute_dmd(config, values | {"in.text_uncond": values["in.text"]})
    expected = {key: np.asarray(value) for key, (value, _) in guided.items()}
    config["cases"]["dcm_skip3"]["guidance"] = 1.0
    del kept["in.text_uncond"]
    assert check(tmp_path, "train_dmd", config, kept | expected) > 5
    config["cases"]["dcm_skip3"]["guidance"] = 2.0
    kept["in.text_uncond"] = tensors["in.text_uncond"]
    with pytest.raises(AssertionError):
        check(tmp_path, "train_dmd", config, kept | expected)


def test_a_simulation_of_another_batch(tmp_path):
    config, tensors = renamed(("bwd_fix4",), *only_cases(*read("train_dmd"), "bwd_fix4"))
    for key in [key for key in tensors if "bwd" in key]:
        tensors[key] = np.concatenate((tensors[key], tensors[key][:, :1]), axis=1)
    tensors["in.text"] = np.concatenate((tensors["in.text"], tensors["in.text"][:1]))
    config["max_simulation_steps_fake"] = 2
    assert check(tmp_path, "train_dmd", config, tensors) == 2


def test_consistency_without_guidance(tmp_path):
    config, tensors = renamed(("fd0_noguide",), *only_cases(*read("train_scm"), "fd0_noguide"))
    config["teacher_guidance"] = 1.0
    del tensors["in.text_uncond"], tensors["out.F_teacher_uncond"], tensors["out.F_teacher"]
    for key in [key for key in tensors if re.match(r"out\.t_|out\.fd0_r", key)]:  # along the guided teacher
        del tensors[key]
    assert check(tmp_path, "train_scm", config, tensors) > 10


def test_other_batches_of_the_networks(tmp_path):
    config, tensors = read("wan21_t2v")
    for key in tensors:
        if key.startswith(("in.", "out.")) and not key.startswith("out.rope"):
            tensors[key] = tensors[key].repeat(2, axis=0)
    tensors["in.t"] = tensors["in.t"][:, 0]
    assert check(tmp_path, "wan21_t2v", config, tensors) > 10

    config, tensors = read("umt5")
    for key in tensors:
        if re.match(r"in\.(ids|mask)|out\.(x|embedding|block\d)$", key):
            tensors[key] = tensors[key][[1, 0, 1]]
    assert check(tmp_path, "umt5", config | {"lengths": [24, 17, 24]}, tensors) > 5


def test_norms_of_rows_in_several_axes(tmp_path):
    config, tensors = read("norms")
    for key in tensors:
        if "fast" in key and not key.startswith("w."):
            tensors[key] = tensors[key].reshape(1, 2, 2, -1)
    assert check(tmp_path, "norms", config, tensors) > 5


def test_another_share_of_blocks(tmp_path):
    """Blocks of 64 by 64, half of five: the two whose mean keys fit best."""
    config, tensors = only_cases(*read("sla"), "b")
    for key in [key for key in tensors if "topk067" in key]:
        del tensors[key]
    _, values = load(GOLDEN / "sla.safetensors")
    q, k = (values[f"in.b.{name}"][0, :, 0].astype(np.float64) for name in "qk")
    means = [x.reshape(-1, 64, x.shape[-1]).mean(axis=1) for x in (q, k - k.mean(axis=0))]
    scores = means[0] @ means[1].T
    tensors["out.b.sparse_map_q64_k64_topk05"] = (scores >= np.sort(scores)[:, -2:-1]).astype(np.int8)[None, None]
    assert check(tmp_path, "sla", config, tensors) > 5


def test_the_vae_beside_the_condition(tmp_path):
    config, tensors = renamed(("same",), *only_cases(*read("i2v_condition"), "same"))
    config["vae"] = "weights in small_vae.safetensors"
    with pytest.raises(Incomplete, match=r"its VAE, 'weights in small_vae.safetensors', is no file beside it"):
        check(tmp_path, "i2v_condition", config, tensors)
    shutil.copy(GOLDEN / "vae.safetensors", tmp_path / "small_vae.safetensors")
    config["settings"] = [["480p", "9:16"]]
    tensors = {key: x for key, x in tensors.items() if "adaptive" not in key or key.endswith("480p.9x16")}
    assert check(tmp_path, "i2v_condition", config, tensors) == 4


@pytest.mark.parametrize(
    ("stem", "missing"),
    [
        ("norms", "eps"),
        ("norms", "in.x"),
        ("merge", "w"),
        ("sampler", "boundary"),
        ("sampler", "in.t2v_1step.init_noise"),
    ],
)
def test_a_missing_parameter_is_told(stem, missing, tmp_path, capsys):
    config, tensors = read(stem)
    config.pop(missing, None)
    tensors.pop(missing, None)
    save_file(tensors, tmp_path / f"{stem}.safetensors", {"config": json.dumps(config)})
    assert compare.main([str(tmp_path)]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{stem} +refused: it has no {re.escape(missing)}, among .* FAIL", shown[0]), shown[0]
    assert shown[-1] == "0 passed, 1 failed"


def test_what_turbojax_fixes_otherwise_is_refused(tmp_path):
    config, tensors = read("int8_linear")
    with pytest.raises(Incomplete, match="block=64, which turbojax fixes at 128"):
        check(tmp_path, "int8_linear", config | {"block": 64}, tensors)


@pytest.mark.parametrize(("text", "value"), [("0p5", 0.5), ("1", 1), ("-1p25", -1.25), ("m2", -2), ("1e-05", 1e-5)])
def test_numbers_in_keys(text, value):
    assert number(text) == value
    with pytest.raises(Incomplete, match=r"'0x5' in a key is no number"):
        number("0x5")
