"""A second solver for the same problem, by ott-jax."""

import warnings

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import PyTree

from jdam._core.linalg import safe_log
from jdam._core.loops import while_loop
from jdam._entropic.c_transform import columns_of
from jdam._entropic.problem import Pair, Solver, State
from jdam._entropic.scaling import largest, sharpened


def solve_by_ott(solver: Solver, pair: Pair) -> State:
    """Solve a transport problem by ott-jax.

    Exact marginals are solved by its Sinkhorn solver. Relaxed marginals are solved by
    translation-invariant iterations (Séjourné, Vialard and Peyré, arXiv:2201.00730) of its
    log-domain kernels, because its solver takes no traced ρ."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ott-jax imports deprecated packages
        from ott.geometry.geometry import Geometry
    epsilon = pair.marginals.epsilon
    scaled = pair.marginals.payable(solver.cost.scaled(pair.x, pair.y, epsilon))
    geometry = Geometry(cost_matrix=epsilon * scaled, epsilon=epsilon)  # type: ignore[arg-type]
    iterate = _balanced if pair.marginals.rho is None else _relaxed
    # ott-jax needs JAX's default promotion rules, which users may have made stricter.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        g, count = iterate(solver, pair, geometry)
    response, sums, targets = columns_of(solver.cost, g, pair)
    state = State(
        f=response.potential,
        g=g,
        gradient=response.gradient,
        error=jnp.abs(sums - targets).sum(),
        iterations=count,
        ratio=jnp.ones_like(epsilon),
        cooled=jnp.zeros_like(epsilon),
    )
    return sharpened(state, scaled, pair, largest(scaled, pair))


def _balanced(solver: Solver, pair: Pair, geometry: PyTree) -> tuple[Array, Array]:
    """Return g and the number of iterations for exact marginals."""
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    sinkhorn = Sinkhorn(threshold=solver.tol, max_iterations=solver.max_iterations)
    output = sinkhorn(LinearProblem(geometry, pair.a, pair.b))
    # ott's potentials define the plan, ours its density with respect to a⊗b.
    return output.g - pair.marginals.epsilon * safe_log(pair.b), jnp.asarray(output.n_iters)


def _relaxed(solver: Solver, pair: Pair, geometry: PyTree) -> tuple[Array, Array]:
    """Return g and the number of iterations for relaxed marginals."""
    _, a, _, b, marginals = pair
    epsilon, s = marginals.epsilon, marginals.tau

    def transform(f: Array, g: Array, weights: Array, axis: int) -> Array:
        result: Array = -s * geometry.apply_lse_kernel(f, g, epsilon, weights, axis)[0]
        return result

    def body_fun(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, g, _ = carry
        f = transform(jnp.zeros_like(a), g, b, 1)
        g = transform(f, jnp.zeros_like(b), a, 0)
        g = g + marginals.dual_shift(transform(jnp.zeros_like(a), g, b, 1), a, g, b)
        _, sums, targets = columns_of(solver.cost, g, pair)
        return count + 1, g, jnp.abs(sums - targets).sum()

    def cond_fun(carry: tuple[Array, Array, Array]) -> Array:
        count, _, marginal_error = carry
        return (marginal_error > solver.tol) & (count < solver.max_iterations)

    start = (jnp.array(0, jnp.int32), jnp.zeros_like(b), jnp.full_like(epsilon, jnp.inf))
    count, g, _ = while_loop(cond_fun, body_fun, start, pair)
    return g, count
