"""Lower bounds on entropic transport costs, from dual values at potentials that need not be
optimal.
"""

from functools import partial

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam._core.batching import in_batches
from jdam._core.linalg import rounding, safe_log
from jdam._entropic.problem import Pair, Solver, pair_batch_size
from jdam._entropic.scaling import some_iterations


def dual_after_half_iteration(
    solver: Solver, pair: Pair, guess: Float[Array, " m"]
) -> Float[Array, ""]:
    """Compute a lower bound on OT, rounding included: the dual value at g and f = s g^{c,ε}, with
    the warm start `guess` as g.

    Every dual value is a lower bound, so potentials need not be optimal. Costs are approximate
    (`Cost.roughly`), and their rounding error is subtracted."""
    x, a, y, b, marginals = pair
    epsilon, s, g = marginals.epsilon, marginals.tau, jnp.where(b > 0, guess, 0)
    costs = marginals.payable(solver.cost.roughly(y, x, epsilon))
    logits = (g / epsilon + safe_log(b))[:, None] - costs
    top = logits.max(0)
    f = -s * epsilon * (top + jnp.log(jnp.exp(logits - top[None]).sum(0)))
    t = marginals.dual_shift(f, a, g, b)
    f, g = f - s * t, g + t
    value = pair.dual_value(f, g)
    origin = jnp.zeros_like(x[:1])
    largest = 2 * (solver.cost.matrix(x, origin).max() + solver.cost.matrix(y, origin).max())
    mass = jnp.maximum(jnp.vdot(marginals.transported_fraction(g), b), 1)
    error = rounding(x.shape[0] + y.shape[0] + x.shape[1], x.dtype) * mass
    return value - error * (largest + jnp.abs(g).max())


def dual_after_some_iterations(
    solver: Solver, pair: Pair, guess: Float[Array, " m"]
) -> Float[Array, ""]:
    """Compute the same bound after a few scaling iterations from the warm start; it is closer and
    costs more."""
    pairs = 4 * pair_batch_size(pair.a.size * pair.b.size)
    g = in_batches(partial(some_iterations, solver), pairs, pair, guess, flat=True)
    return dual_after_half_iteration(solver, pair, g)


def cost_of_masses(
    epsilon: Float[Array, ""], rho: Float[Array, ""], least: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Compute a lower bound on OT_{ε,ρ} of clouds whose atoms are at costs ≥ `least` from each
    other.

    The bound is (2ρ+ε)(1 − e^(−c/(2ρ+ε))), c = `least`, the cost between two atoms of mass 1:
    merging atoms raises no Kullback–Leibler divergence."""
    scale = 2 * rho + epsilon
    return -scale * jnp.expm1(-least / scale)
