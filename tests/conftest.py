"""What all tests share: strict JAX settings, the CPU, no network, a cache folder of their own, the demo's pipeline."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

from jaxtyping import install_import_hook

import tests.annotations  # the hook looks it up in `tests`

OPS = ("int8", "sla", "sage")
CHECKED = ["attention", "norms", *(f"{op}.{part}" for op in OPS for part in ("api", "reference"))]
# Shapes and dtypes in annotations are checked at every call; not in modules of Triton kernels, which read their source.
MODULES = ["turbojax.models", *(f"turbojax.kernels.{module}" for module in CHECKED)]
install_import_hook(MODULES, f"{tests.annotations.__name__}.checked")

import jax
import jax.numpy as jnp
import pytest

from turbojax import TurboVideoPipeline
from turbojax.shapes.demo import write_demo

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The quicker of XLA's two ways to generate code for a CPU, and a program in one piece.
QUICK = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters --xla_cpu_parallel_codegen_split_count=1"


def pytest_configure(config):
    """On a machine with a GPU, too, only tests/gpu uses it: tolerances elsewhere are those of a CPU's float32.

    There programs run for a moment and need not be fast: compiling them with care takes longer.
    """
    if not any("gpu" in argument for argument in config.args):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # for subprocesses
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
        quick = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1"
        jax.config.update("jax_disable_most_optimizations", quick)
        if quick:
            os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}"


def pytest_collection_finish():
    """Garbage is looked for seldom, and not among what has been imported: JAX makes many objects while it traces."""
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The user's cache folder (XDG_CACHE_HOME) for this session, here and in subprocesses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def exact_matmuls():
    """float32 products as exact as the CPU has them."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def homeless(monkeypatch):
    """Neither HOME nor an entry of passwd, as under a user id of a container's choice."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A folder with checkpoint files of a tiny network with random weights."""
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    return folder


@pytest.fixture(scope="session")
def demo_pipe(demo):
    """Its pipeline in float32, loaded once."""
    return TurboVideoPipeline.from_pretrained(demo, dtype=jnp.float32)
