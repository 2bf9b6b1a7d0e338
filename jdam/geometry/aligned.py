"""Point clouds in any pose: the least divergence over rotations and translations of a pattern."""

from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from jdam._core import checks
from jdam._core.batching import by_platform
from jdam._core.derivatives import ITERATED
from jdam._core.linalg import nearest_rotation, polar, safe_sqrt
from jdam._core.loops import while_loop
from jdam._measures.base import AnyMeasure
from jdam._measures.point_cloud import PointCloud
from jdam.geometry import chamfer
from jdam.geometry._poses import Pose, choose_rows, each, rotations
from jdam.geometry.chamfer import Chamfer
from jdam.geometry.protocol import AnyView, BatchSizes, Comparison, Geometry, Patterns
from jdam.geometry.sinkhorn import Sinkhorn

#: How many levels of ε the search goes through, from the size of a query to ε.
LEVELS = 6
#: How many of the poses that the search ends with are refined.
FINALISTS = 3
#: How often a pose is refined at most.
REFINEMENTS = 64


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
    """D = the least divergence to a pattern in any pose, on point clouds.

    For a geometry of divergence D₀ and a group G of motions g(x) = R x + t,

        D(ξ, X) = min over g ∈ G of D₀(ξ, gX).

    The pose moves the pattern, so that pulls, steps and `Recall.inliers` are those of the wrapped
    geometry in the frame of the query. A recall leaves a query in its pose, and
    `result.pose(memory[result.nearest])` is the pattern laid on it: a partial cue, completed.

    **The pose is an upper bound.** A pose is found by alternation. Of its transport plan P, with
    mass m, the best motion is closed (W. Kabsch, Acta Cryst. A 32, 922 (1976)):

        x̄ = ΣPⱼₖxⱼ/m,    ȳ = ΣPⱼₖyₖ/m,    H = ΣPⱼₖ(xⱼ−x̄)(yₖ−ȳ)ᵀ = U diag(s) Vᵀ,
        R = U diag(1, …, 1, det UVᵀ) Vᵀ,    t = x̄ − Rȳ.

    Both halves lower D₀, and end at a local minimum. The first comparison starts from a net of
    rotations: equal angles in the plane, super-Fibonacci spirals in space (M. Alexa, CVPR 2022),
    and fixed random rotations in higher dimensions. It lowers ε of `Chamfer` plans from the size
    of the query to that of the geometry, and takes the best end of the best three. Nothing proves
    that there is no better pose: D is an upper bound of the minimum. Later comparisons refine the
    last pose, so that the energy of a recall rises no more than that of the wrapped geometry.

    Derivatives of energies and divergences are those at the pose found, by the envelope theorem:
    there D₀ does not change with the pose to first order. Second derivatives, and derivatives of
    what a `step` or `recall` returns, hold the poses constant, which leaves out a term.

    **Arguments:**

    - `geometry`: a `Chamfer` or a `Sinkhorn`, balanced or with ρ. ε and ρ are in the same units.
    - `rotations`: whether patterns turn.
    - `translations`: whether they move; if not they turn about the origin.
    - `reflections`: whether R may have determinant −1 too, as a mirror image.
    - `scale`: must be False; scale queries and patterns to one size beforehand.
    - `num_starts`: how many rotations to start from; 16 in the plane, 48 in space and 128 in higher
      dimensions if None, and twice as many with `reflections`. The time of the first comparison
      grows with it.

    For cues of which parts are missing take `Chamfer`, or a ρ. There are no bounds, so that
    `Certified` compares all patterns, and no theory of basins.

    **Raises:** `TypeError` for another geometry or other types; `ValueError` where neither
    `rotations` nor `translations` are free, for `reflections` without `rotations`, and for `scale`.
    """

    geometry: Chamfer | Sinkhorn
    rotations: bool = eqx.field(static=True)
    translations: bool = eqx.field(static=True)
    reflections: bool = eqx.field(static=True)
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
        if not isinstance(geometry, Chamfer | Sinkhorn):
            raise TypeError(
                f"geometry must be a jdam.Chamfer or a jdam.Sinkhorn, whose atoms can be posed; "
                f"got {geometry!r}"
            )
        flags = {"rotations": rotations, "translations": translations, "scale": scale}
        for name, flag in (flags | {"reflections": reflections}).items():
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be a bool; got {flag!r}")
        if scale:
            raise ValueError(
                "scale must be False: what a pattern costs itself changes with its scale; scale "
                "queries and patterns to one size beforehand"
            )
        if not (rotations or translations):
            raise ValueError("rotations or translations must be True; got False for both")
        if reflections and not rotations:
            raise ValueError("reflections must be False without rotations; got True")
        self.geometry, self.rotations, self.translations = geometry, rotations, translations
        self.reflections = reflections
        if num_starts is not None:
            num_starts = checks.positive_int("num_starts", num_starts)
        self.num_starts = num_starts

    def compare(self, view: AnyView, patterns: Patterns, *, exact: bool = True) -> Comparison:
        guess = self._aligned(view, patterns)
        found = self.geometry.compare(view, _posed(patterns, guess))
        return found._replace(guess=Guess(guess.pose, found.guess), pose=guess.pose)

    def plan(self, view: AnyView, patterns: Patterns) -> Float[Array, "B n m"]:
        """That of the wrapped geometry, of the patterns in the poses of their guess."""
        guess = self._aligned(view, patterns) if patterns.guess is None else patterns.guess
        return self.geometry.plan(view, _posed(patterns, guess))

    def first_guess(self, prepared: Any) -> Any:
        return Guess(prepared.unknown, self.geometry.first_guess(prepared.inner))

    def _aligned(self, view: AnyView, patterns: Patterns) -> Guess:
        """The best poses found, and what to start the comparison there from; as constants."""
        if patterns.guess is None:
            patterns = patterns._replace(guess=self.first_guess(patterns.prepared))
        fixed, view, patterns = jax.lax.stop_gradient((self, view, patterns))
        found: Guess = checkpoint_name(fixed._best(view, patterns), ITERATED)
        return found

    def _best(self, view: AnyView, patterns: Patterns) -> Guess:
        """By refinement of the last pose, or of each of the finalists of a search."""
        known = jnp.isfinite(patterns.guess.pose.scale)
        finalists = self._search(view, patterns, known)
        count = jnp.where(known.all(), 1, len(finalists.scale))

        def turn(best: Chosen) -> Chosen:
            finalist = jax.tree.map(lambda leaf: leaf[best.rank], finalists)
            start = choose_rows(known, patterns.guess.pose, finalist)
            pose = self._refined(view, patterns, start)
            found = self.geometry.compare(view, _posed(patterns, Guess(pose, patterns.guess.inner)))
            better = found.divergence < best.divergence
            return Chosen(
                best.rank + 1,
                jnp.where(better, found.divergence, best.divergence),
                choose_rows(better, Guess(pose, found.guess), best.guess),
            )

        start = Chosen(jnp.array(0, jnp.int32), jnp.full(known.shape, jnp.inf), patterns.guess)
        start = start._replace(divergence=start.divergence.astype(patterns.measures.dtype))
        end = while_loop(lambda best: best.rank < count, turn, start, view, patterns, self)
        return end.guess

    def _search(self, view: AnyView, patterns: Patterns, known: Bool[Array, " B"]) -> Pose:
        """The best poses (K, B) among those that start from the net, ε of one-sided plans falling
        from the size of the query; none is sought where all poses are known."""
        query, measures = _query(view), patterns.measures
        starts = self._starts(query, measures)
        least, size = self.geometry.epsilon, _variance(query)
        most = jnp.maximum(size / least, 1)

        def coarse(level: Array) -> Chamfer:
            exponent = 1 - (level + 1).astype(least.dtype) / LEVELS
            inner = self.geometry
            return Chamfer(least * most**exponent, rho=inner.rho, feature_scale=inner.feature_scale)

        def turn(state: tuple[Array, Pose]) -> tuple[Array, Pose]:
            level, poses = state
            step = partial(self._realigned, coarse(level), query, patterns)
            return level + 1, jax.vmap(step)(poses)

        first = jnp.where(known.all(), LEVELS, 0).astype(jnp.int32)
        _, poses = while_loop(
            lambda state: state[0] < LEVELS, turn, (first, starts), view, patterns, self
        )
        last = coarse(jnp.array(LEVELS - 1, jnp.int32))
        posed = jax.vmap(partial(_coarsely_posed, patterns))(poses)
        divergences = jax.vmap(partial(last.compare, query))(posed).divergence
        best = jnp.argsort(divergences, axis=0)[:FINALISTS]
        index = best, jnp.arange(best.shape[1])[None]
        finalists: Pose = jax.tree.map(lambda leaf: leaf[index], poses)
        return finalists

    def _refined(self, view: AnyView, patterns: Patterns, pose: Pose) -> Pose:
        """Poses after alternation until the atoms of patterns come to rest."""
        measures, inner = patterns.measures, patterns.guess.inner
        eps = float(jnp.finfo(measures.dtype).eps)
        farthest = jnp.abs(_query(view).mean).max() + jnp.abs(measures.mean).max(-1)
        tol = eps**0.7 * safe_sqrt(_variance(measures)) + 4 * eps * farthest

        def unfinished(state: Refined) -> Bool[Array, ""]:
            return (state.change > 1).any() & (state.turns < REFINEMENTS)

        def turn(state: Refined) -> Refined:
            posed = patterns._replace(guess=Guess(state.pose, inner))
            moved = self._realigned(self.geometry, view, posed, state.pose)
            steps = moved(measures).points - state.pose(measures).points
            squares = jnp.where(measures.weights > 0, jnp.vecdot(steps, steps), 0).max(-1)
            return Refined(moved, jnp.sqrt(squares) / tol, state.turns + 1)

        start = Refined(pose, jnp.full_like(tol, jnp.inf), jnp.array(0, jnp.int32))
        return while_loop(unfinished, turn, start, view, patterns, self).pose

    def _realigned(self, geometry: Geometry, view: AnyView, patterns: Patterns, pose: Pose) -> Pose:
        """The best poses for the plans between a query and patterns in their poses."""
        if isinstance(geometry, Chamfer):
            posed = _coarsely_posed(patterns, pose)
        else:
            posed = _posed(patterns, Guess(pose, patterns.guess.inner))
        align = partial(self._procrustes, _query(view))
        poses: Pose = jax.vmap(align)(patterns.measures, geometry.plan(view, posed), pose)
        return poses

    def _procrustes(
        self, query: PointCloud, cloud: PointCloud, plan: Float[Array, "n m"], pose: Pose
    ) -> Pose:
        """The best pose of a cloud for this plan; where that has no mass, the pose it has."""
        x = jnp.where(query.weights[:, None] > 0, query.points, 0)
        y = jnp.where(cloud.weights[:, None] > 0, cloud.points, 0)
        rows, columns, mass = plan.sum(1), plan.sum(0), plan.sum()
        some = mass > float(jnp.finfo(mass.dtype).tiny) ** 0.5
        total = jnp.where(some, mass, 1)
        from_, to = columns @ y / total, rows @ x / total
        if not self.translations:
            from_, to = jnp.zeros_like(from_), jnp.zeros_like(to)
        rotation = jnp.eye(cloud.dim, dtype=mass.dtype)
        if self.rotations:
            moment = (x - to[None]).T @ (plan @ (y - from_[None])) / total
            rotation = (polar if self.reflections else nearest_rotation)(moment)
        best = Pose(rotation, to - rotation @ from_, jnp.ones_like(mass))
        chosen: Pose = choose_rows(some, best, pose)
        return chosen

    def _starts(self, query: PointCloud, patterns: PointCloud) -> Pose:
        """The net of rotations (S, B), with the means laid on each other."""
        net = jnp.asarray(self._net(query.dim), query.dtype)
        many = len(net), len(patterns)
        rotations = jnp.broadcast_to(net[:, None], (*many, *net.shape[1:]))
        means = jnp.einsum("sij,bj->sbi", net, patterns.mean, precision="highest")
        shift = query.mean[None, None] - means
        return Pose(
            rotations,
            shift if self.translations else jnp.zeros_like(shift),
            jnp.ones(many, query.dtype),
        )

    def _net(self, dim: int) -> Float[np.ndarray, "S d d"]:
        if not self.rotations:
            return np.eye(dim)[None]
        net = rotations(self.num_starts or {2: 16, 3: 48}.get(dim, 128), dim)
        mirrored = net * np.where(np.arange(dim) == dim - 1, -1, 1)
        return np.concatenate([net, mirrored]) if self.reflections else net

    # Those of the wrapped geometry.

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
        """Fewer, since every start is compared."""
        pairs = len(self._net(patterns.dim)) * patterns.num_atoms**2
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
        usual = {"rotations": True, "translations": True, "reflections": False, "num_starts": None}
        shown = (
            f"{name}={getattr(self, name)}" for name in usual if getattr(self, name) != usual[name]
        )
        return f"Aligned({', '.join([repr(self.geometry), *shown])})"


