"""Point clouds and mixtures in any pose: the least divergence over motions of a pattern."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from jdam._core import checks
from jdam._core.batching import by_platform
from jdam._core.derivatives import ITERATED
from jdam._core.loops import while_loop
from jdam._measures.base import AnyMeasure, with_leaves
from jdam.geometry._alignment import (
    Group,
    Moments,
    Problem,
    Softness,
    atoms_of,
    best_pose,
    in_mixture_plan,
    in_plan,
    moved_by,
    problem,
)
from jdam.geometry._pose_derivatives import followed
from jdam.geometry._pose_search import LANES, REFINEMENTS, Plans, search, starts, tolerance
from jdam.geometry._poses import Pose, choose_rows, each
from jdam.geometry.chamfer import Chamfer, own_growth
from jdam.geometry.mixture import MixtureWasserstein, aligned_plan, by_spectra
from jdam.geometry.protocol import AnyView, BatchSizes, Bound, Comparison, Geometry, Patterns
from jdam.geometry.sinkhorn import Sinkhorn

#: Of the variance of a query, the ε by which poses of mixtures are sought.
COARSE = 0.01


class Prepared(NamedTuple):
    """What the wrapped geometry computes once of patterns, and that no pose of theirs is known."""

    inner: Any
    unknown: Pose  # NaN


class Guess(NamedTuple):
    """What a later comparison starts from."""

    pose: Pose  # NaN before the first comparison
    inner: Any  # of the wrapped geometry


class Refined(NamedTuple):
    """Poses during their refinement, of B patterns."""

    pose: Pose
    change: Float[Array, " B"]  # how far the last turn moved atoms, in units of the tolerance
    turns: Int[Array, ""]


class Chosen(NamedTuple):
    """The best poses so far, of B patterns."""

    rank: Int[Array, ""]  # of the candidate that is next
    divergence: Float[Array, " B"]
    guess: Guess


class Aligned(Geometry):
    """D = the least divergence to a pattern in any pose, on point clouds and Gaussian mixtures.

    For a geometry of divergence D₀ and a group G of motions g(x) = s R x + t,

        D(ξ, X) = min over g ∈ G of D₀(ξ, gX).

    The pose moves the pattern, so that pulls, steps and `Recall.inliers` are those of the wrapped
    geometry in the frame of the query. A recall leaves a query in its pose, and
    `result.pose(memory[result.nearest])` is the pattern laid on it: a partial cue, completed.

    **The pose is an upper bound.** A pose is found by alternation. Of its transport plan P, with
    mass m, the best motion is closed (W. Kabsch, Acta Cryst. A 32, 922 (1976); S. Umeyama, IEEE
    PAMI 13, 376 (1991)):

        x̄ = ΣPⱼₖxⱼ/m,    ȳ = ΣPⱼₖyₖ/m,    H = ΣPⱼₖ(xⱼ−x̄)(yₖ−ȳ)ᵀ = U diag(σ) Vᵀ,
        R = U diag(1, …, 1, det UVᵀ) Vᵀ,    s = ⟨R, H⟩/(ΣPⱼₖ|yₖ−ȳ|² − m a),    t = x̄ − sRȳ,

    where ½as² is to second order what the pattern costs itself at the scale s, and of mixtures H
    has the terms ΣPₖₗLₖ(MₗRₖₗ)ᵀ of their factors too. Both halves lower D₀ if s is held, and end at
    a local minimum. The first comparison starts from a net of rotations: equal angles in the plane,
    super-Fibonacci spirals in space (M. Alexa, CVPR 2022), and in higher dimensions random
    rotations and those that lay principal axes on principal axes. From each it follows one-sided
    plans, as of `Chamfer`, while their ε falls from the size of the query to that of the geometry
    (of mixtures those of sigma points); four of the best are refined. Nothing proves that there is
    no better pose: D is an upper bound of the minimum. Later comparisons refine the last pose, so
    that the energy of a recall rises no more than that of the wrapped geometry.

    **Derivatives** are exact, first and higher, where the pose found is a strict minimum: poses
    follow what D depends on, by the implicit function theorem. Where a motion changes nothing, as
    of a body of revolution, the pose stays along it. Where a search may as well end in another
    minimum D has a kink, and its derivative is that of the minimum found. Where a bound on the
    scale binds, see below, derivatives hold for the stationary scale that it keeps away from.

    **Arguments:**

    - `geometry`: a `Chamfer`; a `Sinkhorn` with the cost ½|x−y|², balanced or with ρ; or a
      `MixtureWasserstein`. ε and ρ are in the units of the query.
    - `rotations`: whether patterns turn.
    - `translations`: whether they move; if not they turn about the origin.
    - `reflections`: whether R may have determinant −1 too, as a mirror image.
    - `scale`: whether they grow and shrink. The scale stays within a factor of 8 of the ratio of
      sizes, the root mean square distances to the mean, and blurring counts for at most half of a
      size. It is that of least D₀: where √ε is not small against the distances of atoms it is off
      by what D₀ is. Parts of a cue that are small fit many patterns at some scale.
    - `num_starts`: how many rotations to start from; 16 in the plane, 48 in space and 128 in higher
      dimensions if None, and twice as many with `reflections`. The time of the first comparison
      grows with it.

    For cues of which parts are missing take `Chamfer`, or a ρ. Labels of atoms, as features, tell
    poses and patterns apart that points alone do not. Landmarks of known order are clouds with
    `features=jnp.eye(n)` and a `Chamfer` of large `feature_scale`, whose plan is the order: this is
    Procrustes' problem, and needs one start. `Certified` has the spectra of covariances as bounds
    of mixtures unless `scale` is free; else it compares all patterns. There is no theory of basins.

    **Raises:** `TypeError` for another geometry or other types; `ValueError` for a geometry with
    another cost, where nothing is free, and for `reflections` without `rotations`.
    """

    geometry: Chamfer | Sinkhorn | MixtureWasserstein
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
        if not isinstance(geometry, Chamfer | Sinkhorn | MixtureWasserstein):
            raise TypeError(
                f"geometry must be a jdam.Chamfer, jdam.Sinkhorn or jdam.MixtureWasserstein, whose "
                f"measures can be posed; got {geometry!r}"
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
        patterns = self._aligned(view, patterns)
        pose = followed(self, view, patterns, patterns.guess.pose)
        found = self.geometry.compare(view, self.posed(patterns, pose))
        return found._replace(guess=Guess(patterns.guess.pose, found.guess), pose=pose)

    def plan(self, view: AnyView, patterns: Patterns) -> Float[Array, "B n m"]:
        """That of the wrapped geometry, of the patterns in the poses of their guess."""
        patterns = self._aligned(view, patterns) if patterns.guess is None else patterns
        pose = followed(self, view, patterns, patterns.guess.pose)
        return self.geometry.plan(view, self.posed(patterns, pose))

    def first_guess(self, prepared: Any) -> Any:
        return Guess(prepared.unknown, self.geometry.first_guess(prepared.inner))

    def posed(self, patterns: Patterns, pose: Pose) -> Patterns:
        """Patterns of the wrapped geometry, in these poses. What is prepared of them hardly changes
        unless their scales do."""
        moved, prepared = pose(patterns.measures), patterns.prepared.inner
        if isinstance(self.geometry, MixtureWasserstein):
            return Patterns(moved, prepared, patterns.guess.inner)
        if self.scaled:
            return Patterns(moved, self.geometry.prepare(moved), patterns.guess.inner)
        still = jax.lax.stop_gradient(pose)
        prepared = prepared._replace(centre=each(still, prepared.centre))
        if isinstance(self.geometry, Sinkhorn):
            turn = Pose(still.rotation, jnp.zeros_like(still.translation), still.scale)
            prepared = prepared._replace(offset=each(turn, prepared.offset))
        return Patterns(moved, prepared, patterns.guess.inner)

    def _aligned(self, view: AnyView, patterns: Patterns) -> Patterns:
        """With the best poses found, and what to start the comparison there from, as constants."""
        if patterns.guess is None:
            patterns = patterns._replace(guess=self.first_guess(patterns.prepared))
        fixed, seen, held = jax.lax.stop_gradient((self, view, patterns))
        found: Guess = checkpoint_name(fixed._best(seen, held), ITERATED)
        return patterns._replace(guess=found)

    def _best(self, view: AnyView, patterns: Patterns) -> Guess:
        """By refinement of the last poses, or of those that a search ends with."""
        query, measures = atoms_of(_query(view)), atoms_of(patterns.measures)
        held = problem(query, measures, getattr(self.geometry, "feature_scale", None))
        last, inner = patterns.guess
        plans = self._plans(held, patterns)
        lanes = search(self.group, held, last, starts(self.group, held, self.num_starts), plans)
        if isinstance(self.geometry, Chamfer):  # whose plans those of the search are
            row, first = jnp.arange(len(lanes.score)), lanes.score.argmin(1)
            return Guess(jax.tree.map(lambda leaf: leaf[row, first], lanes.poses), inner)

        def turn(best: Chosen) -> Chosen:
            start = jax.tree.map(lambda leaf: leaf[:, best.rank], lanes.poses)
            pose = self._refined(held, view, patterns, start)
            found = self.geometry.compare(view, self.posed(patterns, pose))
            better = found.divergence < best.divergence
            return Chosen(
                best.rank + 1,
                jnp.where(better, found.divergence, best.divergence),
                choose_rows(better, Guess(pose, found.guess), best.guess),
            )

        count = jnp.where(jnp.isfinite(last.scale).all(), 1, LANES)
        most = jnp.full_like(held.sizes, jnp.inf)
        start = Chosen(jnp.array(0, jnp.int32), most, patterns.guess)
        end = while_loop(lambda best: best.rank < count, turn, start, lanes, view, patterns, self)
        return end.guess

    def _plans(self, held: Problem, patterns: Patterns) -> Plans:
        """Of the search."""
        geometry = self.geometry
        if isinstance(geometry, MixtureWasserstein):
            return Plans(Softness(COARSE * held.size, None), 0)
        soft = Softness(geometry.epsilon, geometry.rho)
        if isinstance(geometry, Sinkhorn):
            return Plans(soft, 0)
        if not self.scaled:
            return Plans(soft, REFINEMENTS)

        def own(scale: Float[Array, "B W"]) -> Float[Array, "B W"]:
            of_scales = jax.vmap(own_growth, (None, None, 0))
            found: Array = jax.vmap(of_scales, (None, 0, 0))(geometry, patterns.measures, scale)
            return found

        return Plans(soft, REFINEMENTS, own)

    def _refined(self, held: Problem, view: AnyView, patterns: Patterns, pose: Pose) -> Pose:
        """Poses after alternation by plans of the wrapped geometry until atoms come to rest."""
        tol = tolerance(held)

        def unfinished(state: Refined) -> Bool[Array, ""]:
            return (state.change > 1).any() & (state.turns < REFINEMENTS)

        def turn(state: Refined) -> Refined:
            found, own = self._moments(view, patterns, state.pose)
            moved = best_pose(self.group, found, state.pose, held.ratio, own)
            old, new = jax.tree.map(lambda leaf: leaf[:, None], (state.pose, moved))
            return Refined(moved, moved_by(held, old, new)[:, 0] / tol, state.turns + 1)

        start = Refined(pose, jnp.full_like(tol, jnp.inf), jnp.array(0, jnp.int32))
        return while_loop(unfinished, turn, start, held, view, patterns, self).pose

    def _moments(self, view: AnyView, patterns: Patterns, pose: Pose) -> tuple[Moments, Array]:
        """Of the plans between a query and patterns in these poses, and what patterns cost
        themselves; see `best_pose`."""
        query, measures, posed = _query(view), patterns.measures, self.posed(patterns, pose)
        if isinstance(self.geometry, MixtureWasserstein):
            plans, factors = aligned_plan(view, posed.measures)
            # `Bures` turns factors of the query; those of patterns are aligned with what it makes.
            own = view.components.query.factor
            query = with_leaves(query, query.weights, query.means, own)
            # From the frame of the query to that of the patterns.
            factors = jnp.einsum("bij,bklir->bkljr", pose.rotation, factors)
            factors = factors / pose.scale[:, None, None, None, None]
            found = jax.vmap(in_mixture_plan, (0, None, 0, 0))(plans, query, measures, factors)
            return found, jnp.zeros_like(pose.scale)
        plans = self.geometry.plan(view, posed)
        found = jax.vmap(in_plan, (0, None, 0))(plans, query, measures)
        if not self.scaled:
            return found, jnp.zeros_like(pose.scale)
        clouds = posed.measures
        force = jax.vmap(self.geometry.view)(clouds).force
        ways = clouds.points - clouds.mean[:, None]
        growth = jnp.vecdot(
            clouds.weights, jnp.where(clouds.weights > 0, jnp.vecdot(ways, force), 0)
        )
        mass = jnp.where(found.mass > 0, found.mass, 1)
        return found, growth / (mass * pose.scale**2)

    @property
    def group(self) -> Group:
        """The motions that are free."""
        return Group(self.rotations, self.translations, self.reflections, self.scaled)

    def bounds(self, patterns: Patterns) -> tuple[Bound, ...]:
        """By spectra, of mixtures. One-sided and entropic divergences lie below what spectra and
        radii bound."""
        if self.scaled or not isinstance(self.geometry, MixtureWasserstein):
            return ()

        def bound(view: AnyView, patterns: Patterns) -> Float[Array, " B"]:
            held = patterns._replace(prepared=patterns.prepared.inner)
            return by_spectra(view, held, about_means=self.translations)

        return (bound,)

    # Those of the wrapped geometry.

    def match(self, query: AnyMeasure, patterns: AnyMeasure) -> AnyMeasure:
        return self.geometry.match(query, patterns)

    def check(self, name: str, measure: AnyMeasure, batch_ndim: int) -> AnyMeasure:
        return self.geometry.check(name, measure, batch_ndim)

    def prepare(self, patterns: AnyMeasure) -> Any:
        mean = jax.lax.stop_gradient(patterns.mean)
        unknown = jnp.full_like(mean, jnp.nan)
        rotation = jnp.broadcast_to(unknown[..., None], (*unknown.shape, unknown.shape[-1]))
        return Prepared(self.geometry.prepare(patterns), Pose(rotation, unknown, unknown[:, 0]))

    def view(self, query: AnyMeasure) -> AnyView:
        return self.geometry.view(query)

    def move(self, view: AnyView, pull: AnyMeasure, step_size: Array) -> AnyMeasure:
        return self.geometry.move(view, pull, step_size)

    def backtrack(
        self, view: AnyView, pull: AnyMeasure, step_size: Array, times: Any
    ) -> AnyMeasure:
        return self.geometry.backtrack(view, pull, step_size, times)

    def masses(self, view: AnyView, pull: AnyMeasure) -> AnyMeasure | None:
        return self.geometry.masses(view, pull)

    def residual(self, view: AnyView, pull: AnyMeasure) -> Array:
        return self.geometry.residual(view, pull)

    def cautious_residual(self, view: AnyView, pull: AnyMeasure, times: Any) -> Array:
        return self.geometry.cautious_residual(view, pull, times)

    def tolerances(self, query: AnyMeasure, scale: Array) -> tuple[Array, Array]:
        return self.geometry.tolerances(query, scale)

    def gauge(self, measure: AnyMeasure, tangent: AnyMeasure) -> AnyMeasure:
        return self.geometry.gauge(measure, tangent)

    def typical_norm(self, patterns: AnyMeasure, weights: Array | None = None) -> Array:
        return self.geometry.typical_norm(patterns, weights)

    def energy_tolerance(self, patterns: AnyMeasure, weights: Array | None = None) -> Array:
        return self.geometry.energy_tolerance(patterns, weights)

    def batch_sizes(self, patterns: AnyMeasure) -> BatchSizes:
        """Fewer, since poses are sought in several lanes."""
        atoms = jax.eval_shape(atoms_of, patterns)
        pairs = LANES * atoms.num_atoms**2
        most = max(1, by_platform(2**18, 2**24) // pairs)
        inner = self.geometry.batch_sizes(patterns)
        at_once = min(inner.patterns, most, len(patterns))
        queries = max(1, min(inner.queries, most // at_once))
        return BatchSizes(queries, at_once, min(inner.differentiated, at_once))

    @property
    def max_backtracks(self) -> int:  # type: ignore[override]
        return self.geometry.max_backtracks

    @property
    def default_steps(self) -> int:  # type: ignore[override]
        return self.geometry.default_steps

    @property
    def default_acceleration(self) -> int:  # type: ignore[override]
        return self.geometry.default_acceleration

    def __repr__(self) -> str:
        shown = [repr(self.geometry)]
        shown += [] if self.rotations else ["rotations=False"]
        shown += [] if self.translations else ["translations=False"]
        shown += ["reflections=True"] if self.reflections else []
        shown += ["scale=True"] if self.scaled else []
        shown += [] if self.num_starts is None else [f"num_starts={self.num_starts}"]
        return f"Aligned({', '.join(shown)})"


def _query(view: AnyView) -> AnyMeasure:
    """What it is a view of."""
    return getattr(view, "query", view)
