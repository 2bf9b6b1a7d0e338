"""Separations of patterns, and the bounds on recall that follow: basins, errors, sufficient β.

Each bound is a sum over the other patterns k of a pattern i, a function of β, of the distances
dₖ = d(Xᵢ, Xₖ) and of the distance s of a query from Xᵢ. Where D = c·d² for a metric d (W₂ or |x−y|,
c = 1), D(ξ, Xₖ) ≥ c(dₖ − s)² and therefore

    wₖ ≤ (πₖ/πᵢ) exp(−β(D(ξ, Xₖ) − D(ξ, Xᵢ))) ≤ (πₖ/πᵢ) exp(−βc dₖ(dₖ − 2s)).

Where D is S_ε with cost ½|x−y|² (c = ½) or MW₂² (c = 1), the same holds for dₖ = |mᵢ − mₖ| and
s = √(D/c), since D ≥ c|Δm|². The bounds then are statements about D and about means. Lower bounds
on dₖ may take the place of dₖ, so that few exact comparisons are needed.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jdam._core import checks
from jdam._core.batching import map_in_batches
from jdam._core.compile import compiled, working_dtype
from jdam._core.lapack import singular_values
from jdam._energy.energy import inverse_temperature, positive_for
from jdam._measures.gaussian import Gaussian
from jdam._memory.memory import Memory
from jdam._memory.slots import checked_index
from jdam.theory._neighbourhood import (
    Neighbourhood,
    check_memory,
    condensed,
    cost_scale,
    finite_log,
    finite_product,
    least_beta,
    log_mass,
    minimiser_radius,
    neighbourhood,
    over_patterns,
    reliable_beta,
    stable_radii,
    step_bound,
    sum_exp,
)


def separations(memory: Memory) -> Float[Array, " N"]:
    """Return the distance Dᵢ from each pattern to its nearest other pattern, not squared (the Dᵢ of
    arXiv:2509.23162).

    It is W₂ for Gaussians and |x−y| for vectors, and a lower bound on it if more than 64 patterns
    would have to be compared. For point clouds, mixtures and `EntropicBures` it is the distance
    between means, which is at most W₂ and is the quantity of Lemma 11 of arXiv:2603.20656.

    **Arguments:**

    - `memory`: a memory of Gaussians, mixtures, point clouds or vectors.

    **Returns:** distances (N,); ∞ if there is no other pattern.

    **Raises:** `TypeError` for an argument that is not a memory, and for geometries without a known
    bound D ≥ c|Δm|² (as `DotProduct`); `ValueError` for a sharded memory. The other functions of
    this module raise the same.
    """
    check_memory(memory)
    return _separations(memory)


@compiled()
def _separations(memory: Memory) -> Float[Array, " N"]:
    return over_patterns(memory, lambda others: others.distance.min())


def margins(memory: Memory, radius: ArrayLike) -> Float[Array, " N"]:
    """Return the margin Δᵢ of each pattern: a lower bound on the excess of D to every other pattern
    over D to pattern i, at all queries whose distance √(D/c) from pattern i is at most `radius`:

        D(ξ, Xₖ) − D(ξ, Xᵢ) ≥ Δᵢ = c Dᵢ(Dᵢ − 2·radius).

    For clouds this is Assumption (A1) and Lemma 11 of arXiv:2603.20656 in a sharper form,
    Δ = ½ρ² − ρ√(2r) with r = ½radius², which depends neither on ε nor on the number of atoms.

    **Arguments:**

    - `memory`: as in `separations`.
    - `radius`: a distance ≥ 0, a scalar or (N,).

    **Returns:** squared distances (N,); a margin < 0 proves nothing.
    """
    distance = separations(memory)
    radius = _radius(memory, radius, (distance.shape, ()))
    return cost_scale(memory) * distance * (distance - 2 * radius)


def interference(memory: Memory, beta: ArrayLike) -> Float[Array, " N"]:
    """Return the logarithm of the interference Zᵢ(β) = Σ_{k≠i} (πₖ/πᵢ) exp(−βD(Xᵢ, Xₖ)): the Gibbs
    mass of all other patterns at pattern i, divided by its own.

    Pattern i begins to be recalled at the β where Zᵢ ≈ 0.1. The result is an upper bound; its error
    is at most 0.1 % if few patterns contribute to the sum.

    **Arguments:**

    - `memory`: as in `separations`.
    - `beta`: the inverse temperature, > 0.

    **Returns:** log Zᵢ, (N,).
    """
    check_memory(memory)
    return _interference(memory, inverse_temperature(memory, beta))


@compiled()
def _interference(memory: Memory, beta: Float[Array, ""]) -> Float[Array, " N"]:
    scale = cost_scale(memory)

    def of_pattern(others: Neighbourhood) -> Array:
        return log_mass(others, beta * scale)

    return over_patterns(memory, of_pattern, beta, triangle=False)


def transition_beta(memory: Memory, level: float = 0.1) -> Float[Array, " N"]:
    """Return the β at which the interference Zᵢ(β) of each pattern falls to `level`: the β at which
    the pattern begins to be recalled.

    **Arguments:**

    - `memory`: as in `separations`.
    - `level`: the interference, > 0.

    **Returns:** β, (N,), at most a few per cent too large; ∞ for a pattern that is stored twice.
    """
    check_memory(memory)
    return _transition_beta(memory, positive_for(memory, "level", level))


@compiled(rounded=False)
def _transition_beta(memory: Memory, level: Float[Array, ""]) -> Float[Array, " N"]:
    scale = cost_scale(memory)

    def transition(others: Neighbourhood) -> Array:
        groups = condensed(others)
        return least_beta(groups, lambda b: log_mass(groups, b) <= jnp.log(level)) / scale

    return over_patterns(memory, transition, reliable_beta(memory, triangle=False), triangle=False)


def one_step_bound(
    memory: Memory, index: ArrayLike, radius: ArrayLike, beta: ArrayLike
) -> Float[Array, ""]:
    """Return an upper bound on the distance from pattern i after one full step, for all queries
    within `radius` s of pattern i:

        W₂(Φ(ξ), Xᵢ) ≤ Σ_{k≠i} wₖ(W₂(ξ, Xₖ) + W₂(ξ, Xᵢ)) ≤ Σ_{k≠i} (πₖ/πᵢ) dₖ exp(−βdₖ(dₖ − 2s)).

    The second inequality holds because (x + s) exp(−β(x² − s²)) decreases in x = W₂(ξ, Xₖ), and
    x ≥ dₖ − s. Where it increases, for dₖ < (s + √(s² + 2/β))/2, its maximum takes its place.
    Covariances need not commute; Theorem 3 of arXiv:2509.23162 has the bound 3/√(βN) for commuting
    covariances on a sphere. Queries on the geodesic from Xᵢ to its nearest pattern attain the
    largest term up to the factor wᵢ; in random directions the distance is much smaller.

    For clouds (κ = 0), mixtures and `EntropicBures` the bound is one on the distance between the
    mean after the step and the mean of the pattern, and `radius` is one of √(D/c).

    **Arguments:** (scalars: use `jax.vmap` for batches)

    - `memory`: as in `separations`.
    - `index`: the index i of the pattern, an int.
    - `radius`: a distance s ≥ 0.
    - `beta`: the inverse temperature, > 0.

    **Returns:** a distance; nothing is proved unless it is less than `radius`.
    """
    args = _one_of(memory, index, radius, beta)
    return _one_step_bound(memory, *args)


@compiled()
def _one_step_bound(memory: Memory, index: Array, radius: Array, beta: Array) -> Array:
    return step_bound(neighbourhood(memory, index, beta), radius, beta * cost_scale(memory))


def contraction_bound(
    memory: Memory, index: ArrayLike, radius: ArrayLike, beta: ArrayLike
) -> Float[Array, ""]:
    """Return an upper bound on the norm of the derivative of Φ at all points within `radius` s of
    pattern i. If it is less than 1, each step reduces the error by this factor.

    For vectors and diagonal Gaussians it is the Lipschitz constant

        2β Σₖ wₖ dₖ² ≤ 2β Σ_{k≠i} (πₖ/πᵢ) dₖ² exp(−βdₖ(dₖ − 2s)),

    since Φ is z ↦ Σ wₖzₖ in z = (m, σ), with the Jacobian 2βCov_w(z). (Theorem 2 of
    arXiv:2509.23162 has 144βR²/N.) For full covariances with factors Mₖ the optimal transport maps
    also depend on the query, which adds at most

        Σ_{k≠i} (πₖ/πᵢ) exp(−βdₖ(dₖ − 2s)) |Mₖ| (cond Mₖ + cond Mᵢ) / (σ_min(Mᵢ) − s)

    in spectral norms. This term is ∞ where s ≥ σ_min(Mᵢ), and a few per cent for well-conditioned
    covariances.

    **Arguments:** as in `one_step_bound`.

    **Returns:** a scalar ≥ 0, without unit.

    **Raises:** as `separations`; `TypeError` for point clouds, mixtures and `EntropicBures`.
    """
    check_memory(memory, metric=True)
    args = _one_of(memory, index, radius, beta)
    return _contraction_bound(memory, *args)


@compiled()
def _contraction_bound(memory: Memory, index: Array, radius: Array, beta: Array) -> Array:
    distance, log_odds = neighbourhood(memory, index, beta)
    # d² exp(−βd(d−2s)) decreases where βd(d−s) > 1, and is replaced by its maximum elsewhere.
    d = jnp.maximum(distance, (radius + jnp.sqrt(radius**2 + 4 / beta)) / 2)
    by_weights = (
        2 * beta * sum_exp(log_odds + 2 * finite_log(d) - beta * finite_product(d, d - 2 * radius))
    )
    if not isinstance(memory.patterns, Gaussian):
        return by_weights
    # With dR = RΩ, |Ω|·2s_min(MᵀL) ≤ 2|MᵀdL|. The rotation of the map to pattern i is a gauge of
    # the result, so that only differences of rotations count.
    # Batches bound the memory, since decompositions copy their argument.
    sizes = map_in_batches(singular_values, 1024, memory.patterns.factor)
    largest, smallest = sizes[:, 0], sizes[:, -1]
    if sizes.shape[1] < memory.patterns.dim:
        smallest = jnp.zeros_like(smallest)
    gap = smallest[index] - radius
    condition = largest / jnp.where(smallest > 0, smallest, 1)
    nearest = jnp.maximum(distance, radius)
    log_terms = finite_log(largest * (condition + condition[index]))
    log_terms = log_terms - beta * finite_product(nearest, nearest - 2 * radius)
    # The factor of a point mass is 0, and so does not depend on the rotation.
    singular = (smallest == 0) & (largest > 0) & (log_odds > -jnp.inf)
    by_rotations = sum_exp(log_odds + log_terms) / jnp.where(gap > 0, gap, 1)
    return by_weights + jnp.where((gap > 0) & ~singular.any(), by_rotations, jnp.inf)


def basin_radius(memory: Memory, beta: ArrayLike) -> Float[Array, " N"]:
    """Return the largest radius s of each pattern for which `one_step_bound` is at most s, so that
    recall never leaves the ball of radius s.

    All limits of recalls that start in the ball are within `fidelity` of the pattern. For clouds
    (κ = 0), mixtures and `EntropicBures` the radius is one of √(D/c), and D to the pattern rises by
    no more than the contribution of the other patterns to the energy, since the energy never rises.

    **Arguments:**

    - `memory`: as in `separations`.
    - `beta`: the inverse temperature, > 0.

    **Returns:** distances (N,); 0 for a pattern without such a ball.
    """
    check_memory(memory)
    return _fixed_points(memory, inverse_temperature(memory, beta))[1]


def fidelity(memory: Memory, beta: ArrayLike) -> Float[Array, " N"]:
    """Return an upper bound on the distance between each pattern and the fixed point that
    represents it.

    For Gaussians and vectors it is the smallest s for which `one_step_bound` is at most s. All
    fixed points that recall reaches from the ball of `basin_radius` are within s of the pattern.

    For clouds, mixtures and `EntropicBures` it is the smallest s for which there is a minimiser X*
    of the energy with √(D(X*, Xᵢ)/c) ≤ s, as in Theorem 3 of arXiv:2603.20656 (D = S_ε, c = ½),

        D(X*, Xᵢ) ≤ β⁻¹ log(1 + Σ_{k≠i} (πₖ/πᵢ) exp(−βΔₖ)),    Δₖ = c dₖ(dₖ − 2s).

    **Arguments:**

    - `memory`: as in `separations`.
    - `beta`: the inverse temperature, > 0.

    **Returns:** distances √(D/c), (N,); ∞ where nothing is proved.
    """
    check_memory(memory)
    return _fixed_points(memory, inverse_temperature(memory, beta))[0]


@compiled()
def _fixed_points(memory: Memory, beta: Float[Array, ""]) -> tuple[Array, Array]:
    def radii(others: Neighbourhood) -> tuple[Array, Array]:
        groups = condensed(others)
        smallest, largest = stable_radii(groups, beta * cost_scale(memory))
        if memory.geometry.is_squared_metric:
            return smallest, largest
        return minimiser_radius(groups, beta * cost_scale(memory)), largest

    return over_patterns(memory, radii, beta)


def minimum_beta(memory: Memory, error: ArrayLike) -> Float[Array, ""]:
    """Return the smallest β for which `fidelity` is at most `error` at every pattern, to about one
    per cent.

    It grows as log N/D²; Assumption 1 of arXiv:2509.23162 requires a β many times larger.

    **Arguments:**

    - `memory`: as in `separations`.
    - `error`: a distance √(D/c) > 0: W₂, |x−y|, √(2S_ε) or MW₂.

    **Returns:** a scalar; ∞ if there is no such β, as for patterns that are stored twice.
    """
    check_memory(memory)
    error = positive_for(memory, "error", error)
    return _minimum_beta(memory, error)


@compiled(rounded=False)
def _minimum_beta(memory: Memory, error: Float[Array, ""]) -> Float[Array, ""]:
    scale = cost_scale(memory)

    def sufficient_beta(others: Neighbourhood) -> Array:
        groups = condensed(others)

        def condition(b: Array) -> Array:
            if not memory.geometry.is_squared_metric:
                return minimiser_radius(groups, b) <= error
            return stable_radii(groups, b)[0] <= error

        return least_beta(groups, condition) / scale

    return over_patterns(memory, sufficient_beta, reliable_beta(memory)).max()


# ------------------------------------------------------------------ arguments


def _one_of(
    memory: Memory, index: ArrayLike, radius: ArrayLike, beta: ArrayLike
) -> tuple[Array, Array, Array]:
    """Return the checked index of a slot, radius and β of a bound about one pattern."""
    check_memory(memory)
    slot: Array = checked_index(memory, index)
    return slot, _radius(memory, radius, ((),)), inverse_temperature(memory, beta)


def _radius(memory: Memory, radius: ArrayLike, shapes: tuple[tuple[int, ...], ...]) -> Array:
    """Return `radius` as an array, checked to have one of the `shapes` and to be finite and ≥ 0."""
    array = jnp.asarray(radius, working_dtype(memory.dtype))
    if array.shape not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"radius must have shape {expected}; got {array.shape}")
    checks.finite("radius", array)
    checks.nonnegative("radius", array)
    return array
