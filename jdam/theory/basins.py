"""How far apart patterns are, and what that proves of recall: basins, errors, temperatures.

All bounds are sums over the other patterns k of a pattern i of terms in β, the distances dₖ
between the patterns and the distance s of a query from Xᵢ. Where D is c times a squared metric (W₂²
or |x−y|², c = 1), D(ξ, Xₖ) ≥ c(dₖ − s)² and so

    wₖ ≤ (πₖ/πᵢ) exp(−βc(D(ξ, Xₖ) − D(ξ, Xᵢ))) ≤ (πₖ/πᵢ) exp(−βc dₖ(dₖ − 2s)).

Where D is S_ε of cost ½|x−y|² (c = ½), dₖ = |mᵢ − mₖ| and s = √(S_ε/c) do the same, since
S_ε ≥ ½|Δm|²: of such memories the bounds speak of S_ε and of means. Lower bounds on distances
serve as well as distances, so thousands of patterns need few exact ones.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jdam._core import checks
from jdam._core.compile import compiled, working_dtype
from jdam._energy.energy import inverse_temperature
from jdam._measures.gaussian import Gaussian
from jdam._memory.memory import Memory, length_or_capacity
from jdam.theory._neighbourhood import (
    Neighbourhood,
    check_memory,
    condensed,
    cost_scale,
    neighbourhood,
    over_patterns,
    reliable_beta,
)

#: Bisections, each of which gives a binary digit, and steps down to a fixed point.
HALVINGS, DESCENTS = 40, 16


def separations(memory: Memory) -> Float[Array, " N"]:
    """Dᵢ: the distance from each pattern to the nearest other, not squared.

    W₂ for Gaussians and |x−y| for vectors: exact, or a lower bound where many patterns are nearly
    as near and their comparison would take too long. For point clouds and `EntropicBures` the
    distance between means, which is less than W₂ and what Lemma 11 of arXiv:2603.20656 asks for.
    ∞ if there is no other. (The Dᵢ of arXiv:2509.23162.)

    **Raises:** here as in all of this module, `TypeError` for what is no memory and for
    geometries of which nothing is proved (`DotProduct`), `ValueError` for a sharded memory.
    """
    check_memory(memory)
    return _separations(memory)


@compiled()
def _separations(memory: Memory) -> Float[Array, " N"]:
    return over_patterns(memory, lambda others: others.distance.min())


def margins(memory: Memory, radius: ArrayLike) -> Float[Array, " N"]:
    """Δᵢ: by how much D to every other pattern exceeds D to pattern i, at any query whose
    distance from it, √(D/c), is at most `radius`:

        D(ξ, Xₖ) − D(ξ, Xᵢ) ≥ Δᵢ = c Dᵢ(Dᵢ − 2·radius),

    negative where that says nothing. For clouds, Assumption (A1) and Lemma 11 of
    arXiv:2603.20656 in a sharper form, Δ = ½ρ² − ρ√(2r) with r = ½radius², in which neither ε
    nor the number of atoms appears.

    **Arguments:** `radius` ≥ 0, a distance: a scalar or (N,).
    """
    check_memory(memory)
    distance = separations(memory)
    radius = _radius(memory, radius, (distance.shape, ()))
    return cost_scale(memory) * distance * (distance - 2 * radius)


def interference(memory: Memory, beta: ArrayLike) -> Float[Array, " N"]:
    """log Zᵢ(β), Zᵢ = Σ_{k≠i} (πₖ/πᵢ) exp(−βD(Xᵢ, Xₖ)): the Gibbs mass of all others at a pattern,
    in units of its own.

    Recall of pattern i sets in where Zᵢ ≈ 0.1. Not below the truth, and within 0.1 % of it where
    few patterns matter.
    """
    check_memory(memory)
    return _interference(memory, inverse_temperature(memory, beta))


@compiled()
def _interference(memory: Memory, beta: Float[Array, ""]) -> Float[Array, " N"]:
    scale = cost_scale(memory)

    def learn(others: Neighbourhood) -> Array:
        return _log_mass(others, beta * scale)

    return over_patterns(memory, learn, beta, triangle=False)


def transition_beta(memory: Memory, level: float = 0.1) -> Float[Array, " N"]:
    """The β at which the interference Zᵢ(β) of each pattern falls to `level`: where its recall
    sets in. A few per cent above the truth at most; ∞ for a pattern that is stored twice.

    **Arguments:** `level` > 0.
    """
    check_memory(memory)
    return _transition_beta(memory, checks.positive("level", level, working_dtype(memory.dtype)))


@compiled()
def _transition_beta(memory: Memory, level: Float[Array, ""]) -> Float[Array, " N"]:
    scale = cost_scale(memory)

    def learn(others: Neighbourhood) -> Array:
        few = condensed(others)
        return _least_beta(few, lambda b: _log_mass(few, b) <= jnp.log(level)) / scale

    return over_patterns(memory, learn, reliable_beta(memory, triangle=False), triangle=False)


def one_step_bound(
    memory: Memory, index: ArrayLike, radius: ArrayLike, beta: ArrayLike
) -> Float[Array, ""]:
    """How far one full step can end from pattern i, started anywhere within `radius` of it:

        W₂(Φ(ξ), Xᵢ) ≤ Σ_{k≠i} wₖ(W₂(ξ, Xₖ) + W₂(ξ, Xᵢ)) ≤ Σ_{k≠i} (πₖ/πᵢ) dₖ exp(−βdₖ(dₖ − 2s)),

    since (x + s) exp(−β(x² − s²)) falls with x = W₂(ξ, Xₖ) ≥ dₖ − s; where it still rises, for
    dₖ < (s + √(s² + 2/β))/2, its largest value stands for it.
    For Gaussians that commute or not; Theorem 3 of arXiv:2509.23162 has 3/√(βN) for commuting
    covariances on a sphere. Queries on the geodesic from Xᵢ to its nearest pattern attain its
    largest term, up to their wᵢ; random directions stay well below it.

    For clouds (κ = 0) and `EntropicBures` it bounds how far the mean of the step ends from
    that of the pattern, and `radius` is one of √(2S_ε).

    **Arguments:** `index` i, an int; `radius` s ≥ 0, a distance; `beta` > 0. Scalars: use
    `jax.vmap` for more.

    **Returns:** a distance; where it is not less than `radius` nothing is proved.
    """
    args = _one_of(memory, index, radius, beta)
    return _one_step_bound(memory, *args)


@compiled()
def _one_step_bound(memory: Memory, index: Array, radius: Array, beta: Array) -> Array:
    return step_bound(neighbourhood(memory, index, beta), radius, beta * cost_scale(memory))


def contraction_bound(
    memory: Memory, index: ArrayLike, radius: ArrayLike, beta: ArrayLike
) -> Float[Array, ""]:
    """By how much Φ stretches, at most, at any point within `radius` s of pattern i: below 1,
    errors shrink by that factor in each step.

        2β Σₖ wₖ dₖ² ≤ 2β Σ_{k≠i} (πₖ/πᵢ) dₖ² exp(−βdₖ(dₖ − 2s))

    for vectors and diagonal Gaussians, for which Φ is z ↦ Σ wₖzₖ in z = (m, σ), with the Jacobian
    2βCov_w(z), and this is a Lipschitz constant (Theorem 2 of arXiv:2509.23162 has 144βR²/N).
    For full covariances Mₖ the maps themselves turn with the query too, which adds at most

        Σ_{k≠i} (πₖ/πᵢ) exp(−βdₖ(dₖ − 2s)) |Mₖ| (cond Mₖ + cond Mᵢ) / (σ_min(Mᵢ) − s),

    in spectral norms: ∞ where s ≥ σ_min(Mᵢ), and a few per cent where covariances are round.

    **Raises:** also `TypeError` for point clouds and `EntropicBures`.
    """
    check_memory(memory, metric=True)
    args = _one_of(memory, index, radius, beta)
    return _contraction_bound(memory, *args)


@compiled()
def _contraction_bound(memory: Memory, index: Array, radius: Array, beta: Array) -> Array:
    distance, log_odds = neighbourhood(memory, index, beta)
    # d² exp(−βd(d−2s)) falls where βd(d−s) > 1.
    d = jnp.maximum(distance, (radius + jnp.sqrt(radius**2 + 4 / beta)) / 2)
    by_weights = 2 * beta * _sum(log_odds + 2 * _log(d) - beta * _product(d, d - 2 * radius))
    if not isinstance(memory.patterns, Gaussian):
        return by_weights
    # With dR = RΩ, |Ω|·2s_min(MᵀL) ≤ 2|MᵀdL|; what turns like the map to pattern i counts nothing.
    sizes = memory.prepared.spectrum
    largest, least = sizes[:, 0], sizes[:, -1]
    if sizes.shape[1] < memory.patterns.dim:
        least = jnp.zeros_like(least)
    room = least[index] - radius
    condition = largest / jnp.where(least > 0, least, 1)
    nearest = jnp.maximum(distance, radius)
    turning = _log(largest * (condition + condition[index]))
    turning = turning - beta * _product(nearest, nearest - 2 * radius)
    # A pattern that is one point is its own map, whichever way that turns.
    singular = (least == 0) & (largest > 0) & (log_odds > -jnp.inf)
    turned = _sum(log_odds + turning) / jnp.where(room > 0, room, 1)
    return by_weights + jnp.where((room > 0) & ~singular.any(), turned, jnp.inf)


def basin_radius(memory: Memory, beta: ArrayLike) -> Float[Array, " N"]:
    """The largest s for which `one_step_bound` is at most s: a ball about each pattern that
    recall never leaves; 0 where there is none.

    From there every limit of recall is within `fidelity` of the pattern. For clouds (κ = 0) and
    `EntropicBures` it is a radius of √(2S_ε), from which S_ε to the pattern stays below what it
    was, but for what the other patterns can add, since the energy never rises.
    """
    check_memory(memory)
    return _fixed_points(memory, inverse_temperature(memory, beta))[1]


def fidelity(memory: Memory, beta: ArrayLike) -> Float[Array, " N"]:
    """How far what is stored can be from each pattern: a distance, ∞ where nothing is proved.

    For Gaussians and vectors the least s for which `one_step_bound` is at most s: all fixed
    points that recall reaches from the basin are within it.

    For clouds and `EntropicBures` the least s for which a minimiser X* of the energy is within
    √(2S_ε(X*, Xᵢ)) ≤ s, by Theorem 3 of arXiv:2603.20656,

        S_ε(X*, Xᵢ) ≤ β⁻¹ log(1 + Σ_{k≠i} (πₖ/πᵢ) exp(−βΔₖ)),    Δₖ = ½dₖ(dₖ − 2s).
    """
    check_memory(memory)
    return _fixed_points(memory, inverse_temperature(memory, beta))[0]


@compiled()
def _fixed_points(memory: Memory, beta: Float[Array, ""]) -> tuple[Array, Array]:
    def learn(others: Neighbourhood) -> tuple[Array, Array]:
        few = condensed(others)
        least, largest = stable_radii(few, beta * cost_scale(memory))
        if memory.geometry.is_squared_metric:
            return least, largest
        return _minimiser_radius(few, beta * cost_scale(memory)), largest

    return over_patterns(memory, learn, beta)


def minimum_beta(memory: Memory, error: ArrayLike) -> Float[Array, ""]:
    """The smallest β, to a per cent or so, for which `fidelity` is proved to be at most `error` at
    every pattern: what to recall with. ∞ if there is none, as for patterns stored twice.

    It grows as log N/D², which Assumption 1 of arXiv:2509.23162 asks many times more of.

    **Arguments:** `error` > 0, a W₂ distance, or √(2S_ε) for clouds and `EntropicBures`.
    """
    check_memory(memory)
    error = checks.positive("error", error, working_dtype(memory.dtype))
    return _minimum_beta(memory, error)


@compiled()
def _minimum_beta(memory: Memory, error: Float[Array, ""]) -> Float[Array, ""]:
    scale = cost_scale(memory)

    def learn(others: Neighbourhood) -> Array:
        few = condensed(others)

        def good(b: Array) -> Array:
            if not memory.geometry.is_squared_metric:
                return _minimiser_radius(few, b) <= error
            return stable_radii(few, b)[0] <= error

        return _least_beta(few, good) / scale

    return over_patterns(memory, learn, reliable_beta(memory)).max()


# ------------------------------------------------------------------ the sums


def step_bound(others: Neighbourhood, s: Float[Array, ""], b: Float[Array, ""]) -> Float[Array, ""]:
    """Σₖ oddsₖ dₖ exp(−b dₖ(dₖ − 2s)), b = βc, and where that rises with dₖ its largest value."""
    d = jnp.maximum(others.distance, (s + jnp.sqrt(s**2 + 2 / b)) / 2)
    return _sum(others.log_odds + _log(d) - b * _product(d, d - 2 * s))


def stable_radii(
    others: Neighbourhood, b: Float[Array, ""], slack: ArrayLike = 0.0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The least and the largest s with `step_bound` + slack ≤ s; ∞ and 0 if there is none.

    Where it may be so, s < d/2, the bound is convex in s: between the two it is at most s.
    """

    def bound(s: Array) -> Array:
        return step_bound(others, s, b) + slack

    half = others.distance.min() / 2
    alone = half == jnp.inf
    half = jnp.where(alone, 1, half)
    rises = jax.grad(bound)
    middle, _ = _halve(lambda s: rises(s) < 1, jnp.zeros_like(half), half)
    exists = bound(middle) <= middle
    largest, _ = _halve(lambda s: bound(s) <= s, middle, half)
    _, least = _halve(lambda s: bound(s) > s, jnp.zeros_like(half), middle)
    # Far below the others' scale the bound itself is the closer step.
    least = jax.lax.fori_loop(0, DESCENTS, lambda _, s: jnp.minimum(bound(s), s), least)
    least, largest = jnp.where(exists, least, jnp.inf), jnp.where(exists, largest, 0)
    return jnp.where(alone, slack, least), jnp.where(alone, jnp.inf, largest)


