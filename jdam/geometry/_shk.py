"""Steps of point clouds by spherical Hellinger–Kantorovich (SHK) gradient flow: how far they go,
and what is a fixed point."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam._core.linalg import safe_log, safe_sqrt
from jdam._entropic.cost import Cost, HalfSquaredDistance
from jdam._entropic.ground_cost import GroundCost
from jdam._entropic.problem import (
    Cloud,
    Marginals,
    SelfTransport,
    Solver,
)
from jdam._entropic.self_transport import self_transport
from jdam._measures.base import AnyMeasure
from jdam._measures.point_cloud import PointCloud
from jdam.geometry._clouds import (
    Pull,
    Tangent,
    View,
    lifted,
    shortening,
)
from jdam.geometry.protocol import (
    AnyView,
    Geometry,
    Retraction,
)

#: How much more cautious each further attempt at a weight step is, and how many there are
#: before the support step is shortened too.
CAUTION, WEIGHT_ATTEMPTS = 16.0, 8
#: In units of √ε: the residual that is small enough, as where energies are all rounding, and the
#: residual at which recall stops.
RESOLVED = 5e-3, 5e-4
#: With ρ, the curvature of the energy at an atom is its share of transported mass, which of a light
#: atom may be any number. From this one on, a step ends at the atom's average target: one of 2 over
#: the curvature would not lower the energy.
STABLE = 1.5
#: Of an atom that is light: its share of the mean weight.
LIGHT = 0.1


class SHKGeometry(Geometry):
    """A geometry of point clouds by entropic transport whose steps follow the SHK gradient: what
    `Sinkhorn` says of its parameters and steps."""

    epsilon: Float[Array, ""]
    rho: Float[Array, ""] | None
    hellinger_scale: Float[Array, ""]
    tol: float | None = eqx.field(static=True)
    max_iterations: int = eqx.field(static=True)
    solver: str = eqx.field(static=True)
    safeguard: bool = eqx.field(static=True)
    #: The default is that of files of before there was one.
    feature_scale: Float[Array, ""] = 1.0  # type: ignore[assignment]
    cost: Any = eqx.field(static=True, default=None)

    positive: ClassVar[tuple[str, ...]] = ("epsilon", "rho", "hellinger_scale", "feature_scale")
    unprepared: ClassVar[tuple[str, ...]] = ("hellinger_scale",)

    def move(self, view: AnyView, pull: AnyMeasure, step_size: Array) -> AnyMeasure:
        if self.safeguard:
            return self.backtrack(view, pull, step_size, 0)
        query, rate = view.query, step_size * self.hellinger_scale
        weights = jax.nn.softmax(safe_log(query.weights) - rate * pull.variation)
        weights = jnp.where(rate > 0, weights, query.weights)
        return query.with_atoms(query.points + step_size * pull.velocity, weights)

    def backtrack(
        self, view: AnyView, pull: AnyMeasure, step_size: Array, times: Any
    ) -> AnyMeasure:
        """Less reweighting, and only after that a shorter step of the support."""
        query, log_weights = view.query, safe_log(view.query.weights)
        length = step_size * shortening(
            query.weights, pull.variation, step_size * self.hellinger_scale
        )
        caution = jnp.asarray(times, step_size.dtype)
        rate = length * self.hellinger_scale * CAUTION**-caution
        # The support step is shortened too where weight steps are not to blame.
        tried = jnp.where(self.hellinger_scale > 0, WEIGHT_ATTEMPTS, 0)
        length = length * 2.0 ** jnp.minimum(tried - caution, 0)
        weights = jax.nn.softmax(log_weights - rate * pull.variation)
        # An atom of weight 0 could never come back.
        weights = jnp.maximum(weights, float(jnp.finfo(weights.dtype).tiny))
        # With κ = 0 not even the last digit of a weight changes.
        moves = (query.weights > 0) & (rate > 0)
        weights = jnp.where(moves, weights, query.weights)
        factor = length * self._transported(view, pull)
        length = length / jnp.where(factor > STABLE, factor, 1)
        points = query.points + length[..., None] * pull.velocity
        return query.with_atoms(self._held(view, pull, points), weights)

    def _held(self, view: View, pull: Pull, points: Array) -> Float[Array, "n d"]:
        """With ρ, light atoms in the box of all atoms and of where patterns take them: their own
        cloud repels them, of which the energy hardly tells."""
        if self.rho is None:
            return points
        x, weights = view.query.points, view.query.weights
        mass = self._transported(view, pull)[:, None]
        targets = x + (pull.velocity - view.force) / jnp.maximum(mass, LIGHT)
        known = (weights[:, None] > 0) & (mass > LIGHT)
        among = jnp.concatenate([x, jnp.where(known, targets, x)])
        on = jnp.concatenate([weights, weights])[:, None] > 0
        low = jnp.where(on, among, jnp.inf).min(0, keepdims=True)
        high = jnp.where(on, among, -jnp.inf).max(0, keepdims=True)
        light = (weights < LIGHT / len(weights))[:, None]
        return jnp.where(light, jnp.clip(points, low, high), points)

    def _transported(self, view: View, pull: Pull) -> Float[Array, " n"]:
        """Σᵢ wᵢ e^(−fᵢ/ρ), the mass that the average plan takes from each atom over its own: 1
        without ρ."""
        own = self._marginals.transported_fraction(view.known.potential)
        return own if self.rho is None else own - pull.variation / (self.rho + self.epsilon)

    def masses(self, view: AnyView, pull: AnyMeasure) -> AnyMeasure:
        """Of the SHK metric: pⱼ for the points, pⱼ/κ for the logarithms of the weights; 0 for atoms
        that carry little of the plans, of which the energy hardly tells where they are, and for
        features, which do not change."""
        query, kappa = view.query, self.hellinger_scale
        p = query.weights * jnp.minimum(self._transported(view, pull), 1)
        p = jnp.where(p > LIGHT / len(p), p, 0)
        reaction = jnp.where(kappa > 0, p / jnp.where(kappa > 0, kappa, 1), 0)
        none: PointCloud = jax.tree.map(jnp.zeros_like, query)
        return none.with_atoms(jnp.broadcast_to(p[:, None], query.points.shape), reaction)

    def retraction(self, query: AnyMeasure) -> Retraction | None:
        """Displacements of atoms, and changes of log pⱼ/√κ, in the SHK metric, in which both have
        the mass pⱼ. In the coordinates x and log p gradients are −pⱼvⱼ and pⱼ(Fⱼ−F̄). None for a
        cost of one's own, which may have no second derivatives."""
        if self.cost is not None:
            return None
        weights, speed = query.weights, safe_sqrt(self.hellinger_scale)

        def retract(tangent: Tangent) -> PointCloud:
            logits = safe_log(weights) + speed * tangent.reaction
            moved = jax.nn.softmax(logits, where=weights > 0)
            # With κ = 0 not even the last digit of a weight changes.
            held = jnp.where(speed > 0, moved, weights)
            moved_atoms: PointCloud = query.with_atoms(query.points + tangent.points, held)
            return moved_atoms

        def slope(view: View, pull: Pull) -> Tangent:
            p = view.query.weights
            reaction = speed * p * (pull.variation - jnp.vdot(p, pull.variation))
            return Tangent(-p[:, None] * pull.velocity, reaction)

        masses = Tangent(jnp.broadcast_to(weights[:, None], query.points.shape), weights)
        return Retraction(masses, retract, slope)

    def gauge(self, measure: AnyMeasure, tangent: AnyMeasure) -> AnyMeasure:
        """The features, the weights if κ = 0, and always those that are 0."""
        fixed = (self.hellinger_scale == 0) | (measure.weights == 0)
        weights = jnp.where(fixed, tangent.weights, 0)
        return tangent.with_atoms(jnp.zeros_like(tangent.points), weights)

    def residual(self, view: AnyView, pull: AnyMeasure) -> Array:
        """|grad E|_SHK = √(Σ pⱼ|vⱼ|² + κ Var_p F)."""
        return self._residual(view, pull, self.hellinger_scale)

    def cautious_residual(self, view: AnyView, pull: AnyMeasure, times: Any) -> Array:
        """The SHK length of the step with weights at the rate κ' that did not raise the energy,
        √(Σ pⱼ|vⱼ|² + κ'²/κ Var_p F): stiff weights, which only small steps improve, are where they
        belong while F is not yet constant."""
        caution = jnp.asarray(times, self.hellinger_scale.dtype)
        return self._residual(view, pull, self.hellinger_scale * CAUTION ** (-2 * caution))

    def _residual(self, view: View, pull: Pull, rate: Array) -> Array:
        weights = view.query.weights
        speed = jnp.vdot(weights, jnp.vecdot(pull.velocity, pull.velocity))
        centred = pull.variation - jnp.vdot(weights, pull.variation)
        # √κ F is a velocity; F² may be out of range.
        reaction = safe_sqrt(rate) * centred
        return safe_sqrt(speed + jnp.vdot(weights, reaction**2))

    def tolerances(self, query: AnyMeasure, scale: Array) -> tuple[Array, Array]:
        """In units of √ε, below which plans do not tell atoms apart, beside the rounding of
        coordinates: on 48 recalls of outlines, 200 plain steps from where these end move atoms by
        less than a tenth of it. For a cost of one's own, in units of ε by the size of the patterns,
        cost by length as the gradient."""
        if self.cost is not None:
            unit = self.epsilon / jnp.where(scale > 0, scale, 1)
            return RESOLVED[0] * unit, RESOLVED[1] * unit
        rounding = 4 * float(jnp.finfo(query.dtype).eps) * jnp.abs(query.mean).max()
        enough, sought = (size * jnp.sqrt(self.epsilon) for size in RESOLVED)
        if self.rho is not None:  # atoms that slide along others still go far
            enough = 2 * sought
        return enough + rounding, sought + rounding

    @property
    def max_backtracks(self) -> int:  # type: ignore[override]
        """None for plain steps, whether or not the energy rises."""
        return 15 if self.safeguard else 0

    @property
    def default_acceleration(self) -> int:  # type: ignore[override]
        """Not for a given ρ, where derivatives through combined steps are not known to be right;
        nor for a cost of one's own, of which no length of step is known to be good."""
        return 5 if self.safeguard and self.rho is None and self.cost is None else 0

    @property
    def default_steps(self) -> int:  # type: ignore[override]
        """More for a given ρ, where atoms that hardly belong to a pattern move slowly, and for a
        cost of one's own."""
        plain = self.rho is None and self.cost is None
        return 50 if plain or not self.safeguard else 150

    @property
    def _tol(self) -> float:
        if self.tol is not None:
            return self.tol
        result: float = float(jnp.finfo(self.epsilon.dtype).eps) ** 0.7
        return result

    @property
    def _marginals(self) -> Marginals:
        return Marginals(self.epsilon, self.rho)

    @property
    def _solver(self) -> Solver:
        return Solver(self._tol, self.max_iterations, self.solver, self._ground)

    @property
    def _ground(self) -> Cost:
        return HalfSquaredDistance() if self.cost is None else GroundCost(self.cost)

    def lifted(self, cloud: PointCloud) -> PointCloud:
        """A cloud with its features as coordinates: `_clouds.lifted`."""
        return lifted(cloud, self.feature_scale, self.epsilon)

    def _self_transport(
        self, points: Array, weights: Array, known: SelfTransport | None = None
    ) -> SelfTransport:
        return self_transport(self._solver, Cloud(points, weights), self._marginals, known)
