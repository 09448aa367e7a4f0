"""Compiled programs in the user's cache: a second process finds them, and the user's own choice stays."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from turbojax.pipeline import program_cache
from turbojax.pipeline.program_cache import MIN_COMPILE_SECONDS, use_compilation_cache, user_cache

# Compiles ahead of time, with donated arguments, after a first compilation without a cache; prints hits and misses.
PROGRAM = """
import functools, json, jax, jax.numpy as jnp
from turbojax.pipeline.program_cache import use_compilation_cache

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


ROOT = Path(__file__).parents[2]


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


def test_without_a_home_folder_there_is_a_warning(unset, homeless, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        use_compilation_cache()
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("Compiled programs are not kept: no home folder is known")
    assert folder() is None


@pytest.fixture
def programs(unset, tmp_path, monkeypatch):
    """A folder that keeps every program; compiles one and returns its result with [hits, misses]."""
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    seen: list[str] = []
    monkeypatch.setattr(program_cache.jax_cache.monitoring, "record_event", lambda event, **options: seen.append(event))

    def once() -> tuple[float, int]:
        use_compilation_cache()
        seen.clear()
        jax.clear_caches()
        program = jax.jit(lambda x: jnp.sin(x @ x.T) ** 2).lower(jax.ShapeDtypeStruct((4, 4), jnp.float32)).compile()
        result = program(np.eye(4, dtype=np.float32))
        return float(np.asarray(result)[0, 0]), sum(event.endswith("cache_misses") for event in seen)

    return once


DAMAGES = {
    "empty": lambda entry: b"",
    "cut": lambda entry: entry[:-1],
    "zeros": lambda entry: bytes(len(entry)),
    "a bit": lambda entry: entry[:100] + bytes([entry[100] ^ 1]) + entry[101:],
    "JAX's own form": lambda entry: entry[:-32],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("own", [False, True], ids=["users cache", "JAX_COMPILATION_CACHE_DIR"])
@pytest.mark.filterwarnings("error")
def test_a_damaged_program_is_compiled_again_and_replaced(programs, tmp_path, caplog, damage, own):
    if own:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    expected = programs()
    assert expected[1] == 1
    assert programs() == (expected[0], 0)
    (entry,) = Path(folder()).glob("*-cache")
    entry.write_bytes(DAMAGES[damage](entry.read_bytes()))
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert programs() == expected
        (line,) = [record.message for record in caplog.records]
        assert line == f"Compiled programs in {folder()} are damaged: they are compiled again and replaced"
        assert programs() == (expected[0], 0)
    assert len(caplog.records) == 1


def test_an_entry_that_xla_refuses_is_replaced(programs):
    expected = programs()
    (entry,) = Path(folder()).glob("*-cache")
    program_cache.jax_cache._cache.put(
        entry.name[: -len(f"-{program_cache.processor()}-cache")], b"whole, but no program"
    )
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        assert programs() == expected
    assert programs() == (expected[0], 0)


def test_programs_for_another_processor_are_left_alone(programs, monkeypatch, caplog):
    expected = programs()
    monkeypatch.setattr(program_cache, "processor", lambda: "01234567")
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert programs() == expected
    monkeypatch.undo()
    assert len(list(Path(folder()).glob("*-cache"))) == 2
    assert not caplog.records


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("flags\t: sse avx avx512f\n", "flags\t: sse avx\n", False),
        ("flags\t: sse avx\nMHz\t: 3\n", "flags\t: avx sse\nMHz\t: 4\n", True),
        ("Features\t: asimd sve\n", "Features\t: asimd\n", False),
        ("model\t: 1\nflags\t: sse\n", "model\t: 2\nflags\t: sse\n", False),
    ],
)
def test_processors_are_told_apart_by_their_instructions(monkeypatch, one, other, same):
    names = []
    for text in (one, other):
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text)
        names.append(program_cache.processor.__wrapped__())
    assert (names[0] == names[1]) == same


def test_a_full_disk_is_a_line(programs, monkeypatch, caplog):
    def full(folder, name, value):
        (folder.path / f"{name}-cache").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(program_cache.LRUCache, "put", full)
    with caplog.at_level(logging.WARNING, logger="absl"):
        programs()
    (line,) = [record.message for record in caplog.records]
    assert line.startswith("Compiled programs are not kept in ")
    assert not list(Path(folder()).glob("*-cache"))
