"""Point clouds under the one-sided entropic Chamfer divergence: every atom of a query is explained
by a pattern, and not the other way round."""

import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from jdam._core.batching import by_platform
from jdam._core.derivatives import full_precision, jvp
from jdam._core.linalg import safe_log, safe_sqrt
from jdam._measures.base import AnyMeasure
from jdam._measures.point_cloud import PointCloud
from jdam.geometry._clouds import check_cloud, checked_parameters, lifted, shown_parameters
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
    """What is constant about patterns."""

    centre: Float[Array, "N z"]  # of z, features included
    own_cost: Float[Array, " N"]  # S⁰


class Pull(NamedTuple):
    """What a pattern asks of each atom; Gibbs averages of these determine the step."""

    displacement: Float[Array, "n d"]  # shareⱼ(Tⱼ − xⱼ)
    share: Float[Array, " n"]  # shareⱼ, 0 of padding
    variation: Float[Array, " n"]  # Fⱼ = ∂D/∂pⱼ


class Assignment(NamedTuple):
    """How a pattern explains the atoms of a query."""

    costs: Float[Array, " n"]  # Sⱼ
    plan: Float[Array, "n m"]  # Pⱼₖ; rows sum to 1
    displacement: Float[Array, "n d"]  # Tⱼ − xⱼ
    not_converged: Bool[Array, ""]  # whether costs are rounded to more than ε


