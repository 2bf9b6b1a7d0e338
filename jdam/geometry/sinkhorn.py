"""Weighted point clouds under the debiased Sinkhorn divergence, balanced or unbalanced.

This file has the divergence; `_shk` has the steps, by spherical Hellinger–Kantorovich (SHK)
gradient flow.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, PyTree

from jdam._core import checks
from jdam._core.batching import by_platform
from jdam._core.linalg import rounding
from jdam._entropic.bounds import dual_after_half_iteration, dual_after_some_iterations
from jdam._entropic.cost import GroundCost, checked_cost, mean_within
from jdam._entropic.problem import Pair, SinkhornOutput
from jdam._entropic.transport import solve_pair
from jdam._measures.base import AnyMeasure
from jdam._measures.batches import as_batch
from jdam._measures.point_cloud import PointCloud, variance
from jdam.geometry._clouds import (
    Prepared,
    Pull,
    View,
    by_dual,
    by_gap,
    by_means,
    check_cloud,
    checked_parameters,
    lifted,
    radius_of,
    relative_coordinates,
    relative_to,
    rounding_of,
    shown_parameters,
    unit_of,
    zero_padding,
)
from jdam.geometry._shk import SHKGeometry
from jdam.geometry.protocol import (
    AnyView,
    BatchSizes,
    Bound,
    Comparison,
    Embedding,
    Patterns,
    average,
)


class Sinkhorn(SHKGeometry):
    """D = S_ε, the debiased Sinkhorn divergence with cost ½|x−y|², on point clouds.

        S_ε(q, X) = OT_ε(q, X) − ½OT_ε(q, q) − ½OT_ε(X, X)
        OT_ε(μ, ν) = min over π of ∫ ½|x−y|² dπ + ε KL(π | μ⊗ν)

    (eq. 2 of arXiv:2603.20656).

    A step moves support points by barycentric maps T and reweights atoms by the first variation F
    of the energy, both from the same potentials (eqs. 28 and 29 there):

        xⱼ⁺ = xⱼ + τ(Σᵢ wᵢTᵢ(xⱼ) − T₀(xⱼ))          T₀ the map of q to itself
        pⱼ⁺ ∝ pⱼ exp(−τκ Fⱼ)                         Fⱼ = Σᵢ wᵢfᵢ(xⱼ) − h(xⱼ)

    This is −grad E in the SHK metric. Steps are safeguarded: τ is shortened if it is too long for
    reweighting, so that far stray atoms lose their mass before the support moves. If a step would
    raise the energy, its weight part, which is stiff for small ε, is shortened, and its support
    part only if that does not suffice. With ρ, an atom whose transported fraction in the average
    plan exceeds 1.5, as happens to light atoms, moves no farther than to its average target.

    `safeguard=False` takes exactly the steps above, Algorithm 1 of the paper, in `step` and
    `recall`, without acceleration. The energy may then rise if τ exceeds 1 over the largest
    curvature of the energy: for the support from τ ≈ 1 on (τ = 2.1 diverges); for the weights if τκ
    exceeds 1/λ, where λ = εσ₂²/(1−σ₂²), with the second singular value σ₂ of the normalised plan,
    is huge for ε small against the squared distances of atoms.

    **Arguments:**

    - `epsilon` ε > 0: the regularisation, a squared distance: S_{l²ε}(lμ, lν) = l²S_ε(μ, ν). A few
      hundredths of the median of ½|x−y|² within a pattern place points accurately; larger values
      are faster and blur.
    - `rho` ρ > 0: the price of untransported mass, a squared distance, for partial or cluttered
      queries. None, the default, transports all mass.
    - `hellinger_scale` κ ≥ 0: the strength of reweighting, per squared distance; 0 keeps the
      weights.
    - `feature_scale` λ ≥ 0: the price of matching atoms of different features, a squared distance
      for features without unit (see Features). It has no effect on clouds without features.
    - `tol`: the L1 error of the marginals at which the inner solver stops. None is eps^0.7 of the
      dtype, 1e-5 in float32 and 1e-11 in float64. The error of S_ε is of second order in it, that
      of maps and potentials of first order.
    - `max_iterations`: the largest number of iterations of the inner solver. A recall that needs
      more has `Status.SOLVER`. So has one of clouds so large, |x−y|² ≈ 10⁷ε in float32, that the
      rounding of costs exceeds ε and a few per cent of S_ε.
    - `solver`: "stabilised" for scaling iterations followed by Newton steps, or "ott" for the
      solver of ott-jax.
    - `safeguard`: False takes the steps of Algorithm 1 unchanged, see above.
    - `cost`: a ground cost instead of ½|x−y|², an `ott.geometry.costs.CostFn` (see Any ground
      cost).

    `epsilon`, `rho`, `hellinger_scale` and `feature_scale` are traced: changing them does not
    recompile, and they can be differentiated.

    **Features.** If atoms carry features u, the cost is ½|x−y|² + ½λ|u−v|², that of z = (x, √λ u),
    and all of the above holds for z. For one-hot labels, λ is the cost of matching atoms of
    different labels. Steps move the points only; this is the projected gradient flow, along which
    the energy falls too.

    **Unbalanced.** With ρ, D = S_{ε,ρ}, which has in place of OT_ε

        OT_{ε,ρ}(μ, ν) = min over π ≥ 0 of ∫ ½|x−y|² dπ + ε KL(π | μ⊗ν)
                         + ρ KL(π1 | μ) + ρ KL(πᵀ1 | ν)

    (Séjourné et al., arXiv:1910.12958; Hellinger–Kantorovich is its ε = 0 with another cost). Atoms
    several √ρ from all others are not transported: D ≤ 2ρ+ε at any distance. The step is
    the same with F = Σᵢ wᵢ (ρ+ε)(e^(−h/ρ) − e^(−fᵢ/ρ)) and velocities −∇F. `Recall.inliers` has
    e^(−f/ρ), the transported fraction of each atom in the plan to the nearest pattern; with κ > 0
    the mass of the other atoms fades. Choose √ρ between the noise of atoms and the distances
    between them. To complete a partial query, read the pattern nearest to it:
    `memory[jdam.match(memory, query).index]`. There is no theory of basins for ρ, as D does
    not grow with distance.

    **Any ground cost.** `cost` is a c(x, y) ≥ 0 of two atoms, symmetric and with c(x, x) = 0, such
    as `PNormP(1.5)` or `Cosine()`, or a subclass of `CostFn`. D is the same with c in place of
    ½|x−y|², and `epsilon` and `rho` are in units of c. A step moves atoms by −τ∇F(xⱼ), which for
    ½|x−y|² is the step above; its length is halved until the energy does not rise. If the curvature
    of c is far from 1, another `step_size` is faster. S_ε ≥ 0 is known if e^(−c/ε) is positive
    definite: for |x−y|^p with 0 < p ≤ 2 and for the cosine distance, but not for squared distances
    on a circle or torus (Feydy et al., arXiv:1810.08278). `Certified` compares all patterns, as
    there are no lower bounds. The functions of `jdam.theory`, clouds with features and `jdam.save`
    are not supported. The default tolerances are in units of c by length.

    **Raises:** `TypeError` or `ValueError` for arguments that are not of these kinds."""

    def __init__(
        self,
        epsilon: ArrayLike,
        *,
        rho: ArrayLike | None = None,
        hellinger_scale: ArrayLike = 0.0,
        feature_scale: ArrayLike = 1.0,
        tol: float | None = None,
        max_iterations: int = 2000,
        solver: str = "stabilised",
        safeguard: bool = True,
        cost: Any = None,
    ):
        self.epsilon, self.rho, self.hellinger_scale, self.feature_scale = checked_parameters(
            epsilon, rho, hellinger_scale, feature_scale
        )
        if tol is not None:
            checks.positive("tol", tol, jnp.dtype(jnp.float32))
        self.tol = None if tol is None else float(tol)
        self.max_iterations = checks.positive_int("max_iterations", max_iterations)
        if solver not in ("stabilised", "ott"):
            raise ValueError(f"solver must be 'stabilised' or 'ott'; got {solver!r}")
        self.solver = solver
        if not isinstance(safeguard, bool):
            raise TypeError(f"safeguard must be a bool; got {safeguard!r}")
        self.safeguard = safeguard
        self.cost = checked_cost(cost)

    @classmethod
    def relative(
        cls,
        patterns: AnyMeasure,
        epsilon: float = 0.05,
        *,
        rho: float | None = None,
        hellinger_scale: float = 0.0,
        feature_scale: float = 1.0,
        **settings: Any,
    ) -> "Sinkhorn":
        """Return a `Sinkhorn` whose parameters scale with the unit of length of the patterns.

        With u the median of ½|x−y|² within patterns, over pairs of different atoms of a cloud, it
        is `Sinkhorn(epsilon·u, rho=rho·u, hellinger_scale=hellinger_scale/u,
        feature_scale=feature_scale·u)`. The median is of points alone, without features; with a
        `cost`, it is that of c(x, y).

        **Arguments:**

        - `patterns`: clouds with any batch axes, or a list.
        - `epsilon`: ε/u. 0.05 places points accurately; 0.2 is faster and blurs, 0.01 is slower and
          sharper.
        - `rho`: ρ/u, ≈ 0.1 for partial or cluttered queries.
        - `hellinger_scale`: κu, ≈ 1 if atoms are to be dropped.
        - `feature_scale`: λ/u. With 1, atoms of different one-hot labels are as far apart as
          typical atoms of one cloud.
        - `settings`: the other arguments of `Sinkhorn`.

        **Raises:** as `Sinkhorn`; `TypeError` for other measures; `ValueError` if u is 0, as for
        clouds of one atom."""
        patterns = as_batch(patterns)
        if not isinstance(patterns, PointCloud):
            raise TypeError(f"patterns must be jdam.PointClouds; got {type(patterns).__name__}")
        checks.positive("epsilon", epsilon, checks.scalar_dtype(epsilon))
        cost = checked_cost(settings.get("cost"))
        unit = unit_of(patterns, cost=None if cost is None else GroundCost(cost))
        if checks.is_concrete(unit) and not unit > 0:
            raise ValueError("patterns must have different atoms in a cloud; got a median of 0")
        return cls(
            epsilon * unit,
            rho=None if rho is None else rho * unit,
            hellinger_scale=hellinger_scale / unit,
            feature_scale=feature_scale if patterns.features is None else feature_scale * unit,
            **settings,
        )

    def check(self, name: str, measure: AnyMeasure, batch_ndim: int) -> AnyMeasure:
        measure = check_cloud(self, name, measure, batch_ndim)
        if self.cost is not None and measure.features is not None:
            raise ValueError(f"{name} must have no features for {self}, whose cost is of points")
        return measure

    def prepare(self, patterns: AnyMeasure) -> PyTree:
        patterns = lifted(self, patterns)
        centre = self._centre(patterns)
        centred = relative_to(centre, patterns, self.epsilon)
        solution = jax.vmap(self._self_transport)(centred, patterns.weights)
        solution = solution._replace(gradient=None)
        offset = jnp.vecmat(patterns.weights, centred)
        radius = None if self.rho is None else radius_of(centred, patterns.weights)
        return Prepared(centre, *jax.lax.stop_gradient((offset, solution, radius)))

    def first_guess(self, prepared: PyTree) -> PyTree:
        return prepared.self_transport.f

    def view(self, query: AnyMeasure) -> AnyView:
        atoms = lifted(self, query)
        centre = self._centre(atoms)
        centred = relative_to(centre, atoms, self.epsilon)
        solution = self._self_transport(centred, query.weights)
        fraction = self._marginals.transported_fraction(solution.f)
        force = fraction[:, None] * solution.gradient[:, : query.dim]  # features are fixed
        return View(query, centre, centred, solution, force)

    def compare(self, view: AnyView, patterns: Patterns) -> Comparison:
        query, prepared, clouds = view.query, patterns.prepared, lifted(self, patterns.measures)
        weights, centres = clouds.weights, jax.lax.stop_gradient(prepared.centre)
        centred = relative_to(centres, clouds, self.epsilon)
        pattern_transport = jax.vmap(self._self_transport)(
            centred, weights, prepared.self_transport
        )
        shift, means, atoms = relative_coordinates(self._marginals, view, centres, centred, weights)
        solution = self._solve(view, atoms, patterns)
        divergence = (
            means + solution.cost - view.self_transport.cost / 2 - pattern_transport.cost / 2
        )
        not_converged = (solution.error > self._tol) | (pattern_transport.error > self._tol)
        if self.cost is None:
            rounding_error = rounding_of(view, atoms, weights, self._marginals)
            not_converged |= rounding_error > jnp.abs(divergence) / 32
        fractions = self._marginals.transported_fraction(solution.f)
        force, coordinates = fractions[..., None] * solution.gradient, slice(query.dim)
        variation = self._marginals.variation
        return Comparison(
            divergence,
            Pull(
                velocity=view.force[None] - force[..., coordinates] - shift[:, None, coordinates],
                variation=variation(solution.f)
                + shift @ view.centred.T
                - variation(view.self_transport.f)[None],
            ),
            guess=jax.lax.stop_gradient(solution.g),
            not_converged=not_converged | (view.self_transport.error > self._tol),
            inliers=None if self.rho is None else fractions,
        )

    def _solve(
        self, view: View, atoms: Float[Array, "B m d"], patterns: Patterns
    ) -> SinkhornOutput:
        """Solve the transport problems between the query and patterns with these atoms."""
        guess = patterns.prepared.self_transport.f if patterns.guess is None else patterns.guess

        def solve(points: Array, weights: Array, guess: Array) -> SinkhornOutput:
            pair = Pair(view.centred, view.query.weights, points, weights, self._marginals)
            return solve_pair(self._solver, pair, guess)

        solutions: SinkhornOutput = jax.vmap(solve)(atoms, patterns.measures.weights, guess)
        return solutions

    def plan(self, view: AnyView, patterns: Patterns) -> Float[Array, "B n m"]:
        """Compute pⱼbₖ exp((fⱼ + gₖ − cⱼₖ)/ε)."""
        clouds, centres = lifted(self, patterns.measures), patterns.prepared.centre
        weights, centres = clouds.weights, jax.lax.stop_gradient(centres)
        centred = relative_to(centres, clouds, self.epsilon)
        _, _, atoms = relative_coordinates(self._marginals, view, centres, centred, weights)
        solution = self._solve(view, atoms, patterns)

        def plan_of(f: Array, g: Array, points: Array, weights: Array) -> Array:
            costs = self._solver.cost.scaled(view.centred, points, self.epsilon)
            logs = (f[:, None] + g[None]) / self.epsilon - costs
            on = (view.query.weights > 0)[:, None] & (weights > 0)[None]
            masses = view.query.weights[:, None] * weights[None]
            plan: Array = masses * jnp.exp(jnp.where(on, logs, 0))
            return plan

        plans: Array = jax.vmap(plan_of)(solution.f, solution.g, atoms, weights)
        return plans

    def bounds(self, patterns: Patterns) -> tuple[Bound, ...]:
        """Return bounds by means, or by the gap between clouds if ρ is given, and by dual values.

        The dual values follow half a scaling iteration, and then a few more iterations, from the
        warm start. Other ground costs have no bounds."""
        if self.cost is not None:
            return ()
        first = by_means if self.rho is None else partial(by_gap, self.epsilon, self.rho)
        values = (dual_after_half_iteration, dual_after_some_iterations)
        duals = (partial(dual, self._solver) for dual in values)
        return first, *(partial(by_dual, dual, self, self._marginals) for dual in duals)

    def embed(self, measures: AnyMeasure, prepared: PyTree = None) -> Embedding | None:
        """Return m/√2 for the means m, features included: S_ε ≥ ½|m_q − m_X|²."""
        if self.cost_scale is None:
            return None
        clouds = lifted(self, measures)
        squares = zero_padding(clouds.points, clouds.weights) ** 2
        size = jnp.sqrt(jnp.vecdot(clouds.weights, squares.sum(-1)) / 2)
        return clouds.mean * 0.5**0.5, rounding(clouds.num_atoms, clouds.dtype) * size

    def typical_norm(self, patterns: AnyMeasure, weights: Array | None = None) -> Array:
        """Return the root mean square distance of atoms to the mean of all, plus eps^0.3 times the
        distance of that mean to the origin, to which coordinates round."""
        mean = average(patterns.mean, weights)
        centred = zero_padding(patterns.points - mean[None, None], patterns.weights)
        spread = average(jnp.vecdot(patterns.weights, jnp.vecdot(centred, centred)), weights)
        eps = float(jnp.finfo(patterns.dtype).eps)
        result: Array = jnp.sqrt(spread) + eps**0.3 * jnp.sqrt(jnp.vdot(mean, mean))
        return result

    def energy_tolerance(self, patterns: AnyMeasure, weights: Array | None = None) -> Array:
        """Return the rounding error of S_ε between clouds of this size, or the inner solver's if
        larger."""
        eps, patterns = float(jnp.finfo(patterns.dtype).eps), lifted(self, patterns)
        variances = variance(patterns)
        if self.cost is not None:
            variances = mean_within(self._ground, patterns.points, patterns.weights)
        if self.rho is not None:
            variances = jnp.minimum(variances, 2 * (2 * self.rho + self.epsilon))
        return max(eps, self._tol**2) * average(variances, weights) / 2

    def batch_sizes(self, patterns: AnyMeasure) -> BatchSizes:
        numbers = patterns.num_atoms * (patterns.dim + 2)  # numbers of a pull
        budget = by_platform(2**14, 2**24)
        at_once = min(len(patterns), max(1, budget // numbers))
        # Derivatives store several plans at a time, of n² numbers each.
        plans = max(1, budget // 8 // patterns.num_atoms**2)
        queries = max(1, budget // (numbers * at_once))
        return BatchSizes(queries, at_once, min(at_once, plans))

    def __repr__(self) -> str:
        settings = shown_parameters(self)
        settings += [f"tol={self.tol:g}"] if self.tol is not None else []
        settings += [f"solver={self.solver!r}"] if self.solver != "stabilised" else []
        settings += [] if self.safeguard else ["safeguard=False"]
        settings += [f"cost={type(self.cost).__name__}"] if self.cost is not None else []
        return f"Sinkhorn({', '.join(settings)})"

    @property
    def bounds_pay(self) -> bool:  # type: ignore[override]
        """False with ρ, where D hardly differs between distant patterns, and for other ground
        costs."""
        return self.rho is None and self.cost is None

    @property
    def cost_scale(self) -> float | None:  # type: ignore[override]
        """½ for the balanced divergence with cost ½|x−y|²; None otherwise, as with ρ D is
        bounded."""
        return 0.5 if self.rho is None and self.cost is None else None

    def _centre(self, clouds: PointCloud) -> Float[Array, "*batch d"]:
        """Return the origin of coordinates for comparison: the mean, or 0 for a ground cost, which
        need not be translation-invariant."""
        mean = jax.lax.stop_gradient(clouds.mean)
        return mean if self.cost is None else jnp.zeros_like(mean)
