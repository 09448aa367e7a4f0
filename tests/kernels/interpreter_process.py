"""Runs a file of tests with the Triton interpreter, which a process has from its start or not at all."""

import faulthandler
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def run_in_the_interpreter(file: str, config: pytest.Config) -> None:
    """Runs the tests of one file beside this one, slow ones as this process does; raises AssertionError with pytest's
    output where any fails."""
    faulthandler.cancel_dump_traceback_later()  # the limit of one test's time is that of each of them
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "0",
            "-m",
            config.option.markexpr,
            "-p",
            "no:cacheprovider",
            FOLDER / file,
        ],
        cwd=FOLDER.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]
