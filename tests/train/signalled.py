"""A script that sends itself a signal where it reports a step, so that no step passes before the signal arrives.

python -m tests.train.signalled SIGNAL STEP SCRIPT [ARGUMENT ...]
"""

import logging
import os
import runpy
import sys

from absl.logging import get_absl_logger

NUMBER, STEP, *COMMAND = sys.argv[1:]


def watch(record: logging.LogRecord) -> bool:
    if record.getMessage().startswith(f"Step {STEP}:"):
        os.kill(os.getpid(), int(NUMBER))
    return True


if __name__ == "__main__":
    get_absl_logger().addFilter(watch)
    sys.argv = COMMAND
    runpy.run_path(COMMAND[0], run_name="__main__")
