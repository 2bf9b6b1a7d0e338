"""Entropic optimal transport between weighted clouds: potentials, barycentric maps, costs.

    OT_ε(μ, ν) = min over π ∈ Π(μ, ν) of ∫ c dπ + ε KL(π | μ⊗ν)
               = max over f, g of ⟨f, a⟩ + ⟨g, b⟩ − ε(Σ aⱼbₖ exp((fⱼ+gₖ−Cⱼₖ)/ε) − 1)

for μ = Σ aⱼδ(xⱼ) and ν = Σ bₖδ(yₖ) of mass 1, and, where marginals are relaxed,

    OT_{ε,ρ}(μ, ν) = min over π ≥ 0 of ∫ c dπ + ε KL(π | μ⊗ν) + ρ KL(π1 | μ) + ρ KL(πᵀ1 | ν)
        = max over f, g of −ρ⟨a, e^(−f/ρ)−1⟩ − ρ⟨b, e^(−g/ρ)−1⟩ − ε(Σ aⱼbₖ exp((fⱼ+gₖ−Cⱼₖ)/ε) − 1)

(Séjourné et al., arXiv:1910.12958), in the log domain. Both are solved by f = s g^{c,ε} and
g = s f^{c,ε}, the soft c-transforms damped by s = ρ/(ρ+ε), which is 1 for exact marginals. Atoms of
weight 0 change nothing, and get potentials and maps by extension. First derivatives follow from
the envelope theorem, those of potentials and maps from the implicit function theorem: no
iteration is ever differentiated.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from jdam._core.batching import in_batches
from jdam._core.derivatives import ITERATED, full_precision, jvp, moves, vdot
from jdam._entropic.c_transform import (
    CTransform,
    c_transform_change,
    c_transform_in_batches,
    columns_of,
)
from jdam._entropic.cost import Cost
from jdam._entropic.problem import (
    Cloud,
    Marginals,
    Pair,
    SinkhornOutput,
    Solver,
    pair_batch_size,
)
from jdam._entropic.reference import solve_by_ott
from jdam._entropic.scaling import conjugate_gradients, solve


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def solve_pair(solver: Solver, pair: Pair, guess: Float[Array, " m"]) -> SinkhornOutput:
    """The optimal coupling, from a `guess` of g on, which by the method "known" is the solution.
    Pairs of a vmapped batch are solved a few at a time, each to its own convergence."""
    x, a, y, b, marginals = pair
    pair = Pair(*Cloud(x, a).normalised(), *Cloud(y, b).normalised(), marginals)
    pairs = pair_batch_size(a.size * b.size)
    if solver.method == "known":
        known: SinkhornOutput = in_batches(
            partial(_known, solver.cost), pairs, pair, guess, flat=True
        )
        return known
    if solver.method == "ott":
        state = in_batches(partial(solve_by_ott, solver), pairs, pair, flat=True)
    else:
        state = solve(solver, pair, guess)
    return SinkhornOutput(
        pair.dual_value(state.f, state.g), state.f, state.g, state.gradient, state.error
    )


def _known(cost: Cost, pair: Pair, g: Float[Array, " m"]) -> SinkhornOutput:
    columns = columns_of(cost, g, pair)
    f, gradient = columns.response.potential, columns.response.gradient
    return SinkhornOutput(pair.dual_value(f, g), f, g, gradient, columns.marginal_error)


@partial(solve_pair.defjvp, symbolic_zeros=True)
@full_precision
def _solve_pair_jvp(
    solver: Solver, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[SinkhornOutput, SinkhornOutput]:
    solved = checkpoint_name(solve_pair(solver, *primals), ITERATED)
    (pair, _), (dpair, _) = primals, tangents  # the guess changes nothing
    marginals = pair.marginals

    # Where columns are as wanted, (∂(columns − wanted)/∂g) dg = (∂(wanted − columns)/∂pair) dpair.
    answer = partial(columns_of, solver.cost, solved.g)
    a, b, on, s = pair.a, pair.b, pair.b > 0, marginals.tau
    (found, columns, wanted), moved = jvp(answer, (pair,), (dpair,))
    density, mass = found.density, a * marginals.transported_fraction(found.potential)
    diagonal = columns
    if marginals.rho is not None:
        diagonal = columns + wanted * (marginals.epsilon / marginals.rho)

    def hessian(d: Array) -> Array:
        crossed = b * ((mass * (density @ (b * d))) @ density)
        image = diagonal * d - s * crossed
        if marginals.rho is None:
            # Potentials are free up to a constant, mass is conserved: this makes it definite.
            image += columns * (jnp.vdot(columns, d) / columns.sum())
        return jnp.where(on, image, 0)

    def solve(matvec: Any, right: Array) -> Array:
        scale = jax.lax.stop_gradient(jnp.where(on, diagonal, 0))
        precision = float(jnp.finfo(right.dtype).eps)
        return conjugate_gradients(matvec, right, scale, precision, 2 * right.size + 50)[0]

    right = marginals.epsilon * jnp.where(on, moved.wanted - moved.found, 0)
    dg = jax.lax.custom_linear_solve(hessian, right, solve, symmetric=True)
    df, dgradient = c_transform_change(solver.cost, found, dg, pair.turned())
    df, dgradient = df + moved.response.potential, dgradient + moved.response.gradient
    none = jnp.zeros_like(solved.error)
    dcost = _dcost(solver.cost, solved, pair, dpair)
    return solved, SinkhornOutput(dcost, df, dg, dgradient, none)


def _dcost(cost: Cost, solved: SinkhornOutput, pair: Pair, dpair: Pair) -> Float[Array, ""]:
    """dOT by the envelope theorem: the dual objective's, were its potentials not to change."""
    _, a, _, b, marginals = pair
    total = change_by_atoms(marginals, solved.f, a, solved.gradient, Cloud(dpair.x, dpair.a))
    if any(map(moves, (dpair.y, dpair.b, *jax.tree.leaves(dpair.marginals)))):
        back = c_transform_in_batches(cost, solved.f, pair)
        dother = Cloud(dpair.y, dpair.b)
        total += change_by_atoms(marginals, back.potential, b, back.gradient, dother)
        total += change_by_marginals(pair, solved.f, back, dpair.marginals)
    return total


