"""Constants of the convergence theory of point clouds in the spherical Hellinger–Kantorovich (SHK)
metric, arXiv:2603.20656.

At q = Σ pⱼδ(xⱼ) the metric is Σ pⱼ|vⱼ|² + κ⁻¹ Σ uⱼ²/pⱼ for velocities v and rates of change u of
the weights; for κ = 0 weights are constant. d_SHK is its geodesic distance.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, PyTree

from jdam._core.compile import compiled
from jdam._core.lapack import eigenvalues
from jdam._energy.energy import inverse_temperature, positive_for
from jdam._entropic.c_transform import c_transform
from jdam._entropic.cost import HalfSquaredDistance
from jdam._entropic.problem import Marginals, Pair
from jdam._memory.memory import Memory
from jdam._memory.slots import checked_index
from jdam.geometry import Sinkhorn
from jdam.geometry._clouds import lifted
from jdam.geometry.protocol import Patterns
from jdam.theory._neighbourhood import check_memory
from jdam.theory.basins import interference


class ShkConstants(NamedTuple):
    """The constants of Theorems 2 and 3 of arXiv:2603.20656 for one pattern."""

    diameter: Float[Array, ""]  #: D, the diameter of a ball that contains all atoms of the memory
    gradient: Float[Array, ""]  #: G with |grad S_ε|, |grad E| ≤ G (Lemma 8)
    retraction: Float[Array, ""]  #: C with d_SHK(q, Ret_q(ξ)) ≤ C|ξ| for step size τ (Lemma 7)
    smoothness: Float[Array, ""]  #: L: the largest eigenvalue of Hess S_ε(·, Xᵢ) at Xᵢ (A2)
    curvature: Float[Array, ""]  #: μ: the smallest eigenvalue (A4)
    safe_step: Float[Array, ""]  #: τ_max of Theorem 2


def shk_constants(memory: Memory, index: ArrayLike, *, step_size: ArrayLike = 1.0) -> ShkConstants:
    """Return the constants D, G, C, L, μ and τ_max for the pattern at `index`.

        G = D√(1 + κD²/4)          C = (e^{M/2} − 1)/(M/2), M = τκD²
        τ_max = min{1/L, log(min b / w₀)/(2κD²), (sep − 2ρ)/(2D)}

    G is the D√(1+κD²) of Lemma 8, improved by Popoviciu's bound Var F ≤ D⁴/4, and C is that of
    Lemma 7, improved by Jensen's inequality Z ≥ 1. L and μ are eigenvalues at the pattern, from
    exact second derivatives; they estimate the constants of (A2) and (A4), which are bounds on a
    whole basin. τ_max is that of Theorem 2 for weights of at least w₀ = min b/4 and atoms that move
    by at most ρ = sep/4, where sep is the smallest distance between two atoms. Usually its last
    term is the smallest, sep/(4D): no atom can pass another in one step. Larger steps are usual in
    practice.

    **Arguments:**

    - `memory`: a memory of point clouds.
    - `index`: the index of the pattern, an int.
    - `step_size`: τ > 0.

    **Returns:** `ShkConstants`. Features count as additional coordinates.

    **Raises:** `TypeError` for other memories and for an index that is no int; `IndexError` for
    one that is out of range.
    """
    _check_clouds(memory)
    step_size = positive_for(memory, "step_size", step_size)
    return _constants(memory, checked_index(memory, index), step_size)


@compiled()
def _constants(memory: Memory, index: Array, step_size: Array) -> ShkConstants:
    # With features as coordinates the theory applies unchanged.
    patterns = lifted(memory.geometry, memory.patterns)
    kappa = memory.geometry.hellinger_scale  # type: ignore[attr-defined]
    points, on = patterns.points, patterns.weights > 0
    low = jnp.where(on[..., None], points, jnp.inf).min((0, 1))
    high = jnp.where(on[..., None], points, -jnp.inf).max((0, 1))
    out = points - ((low + high) / 2)[None, None]
    diameter = 2 * jnp.sqrt(jnp.where(on, jnp.vecdot(out, out), 0).max())
    tilt = step_size * kappa * diameter**2 / 2
    retraction = jnp.where(tilt > 0, jnp.expm1(tilt) / jnp.where(tilt > 0, tilt, 1), 1)
    curvature, smoothness = _extreme_eigenvalues(memory, index)
    gaps = points[index][:, None] - points[index][None]
    pairs = (on[index][:, None] & on[index][None]) & ~jnp.eye(patterns.num_atoms, dtype=bool)
    separation = jnp.sqrt(jnp.where(pairs, jnp.vecdot(gaps, gaps), jnp.inf).min())
    by_weights = jnp.log(jnp.asarray(4, memory.dtype)) / (2 * kappa * diameter**2)
    by_atoms = separation / (4 * diameter)
    return ShkConstants(
        diameter=diameter,
        gradient=diameter * jnp.sqrt(1 + kappa * diameter**2 / 4),
        retraction=retraction,
        smoothness=smoothness,
        curvature=curvature,
        safe_step=jnp.minimum(1 / smoothness, jnp.minimum(by_weights, by_atoms)),
    )


def _extreme_eigenvalues(memory: Memory, index: Array) -> tuple[Array, Array]:
    """Return the smallest and the largest eigenvalue of Hess S_ε(·, X) at X, in coordinates that
    are orthonormal in the SHK metric.
    """
    cloud, kappa = memory[index], memory.geometry.hellinger_scale  # type: ignore[attr-defined]
    alone, prepared = jax.tree.map(
        lambda leaf: leaf[index][None], (memory.patterns, memory.prepared)
    )
    pattern = Patterns(alone, prepared, memory.geometry.first_guess(prepared))
    root = jnp.sqrt(cloud.weights)
    stretch = jnp.where(root > 0, 1 / jnp.where(root > 0, root, 1), 0)
    size, dim = cloud.points.shape

    def divergence(flat: Array) -> Array:
        moved = flat[: size * dim].reshape(size, dim)
        weighed = flat[size * dim :]
        query = cloud.with_atoms(
            cloud.points + stretch[:, None] * moved,
            cloud.weights + jnp.sqrt(kappa) * root * weighed,
        )
        return memory.geometry.compare(memory.geometry.view(query), pattern).divergence[0]

    hessian = jax.hessian(divergence)(jnp.zeros(size * (dim + 1), memory.dtype))
    # The tangent space excludes changes of total mass and atoms of weight 0. The largest eigenvalue
    # takes the place of the zeros of its complement, so that they are not the smallest.
    on = (root > 0) & (kappa > 0)
    masses = jnp.where(on, root, 0)
    free = jnp.concatenate([jnp.repeat(root > 0, dim), on]).astype(memory.dtype)
    normal = jnp.concatenate([jnp.zeros(size * dim, memory.dtype), masses])
    projection = jnp.diag(free) - jnp.outer(normal, normal)
    projected = projection @ ((hessian + hessian.T) / 2) @ projection
    complement = jnp.eye(free.size, dtype=memory.dtype) - projection
    largest = eigenvalues(projected)[-1]
    return eigenvalues(projected + largest * complement)[0], largest


def weight_stiffness(memory: Memory) -> Float[Array, " N"]:
    """Return the stiffness λ_w of the weights of each pattern: the largest eigenvalue of Hess
    S_ε(·, Xᵢ) at Xᵢ in the weights, in the Fisher metric.

        λ_w = εσ/(1 − σ²),    σ the second singular value of √b⊘P⊘√b, P the plan of Xᵢ to itself

    It grows exponentially as ε falls below the squared distances between atoms. For infinitesimal
    changes of the weights a step is stable if τκ < 2/λ_w. In experiments with weights tilted by 5 %
    the energy first rose at τκ = 1.8/λ_w, so that τκ ≤ 1/λ_w is safe. (λ_w is not in the paper; the
    L of its Assumption (A2) is at least κλ_w.)

    **Arguments:**

    - `memory`: a memory of point clouds.

    **Returns:** (N,), in squared units of distance; 0 for free slots.

    **Raises:** `TypeError` for other memories.
    """
    _check_clouds(memory)
    return _weight_stiffness(memory)


@compiled()
def _weight_stiffness(memory: Memory) -> Float[Array, " N"]:
    epsilon = memory.geometry.epsilon  # type: ignore[attr-defined]

    def of_pattern(pattern: tuple[PyTree, ...]) -> Array:
        cloud, prepared = pattern
        centred = cloud.points - prepared.centre[None]
        problem = Pair(centred, cloud.weights, centred, cloud.weights, Marginals(epsilon))
        plan = c_transform(HalfSquaredDistance(), prepared.self_transport.f, problem)
        root = jnp.sqrt(cloud.weights)
        values = eigenvalues(root[:, None] * plan.density * root[None])
        second = values[-2] if values.size > 1 else jnp.zeros_like(epsilon)
        result: Array = epsilon * second / ((1 - second) * (1 + second))
        return result

    patterns = lifted(memory.geometry, memory.patterns)
    result: Array = jax.lax.map(of_pattern, (patterns, memory.prepared))
    return result if memory.occupied is None else jnp.where(memory.occupied, result, 0)


def shk_drift_bound(
    memory: Memory, index: ArrayLike, beta: ArrayLike, *, step_size: ArrayLike = 1.0
) -> Float[Array, ""]:
    """Return an upper bound on the distance by which one step moves a pattern, d_SHK(Xᵢ,
    R_τ(Xᵢ)) ≤ τCG Zᵢ(β).

    It is Theorem 3 (2) of arXiv:2603.20656 with the `interference` Zᵢ, which is Σ_{k≠i}
    exp(−βS_ε(Xᵢ, Xₖ)) without a prior, in place of (N−1)e^{−βΔ}.

    **Arguments:**

    - `memory`, `index`, `step_size`: as in `shk_constants`.
    - `beta`: the inverse temperature, > 0.

    **Returns:** a distance.

    **Raises:** as `shk_constants`.
    """
    constants = shk_constants(memory, index, step_size=step_size)
    index = checked_index(memory, index)
    logs = interference(memory, inverse_temperature(memory, beta))
    length = jnp.asarray(step_size) * constants.retraction * constants.gradient
    return length * jnp.exp(logs[index])


def shk_iterations(
    constants: ShkConstants, step_size: ArrayLike, gap: ArrayLike, error: ArrayLike
) -> Float[Array, ""]:
    """Return the number of steps after which S_ε to the fixed point is at most `error`, by
    Theorem 2 of arXiv:2603.20656: t ≥ log(A/error)/log(1/θ) with

        A = GC√(2τ·gap)/(1 − θ),    θ = √(1 − μτ).

    All steps have to be in a basin in which (A2) and (A4) hold with these L and μ.

    **Arguments:**

    - `constants`: those of `shk_constants` for the same `step_size`.
    - `step_size`: τ ≤ 1/L.
    - `gap`: the energy of the query minus the energy of the fixed point, a squared distance.
    - `error`: a value > 0 of S_ε, a squared distance.

    **Returns:** a float ≥ 0, to be rounded up.
    """
    rate = jnp.sqrt(1 - jnp.minimum(constants.curvature * step_size, 1))
    start = constants.gradient * constants.retraction * jnp.sqrt(2 * step_size * jnp.asarray(gap))
    return jnp.maximum(jnp.log(start / (1 - rate) / error) / -jnp.log(rate), 0)


def shk_travel_bound(constants: ShkConstants, gap: ArrayLike) -> Float[Array, ""]:
    """Return an upper bound on the rise of S_ε to a pattern over all steps of a recall, for all
    τ ≤ 1/L:

        Σ_t τ|grad E| G C ≤ 2GC√(2·gap/μ).

    Recall stays in {S_ε(·, Xᵢ) ≤ r} if S_ε(q, Xᵢ) plus this bound is at most r. Unlike Theorem 2 of
    arXiv:2603.20656 this needs no lower bound on τ, since by (A4)
    √gap_t − √gap_{t+1} ≥ √(2μ)/4·τ|grad E|.

    **Arguments:**

    - `constants`, `gap`: as in `shk_iterations`.

    **Returns:** a squared distance.
    """
    root = jnp.sqrt(2 * jnp.asarray(gap) / constants.curvature)
    return 2 * constants.gradient * constants.retraction * root


def _check_clouds(memory: Memory) -> None:
    check_memory(memory)
    if not isinstance(memory.geometry, Sinkhorn):
        raise TypeError(f"memory must be one of point clouds, with Sinkhorn; got {memory!r}")
