"""Recomputes golden fixtures with turbojax and compares every recorded output.

    python -m tests.parity FOLDER

Prints one line a key (file, key, largest absolute error, tolerance, ok or FAIL) and ends with "N passed, N failed";
exit code 1 on a failure, or where nothing was compared. A key that turbojax does not recompute is a failure, and so is
a fixture that lacks a parameter of its cases; a file of a kind that no module here recomputes is told as not covered.
Names of cases, sizes, settings and tolerances are the fixture's: any folder of the format will do.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tests.golden_io import Incomplete, load
from tests.parity import (
    condition,
    int8,
    merge,
    norms,
    sage,
    sampler,
    sla,
    train,
    train_schedule,
    umt5,
    vae,
    wan,
)

RELATIVE = 2e-6  # of the largest value: the least tolerance that the fixtures' tables give
Recompute = Callable[[dict, dict[str, np.ndarray]], dict[str, tuple[np.ndarray, float]]]

FIXTURES: dict[str, Recompute] = {
    "i2v_condition": condition.recompute,
    "int8_linear": int8.recompute,
    "merge": merge.recompute,
    "norms": norms.recompute,
    "sagesla": sage.recompute,
    "sampler": sampler.recompute,
    "sla": sla.recompute,
    "train_dmd": train.recompute_dmd,
    "train_schedule": train_schedule.recompute,
    "train_scm": train.recompute_scm,
    "train_sla": train.recompute_sla,
    "umt5": umt5.recompute,
    "vae": vae.recompute,
    "wan21_i2v_clip": wan.recompute,
    "wan21_official": wan.recompute,
    "wan21_t2v": wan.recompute,
    "wan21_t2v_hd128": wan.recompute,
    "wan21_t2v_sla": wan.recompute,
    "wan22_i2v": wan.recompute,
}


def check_file(path: Path) -> Iterator[tuple[str, float, float, bool]]:
    """Key, largest absolute error, tolerance, and whether it is met, for every comparable `out.*` key of a fixture."""
    config, t = load(path)
    values = FIXTURES[path.stem](config, t)
    for key in comparable(config, t):
        if key not in values:
            yield key, float("nan"), 0.0, False
            continue
        value, tolerance = values[key]
        expected = np.asarray(t[key], np.float64)
        tolerance = tolerance_of(config, key, expected, tolerance)
        if value.shape != expected.shape:
            yield key, float("inf"), tolerance, False
            continue
        error = float(np.abs(np.asarray(value, np.float64) - expected).max(initial=0.0))
        yield key, error, tolerance, error <= tolerance


def tolerance_of(config: dict, key: str, expected: np.ndarray, usual: float) -> float:
    """The fixture's own, if it has one; else the usual one of the key's kind, and more for values that are large."""
    if key in config.get("tolerance", ()):
        return config["tolerance"][key]
    return max(usual, RELATIVE * float(np.abs(expected).max(initial=0.0))) if usual else 0.0


def comparable(config: dict, t: dict[str, np.ndarray]) -> list[str]:
    """The `out.*` keys. A fixture that has a table of tolerances names them there: its other keys are notes."""
    keys = sorted(name for name in t if name.startswith("out."))
    return [key for key in keys if key in config.get("tolerance", keys)]


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0]) if len(arguments) == 1 else None
    files = sorted(folder.glob("*.safetensors")) if folder else []
    if not files:
        print(f"usage: python -m tests.parity FOLDER, a folder with fixtures (given: {' '.join(arguments)})")
        return 2
    passed = failed = 0
    not_covered = [path.stem for path in files if path.stem not in FIXTURES]
    for path in files:
        if path.stem in not_covered:
            print(f"{path.stem:18} not covered: no module here recomputes it")
            continue
        try:
            for key, error, tolerance, ok in check_file(path):
                print(f"{path.stem:18} {key:44} {error:8.1e} {tolerance:8.1e} {'ok' if ok else 'FAIL'}")
                passed, failed = passed + ok, failed + (not ok)
        except Incomplete as refusal:
            print(f"{path.stem:18} refused: {refusal} FAIL")
            failed += 1
    if not_covered:
        print(f"not covered: {', '.join(not_covered)}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0
