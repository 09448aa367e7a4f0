"""Damaged and hostile files, some of those that `python -m tests.fuzz` makes: a valid result or one sentence."""

import subprocess
import sys

import pytest

from tests.fuzz import files, run
from tests.fuzz.readers import READERS, SMALL
from turbojax.errors import UserError

INPUTS = 700  # about 220 that were thought of, the others drawn; a dozen seconds of one core
SEED = 0


def test_damaged_files():
    summary = run.run(range(INPUTS), seed=SEED)
    assert sum(sum(counter.values()) for counter in summary.counts.values()) == INPUTS
    assert summary.counts.keys() == READERS.keys()
    assert all(counter["refused"] > 10 for counter in summary.counts.values())
    assert not summary.failures, "\n\n".join(map(str, summary.failures[:5]))


WHOLE = {
    "safetensors": {"x.safetensors": files.to_safetensors(files.networks()["tensors"][0].items(), {"a": "b"})},
    "pth": {"x.pth": files.to_pth(SMALL)},
    "unchanged pth": {"unchanged.pth": files.to_pth(SMALL)},
    "convert": {"x.pth": files.to_pth(files.networks()["transformer"][0])},
    "config.json": {
        "config.json": files.to_json(files.PUBLISHED),
        "x.safetensors": files.to_safetensors(files.networks()["transformer"][1].items()),
    },
    "turbojax.json": {"turbojax.json": files.to_json(files.CONFIGURATION)},
    "header": {"x.safetensors": files.to_safetensors(files.networks()["transformer"][1].items(), {"num_heads": "2"})},
    "index": files.sharded(files.networks()["tensors"][0]),
    "shards": files.shards(),
}


@pytest.mark.parametrize("kind", READERS)
def test_whole_files_are_read(tmp_path, kind):
    """The files that are damaged there are valid: else all of it would be refused for another reason."""
    networks = files.networks().get(kind, [])
    folders = [{"x.safetensors": files.to_safetensors(one.items())} for one in networks]
    folders += [{"x.pth": files.to_pth(one)} for one in networks]
    for i, folder in enumerate(folders or [WHOLE[kind]]):
        place = tmp_path / str(i)
        place.mkdir()
        for name, content in folder.items():
            (place / name).write_bytes(content)
        READERS[kind](place)


def raising(error):
    def read():
        raise error

    return read


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (lambda: None, "read"),
        (raising(UserError("x is damaged")), "refused"),
        (raising(UserError("x is damaged:\nsee there")), "no sentence"),
        (raising(UserError("x" * 2000)), "no sentence"),
        (raising(ValueError("x is damaged")), "traceback"),
        (raising(UserError("x is damaged: Unable to allocate 1 TiB")), "memory"),
    ],
)
def test_what_counts_as_failed(read, outcome):
    assert run.measured(read, size=0)["outcome"] == outcome


@pytest.mark.parametrize(
    ("read", "outcome"),
    [("bytearray(b'x') * 2**28", "memory"), ("bytearray(b'x') * 2**20", "read"), ("exec('while True: pass')", "slow")],
)
def test_limits(read, outcome):
    code = f"""
import signal
from tests.fuzz import run
run.SECONDS = {0.5 if outcome == "slow" else 60}
signal.signal(signal.SIGPROF, run.out_of_time)
print(run.measured(lambda: {read}, size=0)["outcome"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=run.ROOT, check=True)
    assert done.stdout == f"{outcome}\n"
