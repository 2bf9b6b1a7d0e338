"""Weighted point clouds under the debiased Sinkhorn divergence, balanced or unbalanced, moved by
spherical Hellinger–Kantorovich (SHK) gradient flow."""

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jdam._core import checks
from jdam._core.batching import by_platform
from jdam._core.linalg import safe_log, safe_sqrt
from jdam._entropic.bounds import dual_after_half_iteration, dual_after_some_iterations
from jdam._entropic.itself import couple_with_itself
from jdam._entropic.problem import (
    Cloud,
    Coupling,
    Marginals,
    Pair,
    SelfCoupling,
    Solver,
)
from jdam._entropic.transport import couple
from jdam._measures.base import AnyMeasure, with_leaves
from jdam._measures.batches import as_batch
from jdam._measures.point_cloud import PointCloud
from jdam.geometry._cloud_bounds import by_dual, by_gap, by_means
from jdam.geometry._clouds import (
    Footing,
    Prepared,
    Pull,
    Solved,
    Tangent,
    View,
    about,
    place,
    radius_of,
    rounding_of,
    shortening,
    unit_of,
    without_padding,
)
from jdam.geometry.protocol import (
    AnyView,
    BatchSizes,
    Bound,
    Chart,
    Comparison,
    Geometry,
    Patterns,
    average,
    check_batch_ndim,
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


class Sinkhorn(Geometry):
    """D = S_ε, the debiased Sinkhorn divergence with cost ½|x−y|², on point clouds.

    S_ε(q, X) = OT_ε(q, X) − ½OT_ε(q, q) − ½OT_ε(X, X) with
    OT_ε(μ, ν) = min over π of ∫ ½|x−y|² dπ + ε KL(π | μ⊗ν)     (eq. 2 of arXiv:2603.20656).

    A step moves support points by barycentric maps T and reweights atoms by the first
    variation F of the energy, both from the same potentials (eqs. 28 and 29 there):

        xⱼ⁺ = xⱼ + τ(Σᵢ wᵢTᵢ(xⱼ) − T₀(xⱼ))          T₀ the map of q to itself
        pⱼ⁺ ∝ pⱼ exp(−τκ Fⱼ)                         Fⱼ = Σᵢ wᵢfᵢ(xⱼ) − h(xⱼ)

    which is −grad E in the SHK metric. Steps are safe: τ is shortened where it is too long for
    reweighting (far stray atoms lose their mass before the support moves), and where a step
    would raise the energy its weight part is, which is stiff, the more so the smaller ε; its
    support part only if that does not help. With ρ, an atom whose average plan takes more than
    1.5 times its own mass, as happens to light atoms, goes no farther than to its average target.

    `safeguard=False` takes exactly the steps above, Algorithm 1 of the paper, in `step` and
    `recall`, without acceleration. The energy then may rise: where τ exceeds 1 over the largest
    curvature of the energy, for the support from τ ≈ 1 on (τ = 2.1 diverges), for the weights
    where τκ exceeds 1/λ, λ = εσ₂²/(1−σ₂²) with σ₂ the second singular value of the normalised
    plan, which is huge where ε is small against the squared distances of atoms.

    **Arguments:**

    - `epsilon` ε > 0: the regularisation, in squared units of distance. It scales with the data,
      S_{l²ε}(lμ, lν) = l²S_ε(μ, ν). A few hundredths of the median of ½|x−y|² within a pattern
      place points well; more is faster and blurs.
    - `rho` ρ > 0: the price of leaving mass where it is, a squared length too, for cues that are
      partial or cluttered. None, the default, transports all mass.
    - `hellinger_scale` κ ≥ 0: the strength of reweighting, per squared unit of distance; 0 keeps
      the weights.
    - `tol`: the L1 error of the marginals at which the inner solver stops; eps^0.7 of the dtype if
      None, 1e-5 in float32 and 1e-11 in float64. S_ε errs in its second order, maps and potentials
      in its first.
    - `max_iterations` of the inner solver. A recall that needed more has `Status.SOLVER`, as has
      one of clouds so large, |x−y|² ≈ 10⁷ε in float32, that costs round to more than ε and than a
      few per cent of S_ε.
    - `solver`: "stabilised", scaling iterations finished by Newton steps, or "ott", the solver of
      ott-jax.
    - `safeguard`: False takes the steps of Algorithm 1 as they are, see above.

    `epsilon`, `rho` and `hellinger_scale` are traced: changing them does not recompile, and they
    can be differentiated.

    **Unbalanced.** With ρ, D = S_{ε,ρ}, the same of

        OT_{ε,ρ}(μ, ν) = min over π ≥ 0 of ∫ ½|x−y|² dπ + ε KL(π | μ⊗ν)
                         + ρ KL(π1 | μ) + ρ KL(πᵀ1 | ν)

    (Séjourné et al., arXiv:1910.12958; Hellinger–Kantorovich is its ε = 0 with another cost). Atoms
    farther than some √ρ from all others are given up: D ≤ 2ρ+ε however far clouds are. The step
    is the same with F = Σᵢ wᵢ (ρ+ε)(e^(−h/ρ) − e^(−fᵢ/ρ)) and velocities −∇F, and `Recall.inliers`
    has e^(−f/ρ), the share of each atom that finds a partner in the nearest pattern: with κ > 0
    the mass of the others fades. Choose √ρ between the noise of atoms and the distances between
    them. To complete a partial cue, read the pattern that it addresses:
    `jdam.attend(memory, cue, beta, values=memory)`. There is no theory of basins for ρ, as D does
    not grow with distance.

    **Raises:** `TypeError` or `ValueError` for arguments that are not of these kinds.
    """

    epsilon: Float[Array, ""]
    rho: Float[Array, ""] | None
    hellinger_scale: Float[Array, ""]
    tol: float | None = eqx.field(static=True)
    max_iterations: int = eqx.field(static=True)
    solver: str = eqx.field(static=True)
    safeguard: bool = eqx.field(static=True)

    positive: ClassVar[tuple[str, ...]] = ("epsilon", "rho", "hellinger_scale")
    unprepared: ClassVar[tuple[str, ...]] = ("hellinger_scale",)

    def __init__(
        self,
        epsilon: ArrayLike,
        *,
        rho: ArrayLike | None = None,
        hellinger_scale: ArrayLike = 0.0,
        tol: float | None = None,
        max_iterations: int = 2000,
        solver: str = "stabilised",
        safeguard: bool = True,
    ):
        self.epsilon = checks.positive("epsilon", epsilon, checks.scalar_dtype(epsilon))
        self.rho = None if rho is None else checks.positive("rho", rho, checks.scalar_dtype(rho))
        dtype = checks.scalar_dtype(hellinger_scale)
        self.hellinger_scale = checks.nonnegative_scalar("hellinger_scale", hellinger_scale, dtype)
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

    @classmethod
    def relative(
        cls,
        patterns: AnyMeasure,
        epsilon: float = 0.05,
        *,
        rho: float | None = None,
        hellinger_scale: float = 0.0,
        **settings: Any,
    ) -> "Sinkhorn":
        """A `Sinkhorn` in units of the patterns, so that it follows their unit of length: with u
        the median of ½|x−y|² within patterns, over pairs of different atoms of a cloud, it is
        `Sinkhorn(epsilon·u, rho=rho·u, hellinger_scale=hellinger_scale/u)`.

        ε = 0.05 places points well; 0.2 is faster and blurs, 0.01 slower and sharper. With cues
        that are partial or cluttered, ρ ≈ 0.1; with atoms to be dropped, κ ≈ 1.

        **Arguments:** `patterns`: clouds with any batch axes, or a list; `settings`: `tol`,
        `max_iterations` and `solver`.

        **Raises:** as `Sinkhorn`; `TypeError` for other measures; `ValueError` where u is 0, as of
        clouds of one atom.
        """
        patterns = as_batch(patterns)
        if not isinstance(patterns, PointCloud):
            raise TypeError(f"patterns must be jdam.PointClouds; got {type(patterns).__name__}")
        checks.positive("epsilon", epsilon, checks.scalar_dtype(epsilon))
        unit = unit_of(patterns)
        if checks.is_concrete(unit) and not unit > 0:
            raise ValueError("patterns must have different atoms in a cloud; got a median of 0")
        price = None if rho is None else rho * unit
        return cls(epsilon * unit, rho=price, hellinger_scale=hellinger_scale / unit, **settings)

    def check(self, name: str, measure: AnyMeasure, batch_ndim: int) -> AnyMeasure:
        if not isinstance(measure, PointCloud):
            raise TypeError(
                f"{name} must be a jdam.PointCloud for {self}; got {type(measure).__name__}"
            )
        check_batch_ndim(name, measure, batch_ndim)
        return measure

    def prepare(self, patterns: AnyMeasure) -> Any:
        centre = jax.lax.stop_gradient(patterns.mean)
        centred = about(centre, patterns, self.epsilon)
        known = jax.vmap(self._couple_with_itself)(centred, patterns.weights)
        known = known._replace(gradient=None)
        offset = jnp.vecmat(patterns.weights, centred)
        radius = None if self.rho is None else radius_of(centred, patterns.weights)
        return Prepared(centre, *jax.lax.stop_gradient((offset, known, radius)))

    def first_guess(self, prepared: Any) -> Any:
        return prepared.known.potential

    def settled(self, guess: Any) -> Any:
        return None if guess is None else Solved(guess)

    def view(self, query: AnyMeasure) -> AnyView:
        centre = jax.lax.stop_gradient(query.mean)
        centred = about(centre, query, self.epsilon)
        known = self._couple_with_itself(centred, query.weights)
        share = self._marginals.share(known.potential)
        assert known.gradient is not None  # it is dropped of patterns only
        return View(query, centre, centred, known, share[:, None] * known.gradient)

    def kept(self, view: AnyView) -> AnyView:
        return Footing(view.query, view.known, view.force)

    def compare(self, view: AnyView, patterns: Patterns, *, exact: bool = True) -> Comparison:
        query, prepared, weights = view.query, patterns.prepared, patterns.measures.weights
        centres = jax.lax.stop_gradient(prepared.centre)
        centred = about(centres, patterns.measures, self.epsilon)
        known = jax.vmap(self._couple_with_itself)(centred, weights, prepared.known)
        shift, means, placed = place(self._marginals, view, centres, centred, weights)

        guess, solver = patterns.guess, self._solver
        if isinstance(guess, Solved):
            guess, solver = guess.g, replace(solver, method="known")

        def one(points: Array, weights: Array, guess: Array) -> Coupling:
            pair = Pair(view.centred, query.weights, points, weights, self._marginals)
            return couple(solver, pair, guess)

        found = jax.vmap(one)(placed, weights, guess)
        divergence = means + found.cost - view.known.cost / 2 - known.cost / 2
        missed = (found.error > self._tol) | (known.error > self._tol)
        missed |= rounding_of(view, placed, weights, self._marginals) > jnp.abs(divergence) / 32
        shares = self._marginals.share(found.f)
        variation = self._marginals.variation
        return Comparison(
            divergence,
            Pull(
                velocity=view.force[None] - shares[..., None] * found.gradient - shift[:, None],
                variation=variation(found.f)
                + shift @ view.centred.T
                - variation(view.known.potential)[None],
            ),
            guess=jax.lax.stop_gradient(found.g),
            missed=missed | (view.known.error > self._tol),
            inliers=None if self.rho is None else shares,
        )

    def bounds(self, patterns: Patterns) -> tuple[Bound, ...]:
        """By means, or by the gap between clouds if ρ is given; and by dual values after half an
        iteration from the potential of the pattern with itself and after some more."""
        first = by_means if self.rho is None else partial(by_gap, self.epsilon, self.rho)
        duals = (dual_after_half_iteration, dual_after_some_iterations)
        return first, *(partial(by_dual, dual, self._solver, self._marginals) for dual in duals)

    def move(self, view: AnyView, pull: AnyMeasure, step_size: Array) -> AnyMeasure:
        if self.safeguard:
            return self.backtrack(view, pull, step_size, 0)
        query, rate = view.query, step_size * self.hellinger_scale
        weights = jax.nn.softmax(safe_log(query.weights) - rate * pull.variation)
        weights = jnp.where(rate > 0, weights, query.weights)
        return PointCloud(query.points + step_size * pull.velocity, weights)

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
        return PointCloud(self._held(view, pull, points), weights)

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
        own = self._marginals.share(view.known.potential)
        return own if self.rho is None else own - pull.variation / (self.rho + self.epsilon)

    def surely_descends(
        self, view: AnyView, pull: AnyMeasure, step_size: Array, moved: AnyMeasure
    ) -> Array:
        """For κ = 0, the bound E(q⁺) − E(q) ≤ Σ pⱼ(τ²/2 sⱼ|vⱼ|² − τ⟨vⱼ, vⱼ + T₀(xⱼ) − xⱼ⟩)
        − ½(OT_ε(q⁺, q⁺) − OT_ε(q, q)): E is concave in the Sₓ, and the old plans, which transport
        the share sⱼ of each atom, move along."""
        velocity, weights = pull.velocity, view.query.weights
        # Of what Σᵢ wᵢPᵢ transports, atom by atom: its share, and the force on it.
        share = self._marginals.share(view.known.potential)
        if self.rho is not None:
            share = share - pull.variation / (self.rho + self.epsilon)
        rest = velocity - view.force
        along = jnp.vecdot(velocity, step_size / 2 * share[:, None] * velocity - rest)
        centred = view.centred + step_size * velocity
        known = self._couple_with_itself(centred, weights)
        bound = step_size * jnp.vdot(weights, along) - (known.cost - view.known.cost) / 2
        result: Array = (self.hellinger_scale == 0) & (bound <= 0)
        return result

    def masses(self, query: AnyMeasure) -> AnyMeasure:
        """Of the SHK metric: pⱼ for the points, pⱼ/κ for the logarithms of the weights."""
        p, kappa = query.weights, self.hellinger_scale
        reaction = jnp.where(kappa > 0, p / jnp.where(kappa > 0, kappa, 1), 0)
        return with_leaves(query, jnp.broadcast_to(p[:, None], query.points.shape), reaction)

    def confined(self, measure: AnyMeasure, plain: AnyMeasure) -> AnyMeasure:
        """Within the box of the plain step's atoms: of light atoms the energy does not tell."""
        points, on = plain.points, (plain.weights > 0)[:, None]
        low = jnp.where(on, points, jnp.inf).min(0, keepdims=True)
        high = jnp.where(on, points, -jnp.inf).max(0, keepdims=True)
        kept = jnp.where(on, jnp.clip(measure.points, low, high), measure.points)
        return with_leaves(measure, kept, measure.weights)

    def chart(self, query: AnyMeasure) -> Chart:
        """Displacements of atoms, and changes of log pⱼ/√κ, in the SHK metric, in which both have
        the mass pⱼ. In the coordinates x and log p gradients are −pⱼvⱼ and pⱼ(Fⱼ−F̄)."""
        weights, speed = query.weights, safe_sqrt(self.hellinger_scale)

        def displaced(tangent: Tangent) -> PointCloud:
            logits = safe_log(weights) + speed * tangent.reaction
            moved = jax.nn.softmax(logits, where=weights > 0)
            # With κ = 0 not even the last digit of a weight changes.
            held = jnp.where(speed > 0, moved, weights)
            return PointCloud(query.points + tangent.points, held)

        def slope(view: View, pull: Pull) -> Tangent:
            p = view.query.weights
            reaction = speed * p * (pull.variation - jnp.vdot(p, pull.variation))
            return Tangent(-p[:, None] * pull.velocity, reaction)

        masses = Tangent(jnp.broadcast_to(weights[:, None], query.points.shape), weights)
        return Chart(masses, displaced, slope)

    def conserved(self, measure: AnyMeasure, tangent: AnyMeasure) -> AnyMeasure:
        """The weights if κ = 0, and always those that are 0."""
        still = super().conserved(measure, tangent)
        fixed = (self.hellinger_scale == 0) | (measure.weights == 0)
        return with_leaves(still, still.points, jnp.where(fixed, tangent.weights, 0))

    def residual(self, view: AnyView, pull: AnyMeasure) -> Array:
        """|grad E|_SHK = √(Σ pⱼ|vⱼ|² + κ Var_p F)."""
        return self._residual(view, pull, self.hellinger_scale)

    def residual_with_caution(self, view: AnyView, pull: AnyMeasure, times: Any) -> Array:
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
        less than a tenth of it."""
        rounding = 4 * float(jnp.finfo(query.dtype).eps) * jnp.abs(query.mean).max()
        enough, sought = (size * jnp.sqrt(self.epsilon) for size in RESOLVED)
        return enough + rounding, sought + rounding

    def scale(self, patterns: AnyMeasure, weights: Array | None = None) -> Array:
        """The root mean square distance of atoms to the mean of all, and a share of their
        distance to the origin, where coordinates round."""
        mean = average(patterns.mean, weights)
        centred = without_padding(patterns.points - mean[None, None], patterns.weights)
        spread = average(jnp.vecdot(patterns.weights, jnp.vecdot(centred, centred)), weights)
        eps = float(jnp.finfo(patterns.dtype).eps)
        result: Array = jnp.sqrt(spread) + eps**0.3 * jnp.sqrt(jnp.vdot(mean, mean))
        return result

    def resolution(self, patterns: AnyMeasure, weights: Array | None = None) -> Array:
        """The rounding of S_ε between clouds of this size, and the inner solver's error."""
        eps = float(jnp.finfo(patterns.dtype).eps)
        centred = without_padding(patterns.points - patterns.mean[:, None], patterns.weights)
        variances = jnp.vecdot(patterns.weights, jnp.vecdot(centred, centred))
        if self.rho is not None:
            variances = jnp.minimum(variances, 2 * (2 * self.rho + self.epsilon))
        return max(eps, self._tol**2) * average(variances, weights) / 2

    def batch_sizes(self, patterns: AnyMeasure) -> BatchSizes:
        numbers = patterns.num_atoms * (patterns.dim + 2)  # of a pull
        budget = by_platform(2**14, 2**24)
        at_once = min(len(patterns), max(1, budget // numbers))
        # Derivatives hold plans, n² numbers a pair and some of them at a time.
        plans = max(1, budget // 8 // patterns.num_atoms**2)
        queries = max(1, budget // (numbers * at_once))
        return BatchSizes(queries, at_once, min(at_once, plans))

    def __repr__(self) -> str:
        settings = [f"epsilon={_shown(self.epsilon)}"]
        settings += [f"rho={_shown(self.rho)}"] if self.rho is not None else []
        settings += [f"hellinger_scale={_shown(self.hellinger_scale)}"]
        settings += [f"tol={self.tol:g}"] if self.tol is not None else []
        settings += [f"solver={self.solver!r}"] if self.solver != "stabilised" else []
        settings += [] if self.safeguard else ["safeguard=False"]
        return f"Sinkhorn({', '.join(settings)})"

    @property
    def max_backtracks(self) -> int:  # type: ignore[override]
        """None for plain steps, whether or not the energy rises."""
        return 15 if self.safeguard else 0

    @property
    def default_acceleration(self) -> int:  # type: ignore[override]
        """Not for a given ρ: bold steps take strays and light atoms astray, of which the energy
        hardly tells."""
        return 5 if self.safeguard and self.rho is None else 0

    @property
    def default_steps(self) -> int:  # type: ignore[override]
        """More for a given ρ, where atoms that hardly belong to a pattern move slowly."""
        return 50 if self.rho is None or not self.safeguard else 150

    @property
    def bounds_pay(self) -> bool:  # type: ignore[override]
        """Not for a given ρ, where D of far patterns hardly differs."""
        return self.rho is None

    @property
    def cost_scale(self) -> float | None:  # type: ignore[override]
        """½ for the balanced divergence; the other does not grow without bounds."""
        return 0.5 if self.rho is None else None

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
        return Solver(self._tol, self.max_iterations, self.solver)

    def _couple_with_itself(
        self, points: Array, weights: Array, known: SelfCoupling | None = None
    ) -> SelfCoupling:
        return couple_with_itself(self._solver, Cloud(points, weights), self._marginals, known)


def _shown(value: Array) -> str:
    return f"{float(value):.4g}" if checks.is_concrete(value) and value.ndim == 0 else "…"
