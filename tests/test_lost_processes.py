"""A run of the tests ends, as failed, where a test takes its process with it or never ends."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SETTINGS = Path(__file__).parents[1] / "pyproject.toml"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("os.abort()", "Fatal Python error: Aborted"),
        ("lock = threading.Lock(); lock.acquire(); lock.acquire()", "Timeout"),
    ],
)
def test_the_run_fails(tmp_path, body, said):
    source = f"""
        import os, threading

        def test_that_passes():
            pass

        def test_that_does_not_return():
            {body}
    """
    (tmp_path / "test_it.py").write_text(textwrap.dedent(source))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", SETTINGS, "-n", "1", "-p", "no:cacheprovider", tmp_path]
        + (["-o", "faulthandler_timeout=1"] if said == "Timeout" else []),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode, run.stdout
    assert said in run.stdout + run.stderr
    assert "test_that_does_not_return" in run.stdout + run.stderr