def change_by_atoms(
    marginals: Marginals, f: Array, a: Array, gradient: Array, dcloud: Cloud
) -> Float[Array, ""]:
    """Σ −(ρ+ε)(e^(−f/ρ)−1) daⱼ + Σ aⱼ e^(−f/ρ) ⟨∇c, dxⱼ⟩, which for exact marginals are
    ⟨f, da⟩ + Σ aⱼ⟨∇c, dxⱼ⟩."""
    force = (a * marginals.transported_fraction(f))[:, None] * gradient
    return vdot(marginals.variation(f), dcloud.a) + vdot(force, dcloud.x)


def change_by_marginals(
    pair: Pair, f: Array, back: CTransform, dmarginals: Marginals
) -> Float[Array, ""]:
    """KL(P | a⊗b) dε + (KL(P1 | a) + KL(Pᵀ1 | b)) dρ, `back` being the response to f."""
    marginals, g = pair.marginals, jnp.where(pair.b > 0, back.potential, 0)
    f = jnp.where(pair.a > 0, f, 0)
    rows, columns = (
        pair.a * marginals.transported_fraction(f),
        pair.b * marginals.transported_fraction(g),
    )
    priced = jnp.vdot(rows, f) + jnp.vdot(columns, g)  # ⟨P, f⊕g⟩
    entropy = (priced - jnp.vdot(columns, back.spent)) / marginals.epsilon
    if marginals.rho is None:
        return vdot(entropy, dmarginals.epsilon)
    first, second = (jnp.vdot(w, marginals.dual(p)) for w, p in ((pair.a, f), (pair.b, g)))
    lost = second / marginals.rho  # 1 − ΣP
    relaxed = (first + second - priced) / marginals.rho
    return vdot(entropy + lost, dmarginals.epsilon) + vdot(relaxed, dmarginals.rho)