class Chamfer(Geometry):
    """D = the one-sided entropic Chamfer divergence with cost ½|x−y|², on point clouds.

    A query Σⱼ pⱼδ(xⱼ) is explained by a pattern Σₖ bₖδ(yₖ), of which it may be any part: what the
    pattern has and the query lacks costs nothing. D is entropic transport whose second marginal is
    free, and has a closed form:

        Sⱼ = −ε log Σₖ bₖ exp(−½|xⱼ−yₖ|²/ε)         sⱼ = Sⱼ − S⁰, S⁰ = Σₖ bₖSₖ of the pattern itself
        D = Σⱼ pⱼ(ρ+ε)(1 − shareⱼ)                  shareⱼ = exp(−sⱼ/(ρ+ε))

    and D = Σⱼ pⱼsⱼ without ρ, where all shares are 1. It is the value of min over π ≥ 0 of
    ∫ ½|x−y|² dπ + ε KL(π | q⊗X) + ρ KL(π1 | q), up to the constant S⁰. For ε → 0 without ρ it is
    the one-sided Chamfer distance Σⱼ pⱼ minₖ ½|xⱼ−yₖ|². D is about 0 for the pattern itself and for
    every part of it, and at most ρ+ε. Where a query lies between atoms of a pattern that are closer
    than √ε, D is a little less than 0. It is no metric, not even symmetric, and `jdam.theory` has
    nothing to say of it.

    A step moves each atom to the mean of its targets Tⱼ = Σₖ Pⱼₖyₖ, Pⱼₖ ∝ bₖ exp(−½|xⱼ−yₖ|²/ε),
    and reweights atoms by the first variation F of the energy:

        xⱼ⁺ = xⱼ + τ(Σᵢ wᵢshareᵢⱼTᵢⱼ / Σᵢ wᵢshareᵢⱼ − xⱼ)
        pⱼ⁺ ∝ pⱼ exp(−τκFⱼ)                          Fⱼ = Σᵢ wᵢ(ρ+ε)(1 − shareᵢⱼ)

    For τ ≤ 1 and any κ ≥ 0 it never raises the energy: with P held, Sⱼ is majorised by a quadratic
    function of xⱼ, D is concave in the Sⱼ and linear in p, and the energy is concave in the D. An
    atom whose every share underflows stays where it is, as does padding.

    **Arguments:**

    - `epsilon` ε > 0: the regularisation, a squared length. It blurs patterns below √ε.
    - `rho` ρ > 0: the price of an atom that nothing explains, a squared length too, for cues with
      strays: choose √ρ between the noise of atoms and the distances between them. None, the
      default, has every atom explained.
    - `hellinger_scale` κ ≥ 0: the strength of reweighting, per squared unit of distance; 0 keeps
      the weights. With κ > 0 mass goes to the atoms that are explained best, in the end to these
      alone, since D is linear in p. It takes some 1/κΔF steps: where F differs little between
      atoms, recall says `Status.MAX_STEPS`, and a few `max_steps` may be what is wanted.
    - `feature_scale` λ ≥ 0: the price of matching atoms of different features, a squared length for
      features without unit: with it the cost of atoms is ½|x−y|² + ½λ|u−v|², as in `Sinkhorn`. A
      step moves points alone. Of clouds without features it means nothing.

    All are traced: changing them does not recompile, and they can be differentiated. The step does
    not depend on how small shares are: strays move onto patterns too, unless theirs underflow. So
    `Recall.inliers`, the shares in the nearest pattern if ρ is given, are those of atoms that have
    moved; `jdam.match` has those of the query. `Status.SOLVER` says that a pattern extends so far,
    |y−y'|² ≈ 10⁷ε in float32, that its costs are rounded to more than ε.

    One-sided distances of sets are those of late interaction (Khattab and Zaharia,
    arXiv:2004.12832); Pⱼₖ is the attention of an atom to the atoms of a pattern, within the
    attention of the query to the patterns.

    **Raises:** `TypeError` or `ValueError` for arguments that are not of these kinds.
    """

    epsilon: Float[Array, ""]
    rho: Float[Array, ""] | None
    hellinger_scale: Float[Array, ""]
    feature_scale: Float[Array, ""]

    max_backtracks: ClassVar[int] = 0
    default_steps: ClassVar[int] = 256  # they are cheap, and many where patterns overlap
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
        """A `Chamfer` in units of the patterns, as `Sinkhorn.relative`: with u the median of
        ½|x−y|² within patterns, `Chamfer(epsilon·u, rho=rho·u, hellinger_scale=hellinger_scale/u,
        feature_scale=feature_scale·u)`.

        Where atoms of cues are off by a known σ in each coordinate, an ε of 1 to 3σ² and a ρ of 5
        to 10σ² are better than any default. For σ of 4 % of the median distance within patterns
        these are about `relative(patterns, 0.01, rho=0.03)`; the defaults are for twice that σ.

        **Arguments:** `patterns`: clouds with any batch axes, or a list of them.

        **Raises:** as `Sinkhorn.relative`.
        """
        scales = {"hellinger_scale": hellinger_scale, "feature_scale": feature_scale}
        units = Sinkhorn.relative(patterns, epsilon, rho=rho, **scales)
        scales = {name: getattr(units, name) for name in scales}
        return cls(units.epsilon, rho=units.rho, **scales)

    def check(self, name: str, measure: AnyMeasure, batch_ndim: int) -> AnyMeasure:
        return check_cloud(self, name, measure, batch_ndim)

    def prepare(self, patterns: AnyMeasure) -> Any:
        patterns, epsilon = jax.lax.stop_gradient((self._lifted(patterns), self.epsilon))
        centre = patterns.mean
        return Prepared(centre, jax.vmap(_own_cost, (0, 0, None))(centre, patterns, epsilon))

    def _lifted(self, cloud: PointCloud) -> PointCloud:
        """The cloud of z = (x, √λ u), u its features."""
        return lifted(cloud, self.feature_scale, self.epsilon)

    def compare(self, view: AnyView, patterns: Patterns) -> Comparison:
        def one(cloud: PointCloud, prepared: Prepared) -> Comparison:
            found, share, variation = self._explain(view, cloud, prepared)
            pull = Pull(share[:, None] * found.displacement, share, variation)
            divergence = jnp.vdot(view.weights, variation)
            return Comparison(divergence, pull, not_converged=found.not_converged, inliers=share)

        compared = jax.vmap(one)(patterns.measures, patterns.prepared)
        return compared if self.rho is not None else compared._replace(inliers=None)

    def plan(self, view: AnyView, patterns: Patterns) -> Float[Array, "B n m"]:
        """pⱼshareⱼPⱼₖ."""

        def one(cloud: PointCloud, prepared: Prepared) -> Array:
            found, share, _ = self._explain(view, cloud, prepared)
            plan: Array = (view.weights * share)[:, None] * found.plan
            return plan

        plans: Array = jax.vmap(one)(patterns.measures, patterns.prepared)
        return plans

    def _explain(
        self, query: PointCloud, cloud: PointCloud, prepared: Prepared
    ) -> tuple[Assignment, Float[Array, " n"], Float[Array, " n"]]:
        """How a pattern explains the query, shareⱼ, which of padding is 0, and Fⱼ."""
        dim, query, cloud = query.dim, self._lifted(query), self._lifted(cloud)
        found = assign(prepared.centre, query, cloud, self.epsilon)
        found = found._replace(displacement=found.displacement[:, :dim])
        own_cost = _known(prepared.own_cost, prepared.centre, cloud, self.epsilon)
        share, variation = self._shares(found.costs - own_cost)
        return found, jnp.where(query.weights > 0, share, 0), variation

    def _shares(self, excess: Float[Array, " n"]) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """shareⱼ and Fⱼ of the costs sⱼ."""
        if self.rho is None:
            return jnp.ones_like(excess), excess
        reach = self.rho + self.epsilon
        # What is farther has the share 0, and derivatives that stay in range.
        scaled = jnp.minimum(excess, 2 * _range(excess) * reach) / reach
        return jnp.exp(-scaled), -reach * jnp.expm1(-scaled)

    def move(self, view: AnyView, pull: AnyMeasure, step_size: Array) -> AnyMeasure:
        rate = step_size * self.hellinger_scale
        # Finite of padding, whose weights could else be NaN were there nothing else.
        logs = jnp.maximum(safe_log(view.weights), float(jnp.finfo(rate.dtype).min) / 2)
        weights = jax.nn.softmax(logs - rate * pull.variation)
        # An atom of weight 0 could never come back.
        weights = jnp.maximum(weights, float(jnp.finfo(weights.dtype).tiny))
        # With κ = 0 not even the last digit of a weight changes.
        weights = jnp.where((view.weights > 0) & (rate > 0), weights, view.weights)
        return view.with_atoms(view.points + step_size * _change(pull), weights)

    def residual(self, view: AnyView, pull: AnyMeasure) -> Array:
        """√(Σ pⱼ|Δxⱼ|² + κ Var_p F), Δx the change of the full step."""
        change, weights = _change(pull), view.weights
        centred = pull.variation - jnp.vdot(weights, pull.variation)
        reaction = safe_sqrt(self.hellinger_scale) * centred  # a length; F² may be out of range
        return safe_sqrt(jnp.vdot(weights, jnp.vecdot(change, change) + reaction**2))

    def tolerances(self, query: AnyMeasure, scale: Array) -> tuple[Array, Array]:
        """In units of √ε, below which plans do not tell atoms apart, beside the rounding of
        coordinates."""
        sought = RESOLVED * jnp.sqrt(self.epsilon)
        sought = sought + 4 * float(jnp.finfo(scale.dtype).eps) * scale
        return sought, sought

    def masses(self, view: AnyView, pull: AnyMeasure) -> AnyMeasure:
        """Of the metric of `residual`: pⱼ for points, pⱼ/κ for logarithms of weights."""
        query, kappa = view, self.hellinger_scale
        p = query.weights
        reaction = jnp.where(kappa > 0, p / jnp.where(kappa > 0, kappa, 1), 0)
        none: PointCloud = jax.tree.map(jnp.zeros_like, query)
        return none.with_atoms(jnp.broadcast_to(p[:, None], query.points.shape), reaction)

    def gauge(self, measure: AnyMeasure, tangent: AnyMeasure) -> AnyMeasure:
        """Padding, and all weights if κ = 0."""
        padding = measure.weights == 0
        weights = jnp.where(padding | (self.hellinger_scale == 0), tangent.weights, 0)
        return tangent.with_atoms(jnp.where(padding[:, None], tangent.points, 0), weights)

    def typical_norm(self, patterns: AnyMeasure, weights: Array | None = None) -> Array:
        """The root mean square of |x| over all patterns, with which coordinates round."""
        points = jnp.where(patterns.weights[..., None] > 0, patterns.points, 0)
        squares = jnp.vecdot(patterns.weights, jnp.vecdot(points, points))
        return safe_sqrt(average(squares, weights))

    def batch_sizes(self, patterns: AnyMeasure) -> BatchSizes:
        pairs = patterns.num_atoms * (patterns.num_atoms + patterns.dim)
        at_once = min(len(patterns), max(1, by_platform(2**16, 2**22) // pairs))
        queries = max(1, by_platform(2**18, 2**26) // (pairs * at_once))
        return BatchSizes(queries, at_once, at_once)

    def __repr__(self) -> str:
        return f"Chamfer({', '.join(shown_parameters(self))})"


def coordinates(centre: Float[Array, " d"], cloud: PointCloud) -> Float[Array, "n d"]:
    """z of atoms, about a centre, in which c = ½|z−z'|²; 0 for padding, wherever it lies."""
    return jnp.where(cloud.weights[:, None] > 0, cloud.points - centre[None], 0)


def assign(
    centre: Float[Array, " d"], query: PointCloud, cloud: PointCloud, epsilon: Float[Array, ""]
) -> Assignment:
    """Entropic transport of the query's atoms, each on its own, to a cloud about this centre.

    Products lose no digits to a common shift, since the centre is the cloud's own."""
    centre = jax.lax.stop_gradient(centre)
    x, y, on = coordinates(centre, query), coordinates(centre, cloud), cloud.weights > 0
    squares = jnp.vecdot(y, y)
    # ½|x−y|² − ½|x|² − ε log b; padding is infinitely far.
    levels = jnp.where(
        on, squares / 2 - epsilon * jnp.log(jnp.where(on, cloud.weights, 1)), jnp.inf
    )
    costs = levels[None] - x @ y.T
    least = jax.lax.stop_gradient(costs.min(1))
    # Within the range of exp: a sum that is 0 by rounding would have an infinite logarithm.
    excess = jnp.minimum(costs - least[:, None], _range(costs) * epsilon)
    masses = jnp.where(on[None], jnp.exp(-excess / epsilon), 0)
    total = masses.sum(1)
    plan = masses / total[:, None]
    found = jnp.vecdot(x, x) / 2 + least - epsilon * jnp.log(total)
    not_converged = float(jnp.finfo(squares.dtype).eps) * squares.max() > epsilon
    return Assignment(found, plan, plan @ y - x, jax.lax.stop_gradient(not_converged))


def _own_cost(centre: Array, cloud: PointCloud, epsilon: Array) -> Float[Array, ""]:
    """S⁰, what the cloud costs itself."""
    return jnp.vdot(cloud.weights, assign(centre, cloud, cloud, epsilon).costs)


def own_growth(geometry: Chamfer, cloud: PointCloud, scale: Array) -> Float[Array, ""]:
    """(∂S⁰/∂s)/s of the cloud sX, s its scale."""
    steps = cloud.points - cloud.mean[None]

    def own_cost(scale: Array) -> Array:
        grown = geometry._lifted(cloud.with_atoms(scale * steps, cloud.weights))
        return _own_cost(jnp.zeros_like(grown.points[0]), grown, geometry.epsilon)

    growth: Array = jax.jvp(own_cost, (scale,), (jnp.ones_like(scale),))[1] / scale
    return growth


@jax.custom_jvp
def _known(own_cost: Array, centre: Array, cloud: PointCloud, epsilon: Array) -> Array:
    """S⁰, which is known, with its derivatives, which are computed where they are asked for."""
    return own_cost


def _known_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    return _known(*primals), jvp(_own_cost, primals[1:], tangents[1:])[1]


_known.defjvp(full_precision(_known_jvp), symbolic_zeros=True)


def _change(pull: Pull) -> Float[Array, "n d"]:
    """Σ wᵢshareᵢ(Tᵢ − x)/Σ wᵢshareᵢ, 0 where shares are so small that derivatives of the quotient
    would overflow."""
    within = pull.share > float(jnp.finfo(pull.share.dtype).tiny) ** 0.5
    total = jnp.where(within, pull.share, 1)[:, None]
    return jnp.where(within[:, None], pull.displacement / total, 0)


def _range(like: Array) -> float:
    """How large −log of a positive number may be."""
    return -0.9 * math.log(float(jnp.finfo(like.dtype).tiny))
