"""Lower bounds on the cost of entropic transport: any dual value is one."""

from functools import partial

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam._core.batching import in_tiles
from jdam._core.linalg import rounding
from jdam._entropic.problem import Pair, Solver, log, pairs_at_once
from jdam._entropic.scaling import some_iterations


def dual_after_half_iteration(pair: Pair, guess: Float[Array, " m"]) -> Float[Array, ""]:
    """A lower bound on OT_ε: ⟨f, a⟩ + ⟨g, b⟩ with f = g^{c,ε}, less its rounding. As any dual
    value is one, costs may come from products, and potentials from a `guess` of g."""
    x, a, y, b, epsilon = pair
    g, half = jnp.where(b > 0, guess, 0), jnp.vecdot(y, y) / 2
    logits = (y / epsilon) @ x.T + ((g - half) / epsilon + log(b))[:, None]
    top = logits.max(0)
    f = jnp.vecdot(x, x) / 2 - epsilon * (top + jnp.log(jnp.exp(logits - top[None]).sum(0)))
    largest = jnp.vecdot(x, x).max() + jnp.vecdot(y, y).max() + jnp.abs(g).max()
    error = largest * rounding(x.shape[0] + y.shape[0] + x.shape[1], x.dtype)
    return jnp.vdot(f, a) + jnp.vdot(g, b) - error


def dual_after_some_iterations(
    solver: Solver, pair: Pair, guess: Float[Array, " m"]
) -> Float[Array, ""]:
    """The same from the g that some scaling iterations make of the guess."""
    pairs = 4 * pairs_at_once(pair.a.size * pair.b.size)
    g = in_tiles(partial(some_iterations, solver), pairs, pair, guess, flat=True)
    return dual_after_half_iteration(pair, g)
