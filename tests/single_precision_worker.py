"""jdam as users run it: without 64-bit numbers, in a process of its own, warnings being errors."""

import warnings
from functools import partial

warnings.simplefilter("error")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jdam
from tests.helpers import clouds, diagonals, gaussians, near, vectors

assert not jax.config.jax_enable_x64
rng = np.random.default_rng(7)
KINDS = {
    "vectors": (vectors, None),
    "Gaussians": (gaussians, None),
    "diagonal": (diagonals, jdam.EntropicBures(0.1)),
    "clouds": (clouds, jdam.Sinkhorn(0.5)),
}
for kind, (make, geometry) in KINDS.items():
    # Patterns as NumPy makes them, in double precision: JAX rounds them.
    memory = jdam.store(make(rng, 5, 3), geometry)
    assert memory.dtype == jnp.float32
    queries = near(rng, memory.patterns, 0.05)
    recall = jax.vmap(partial(jdam.recall, max_steps=200), (None, 0, None))
    result = recall(memory, queries, 30.0)
    assert result.nearest.tolist() == list(range(5)), kind
    good = [jdam.Status.CONVERGED, jdam.Status.STALLED]
    assert np.isin(result.status, good).all(), (kind, result)
    slope = jax.grad(jdam.energy, argnums=1)(memory, queries[0], 1.0)
    assert all(
        leaf.dtype == jnp.float32 and jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(slope)
    )
memory = jdam.store(gaussians(rng, 5, 3))
fit = jdam.fit(memory, 1.0, near(rng, memory.patterns, 0.1), memory.patterns, optax.adam(0.01),
               num_steps=3)  # fmt: skip
assert jnp.isfinite(fit.losses).all()
sphere = jdam.random.wasserstein_sphere(jax.random.key(0), 4, 2)
cue = jdam.random.perturb(jax.random.key(1), sphere[1], 0.1)
assert int(jdam.theory.certify(jdam.store(sphere), cue, 1e3).index) == 1
print("as in double precision")
