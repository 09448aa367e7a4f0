"""Time, memory and surroundings of a measurement, and the JSON file that keeps it."""

import datetime
import importlib.metadata
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax

from turbojax.files import write_json
from turbojax.memory.planner import device_limit, memory_stats

T = TypeVar("T")


def command_line() -> str:
    """Returns this process's command, without the file that is written."""
    words = [word for word in sys.argv if not word.startswith("--out=")]
    return " ".join(words if words[0].startswith("turbojax ") else ["python", *words])


def environment() -> dict[str, Any]:
    """Returns device, versions, command and date."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "triton", "jax-triton", "numpy")
    return {
        "device": device.device_kind,
        "device_memory_limit": device_limit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "command": command_line(),
        "date": datetime.date.today().isoformat(),
    }


def version(package: str) -> str | None:
    """Returns the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_bytes() -> int | None:
    """Returns the most bytes in use on the device since the process began; None where the device does not count."""
    return memory_stats().get("peak_bytes_in_use")


def temporary_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Returns the bytes that a program allocates besides its arguments and results; None where XLA does not say."""
    return getattr(compiled.memory_analysis(), "temp_size_in_bytes", None)


def timed_calls(function: Callable[[], T], calls: int) -> tuple[list[float], T]:
    """Returns the wall-clock seconds of each of some calls, the first of which compiles, and the last one's result."""
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        result = jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return seconds, result


def median_seconds(function: Callable[[], Any], *, repeats: int = 5) -> float:
    """Returns the median wall-clock seconds of a call that returns arrays, after one call to warm up."""
    return statistics.median(timed_calls(function, 1 + repeats)[0][1:])


def seconds_per_call(function: Callable, arguments: list[tuple], *, calls: int = 20) -> float:
    """Returns the median over repeats of a run of calls that go to the device without waiting, after a warm-up.

    With few calls a run the first launch and the wait at the end, 0.1 ms together, would count against small shapes.
    """

    def run() -> Any:
        last = None
        for i in range(calls):
            last = function(*arguments[i % len(arguments)])
        return last

    return median_seconds(run) / calls


def save(result: dict[str, Any], path: Path) -> None:
    """Writes a result as JSON, with its environment."""
    write_json(path, environment() | result)