def _minimiser_radius(others: Neighbourhood, b: Float[Array, ""]) -> Float[Array, ""]:
    """The least s, nearly, with log(1 + Σₖ oddsₖ exp(−b dₖ(dₖ−2s)))/b ≤ s²."""

    def squared(s: Array) -> Array:
        logs = others.log_odds - b * _product(others.distance, others.distance - 2 * s)
        return jnp.log1p(jnp.exp(jax.nn.logsumexp(logs))) / b

    half = others.distance.min() / 2
    half = jnp.where(half == jnp.inf, jnp.ones_like(half), half)
    # Of radii down to a thousandth of the separation, the largest gap: s² is what is to be beaten.
    radii = half * jnp.asarray(0.5, half.dtype) ** jnp.arange(0, 10, 0.25, dtype=half.dtype)
    good = jax.vmap(squared)(radii) <= radii**2
    start = jnp.where(good, radii, jnp.inf).min()

    def shrink(_: int, s: Array) -> Array:
        return jnp.minimum(s, jnp.sqrt(squared(s)))

    found = jax.lax.fori_loop(0, DESCENTS, shrink, jnp.where(start == jnp.inf, 0, start))
    return jnp.where(start == jnp.inf, jnp.inf, found)


def _least_beta(others: Neighbourhood, good: Callable[[Array], Array]) -> Float[Array, ""]:
    """The least b at which something is good that is so for all larger b; ∞ if there is none."""
    distance = others.distance.min()
    alone, twice = distance == jnp.inf, distance == 0
    unit = 1 / jnp.where(alone | twice, 1, distance) ** 2
    # b d² has to outweigh the prior too.
    most = 1e5 + 2 * jnp.maximum(others.log_odds.max(), 0)
    low, high = jnp.log(jnp.full_like(most, 1e-4)), jnp.log(most)
    _, found = _halve(lambda x: ~good(unit * jnp.exp(x)), low, high)
    # Not asked again: compiled elsewhere, a comparison this close may come out the other way.
    reached = (found < high) & ~twice
    return jnp.where(alone, 0, jnp.where(reached, unit * jnp.exp(found), jnp.inf))


