"""Entropic optimal transport between weighted clouds, and of a cloud to itself: potentials,
barycentric maps and costs.

    OT_ε(μ, ν) = min over π ∈ Π(μ, ν) of ∫ c dπ + ε KL(π | μ⊗ν)
               = max over f, g of ⟨f, a⟩ + ⟨g, b⟩ − ε(Σ aⱼbₖ exp((fⱼ+gₖ−Cⱼₖ)/ε) − 1)

for μ = Σ aⱼδ(xⱼ) and ν = Σ bₖδ(yₖ) of mass 1, and, for relaxed marginals,

    OT_{ε,ρ}(μ, ν) = min over π ≥ 0 of ∫ c dπ + ε KL(π | μ⊗ν) + ρ KL(π1 | μ) + ρ KL(πᵀ1 | ν)
        = max over f, g of −ρ⟨a, e^(−f/ρ)−1⟩ − ρ⟨b, e^(−g/ρ)−1⟩ − ε(Σ aⱼbₖ exp((fⱼ+gₖ−Cⱼₖ)/ε) − 1)

(Séjourné et al., arXiv:1910.12958). Solvers are stabilised in the log domain. Optimal potentials
satisfy f = s g^{c,ε} and g = s f^{c,ε}, with soft c-transforms damped by s = ρ/(ρ+ε), which is 1
for exact marginals. Atoms of weight 0 have no effect; c-transforms extend potentials and maps to
them. First derivatives of costs follow from the envelope theorem, those of potentials and maps from
the implicit function theorem; iterations are never differentiated.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, PyTree

from jdam._core.batching import in_batches
from jdam._core.derivatives import ITERATED, full_precision, jvp, moves, vdot
from jdam._core.loops import repeat
from jdam._entropic.c_transform import (
    CTransform,
    c_transform,
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
from jdam._entropic.scaling import conjugate_gradients, solve, solve_self


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def solve_pair(solver: Solver, pair: Pair, guess: Float[Array, " m"]) -> SinkhornOutput:
    """Compute the optimal coupling from the warm start `guess` of g.

    Under `jax.vmap`, pairs form a work queue: a few are solved at a time, each to its own
    convergence."""
    x, a, y, b, marginals = pair
    pair = Pair(*Cloud(x, a).normalised(), *Cloud(y, b).normalised(), marginals)
    pairs = pair_batch_size(a.size * b.size)
    if solver.method == "ott":
        state = in_batches(partial(solve_by_ott, solver), pairs, pair, flat=True)
    else:
        state = solve(solver, pair, guess)
    return SinkhornOutput(
        pair.dual_value(state.f, state.g), state.f, state.g, state.gradient, state.error
    )


@partial(solve_pair.defjvp, symbolic_zeros=True)
@full_precision
def _solve_pair_jvp(
    solver: Solver, primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]
) -> tuple[SinkhornOutput, SinkhornOutput]:
    solved = checkpoint_name(solve_pair(solver, *primals), ITERATED)
    (pair, _), (dpair, _) = primals, tangents  # the solution does not depend on the guess
    marginals = pair.marginals

    # sums = targets implies (∂(sums − targets)/∂g) dg = (∂(targets − sums)/∂pair) dpair.
    column_sums = partial(columns_of, solver.cost, solved.g)
    a, b, on, s = pair.a, pair.b, pair.b > 0, marginals.tau
    (response, sums, targets), (dresponse, dsums, dtargets) = jvp(column_sums, (pair,), (dpair,))
    density, mass = response.density, a * marginals.transported_fraction(response.potential)
    diagonal = sums
    if marginals.rho is not None:
        diagonal = sums + targets * (marginals.epsilon / marginals.rho)

    def hessian(d: Array) -> Array:
        crossed = b * ((mass * (density @ (b * d))) @ density)
        image = diagonal * d - s * crossed
        if marginals.rho is None:
            # A constant in g is free, as mass is conserved. This term makes the system definite.
            image += sums * (jnp.vdot(sums, d) / sums.sum())
        return jnp.where(on, image, 0)

    def solve(matvec: Any, right: Array) -> Array:
        scale = jax.lax.stop_gradient(jnp.where(on, diagonal, 0))
        precision = float(jnp.finfo(right.dtype).eps)
        return conjugate_gradients(matvec, right, scale, precision, 2 * right.size + 50)[0]

    right = marginals.epsilon * jnp.where(on, dtargets - dsums, 0)
    dg = jax.lax.custom_linear_solve(hessian, right, solve, symmetric=True)
    df, dgradient = c_transform_change(solver.cost, response, dg, pair.turned())
    df, dgradient = df + dresponse.potential, dgradient + dresponse.gradient
    zero = jnp.zeros_like(solved.error)
    dcost = _dcost(solver.cost, solved, pair, dpair)
    return solved, SinkhornOutput(dcost, df, dg, dgradient, zero)


def _dcost(cost: Cost, solved: SinkhornOutput, pair: Pair, dpair: Pair) -> Float[Array, ""]:
    """Compute dOT by the envelope theorem: the differential of the dual objective at fixed
    potentials."""
    _, a, _, b, marginals = pair
    total = change_by_atoms(marginals, solved.f, a, solved.gradient, Cloud(dpair.x, dpair.a))
    if any(map(moves, (dpair.y, dpair.b, *jax.tree.leaves(dpair.marginals)))):
        transform = c_transform_in_batches(cost, solved.f, pair)
        dother = Cloud(dpair.y, dpair.b)
        total += change_by_atoms(marginals, transform.potential, b, transform.gradient, dother)
        total += change_by_marginals(pair, solved.f, transform, dpair.marginals)
    return total


def change_by_atoms(
    marginals: Marginals, f: Array, a: Array, gradient: Array, dcloud: Cloud
) -> Float[Array, ""]:
    """Compute Σ −(ρ+ε)(e^(−f/ρ)−1) daⱼ + Σ aⱼ e^(−f/ρ) ⟨∇c, dxⱼ⟩, which is ⟨f, da⟩ + Σ aⱼ⟨∇c, dxⱼ⟩
    for exact marginals."""
    force = (a * marginals.transported_fraction(f))[:, None] * gradient
    return vdot(marginals.variation(f), dcloud.a) + vdot(force, dcloud.x)


def change_by_marginals(
    pair: Pair, f: Array, transform: CTransform, dmarginals: Marginals
) -> Float[Array, ""]:
    """Compute KL(P | a⊗b) dε + (KL(P1 | a) + KL(Pᵀ1 | b)) dρ, where `transform` is the c-transform
    of f."""
    marginals, g = pair.marginals, jnp.where(pair.b > 0, transform.potential, 0)
    f = jnp.where(pair.a > 0, f, 0)
    rows, columns = (
        pair.a * marginals.transported_fraction(f),
        pair.b * marginals.transported_fraction(g),
    )
    paired = jnp.vdot(rows, f) + jnp.vdot(columns, g)  # ⟨P, f⊕g⟩
    entropy = (paired - jnp.vdot(columns, transform.spent)) / marginals.epsilon
    if marginals.rho is None:
        return vdot(entropy, dmarginals.epsilon)
    first, second = (jnp.vdot(w, marginals.dual(p)) for w, p in ((pair.a, f), (pair.b, g)))
    lost = second / marginals.rho  # 1 − ΣP
    relaxed = (first + second - paired) / marginals.rho
    return vdot(entropy + lost, dmarginals.epsilon) + vdot(relaxed, dmarginals.rho)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def self_transport(
    solver: Solver, cloud: Cloud, marginals: Marginals, known: SinkhornOutput | None = None
) -> SinkhornOutput:
    """Compute the optimal coupling of a cloud with itself.

    If the coupling is `known`, it is returned, and only derivatives are computed. Under `jax.vmap`,
    a few clouds are solved at a time."""
    if known is not None:
        return known
    pairs = pair_batch_size(len(cloud.x) ** 2)
    result: SinkhornOutput = in_batches(
        partial(solve_self, solver), pairs, cloud.normalised(), marginals, flat=True
    )
    return result


@partial(self_transport.defjvp, symbolic_zeros=True)
@full_precision
def _self_transport_jvp(
    solver: Solver, primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]
) -> tuple[SinkhornOutput, SinkhornOutput]:
    solved = self_transport(solver, *primals)
    problem, h = primals[:2], solved.f
    cloud, marginals = problem
    dcloud, dmarginals = tangents[:2]

    def transform(cloud: Cloud, marginals: Marginals) -> CTransform:
        return c_transform(solver.cost, h, _with_itself(cloud, marginals))

    # h = s h^{c,ε} implies (I + sP̃) dh = (∂(s h^{c,ε})/∂problem) dproblem.
    response, dresponse = jvp(transform, problem, (dcloud, dmarginals))
    itself = _with_itself(cloud, marginals)
    differential = partial(c_transform_change, solver.cost, response, pair=itself)

    def plus_plan(d: Array) -> Array:
        return d - differential(d)[0]

    def solve(matvec: Any, right: Array) -> Array:
        iterations = math.ceil(-math.log(float(jnp.finfo(right.dtype).eps)) / math.log(3))
        # Richardson iterations of step 2/3: the spectrum of I + sP̃ lies in [1, 2].
        return repeat(
            iterations, lambda d: d + (right - matvec(d)) * (2 / 3), jnp.zeros_like(right), right
        )

    right = dresponse.potential
    dh = jax.lax.custom_linear_solve(plus_plan, right, solve, transpose_solve=solve)
    dcost = 2 * change_by_atoms(marginals, h, cloud.a, response.gradient, dcloud)
    dcost += change_by_marginals(itself, h, response._replace(potential=h), dmarginals)
    dgradient = None if solved.gradient is None else dresponse.gradient + differential(dh)[1]
    return solved, SinkhornOutput(dcost, dh, None, dgradient, jnp.zeros_like(solved.error))


def _with_itself(cloud: Cloud, marginals: Marginals) -> Pair:
    return Pair(cloud.x, cloud.a, cloud.x, cloud.a, marginals)
