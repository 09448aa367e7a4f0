"""The user's cache folder, and JAX's compiled programs in it."""

import os
from pathlib import Path

import jax
from absl import logging
from jax.experimental.compilation_cache import compilation_cache

# JAX's default, 1 s, leaves out the many small programs of loading a checkpoint.
MIN_COMPILE_SECONDS = 0.05


def user_cache() -> Path:
    """turbojax's folder in the user's cache, XDG_CACHE_HOME or else ~/.cache; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turbojax"


def use_compilation_cache() -> None:
    """Has JAX keep compiled programs in the user's cache, unless JAX's own options say otherwise.

    Those are JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE and JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS,
    as environment variables or (the first two) by jax.config. A folder that cannot be written is a warning.
    """
    options = jax.config.values
    if options["jax_compilation_cache_dir"] is not None or not options["jax_enable_compilation_cache"]:
        return
    folder = user_cache() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logging.warning("Compiled programs are not kept: %s; name another cache, XDG_CACHE_HOME", error)
        return
    if not os.access(folder, os.W_OK):
        logging.warning("Compiled programs are not kept: %s cannot be written", folder)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    compilation_cache.reset_cache()  # JAX decides at the first compilation whether there is a cache
