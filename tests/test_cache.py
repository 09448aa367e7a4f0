"""Compiled programs in the user's cache: a second process finds them, and the user's own choice stays."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from turbojax.cache import MIN_COMPILE_SECONDS, use_compilation_cache, user_cache

# Compiles ahead of time, with donated arguments, after a first compilation without a cache; prints hits and misses.
PROGRAM = """
import functools, json, jax, jax.numpy as jnp
from turbojax.cache import use_compilation_cache

jax.jit(lambda x: x + 1)(1.0)
seen = []
jax.monitoring.register_event_listener(lambda event, **options: seen.append(event.rpartition("/")[2]))
use_compilation_cache()

@functools.partial(jax.jit, static_argnames="power", donate_argnames="state")
def step(x, state, *, power):
    return jnp.linalg.qr(jnp.sin(x @ x.T))[0] ** power, state + x

x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
compiled = step.lower(x, x, power=2).compile()
out, state = step(jnp.eye(64), jnp.zeros((64, 64)), power=3)
print(json.dumps([seen.count("cache_hits"), seen.count("cache_misses"), float(compiled(state, out)[0][0, 0])]))
"""


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """JAX without a cache folder, a user's cache in tmp_path; afterwards all is as before."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")
    before = {name: jax.config.values[name] for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def folder() -> str | None:
    return jax.config.values["jax_compilation_cache_dir"]


def test_a_second_process_finds_the_programs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.001")
    command = [sys.executable, "-c", PROGRAM]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT) for _ in range(2)]
    (hits, misses, first), (hits_again, misses_again, second) = (json.loads(run.stdout) for run in runs)
    assert hits == 0
    assert hits_again == misses >= 2
    assert misses_again == 0
    assert first == second
    assert list((tmp_path / "turbojax" / "xla").glob("jit_step*"))


ROOT = Path(__file__).parents[1]


def test_the_users_cache(unset, tmp_path):
    use_compilation_cache()
    assert folder() == str(tmp_path / "turbojax" / "xla") == str(user_cache() / "xla")
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == MIN_COMPILE_SECONDS


def test_the_users_choice_stays(unset, tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    use_compilation_cache()
    assert folder() == str(tmp_path / "own")
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    use_compilation_cache()
    assert folder() is None
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "3")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 3.0)
    use_compilation_cache()
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 3


def test_without_a_folder_there_is_a_warning(unset, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, logger="absl"):
        use_compilation_cache()
    assert [record.message.partition(":")[0] for record in caplog.records] == ["Compiled programs are not kept"]
    assert folder() is None
