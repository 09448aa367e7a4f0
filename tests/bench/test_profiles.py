"""Profiles read back: one written by hand, field by field, and one of a program that ran."""

import jax
import jax.numpy as jnp
import pytest

from turbojax.bench import profiles
from turbojax.bench.profiles import Event


def field(number: int, value: int | str | bytes) -> bytes:
    """A field of a protocol buffer: a number, or the length and bytes of a text or a message."""
    if isinstance(value, int):
        return bytes([number << 3]) + varint(value)
    value = value.encode("latin-1") if isinstance(value, str) else value
    return bytes([number << 3 | 2]) + varint(len(value)) + value


def varint(value: int) -> bytes:
    head, rest = value & 127, value >> 7
    return bytes([head | 128]) + varint(rest) if rest else bytes([head])


def named(number: int, key: int, name: str) -> bytes:
    """An entry of one of a plane's two tables of names."""
    return field(number, field(1, key) + field(2, field(1, key) + field(2, name)))


def event(key: int, picoseconds: int, *statistics: bytes) -> bytes:
    own = b"".join(field(4, statistic) for statistic in statistics)
    return field(4, field(1, key) + field(2, 17) + field(3, picoseconds) + own)


def test_events(tmp_path):
    """Operations as text and as numbers of names, statistics nobody named, other fields, names that are no UTF-8."""
    ran = b"".join([
        event(1, 3_000_000, field(1, 8) + field(3, 5), field(1, 9) + field(5, "fusion.1")),
        event(300, 2**40, field(1, 9) + field(7, 10)),
        event(1, 0, field(1, 77) + field(5, "nobody named 77")),
        event(2, 1, field(1, 9) + field(7, 78)),
    ])  # fmt: skip
    line = field(1, 1) + field(2, "Stream #1") + field(3, 5) + ran
    names = named(4, 1, "kernel") + named(4, 300, "k\xff") + named(5, 9, "hlo_op") + named(5, 10, "dot.3")
    plane = field(1, 2) + field(2, "/device:GPU:0") + field(3, line) + names
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "host.xplane.pb").write_bytes(field(1, field(2, "/host:CPU")) + field(1, plane) + field(4, "vm"))
    where = "/device:GPU:0", "Stream #1"
    assert list(profiles.events(tmp_path)) == [
        Event(*where, "kernel", "fusion.1", pytest.approx(3e-6)),
        Event(*where, "k�", "dot.3", pytest.approx(2**40 * 1e-12)),
        Event(*where, "kernel", None, 0.0),
        Event(*where, "", None, pytest.approx(1e-12)),
    ]


def test_a_program_that_ran(tmp_path):
    run = jax.jit(lambda x: jnp.sin(x @ x))
    x = jnp.ones((64, 64))
    program = run.lower(x).compile()
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(program(x))
    ops = {event.op for event in profiles.events(tmp_path)} - {None}
    assert ops
    assert all(op in program.as_text() for op in ops)
    assert all(event.seconds >= 0 for event in profiles.events(tmp_path))
