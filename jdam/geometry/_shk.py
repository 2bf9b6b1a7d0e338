"""Steps of point clouds by spherical Hellinger–Kantorovich (SHK) gradient flow.

This file has step sizes, residuals and tolerances; `sinkhorn` has the divergence.
"""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam._core.linalg import safe_log, safe_sqrt
from jdam._entropic.cost import Cost, GroundCost, HalfSquaredDistance
from jdam._entropic.problem import (
    Cloud,
    Marginals,
    SinkhornOutput,
    Solver,
)
from jdam._entropic.transport import self_transport
from jdam._measures.base import AnyMeasure
from jdam._measures.point_cloud import PointCloud
from jdam.geometry._clouds import (
    Pull,
    View,
    masses_of,
    metric_length,
    reweighted,
    shortening,
)
from jdam.geometry.protocol import (
    AnyView,
    Geometry,
    Retraction,
)

#: The factor by which each backtracking attempt reduces the weight step, and the number of attempts
#: before the support step is shortened too.
WEIGHT_SHRINK, WEIGHT_ATTEMPTS = 16.0, 8
#: The largest residual that counts as converged where the energy stagnates, and the residual at
#: which recall stops, in units of √ε.
RESOLVED = 5e-3, 5e-4
#: With ρ, the curvature of the energy at an atom is its transported fraction, which is unbounded
#: for light atoms. Above this fraction a step ends at the atom's average target, because a step of
#: 2 over the curvature would not lower the energy.
STABLE = 1.5
#: Atoms below this fraction of the mean weight are light.
LIGHT = 0.1


