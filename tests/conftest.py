"""Strict settings: float64 available, no silent promotion of dtypes or ranks."""

import gc
import os
import signal
from pathlib import Path

import jaxlib.version

# Compiling takes most of the suite's time, and a third of it like this: without optimizing, and
# each program in one piece, where XLA would cut it for threads that two workers have no cores for.
# A flag that a later version of XLA no longer knew would end the process.
FLAGS = "--xla_backend_optimization_level=0"
if jaxlib.version.__version_info__ < (0, 11):
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", FLAGS)
# Programs are compiled once for all workers, processes that tests start, and later runs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / "build/xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import chex
import jax
import numpy as np
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

import tests.annotations  # noqa: F401 (by its name, before jdam is imported)

chex.set_n_cpu_devices(2)


def pytest_configure(config: pytest.Config) -> None:
    """Annotations are checked by the quick tier, which calls everything: checking them costs a
    quarter of the time."""
    if config.option.markexpr != "full":
        install_import_hook("jdam", "tests.annotations.check")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest starts first, so that no worker waits for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_sharding.py")


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
settings.register_profile("jdam", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("jdam")
# Tracing makes many objects that live on: a tenth of the time goes to looking through them.
gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """A process may map only so many pieces of memory, and each compiled program takes some."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or len(maps.read_bytes().splitlines()) > 25_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def count_traces_anew():
    """`chex.assert_max_traces` counts those of equal functions together."""
    chex.clear_trace_counter()


@pytest.fixture
def interruptible():
    """A process that was started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20250927)
