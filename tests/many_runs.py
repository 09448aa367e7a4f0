"""Runs scripts with many command lines, each forked from one process that has imported everything.

Importing takes seconds, forking none; the arguments are further modules to import. Reads
[[script, argument, ...], ...] as JSON from stdin and writes
[[exit code, stdout, stderr], ...] as JSON to stdout.
"""

import importlib
import json
import os
import runpy
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

IMPORTED = ("turbojax.app.session", "turbojax.weights.convert", "turbojax.app.cli", "ml_collections.config_flags")


def run(script: str, *arguments: str) -> tuple[int, str, str]:
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdout", "stderr")]
        if (child := os.fork()) == 0:
            for descriptor, stream in enumerate(streams, start=1):
                os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), descriptor)
            sys.argv = [script, *arguments]
            code = 0
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        status = os.waitpid(child, 0)[1]
        return os.waitstatus_to_exitcode(status), *(stream.read_text() for stream in streams)


if __name__ == "__main__":
    for module in (*IMPORTED, *sys.argv[1:]):
        importlib.import_module(module)
    warnings.filterwarnings("ignore", message="os.fork")  # no JAX backend has been started in this process
    print(json.dumps([run(*case) for case in json.load(sys.stdin)]))