class SHKGeometry(Geometry):
    """A geometry of point clouds by entropic transport, whose steps follow the SHK gradient.

    `Sinkhorn` documents parameters and steps."""

    epsilon: Float[Array, ""]
    rho: Float[Array, ""] | None
    hellinger_scale: Float[Array, ""]
    tol: float | None = eqx.field(static=True)
    max_iterations: int = eqx.field(static=True)
    solver: str = eqx.field(static=True)
    safeguard: bool = eqx.field(static=True)
    #: The default applies to files saved without this field.
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
        self, view: AnyView, pull: AnyMeasure, step_size: Array, backtracks: Any
    ) -> AnyMeasure:
        """Return a step with less reweighting and, after `WEIGHT_ATTEMPTS` attempts, a shorter step
        of the support."""
        query, whole_rate = view.query, step_size * self.hellinger_scale
        length = step_size * shortening(query.weights, pull.variation, whole_rate)
        shrinks = jnp.asarray(backtracks, step_size.dtype)
        rate = length * self.hellinger_scale * WEIGHT_SHRINK**-shrinks
        # Without weight steps, the first attempt already shortens the support step.
        tried = jnp.where(self.hellinger_scale > 0, WEIGHT_ATTEMPTS, 0)
        length = length * 2.0 ** jnp.minimum(tried - shrinks, 0)
        weights = reweighted(query.weights, pull.variation, rate)
        factor = length * self._transported(view, pull)
        length = length / jnp.where(factor > STABLE, factor, 1)
        points = query.points + length[..., None] * pull.velocity
        return query.with_atoms(self._boxed(view, pull, points), weights)

    def _boxed(self, view: View, pull: Pull, points: Array) -> Float[Array, "n d"]:
        """Clip light atoms, with ρ, to the box of all atoms and their targets. Their own cloud
        repels them, and the energy hardly depends on them."""
        if self.rho is None:
            return points
        x, weights = view.query.points, view.query.weights
        mass = self._transported(view, pull)[:, None]
        targets = x + (pull.velocity - view.force) / jnp.maximum(mass, LIGHT)
        reliable = (weights[:, None] > 0) & (mass > LIGHT)
        candidates = jnp.concatenate([x, jnp.where(reliable, targets, x)])
        on = jnp.concatenate([weights, weights])[:, None] > 0
        low = jnp.where(on, candidates, jnp.inf).min(0, keepdims=True)
        high = jnp.where(on, candidates, -jnp.inf).max(0, keepdims=True)
        light = (weights < LIGHT / len(weights))[:, None]
        return jnp.where(light, jnp.clip(points, low, high), points)

    def _transported(self, view: View, pull: Pull) -> Float[Array, " n"]:
        """Compute Σᵢ wᵢ e^(−fᵢ/ρ), the transported fraction of each atom in the average plan: 1
        without ρ."""
        fraction = self._marginals.transported_fraction(view.self_transport.f)
        return (
            fraction if self.rho is None else fraction - pull.variation / (self.rho + self.epsilon)
        )

    def masses(self, view: AnyView, pull: AnyMeasure) -> AnyMeasure:
        """Return the masses of the SHK metric, 0 for atoms with little mass in the plans, whose
        position hardly changes the energy."""
        p = view.query.weights * jnp.minimum(self._transported(view, pull), 1)
        p = jnp.where(p > LIGHT / len(p), p, 0)
        return masses_of(view.query, p, self.hellinger_scale)

    def retraction(self, query: AnyMeasure) -> Retraction | None:
        """Return coordinates of displacements of atoms and changes of log pⱼ/√κ, (n, d) and (n,),
        both of mass pⱼ in the SHK metric.

        The gradients in x and log p are −pⱼvⱼ and pⱼ(Fⱼ−F̄). The result is None for other ground
        costs, which may lack second derivatives."""
        if self.cost is not None:
            return None
        weights, speed = query.weights, safe_sqrt(self.hellinger_scale)

        def retract(tangent: tuple[Array, Array]) -> PointCloud:
            displacement, reaction = tangent
            logits = safe_log(weights) + speed * reaction
            reweighted = jax.nn.softmax(logits, where=weights > 0)
            # With κ = 0 the weights stay exactly the same.
            new_weights = jnp.where(speed > 0, reweighted, weights)
            moved_atoms: PointCloud = query.with_atoms(query.points + displacement, new_weights)
            return moved_atoms

        def slope(view: View, pull: Pull) -> tuple[Array, Array]:
            p = view.query.weights
            reaction = speed * p * (pull.variation - jnp.vdot(p, pull.variation))
            return -p[:, None] * pull.velocity, reaction

        masses = jnp.broadcast_to(weights[:, None], query.points.shape), weights
        return Retraction(masses, retract, slope)

    def gauge(self, measure: AnyMeasure, tangent: AnyMeasure) -> AnyMeasure:
        """Project a tangent on the features, on weights that are 0 and, if κ = 0, on all weights,
        which no step moves."""
        fixed = (self.hellinger_scale == 0) | (measure.weights == 0)
        weights = jnp.where(fixed, tangent.weights, 0)
        return tangent.with_atoms(jnp.zeros_like(tangent.points), weights)

    def residual(self, view: AnyView, pull: AnyMeasure) -> Array:
        """Compute |grad E|_SHK = √(Σ pⱼ|vⱼ|² + κ Var_p F)."""
        kappa = self.hellinger_scale
        return metric_length(view.query.weights, pull.velocity, pull.variation, kappa)

    def cautious_residual(self, view: AnyView, pull: AnyMeasure, backtracks: Any) -> Array:
        """Compute √(Σ pⱼ|vⱼ|² + κ'²/κ Var_p F), the SHK length of the step with the reduced weight
        rate κ'.

        Stiff weights, which only small steps improve, count as converged although F is not yet
        constant."""
        shrinks = jnp.asarray(backtracks, self.hellinger_scale.dtype)
        kappa = self.hellinger_scale * WEIGHT_SHRINK ** (-2 * shrinks)
        return metric_length(view.query.weights, pull.velocity, pull.variation, kappa)

    def tolerances(self, query: AnyMeasure, scale: Array) -> tuple[Array, Array]:
        """Return tolerances in units of √ε, below which plans do not resolve atoms, plus the
        rounding of coordinates.

        On 48 recalls of outlines, 200 more plain steps move atoms by less than a tenth of √ε. For
        other ground costs, units are ε over the typical norm of the patterns: cost by length, as of
        the gradient."""
        if self.cost is not None:
            unit = self.epsilon / jnp.where(scale > 0, scale, 1)
            return RESOLVED[0] * unit, RESOLVED[1] * unit
        rounding = 4 * float(jnp.finfo(query.dtype).eps) * jnp.abs(query.mean).max()
        largest, goal = (size * jnp.sqrt(self.epsilon) + rounding for size in RESOLVED)
        return largest, goal

    @property
    def max_backtracks(self) -> int:  # type: ignore[override]
        """15, or 0 without `safeguard`, whether or not the energy rises."""
        return 15 if self.safeguard else 0

    @property
    def default_acceleration(self) -> int:  # type: ignore[override]
        """5, or 0 without `safeguard` and for other ground costs, for which no good step size is
        known."""
        return 5 if self.safeguard and self.cost is None else 0

    @property
    def default_steps(self) -> int:  # type: ignore[override]
        """50, or 200 with ρ, where atoms with small transported fractions move slowly, and for
        other ground costs."""
        plain = self.rho is None and self.cost is None
        return 50 if plain or not self.safeguard else 200

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

    def _self_transport(
        self, points: Array, weights: Array, solution: SinkhornOutput | None = None
    ) -> SinkhornOutput:
        return self_transport(self._solver, Cloud(points, weights), self._marginals, solution)
