"""Strict settings: float64 available, no silent promotion of dtypes or ranks."""

import os

# Compiling takes most of the suite's time, and half as long like this.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

import jax
import numpy as np
import pytest
from hypothesis import settings

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
settings.register_profile("jdam", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("jdam")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20250927)
