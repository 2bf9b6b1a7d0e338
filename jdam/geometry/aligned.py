"""The geometry `Aligned`: point clouds, mixtures and landmarks up to motions of the pattern."""

import functools
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, PyTree

from jdam._core import checks
from jdam._core.batching import by_platform
from jdam._core.derivatives import ITERATED
from jdam._core.loops import while_loop
from jdam._entropic.problem import Marginals
from jdam._measures.base import AnyMeasure, with_leaves
from jdam.geometry._alignment import (
    Group,
    Moments,
    Problem,
    alignment_problem,
    atoms_of,
    best_pose,
    displacement,
    landmark_moments,
    mixture_plan_moments,
    plan_moments,
    rigid_part,
    with_derivative,
)
from jdam.geometry._pose_search import LANES, MAX_REFINEMENTS, Settings, search, starts, tolerance
from jdam.geometry._poses import Pose, transform_points, where_rows
from jdam.geometry.chamfer import Chamfer, self_cost_growth
from jdam.geometry.euclidean import Euclidean, Landmarks
from jdam.geometry.mixture import MixtureWasserstein, aligned_plan, by_spectra
from jdam.geometry.protocol import AnyView, BatchSizes, Bound, Comparison, Geometry, Patterns
from jdam.geometry.sinkhorn import Sinkhorn

Method = TypeVar("Method", bound=Callable[..., Any])
#: The ε of the search for poses of mixtures, as a fraction of the variance of the query.
COARSE_EPSILON = 0.01


class Posed(NamedTuple):
    """Prepared arrays of the wrapped geometry, or its warm start, and poses of patterns."""

    inner: PyTree
    pose: Pose  # NaN if unknown


def _forwarded(method: Method) -> Method:
    """Return the same method of the wrapped geometry, as a method of `Aligned`."""

    @functools.wraps(method)
    def call(self: "Aligned", *args: Any, **kwargs: Any) -> Any:
        return getattr(self.geometry, method.__name__)(*args, **kwargs)

    return call  # type: ignore[return-value]