def _halve(holds: Callable[[Array], Array], low: Array, high: Array) -> tuple[Array, Array]:
    """Where something ceases to hold that holds at `low`, by bisection: the two ends."""

    def turn(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        so = holds(middle)
        return jnp.where(so, middle, low), jnp.where(so, high, middle)

    result: tuple[Array, Array] = jax.lax.fori_loop(0, HALVINGS, turn, (low, high))
    return result


def _log_mass(others: Neighbourhood, b: Float[Array, ""]) -> Float[Array, ""]:
    """log Σₖ oddsₖ exp(−b dₖ²)."""
    return jax.nn.logsumexp(others.log_odds - b * _product(others.distance, others.distance))


def _sum(logs: Float[Array, " K"]) -> Float[Array, ""]:
    """Σ exp(logs), with derivatives where there is no pattern."""
    off = logs == -jnp.inf
    return jnp.where(off, 0, jnp.exp(jnp.where(off, 0, logs))).sum()


def _product(x: Float[Array, " K"], y: Float[Array, " K"]) -> Float[Array, " K"]:
    """x·y, finite where there is no pattern."""
    none = jnp.isinf(x) | jnp.isinf(y)
    return jnp.where(none, 0, jnp.where(none, 0, x) * jnp.where(none, 0, y))


def _log(d: Float[Array, " K"]) -> Float[Array, " K"]:
    on = (d > 0) & (d < jnp.inf)
    return jnp.where(on, jnp.log(jnp.where(on, d, 1)), jnp.where(d == 0, -jnp.inf, 0))


# ------------------------------------------------------------------ arguments


def _one_of(
    memory: Memory, index: ArrayLike, radius: ArrayLike, beta: ArrayLike
) -> tuple[Array, Array, Array]:
    check_memory(memory)
    index = jnp.asarray(index)
    if not jnp.issubdtype(index.dtype, jnp.integer) or index.ndim:
        raise TypeError(f"index must be an int; got {index!r}: use jax.vmap for more")
    if checks.is_concrete(index):
        checks.index(int(index), length_or_capacity(memory), "a memory")
    index = memory.from_start(index)
    return index, _radius(memory, radius, ((),)), inverse_temperature(memory, beta)


def _radius(memory: Memory, radius: ArrayLike, shapes: tuple[tuple[int, ...], ...]) -> Array:
    array = jnp.asarray(radius, working_dtype(memory.dtype))
    if array.shape not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"radius must have shape {wanted}; got {array.shape}")
    checks.finite("radius", array)
    checks.nonnegative("radius", array)
    return array
