"""The demonstrations that `python -m jdam` runs, on data bundled with scikit-learn and ASE."""

import jax
import jax.numpy as jnp

import jdam


def spacing(memory: jdam.Memory) -> float:
    """The median over patterns of D to the nearest other pattern."""
    pairs = jax.vmap(jdam.divergences, (None, 0))(memory, memory.patterns)
    return float(jnp.median(jnp.where(jnp.eye(len(memory), dtype=bool), jnp.inf, pairs).min(1)))