def _posed(patterns: Patterns, guess: Guess) -> Patterns:
    """Patterns in their poses. What is prepared of them does not change but for their centres."""
    pose, prepared = guess.pose, patterns.prepared.inner
    moved = prepared._replace(centre=each(pose, prepared.centre))
    if hasattr(prepared, "offset"):
        turn = Pose(pose.rotation, jnp.zeros_like(pose.translation), pose.scale)
        moved = moved._replace(offset=each(turn, prepared.offset))
    return Patterns(pose(patterns.measures), moved, guess.inner)


def _coarsely_posed(patterns: Patterns, pose: Pose) -> Patterns:
    """The same for a `Chamfer` of another ε, up to a constant of its divergence."""
    centre = patterns.prepared.inner.centre
    prepared = chamfer.Prepared(each(pose, centre), jnp.zeros_like(centre[:, 0]))
    return Patterns(pose(patterns.measures), prepared)


def _query(view: AnyView) -> PointCloud:
    return view if isinstance(view, PointCloud) else view.query


def _variance(cloud: PointCloud) -> Float[Array, " *batch"]:
    """Σ aⱼ|xⱼ − mean|²."""
    steps = cloud.points - cloud.mean[..., None, :]
    squares = jnp.where(cloud.weights > 0, jnp.vecdot(steps, steps), 0)
    return jnp.vecdot(cloud.weights, squares)