class Aligned(Geometry):
    """D = the smallest divergence to a pattern in any pose, on point clouds, Gaussian mixtures and
    landmarks.

    For a geometry with divergence D₀ and a group G of motions g(x) = s R x + t,

        D(ξ, X) = min over g ∈ G of D₀(ξ, gX).

    The pose moves the pattern, so that pulls, steps and `Recall.inliers` are those of the wrapped
    geometry in the frame of the query. Recall does not change the pose of a query, and
    `result.pose(memory[result.nearest])` is the pattern aligned with it, which completes a partial
    query.

    **The pose is an upper bound.** It is found by alternation of transport plans and motions. For a
    plan P of mass m, the best motion has a closed form (W. Kabsch, Acta Cryst. A 32, 922 (1976); S.
    Umeyama, IEEE PAMI 13, 376 (1991)):

        x̄ = ΣPⱼₖxⱼ/m,    ȳ = ΣPⱼₖyₖ/m,    H = ΣPⱼₖ(xⱼ−x̄)(yₖ−ȳ)ᵀ = U diag(σ) Vᵀ,
        R = U diag(1, …, 1, det UVᵀ) Vᵀ,    s = ⟨R, H⟩/(ΣPⱼₖ|yₖ−ȳ|² − m a),    t = x̄ − sRȳ,

    where ½as² is the self cost of the pattern at the scale s, to second order; for mixtures, H also
    has the terms ΣPₖₗLₖ(MₗRₖₗ)ᵀ of their factors. For constant s both halves lower D₀, and the
    alternation ends at a local minimum. The first comparison starts from a grid of rotations: equal
    angles in the plane, super-Fibonacci spirals in space (M. Alexa, CVPR 2022), and in higher
    dimensions random rotations and those that map principal axes to principal axes. From each start
    it uses one-sided plans, as of `Chamfer`, with ε decreasing from the size of the query to the ε
    of the geometry (for mixtures, plans of sigma points); four of the best poses are refined, in at
    most 64 iterations. A better pose may exist, so that D is an upper bound on the minimum. Later
    comparisons refine the last pose, so that the energy of a recall rises no more than that of the
    wrapped geometry.

    **Derivatives** are exact, first and higher, if the pose is a strict minimum: the derivative of
    the pose is that of the implicit function theorem. It is zero along motions that change nothing,
    as rotations of a body of revolution. Where another start would give another minimum, D has a
    kink, and its derivative is that of the minimum found. Where a bound on the scale is active (see
    `scale`), derivatives are those of the stationary scale.

    **Arguments:**

    - `geometry`: a `Chamfer`; a `Sinkhorn` with the cost ½|x−y|², balanced or with ρ; a
      `MixtureWasserstein`; or `Euclidean` for landmarks, arrays (n, d) of n points in a known
      order, D₀ = Σⱼ|xⱼ−yⱼ|². ε and ρ are in the units of the query.
    - `rotations`: whether to rotate patterns.
    - `translations`: whether to translate them; if False, they are rotated about the origin.
    - `reflections`: whether R may have determinant −1.
    - `scale`: whether to scale patterns. The scale is the one of smallest D₀; its error is small if
      √ε is small against the distances of atoms. It stays within a factor of 8 of the ratio of
      sizes, the root mean square distances to the mean, and the term m a is at most half of
      ΣPⱼₖ|yₖ−ȳ|². Small parts of a measure fit many patterns at some scale.
    - `num_starts`: the number of initial rotations; None for 16 in the plane, 48 in space and 128
      in higher dimensions, and twice as many with `reflections`. The time of the first comparison
      is proportional to it.

    Use `Chamfer`, or a ρ, for partial queries. Labels of atoms, as features, distinguish poses and
    patterns that have similar points. The plan of landmarks is their order, so that the first
    motion is the best one: D is the minimum itself (the orthogonal Procrustes problem), and no
    start is needed. `Certified` uses spectra of covariances as
    bounds for mixtures without `scale`, and compares all patterns otherwise. `jdam.theory` does not
    apply.

    **Raises:** `TypeError` for another geometry or arguments of other types; `ValueError` for a
    geometry with another cost, for an empty group, and for `reflections` without `rotations`."""

    geometry: Chamfer | Sinkhorn | MixtureWasserstein | Landmarks
    rotations: bool = eqx.field(static=True)
    translations: bool = eqx.field(static=True)
    reflections: bool = eqx.field(static=True)
    scaled: bool = eqx.field(static=True)
    num_starts: int | None = eqx.field(static=True)

    def __init__(
        self,
        geometry: Geometry,
        *,
        rotations: bool = True,
        translations: bool = True,
        reflections: bool = False,
        scale: bool = False,
        num_starts: int | None = None,
    ):
        if type(geometry) is Euclidean:
            geometry = Landmarks()
        if not isinstance(geometry, Chamfer | Sinkhorn | MixtureWasserstein | Landmarks):
            raise TypeError(
                "geometry must be a jdam.Chamfer, jdam.Sinkhorn, jdam.MixtureWasserstein or "
                f"jdam.Euclidean; got {geometry!r}"
            )
        if getattr(geometry, "cost", None) is not None:
            raise ValueError(f"geometry must have the cost ½|x−y|²; got {geometry!r}")
        flags = {"rotations": rotations, "translations": translations, "scale": scale}
        for name, flag in (flags | {"reflections": reflections}).items():
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be a bool; got {flag!r}")
        if not (rotations or translations or scale):
            raise ValueError("rotations, translations or scale must be True; got False for all")
        if reflections and not rotations:
            raise ValueError("reflections must be False without rotations; got True")
        self.geometry, self.rotations, self.translations = geometry, rotations, translations
        self.reflections, self.scaled = reflections, scale
        if num_starts is not None:
            num_starts = checks.positive_int("num_starts", num_starts)
        self.num_starts = num_starts

    def compare(self, view: AnyView, patterns: Patterns) -> Comparison:
        patterns = self._with_best_poses(view, patterns)
        pose = with_derivative(self, view, patterns, patterns.guess.pose)
        comparison = self.geometry.compare(view, self.posed(patterns, pose))
        guess = Posed(comparison.guess, patterns.guess.pose)
        return comparison._replace(guess=guess, pose=pose)

    def plan(self, view: AnyView, patterns: Patterns) -> Float[Array, "B n m"]:
        """Return the plans of the wrapped geometry, for patterns in the poses of the warm start."""
        patterns = self._with_best_poses(view, patterns) if patterns.guess is None else patterns
        pose = with_derivative(self, view, patterns, patterns.guess.pose)
        return self.geometry.plan(view, self.posed(patterns, pose))

    def first_guess(self, prepared: PyTree) -> PyTree:
        return Posed(self.geometry.first_guess(prepared.inner), prepared.pose)

    def posed(self, patterns: Patterns, pose: Pose) -> Patterns:
        """Return patterns of the wrapped geometry in the given poses.

        Prepared arrays are transformed, and computed anew only if scales change."""
        moved, prepared = pose(patterns.measures), patterns.prepared.inner
        if isinstance(self.geometry, MixtureWasserstein | Landmarks):
            return Patterns(moved, prepared, patterns.guess.inner)
        if self.scaled:
            return Patterns(moved, self.geometry.prepare(moved), patterns.guess.inner)
        constant = jax.lax.stop_gradient(pose)
        prepared = prepared._replace(centre=transform_points(constant, prepared.centre))
        if isinstance(self.geometry, Sinkhorn):
            linear = Pose(constant.rotation, jnp.zeros_like(constant.translation), constant.scale)
            prepared = prepared._replace(offset=transform_points(linear, prepared.offset))
        return Patterns(moved, prepared, patterns.guess.inner)

    def _with_best_poses(self, view: AnyView, patterns: Patterns) -> Patterns:
        """Return the patterns with a warm start of the best poses, as constants."""
        if patterns.guess is None:
            patterns = patterns._replace(guess=self.first_guess(patterns.prepared))
        fixed, query, rows = jax.lax.stop_gradient((self, view, patterns))
        warm_start: Posed = checkpoint_name(fixed._best_poses(query, rows), ITERATED)
        return patterns._replace(guess=warm_start)

    def _best_poses(self, view: AnyView, patterns: Patterns) -> Posed:
        """Refine the previous poses or, in the first comparison, the results of a search."""
        query, measures = atoms_of(_query(view)), atoms_of(patterns.measures)
        problem = alignment_problem(query, measures, getattr(self.geometry, "feature_scale", None))
        inner, previous = patterns.guess
        if isinstance(self.geometry, Landmarks):
            moments = jax.vmap(landmark_moments, (None, 0))(query.points, measures.points)
            growth = jnp.zeros_like(problem.sizes)
            return Posed(inner, best_pose(self.group, moments, previous, problem.ratio, growth))
        settings = self._plan_settings(problem, patterns)
        candidates = starts(self.group, problem, self.num_starts)
        result = search(self.group, problem, previous, candidates, settings)
        if isinstance(self.geometry, Chamfer):  # the search has the same plans
            row, best_lane = jnp.arange(len(result.score)), result.score.argmin(1)
            return Posed(inner, jax.tree.map(lambda leaf: leaf[row, best_lane], result.poses))

        def body_fun(best: tuple[Array, Array, Posed]) -> tuple[Array, Array, Posed]:
            rank, divergence, warm_start = best
            start = jax.tree.map(lambda leaf: leaf[:, rank], result.poses)
            pose = self._refine(problem, view, patterns, start)
            comparison = self.geometry.compare(view, self.posed(patterns, pose))
            better = comparison.divergence < divergence
            divergence = jnp.where(better, comparison.divergence, divergence)
            refined = Posed(comparison.guess, pose)
            return rank + 1, divergence, where_rows(better, refined, warm_start)

        count = jnp.where(jnp.isfinite(previous.scale).all(), 1, LANES)
        unbounded = jnp.full_like(problem.sizes, jnp.inf)
        start = jnp.array(0, jnp.int32), unbounded, patterns.guess
        closure = result, view, patterns, self
        best: tuple[Array, Array, Posed] = while_loop(
            lambda best: best[0] < count, body_fun, start, *closure
        )
        return best[2]

    def _plan_settings(self, problem: Problem, patterns: Patterns) -> Settings:
        """Return the settings of the search."""
        geometry = self.geometry
        if isinstance(geometry, MixtureWasserstein):
            return Settings(Marginals(COARSE_EPSILON * problem.size), 0)
        assert not isinstance(geometry, Landmarks)  # which need no search
        marginals = Marginals(geometry.epsilon, geometry.rho)
        if isinstance(geometry, Sinkhorn):
            return Settings(marginals, 0)
        if not self.scaled:
            return Settings(marginals, MAX_REFINEMENTS)

        def growth(scale: Float[Array, "B W"]) -> Float[Array, "B W"]:
            over_scales = jax.vmap(self_cost_growth, (None, None, 0))
            result: Array = jax.vmap(over_scales, (None, 0, 0))(geometry, patterns.measures, scale)
            return result

        return Settings(marginals, MAX_REFINEMENTS, growth)

    def _refine(self, problem: Problem, view: AnyView, patterns: Patterns, pose: Pose) -> Pose:
        """Alternate plans of the wrapped geometry and motions until the displacement is within the
        tolerance."""
        tol = tolerance(problem)

        def cond_fun(state: tuple[Pose, Array, Array]) -> Bool[Array, ""]:
            _, change, iteration = state
            return (change > tol).any() & (iteration < MAX_REFINEMENTS)

        def body_fun(state: tuple[Pose, Array, Array]) -> tuple[Pose, Array, Array]:
            pose, _, iteration = state
            moments, growth = self._moments(view, patterns, pose)
            new_pose = best_pose(self.group, moments, pose, problem.ratio, growth)
            old, new = jax.tree.map(lambda leaf: leaf[:, None], (pose, new_pose))
            return new_pose, displacement(problem, old, new)[:, 0], iteration + 1

        start = pose, jnp.full_like(tol, jnp.inf), jnp.array(0, jnp.int32)
        return while_loop(cond_fun, body_fun, start, problem, view, patterns, self)[0]

    def _moments(self, view: AnyView, patterns: Patterns, pose: Pose) -> tuple[Moments, Array]:
        """Return the moments of the plans between the query and patterns in the given poses, and
        the growth of the patterns' self cost with the scale, see `best_pose`."""
        query, measures, posed = _query(view), patterns.measures, self.posed(patterns, pose)
        if isinstance(self.geometry, MixtureWasserstein):
            plans, factors = aligned_plan(view, posed.measures)
            # `Bures` rotates the factors of the query; those of patterns are aligned with these.
            factor = view.components.query.factor
            query = with_leaves(query, query.weights, query.means, factor)
            # Factors are transformed from the frame of the query to that of the patterns.
            factors = jnp.einsum("bij,bklir->bkljr", pose.rotation, factors)
            factors = factors / pose.scale[:, None, None, None, None]
            over_patterns = jax.vmap(mixture_plan_moments, (0, None, 0, 0))
            result = over_patterns(plans, query, measures, factors)
            return result, jnp.zeros_like(pose.scale)
        plans = self.geometry.plan(view, posed)
        result = jax.vmap(plan_moments, (0, None, 0))(plans, query, measures)
        if not self.scaled:
            return result, jnp.zeros_like(pose.scale)
        clouds = posed.measures
        force = jax.vmap(self.geometry.view)(clouds).force
        centred = clouds.points - clouds.mean[:, None]
        forces = jnp.where(clouds.weights > 0, jnp.vecdot(centred, force), 0)
        growth = jnp.vecdot(clouds.weights, forces)
        mass = jnp.where(result.mass > 0, result.mass, 1)
        return result, growth / (mass * pose.scale**2)

    def gauge(self, measure: AnyMeasure, tangent: AnyMeasure) -> AnyMeasure:
        """Project a tangent on the gauge of the wrapped geometry, and on the rigid motions of the
        group. They do not change D, and no step makes them, because the pulls of patterns in their
        best poses have no net force and no torque."""
        rigid = self.group._replace(scale=False)
        inner = self.geometry.gauge(measure, tangent)
        return jax.tree.map(jnp.add, inner, rigid_part(rigid, measure, tangent))

    @property
    def group(self) -> Group:
        """The group of motions."""
        return Group(self.rotations, self.translations, self.reflections, self.scaled)

    def bounds(self, patterns: Patterns) -> tuple[Bound, ...]:
        """Return the bound by spectra for mixtures. One-sided and entropic divergences may be
        smaller than bounds by spectra and radii."""
        if self.scaled or not isinstance(self.geometry, MixtureWasserstein):
            return ()

        def bound(view: AnyView, patterns: Patterns) -> Float[Array, " B"]:
            inner = patterns._replace(prepared=patterns.prepared.inner)
            return by_spectra(view, inner, about_means=self.translations)

        return (bound,)

    # All else is that of the wrapped geometry.
    match = _forwarded(Geometry.match)
    view = _forwarded(Geometry.view)
    move = _forwarded(Geometry.move)
    backtrack = _forwarded(Geometry.backtrack)
    masses = _forwarded(Geometry.masses)
    residual = _forwarded(Geometry.residual)
    cautious_residual = _forwarded(Geometry.cautious_residual)
    tolerances = _forwarded(Geometry.tolerances)
    typical_norm = _forwarded(Geometry.typical_norm)
    energy_tolerance = _forwarded(Geometry.energy_tolerance)
    max_backtracks = property(attrgetter("geometry.max_backtracks"))
    default_steps = property(attrgetter("geometry.default_steps"))
    default_acceleration = property(attrgetter("geometry.default_acceleration"))

    def check(self, name: str, measure: AnyMeasure, batch_ndim: int) -> AnyMeasure:
        return self.geometry.check(name, measure, batch_ndim)

    def prepare(self, patterns: AnyMeasure) -> PyTree:
        mean = atoms_of(jax.lax.stop_gradient(patterns)).mean
        nan = jnp.full_like(mean, jnp.nan)
        rotation = jnp.broadcast_to(nan[..., None], (*nan.shape, nan.shape[-1]))
        return Posed(self.geometry.prepare(patterns), Pose(rotation, nan, nan[:, 0]))

    def batch_sizes(self, patterns: AnyMeasure) -> BatchSizes:
        """Return smaller sizes than the wrapped geometry, since the search has several lanes."""
        atoms = jax.eval_shape(atoms_of, patterns)
        pairs = LANES * atoms.num_atoms**2
        budget = max(1, by_platform(2**18, 2**24) // pairs)
        inner = self.geometry.batch_sizes(patterns)
        at_once = min(inner.patterns, budget, len(patterns))
        queries = max(1, min(inner.queries, budget // at_once))
        return BatchSizes(queries, at_once, min(inner.differentiated, at_once))

    def __repr__(self) -> str:
        settings = [repr(self.geometry)]
        settings += [] if self.rotations else ["rotations=False"]
        settings += [] if self.translations else ["translations=False"]
        settings += ["reflections=True"] if self.reflections else []
        settings += ["scale=True"] if self.scaled else []
        settings += [] if self.num_starts is None else [f"num_starts={self.num_starts}"]
        return f"Aligned({', '.join(settings)})"


def _query(view: AnyView) -> AnyMeasure:
    """Return the query of a view."""
    return getattr(view, "query", view)
