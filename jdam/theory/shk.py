"""Constants of the convergence theory of point clouds, arXiv:2603.20656.

The SHK metric at q = Σ pⱼδ(xⱼ) is Σ pⱼ|vⱼ|² + κ⁻¹ Σ uⱼ²/pⱼ for velocities v and changes of weight
u; for κ = 0 weights do not change. Distances d_SHK are lengths in it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jdam._core import checks
from jdam._core.compile import compiled, working_dtype
from jdam._core.lapack import eigenvalues
from jdam._energy.energy import inverse_temperature
from jdam._entropic.c_transform import c_transform
from jdam._entropic.cost import HalfSquaredDistance
from jdam._entropic.problem import Marginals, Pair
from jdam._measures.point_cloud import PointCloud
from jdam._memory.memory import Memory, length_or_capacity
from jdam.geometry import Sinkhorn
from jdam.geometry.protocol import Patterns
from jdam.theory._neighbourhood import check_memory
from jdam.theory.basins import interference


class ShkConstants(NamedTuple):
    """Constants about one pattern, as Theorems 2 and 3 of arXiv:2603.20656 use them."""

    diameter: Float[Array, ""]  #: D of a ball that holds all atoms of the memory, a distance
    gradient: Float[Array, ""]  #: G with |grad S_ε|, |grad E| ≤ G (Lemma 8)
    retraction: Float[Array, ""]  #: C with d_SHK(q, Ret_q(ξ)) ≤ C|ξ| for steps τ (Lemma 7)
    smoothness: Float[Array, ""]  #: L: the largest eigenvalue of Hess S_ε(·, Xᵢ) at Xᵢ (A2)
    curvature: Float[Array, ""]  #: μ: the smallest (A4)
    safe_step: Float[Array, ""]  #: τ_max of Theorem 2


def shk_constants(memory: Memory, index: ArrayLike, *, step_size: ArrayLike = 1.0) -> ShkConstants:
    """D, G, C, L, μ and the largest safe step about the pattern at `index`.

        G = D√(1 + κD²/4)          C = (e^{M/2} − 1)/(M/2), M = τκD²
        τ_max = min{1/L, log(min b / w₀)/(2κD²), (sep − 2ρ)/(2D)}

    G is Lemma 8's D√(1+κD²) with Popoviciu's bound Var F ≤ D⁴/4, C Lemma 7's with Jensen's
    inequality Z ≥ 1. L and μ are eigenvalues at the pattern, by exact second derivatives: what
    (A2) and (A4) ask for in a whole basin is estimated by them, not proved. τ_max is Theorem 2's
    with weights that may fall to w₀ = min b/4, and atoms that may move by ρ = sep/4, sep being the
    least distance between two atoms. Mostly its last term binds, sep/(4D): a step in which no atom
    could pass another, far below what recall takes without harm.

    **Arguments:** a `memory` of point clouds; `index` of a pattern; `step_size` τ > 0.

    **Raises:** `TypeError` for other memories.
    """
    _check_clouds(memory)
    index = jnp.asarray(index, jnp.int32)
    if checks.is_concrete(index):
        checks.index(int(index), length_or_capacity(memory), "a memory")
    return _constants(
        memory,
        memory.from_start(index),
        checks.positive("step_size", step_size, working_dtype(memory.dtype)),
    )


@compiled()
def _constants(memory: Memory, index: Array, step_size: Array) -> ShkConstants:
    patterns, kappa = _lifted(memory), memory.geometry.hellinger_scale  # type: ignore[attr-defined]
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
    """Of Hess S_ε(·, X) at X, in coordinates orthonormal in the SHK metric."""
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
    # Mass is conserved, and atoms of weight 0 do not count.
    on = (root > 0) & (kappa > 0)
    still = jnp.where(on, root, 0)
    free = jnp.concatenate([jnp.repeat(root > 0, dim), on]).astype(memory.dtype)
    mass = jnp.concatenate([jnp.zeros(size * dim, memory.dtype), still])
    along = jnp.diag(free) - jnp.outer(mass, mass)
    inside = along @ ((hessian + hessian.T) / 2) @ along
    outside = jnp.eye(free.size, dtype=memory.dtype) - along
    most = eigenvalues(inside)[-1]
    return eigenvalues(inside + most * outside)[0], most


def weight_stiffness(memory: Memory) -> Float[Array, " N"]:
    """λ_w: the largest eigenvalue of Hess S_ε(·, Xᵢ) at Xᵢ in weights, in the Fisher metric.

        λ_w = εσ/(1 − σ²),    σ the second singular value of √b⊘P⊘√b, P the plan of Xᵢ to itself

    It grows exponentially as ε falls below the squared gaps between atoms. Small changes of weight
    are stepped stably for τκ < 2/λ_w, and with a tilt of 5 % the energy first rose at 1.8/λ_w, so
    that τκ ≤ 1/λ_w is safe. In squared units of distance. (Not in the paper: the L of its
    Assumption (A2) is at least κλ_w.)

    **Raises:** `TypeError` for memories of anything but point clouds.
    """
    _check_clouds(memory)
    return _weight_stiffness(memory)


@compiled()
def _weight_stiffness(memory: Memory) -> Float[Array, " N"]:
    epsilon = memory.geometry.epsilon  # type: ignore[attr-defined]

    def one(pattern: tuple[Any, ...]) -> Array:
        cloud, prepared = pattern
        centred = cloud.points - prepared.centre[None]
        itself = Pair(centred, cloud.weights, centred, cloud.weights, Marginals(epsilon))
        plan = c_transform(HalfSquaredDistance(), prepared.known.potential, itself)
        root = jnp.sqrt(cloud.weights)
        values = eigenvalues(root[:, None] * plan.density * root[None])
        second = values[-2] if values.size > 1 else jnp.zeros_like(epsilon)
        result: Array = epsilon * second / ((1 - second) * (1 + second))
        return result

    result: Array = jax.lax.map(one, (_lifted(memory), memory.prepared))
    return result if memory.occupied is None else jnp.where(memory.occupied, result, 0)


def shk_drift_bound(
    memory: Memory, index: ArrayLike, beta: ArrayLike, *, step_size: ArrayLike = 1.0
) -> Float[Array, ""]:
    """How far one step moves a pattern: d_SHK(Xᵢ, R_τ(Xᵢ)) ≤ τCG Zᵢ(β), with the interference
    Zᵢ = Σ_{k≠i} exp(−βS_ε(Xᵢ, Xₖ)) for the (N−1)e^{−βΔ} of Theorem 3 (2) of arXiv:2603.20656.

    **Arguments** and **raises:** as `shk_constants`; `beta` > 0.
    """
    constants = shk_constants(memory, index, step_size=step_size)
    logs = interference(memory, inverse_temperature(memory, beta))
    length = jnp.asarray(step_size) * constants.retraction * constants.gradient
    return length * jnp.exp(logs[index])


def shk_iterations(
    constants: ShkConstants, step_size: ArrayLike, gap: ArrayLike, error: ArrayLike
) -> Float[Array, ""]:
    """After how many steps S_ε to the fixed point is at most `error`, all of them within a basin
    where (A2) and (A4) hold with these L and μ: t ≥ log(A/error)/log(1/θ),

        A = GC√(2τ·gap)/(1 − θ),    θ = √(1 − μτ)                (Theorem 2 of arXiv:2603.20656).

    **Arguments:** `constants` of `shk_constants` for the same `step_size` τ ≤ 1/L; `gap`, the
    energy of the query above that of the fixed point; `error` > 0, in squared units of distance.

    **Returns:** a float, to be rounded up; 0 where no step is needed.
    """
    rate = jnp.sqrt(1 - jnp.minimum(constants.curvature * step_size, 1))
    start = constants.gradient * constants.retraction * jnp.sqrt(2 * step_size * jnp.asarray(gap))
    return jnp.maximum(jnp.log(start / (1 - rate) / error) / -jnp.log(rate), 0)


def shk_travel_bound(constants: ShkConstants, gap: ArrayLike) -> Float[Array, ""]:
    """By how much S_ε to a pattern can rise on the whole way of a recall, for every τ ≤ 1/L:

        Σ_t τ|grad E| G C ≤ 2GC√(2·gap/μ).

    So recall stays in {S_ε(·, Xᵢ) ≤ r} if S_ε(q, Xᵢ) plus this is at most r, without the lower
    bound on τ that Theorem 2 of arXiv:2603.20656 needs: (A4) gives
    √gap_t − √gap_{t+1} ≥ √(2μ)/4·τ|grad E|.

    **Arguments:** as `shk_iterations`. In squared units of distance.
    """
    root = jnp.sqrt(2 * jnp.asarray(gap) / constants.curvature)
    return 2 * constants.gradient * constants.retraction * root


def _lifted(memory: Memory) -> PointCloud:
    """The patterns with features as coordinates, in which the theory holds as it is."""
    lifted: PointCloud = memory.geometry.lifted(memory.patterns)  # type: ignore[attr-defined]
    return lifted


def _check_clouds(memory: Memory) -> None:
    check_memory(memory)
    if not isinstance(memory.geometry, Sinkhorn):
        raise TypeError(f"memory must be one of point clouds, with Sinkhorn; got {memory!r}")
