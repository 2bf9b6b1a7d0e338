"""The geometry `Chamfer`: point clouds under the one-sided entropic Chamfer divergence, from every
atom of a query to a pattern.
"""

import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, PyTree

from jdam._core.batching import by_platform
from jdam._core.derivatives import full_precision, jvp
from jdam._core.linalg import safe_sqrt
from jdam._measures.base import AnyMeasure
from jdam._measures.point_cloud import PointCloud
from jdam.geometry._clouds import (
    check_cloud,
    checked_parameters,
    lifted,
    masses_of,
    metric_length,
    reweighted,
    shown_parameters,
    zero_padding,
)
from jdam.geometry.protocol import (
    AnyView,
    BatchSizes,
    Comparison,
    Geometry,
    Patterns,
    average,
)
from jdam.geometry.sinkhorn import Sinkhorn

#: The residual at which recall stops, in units of √ε.
RESOLVED = 1e-4


class Prepared(NamedTuple):
    """Constants of patterns."""

    centre: Float[Array, "N z"]  # the means, features included
    self_cost: Float[Array, " N"]  # S⁰


class Pull(NamedTuple):
    """The contribution of a pattern to the step; Gibbs averages of it determine the step."""

    displacement: Float[Array, "n d"]  # aⱼ(Tⱼ − xⱼ)
    fraction: Float[Array, " n"]  # aⱼ, the transported fractions; 0 for padding
    variation: Float[Array, " n"]  # Fⱼ = ∂D/∂pⱼ


class Assignment(NamedTuple):
    """Transport of the atoms of a query to a pattern."""

    costs: Float[Array, " n"]  # Sⱼ
    plan: Float[Array, "n m"]  # Pⱼₖ; rows sum to 1
    displacement: Float[Array, "n d"]  # Tⱼ − xⱼ
    not_converged: Bool[Array, ""]  # whether the rounding error of costs exceeds ε


