"""Lower bounds on the cost of entropic transport: any dual value is one."""

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
    """A lower bound on OT: the dual value of f = s g^{c,ε} and g, less its rounding. As any dual
    value is one, costs may be rough, and potentials come from a `guess` of g."""
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
    """The same from the g that some scaling iterations make of the guess."""
    pairs = 4 * pair_batch_size(pair.a.size * pair.b.size)
    g = in_batches(partial(some_iterations, solver), pairs, pair, guess, flat=True)
    return dual_after_half_iteration(solver, pair, g)


def cost_of_masses(
    epsilon: Float[Array, ""], rho: Float[Array, ""], least: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """A lower bound on OT_{ε,ρ} of clouds no atoms of which are closer than at the cost `least`:
    (2ρ+ε)(1 − e^(−c/(2ρ+ε))), the cost of two atoms of mass 1, since merging atoms raises no
    Kullback–Leibler divergence."""
    scale = 2 * rho + epsilon
    return -scale * jnp.expm1(-least / scale)
