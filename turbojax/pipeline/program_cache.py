"""JAX's compiled programs in the user's cache folder."""

import functools
import hashlib
import os
import platform
import re
from contextlib import suppress
from pathlib import Path

import jax
from absl import logging
from jax._src import compilation_cache as jax_cache  # has no public way to say how entries are read and written
from jax._src.lru_cache import LRUCache

from turbojax.errors import UserError
from turbojax.files import user_cache

# JAX's default, 1 s, leaves out the many small programs of loading a checkpoint.
MIN_COMPILE_SECONDS = 0.05
# Lines of /proc/cpuinfo that decide the instructions which XLA compiles for: of x86, and of Arm.
PROCESSOR = re.compile(r"^(vendor_id|cpu family|model|flags|CPU implementer|CPU part|Features)\s*:(.*)$", re.MULTILINE)


def use_compilation_cache() -> None:
    """Makes JAX keep compiled programs in the user's cache, or in the folder that JAX's own options name.

    Those are JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE and JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS,
    as environment variables or (the first two) by jax.config. A folder that cannot be written is a warning.
    """
    options = jax.config.values
    if not options["jax_enable_compilation_cache"]:
        return
    given = options["jax_compilation_cache_dir"]
    if isinstance(jax_cache._cache, ProgramCache) and str(jax_cache._cache.path) == given:
        return
    try:
        folder = given or str(user_cache() / "xla")
        cache = ProgramCache(folder, max_size=options["jax_compilation_cache_max_size"])
    except (UserError, OSError) as error:
        logging.warning("Compiled programs are not kept: %s; name another cache, XDG_CACHE_HOME", error)
        jax.config.update("jax_compilation_cache_dir", None)
        return
    if not given:
        jax.config.update("jax_compilation_cache_dir", folder)
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    jax_cache.reset_cache()  # JAX decides at the first compilation whether there is a cache
    jax_cache._cache = cache


class ProgramCache(LRUCache):
    """JAX's folder of compiled programs, whose entries belong to a processor and end in a checksum.

    JAX itself never replaces an entry that it cannot read, and may take one that was compiled for another processor's
    instructions, such as a home folder on two machines has.
    """

    def __init__(self, path: str, *, max_size: int):
        super().__init__(path, max_size=max_size)
        self._warned: set[str] = set()

    def get(self, key: str) -> bytes | None:
        """Returns the entry, or None if it is absent or damaged; a damaged one is removed."""
        name = self._name(key)
        try:
            entry = super().get(name)
            if entry is None:
                return None
            value, checksum = entry[:-32], entry[-32:]
            if checksum == hashlib.sha256(value).digest():
                return value
            self._warn("Compiled programs in %s are damaged: they are compiled again and replaced", self.path)
            self._remove(name)
        except OSError as error:
            self._warn("Compiled programs in %s cannot be read: %s", self.path, error)
        return None

    def put(self, key: str, value: bytes) -> None:
        """Writes the entry, in the place of one that is there."""
        name = self._name(key)
        try:
            self._remove(name)
            super().put(name, value + hashlib.sha256(value).digest())
        except OSError as error:
            self._warn("Compiled programs are not kept in %s: %s", self.path, error)
            with suppress(OSError):
                self._remove(name)

    def _name(self, key: str) -> str:
        return f"{key}-{processor()}"

    def _remove(self, name: str) -> None:
        (self.path / f"{name}-cache").unlink(missing_ok=True)

    def _warn(self, line: str, *values: object) -> None:
        """Logs a warning, once for each kind of trouble."""
        if line not in self._warned:
            self._warned.add(line)
            logging.warning(line, *values)


@functools.cache
def processor() -> str:
    """Returns 8 letters for what this processor can execute."""
    try:
        found = dict(PROCESSOR.findall(Path("/proc/cpuinfo").read_text()))
    except OSError:  # not Linux
        found = {"processor": platform.processor()}
    described = [platform.machine(), *(f"{name} {' '.join(sorted(found[name].split()))}" for name in sorted(found))]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:8]
