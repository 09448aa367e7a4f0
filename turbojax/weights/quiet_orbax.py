"""Orbax without what it prints, of which users can make nothing.

It logs 25 lines for each file at the level of our own messages, through absl's one logger, so that no level of its own
silences it. Where a write or a read fails, for a full disk say, it raises the first failure, which our errors quote.
The others go to standard error by three ways, as tracebacks: tasks that nobody awaits (asyncio's log), coroutines that
end with the interpreter (`sys.unraisablehook`), and coroutines that never ran (a warning). Only Orbax' own are dropped.
"""

import functools
import logging as standard_logging
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import logging

_READ_OR_WRITE = re.compile("orbax|TensorStore|local file")  # in the reports of Orbax' tasks


@functools.cache
def orbax() -> ModuleType:
    """Imports orbax.checkpoint, which takes a second or more, and silences it."""
    import orbax.checkpoint as ocp

    logging.get_absl_logger().addFilter(lambda record: "orbax" not in Path(record.pathname).parts)
    standard_logging.getLogger("asyncio").addFilter(lambda record: not _READ_OR_WRITE.search(record.getMessage()))
    warnings.filterwarnings("ignore", message="coroutine '(async_serialize|_read_array)")
    hook = sys.unraisablehook

    def without_coroutines(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        of_orbax = code is not None and "orbax" in Path(code.co_filename).parts
        if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = without_coroutines
    return ocp