class Chamfer(Geometry):
    """D = the one-sided entropic Chamfer divergence with cost ½|x−y|², on point clouds.

    A query Σⱼ pⱼδ(xⱼ) is compared with a pattern Σₖ bₖδ(yₖ) of which it may be any part: atoms of
    the pattern that the query lacks cost nothing. D is entropic transport with a free second
    marginal, and has a closed form:

        Sⱼ = −ε log Σₖ bₖ exp(−½|xⱼ−yₖ|²/ε)         sⱼ = Sⱼ − S⁰, S⁰ = Σₖ bₖSₖ of the pattern itself
        D = Σⱼ pⱼ(ρ+ε)(1 − aⱼ)                      aⱼ = exp(−sⱼ/(ρ+ε))

    with the transported fractions aⱼ, and D = Σⱼ pⱼsⱼ without ρ, where all aⱼ are 1. It is the
    minimum over π ≥ 0 of ∫ ½|x−y|² dπ + ε KL(π | q⊗X) + ρ KL(π1 | q), up to the constant S⁰. For
    ε → 0 without ρ it is the one-sided Chamfer distance Σⱼ pⱼ minₖ ½|xⱼ−yₖ|². D is about 0 for the
    pattern itself and for every part of it, and at most ρ+ε. It is slightly negative for a query
    between atoms of a pattern that are closer than √ε. D is not symmetric, and `jdam.theory` does
    not apply.

    A step moves each atom to the mean of its targets Tⱼ = Σₖ Pⱼₖyₖ, Pⱼₖ ∝ bₖ exp(−½|xⱼ−yₖ|²/ε), and
    reweights atoms by the first variation F of the energy:

        xⱼ⁺ = xⱼ + τ(Σᵢ wᵢaᵢⱼTᵢⱼ / Σᵢ wᵢaᵢⱼ − xⱼ)
        pⱼ⁺ ∝ pⱼ exp(−τκFⱼ)                          Fⱼ = Σᵢ wᵢ(ρ+ε)(1 − aᵢⱼ)

    For τ ≤ 1 and any κ ≥ 0 it never raises the energy: for constant P, Sⱼ is majorised by a
    quadratic function of xⱼ, D is concave in the Sⱼ and linear in p, and the energy is concave in
    the D. Padding, and atoms whose fractions all underflow, do not move.

    **Arguments:**

    - `epsilon` ε > 0: the regularisation, a squared distance. It blurs patterns below √ε.
    - `rho` ρ > 0: the price of an untransported atom, a squared distance, for queries with stray
      atoms. Choose √ρ between the noise of atoms and the distances between them. None, the default,
      transports every atom.
    - `hellinger_scale` κ ≥ 0: the strength of reweighting, per squared distance; 0 keeps the
      weights. With κ > 0 mass moves to the atoms of least cost, in the limit to these alone, since
      D is linear in p. This takes some 1/κΔF steps: where F differs little between atoms, the
      status is `Status.MAX_STEPS`, and a smaller `max_steps` may suffice.
    - `feature_scale` λ ≥ 0: the price of matching atoms of different features, a squared distance
      for features without unit: the cost of atoms is ½|x−y|² + ½λ|u−v|², as in `Sinkhorn`. Steps
      move the points only. It has no effect on clouds without features.

    All are traced: changing them does not recompile, and they can be differentiated. The length of
    a step does not depend on the transported fractions: stray atoms move onto patterns too, unless
    their fractions underflow. So `Recall.inliers`, the fractions for the nearest pattern if ρ is
    given, are those of atoms that have moved; `jdam.match` returns those of the query. The status
    is `Status.SOLVER` for a pattern so large, |y−y'|² ≈ 10⁷ε in float32, that the rounding error of
    its costs exceeds ε.

    One-sided distances of sets are used in late interaction (Khattab and Zaharia,
    arXiv:2004.12832); Pⱼₖ is the attention of an atom to the atoms of a pattern, within the
    attention of the query to the patterns.

    **Raises:** `TypeError` or `ValueError` for arguments that are not of these kinds.
    """

    epsilon: Float[Array, ""]
    rho: Float[Array, ""] | None
    hellinger_scale: Float[Array, ""]
    feature_scale: Float[Array, ""]

    max_backtracks: ClassVar[int] = 0
    default_steps: ClassVar[int] = 256  # steps are cheap, and many where patterns overlap
    positive: ClassVar[tuple[str, ...]] = ("epsilon", "rho", "hellinger_scale", "feature_scale")
    unprepared: ClassVar[tuple[str, ...]] = ("rho", "hellinger_scale")

    def __init__(
        self,
        epsilon: ArrayLike,
        *,
        rho: ArrayLike | None = None,
        hellinger_scale: ArrayLike = 0.0,
        feature_scale: ArrayLike = 1.0,
    ):
        self.epsilon, self.rho, self.hellinger_scale, self.feature_scale = checked_parameters(
            epsilon, rho, hellinger_scale, feature_scale
        )

    @classmethod
    def relative(
        cls,
        patterns: AnyMeasure,
        epsilon: float = 0.05,
        *,
        rho: float | None = 0.1,
        hellinger_scale: float = 0.0,
        feature_scale: float = 1.0,
    ) -> "Chamfer":
        """Return a `Chamfer` whose parameters scale with the unit of length of the patterns, as
        `Sinkhorn.relative`.

        With u the median of ½|x−y|² within patterns, it is `Chamfer(epsilon·u, rho=rho·u,
        hellinger_scale=hellinger_scale/u, feature_scale=feature_scale·u)`. If the atoms of queries
        have noise of a known σ in each coordinate, an ε of 1 to 3σ² and a ρ of 5 to 10σ² are better
        than any default. For σ of 4 % of the median distance within patterns these are about
        `relative(patterns, 0.01, rho=0.03)`; the defaults are for twice that σ.

        **Arguments:**

        - `patterns`: clouds with any batch axes, or a list of them.
        - `epsilon`, `rho`, `hellinger_scale`, `feature_scale`: ε/u, ρ/u, κu and λ/u.

        **Raises:** as `Sinkhorn.relative`.
        """
        scales = {"hellinger_scale": hellinger_scale, "feature_scale": feature_scale}
        units = Sinkhorn.relative(patterns, epsilon, rho=rho, **scales)
        scales = {name: getattr(units, name) for name in scales}
        return cls(units.epsilon, rho=units.rho, **scales)

    def check(self, name: str, measure: AnyMeasure, batch_ndim: int) -> AnyMeasure:
        return check_cloud(self, name, measure, batch_ndim)

    def prepare(self, patterns: AnyMeasure) -> PyTree:
        patterns, epsilon = jax.lax.stop_gradient((lifted(self, patterns), self.epsilon))
        centre = patterns.mean
        return Prepared(centre, jax.vmap(_self_cost, (0, 0, None))(centre, patterns, epsilon))

    def compare(self, view: AnyView, patterns: Patterns) -> Comparison:
        def one(cloud: PointCloud, prepared: Prepared) -> Comparison:
            assignment, fractions, variation = self._assign(view, cloud, prepared)
            pull = Pull(fractions[:, None] * assignment.displacement, fractions, variation)
            divergence = jnp.vdot(view.weights, variation)
            return Comparison(
                divergence, pull, not_converged=assignment.not_converged, inliers=fractions
            )

        comparison = jax.vmap(one)(patterns.measures, patterns.prepared)
        return comparison if self.rho is not None else comparison._replace(inliers=None)

    def plan(self, view: AnyView, patterns: Patterns) -> Float[Array, "B n m"]:
        """Compute pⱼaⱼPⱼₖ."""

        def one(cloud: PointCloud, prepared: Prepared) -> Array:
            assignment, fraction, _ = self._assign(view, cloud, prepared)
            plan: Array = (view.weights * fraction)[:, None] * assignment.plan
            return plan

        plans: Array = jax.vmap(one)(patterns.measures, patterns.prepared)
        return plans

    def _assign(
        self, query: PointCloud, cloud: PointCloud, prepared: Prepared
    ) -> tuple[Assignment, Float[Array, " n"], Float[Array, " n"]]:
        """Return the assignment of the query to a pattern, the fractions aⱼ, which are 0 for
        padding, and Fⱼ.
        """
        dim, query, cloud = query.dim, lifted(self, query), lifted(self, cloud)
        assignment = assign(prepared.centre, query, cloud, self.epsilon)
        assignment = assignment._replace(displacement=assignment.displacement[:, :dim])
        self_cost = _with_derivative(prepared.self_cost, prepared.centre, cloud, self.epsilon)
        fraction, variation = self._fractions(assignment.costs - self_cost)
        return assignment, jnp.where(query.weights > 0, fraction, 0), variation

    def _fractions(
        self, excess: Float[Array, " n"]
    ) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """Return aⱼ and Fⱼ for costs sⱼ."""
        if self.rho is None:
            return jnp.ones_like(excess), excess
        reach = self.rho + self.epsilon
        # Larger costs have the fraction 0; the minimum keeps derivatives within range.
        scaled = jnp.minimum(excess, 2 * _largest_exponent(excess) * reach) / reach
        return jnp.exp(-scaled), -reach * jnp.expm1(-scaled)

    def move(self, view: AnyView, pull: AnyMeasure, step_size: Array) -> AnyMeasure:
        weights = reweighted(view.weights, pull.variation, step_size * self.hellinger_scale)
        return view.with_atoms(view.points + step_size * _step(pull), weights)

    def residual(self, view: AnyView, pull: AnyMeasure) -> Array:
        """Compute √(Σ pⱼ|Δxⱼ|² + κ Var_p F), where Δx is the displacement of the full step."""
        return metric_length(view.weights, _step(pull), pull.variation, self.hellinger_scale)

    def tolerances(self, query: AnyMeasure, scale: Array) -> tuple[Array, Array]:
        """Return tolerances in units of √ε, below which plans do not resolve atoms, plus the
        rounding of coordinates.
        """
        tol = RESOLVED * jnp.sqrt(self.epsilon)
        tol = tol + 4 * float(jnp.finfo(scale.dtype).eps) * scale
        return tol, tol

    def masses(self, view: AnyView, pull: AnyMeasure) -> AnyMeasure:
        """Return the masses of the metric of `residual`."""
        return masses_of(view, view.weights, self.hellinger_scale)

    def gauge(self, measure: AnyMeasure, tangent: AnyMeasure) -> AnyMeasure:
        """Project a tangent on padding and, if κ = 0, on all weights, which no step moves."""
        padding = measure.weights == 0
        weights = jnp.where(padding | (self.hellinger_scale == 0), tangent.weights, 0)
        return tangent.with_atoms(jnp.where(padding[:, None], tangent.points, 0), weights)

    def typical_norm(self, patterns: AnyMeasure, weights: Array | None = None) -> Array:
        """Return the root mean square of |x| over all patterns, which determines the rounding of
        coordinates.
        """
        points = zero_padding(patterns.points, patterns.weights)
        squares = jnp.vecdot(patterns.weights, jnp.vecdot(points, points))
        return safe_sqrt(average(squares, weights))

    def batch_sizes(self, patterns: AnyMeasure) -> BatchSizes:
        pairs = patterns.num_atoms * (patterns.num_atoms + patterns.dim)
        at_once = min(len(patterns), max(1, by_platform(2**16, 2**22) // pairs))
        queries = max(1, by_platform(2**18, 2**26) // (pairs * at_once))
        return BatchSizes(queries, at_once, at_once)

    def __repr__(self) -> str:
        return f"Chamfer({', '.join(shown_parameters(self))})"


def assign(
    centre: Float[Array, " d"], query: PointCloud, cloud: PointCloud, epsilon: Float[Array, ""]
) -> Assignment:
    """Compute the entropic transport of each atom of the query to a cloud with the given centre.

    Coordinates relative to the centre of the cloud avoid the cancellation of large common shifts.
    """
    centre, has_weight = jax.lax.stop_gradient(centre), cloud.weights > 0
    x, y = (zero_padding(c.points - centre[None], c.weights) for c in (query, cloud))
    squares = jnp.vecdot(y, y)
    # ½|x−y|² − ½|x|² − ε log b; padding is infinitely far.
    offsets = jnp.where(
        has_weight,
        squares / 2 - epsilon * jnp.log(jnp.where(has_weight, cloud.weights, 1)),
        jnp.inf,
    )
    costs = offsets[None] - x @ y.T
    minima = jax.lax.stop_gradient(costs.min(1))
    # The minimum keeps exp from underflowing: a sum of 0 would have an infinite logarithm.
    excess = jnp.minimum(costs - minima[:, None], _largest_exponent(costs) * epsilon)
    masses = jnp.where(has_weight[None], jnp.exp(-excess / epsilon), 0)
    totals = masses.sum(1)
    plan = masses / totals[:, None]
    soft_minima = jnp.vecdot(x, x) / 2 + minima - epsilon * jnp.log(totals)
    not_converged = float(jnp.finfo(squares.dtype).eps) * squares.max() > epsilon
    return Assignment(soft_minima, plan, plan @ y - x, jax.lax.stop_gradient(not_converged))


def _self_cost(centre: Array, cloud: PointCloud, epsilon: Array) -> Float[Array, ""]:
    """Compute S⁰, the self cost of a cloud."""
    return jnp.vdot(cloud.weights, assign(centre, cloud, cloud, epsilon).costs)


def self_cost_growth(geometry: Chamfer, cloud: PointCloud, scale: Array) -> Float[Array, ""]:
    """Compute (∂S⁰/∂s)/s of the cloud sX at the scale s."""
    centred = cloud.points - cloud.mean[None]

    def self_cost(scale: Array) -> Array:
        scaled = lifted(geometry, cloud.with_atoms(scale * centred, cloud.weights))
        return _self_cost(jnp.zeros_like(scaled.points[0]), scaled, geometry.epsilon)

    growth: Array = jax.jvp(self_cost, (scale,), (jnp.ones_like(scale),))[1] / scale
    return growth


@jax.custom_jvp
def _with_derivative(self_cost: Array, centre: Array, cloud: PointCloud, epsilon: Array) -> Array:
    """Return the known S⁰, with derivatives that are computed only on demand."""
    return self_cost


def _self_cost_jvp(
    primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]
) -> tuple[Array, Array]:
    return _with_derivative(*primals), jvp(_self_cost, primals[1:], tangents[1:])[1]


_with_derivative.defjvp(full_precision(_self_cost_jvp), symbolic_zeros=True)


def _step(pull: Pull) -> Float[Array, "n d"]:
    """Compute Σ wᵢaᵢ(Tᵢ − x)/Σ wᵢaᵢ, or 0 for fractions so small that derivatives of the quotient
    would overflow.
    """
    has_mass = pull.fraction > float(jnp.finfo(pull.fraction.dtype).tiny) ** 0.5
    total = jnp.where(has_mass, pull.fraction, 1)[:, None]
    return jnp.where(has_mass[:, None], pull.displacement / total, 0)


def _largest_exponent(like: Array) -> float:
    """Return the largest −log of a positive number of this dtype, less a margin."""
    return -0.9 * math.log(float(jnp.finfo(like.dtype).tiny))
