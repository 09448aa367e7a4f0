"""Every golden fixture in float32 by `python -m tests.parity`, its exit codes, and the bfloat16 network's error."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.closeness import relative_error
from tests.golden_io import GOLDEN, load
from tests.parity import compare
from tests.parity.wan import build, channels_first, channels_last, inputs

pytestmark = pytest.mark.usefixtures("exact_matmuls")

FILES = sorted(GOLDEN.glob("*.safetensors"))
WAN = [file for file in FILES if file.stem.startswith("wan")]
names = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def test_the_fixtures_are_all_there():
    assert {file.stem for file in FILES} >= compare.FIXTURES.keys()


@names
def test_every_output(file):
    results = list(compare.check_file(file))
    assert len(results) == len(compare.comparable(*load(file))) > 0
    assert not [row for row in results if not row[-1]]


@pytest.mark.parametrize("file", WAN, ids=lambda file: file.stem)
def test_bfloat16_network(file):
    config, t = load(file)
    model = build(config, t, dtype=jnp.bfloat16)
    if "in.x.0" in t:  # the official form: lists of clips and texts
        context = np.pad(t["in.context.0"], ((0, config["args"]["text_len"] - len(t["in.context.0"])), (0, 0)))
        x, text = channels_last(t["in.x.0"])[None], jnp.asarray(context)[None]
        arguments, expected = {"x": x, "timesteps": jnp.asarray(t["in.t"][:1]), "text": text}, t["out.x.0"][None]
    else:
        arguments, expected = inputs(t), t["out.x"]
    got = channels_first(jax.jit(model.__call__)(**arguments))
    assert relative_error(got, expected) < 2e-2


def with_outputs(file: Path, target: Path, **changes) -> Path:
    """A copy of a fixture with other `out.*` values."""
    with safe_open(file, "np") as f:
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (safe_open is no dict)
        save_file(tensors | {f"out.{name}": value for name, value in changes.items()}, target, f.metadata())
    return target


def test_unknown_wrong_and_misshapen_outputs_fail(tmp_path):
    file = with_outputs(
        GOLDEN / "norms.safetensors",
        tmp_path / "norms.safetensors",
        surprise=np.zeros(3, np.float32),
        layernorm=load(GOLDEN / "norms.safetensors")[1]["out.layernorm"] + np.float32(2e-5),
        fast_rmsnorm=np.zeros(3, np.float32),
    )
    failed = {key for key, *_, ok in compare.check_file(file) if not ok}
    assert failed == {"out.surprise", "out.layernorm", "out.fast_rmsnorm"}


def test_exit_codes(tmp_path, capsys):
    shutil.copy(GOLDEN / "norms.safetensors", tmp_path)
    with_outputs(GOLDEN / "norms.safetensors", tmp_path / "another_issue.safetensors")
    assert compare.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("not covered: no module here recomputes it")
    assert lines[-2:] == ["not covered: another_issue", f"{len(lines) - 3} passed, 0 failed"]
    assert compare.main([]) == compare.main([str(tmp_path / "nothing")]) == 2
    (tmp_path / "norms.safetensors").unlink()
    assert compare.main([str(tmp_path)]) == 1  # nothing was compared


def test_a_failure_is_exit_code_1(tmp_path):
    norms = GOLDEN / "norms.safetensors"
    with_outputs(norms, tmp_path / "norms.safetensors", surprise=np.zeros(3, np.float32))
    run = subprocess.run([sys.executable, "-m", "tests.parity", tmp_path], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stdout.splitlines()[-1].endswith(" passed, 1 failed")
    (surprise,) = [line for line in run.stdout.splitlines() if "out.surprise" in line]
    assert surprise.endswith("FAIL")
