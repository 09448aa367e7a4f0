"""Runs damaged files through their readers in a process of its own, with limits of time and memory for each.

The worker reports a line an input. What it does not survive is its last input's fault: it is started again behind it.
"""

import argparse
import collections
import functools
import json
import os
import queue
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

SECONDS = 5  # of the processor, for an input
MEMORY = 100 * 2**20  # bytes, and four times the input's
LONGEST = 1500  # characters of an error
SILENCE = 120  # seconds without a report, until the worker is taken for hanging; other programs may run beside it
ROOT = Path(__file__).resolve().parents[2]


class Failure(NamedTuple):
    """An input that is neither read nor refused in a sentence: `--inputs=NUMBER` runs it alone."""

    number: int
    kind: str
    outcome: str
    detail: str


class Summary(NamedTuple):
    """Counts by reader and outcome; what failed; the most seconds and bytes that an input took, and its number."""

    counts: dict[str, dict[str, int]]
    failures: list[Failure]
    slowest: tuple[float, int]
    largest: tuple[float, int]


class OutOfTimeError(BaseException):
    """Not an Exception, so that no reader takes it for the file's."""


def run(numbers: range, *, seed: int) -> Summary:
    """Inputs by number: those thought of come first, then those drawn from the seed."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    failures, slowest, largest, first = [], (0.0, 0), (0.0, 0), numbers.start
    while first < numbers.stop:
        with tempfile.TemporaryFile("w+") as errors:
            for report in reports(range(first, numbers.stop), seed, errors):
                if "died" in report:
                    errors.seek(0)
                    if not report["ready"]:
                        raise RuntimeError(f"the worker did not start: {errors.read()}")
                    report |= {"number": first, "kind": "?", "detail": f"{report.pop('died')}: {errors.read()[-2000:]}"}
                first = report["number"] + 1
                counts[report["kind"]][report["outcome"]] += 1
                slowest = max(slowest, (report["seconds"], report["number"]))
                largest = max(largest, (report["memory"], report["number"]))
                if report["outcome"] not in ("read", "refused"):
                    failures.append(Failure(*(report[name] for name in Failure._fields)))
    return Summary({kind: dict(counter) for kind, counter in sorted(counts.items())}, failures, slowest, largest)


def reports(numbers: range, seed: int, errors: Any):
    """Yields what a worker says of these inputs, and how it ended if that was before the last."""
    command = [
        sys.executable,
        "-m",
        "tests.fuzz",
        "--worker",
        f"--seed={seed}",
        f"--inputs={numbers.start}:{numbers.stop}",
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    lines: queue.Queue[str | None] = queue.Queue()

    def listen() -> None:
        for line in worker.stdout:
            lines.put(line)
        lines.put(None)

    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=environment
    ) as worker:
        threading.Thread(target=listen, daemon=True).start()
        died, ready, last = "", False, numbers.start - 1
        while not died and last < numbers.stop - 1:
            try:
                line = lines.get(timeout=SILENCE)
            except queue.Empty:
                died = f"no report for {SILENCE} seconds"
                continue
            if line is None:
                died = f"exit code {worker.wait()}"
                continue
            report = json.loads(line)
            if "ready" in report:
                ready = True
                continue
            last = report["number"]
            yield report
        worker.kill()
    if died:
        yield {"died": died, "ready": ready, "outcome": "crash", "seconds": 0.0, "memory": 0.0}


def work(numbers: range, *, seed: int) -> None:
    """The worker: one input after the other."""
    from tests.fuzz.hostile import all_files
    from tests.fuzz.readers import READERS, draw

    hostile = dict(enumerate(all_files()))
    limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (size_of_addresses() + 4 * 2**30, limit))  # the machine's other programs
    signal.signal(signal.SIGPROF, out_of_time)
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps({"ready": True}), flush=True)
        for number in numbers:
            kind, files = hostile.get(number) or draw(Random(f"{seed} {number}"))
            folder = Path(temporary, str(number))
            folder.mkdir()
            for name, content in files.items():
                (folder / name).write_bytes(content)
            report = measured(functools.partial(READERS[kind], folder), size=sum(map(len, files.values())))
            print(json.dumps({"number": number, "kind": kind} | report), flush=True)
            shutil.rmtree(folder)


def measured(read: Any, *, size: int) -> dict[str, Any]:
    """How reading went, in seconds of the processor and bytes of memory."""
    from turbojax.errors import UserError

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = peak(), time.process_time()
    outcome, detail = "read", ""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        read()
    except UserError as error:
        outcome, detail = "refused", str(error)
        if len(detail) > LONGEST or not detail.isprintable():
            outcome, detail = "no sentence", f"{len(detail)} characters: {detail[:300]!r}"
        elif "allocate" in detail or "MemoryError" in detail:
            outcome = "memory"
    except OutOfTimeError:
        outcome = "slow"
    except Exception as error:
        import traceback

        outcome, detail = "traceback", "".join(traceback.format_exception(error)[-3:])[-1500:]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    memory = peak() - before
    if memory > 4 * size + MEMORY and outcome in ("read", "refused"):
        outcome, detail = "memory", f"{memory / 2**20:.0f} MiB for {size} bytes: {detail[:200]}"
    return {"outcome": outcome, "detail": detail, "seconds": time.process_time() - start, "memory": memory}


def out_of_time(signum: int, frame: Any) -> None:
    raise OutOfTimeError


def peak() -> int:
    """The most bytes of memory that this process had; not by getrusage, which begins with what its parent had."""
    (kilobytes,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def size_of_addresses() -> int:
    """Bytes of addresses that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", default="20000", help="how many, or FIRST:END of their numbers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", action="store_true", help="used by the program itself")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    first, _, end = arguments.inputs.rpartition(":")
    numbers = range(int(first or 0), int(end))
    if arguments.worker:
        work(numbers, seed=arguments.seed)
        return
    start = time.monotonic()
    summary = run(numbers, seed=arguments.seed)
    for failure in summary.failures:
        print(f"{failure.number} {failure.kind}: {failure.outcome}: {failure.detail}\n")
    for kind, counter in summary.counts.items():
        print(f"{kind:16}", ", ".join(f"{count} {outcome}" for outcome, count in sorted(counter.items())))
    print(f"{len(numbers)} inputs of seed {arguments.seed} in {time.monotonic() - start:.0f} s")
    (seconds, slowest), (memory, largest) = summary.slowest, summary.largest
    print(f"at most {seconds:.1f} s (input {slowest}) and {memory / 2**20:.0f} MiB (input {largest})")
    print(f"{len(summary.failures)} failed")
    sys.exit(bool(summary.failures))
