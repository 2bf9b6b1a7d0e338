"""One step of recall, and the loop."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jdam import _checks, _descent
from jdam._batching import compute_if, in_tiles, map_in_chunks
from jdam._compile import compiled, working_dtype
from jdam._result import Recall, Trace, report
from jdam.adjoint import Adjoint, Loop, Unrolled
from jdam.energy import fit_query, inverse_temperature, queries_at_once
from jdam.geometry.protocol import AnyMeasure, Geometry, any_of
from jdam.memory import Memory
from jdam.search import Exhaustive, Search
from jdam.separation import LogSumExp, Separation
from jdam.separation import check as check_separation


def step(
    memory: Memory,
    query: AnyMeasure,
    beta: ArrayLike,
    step_size: ArrayLike = 1.0,
    *,
    separation: Separation = LogSumExp(),
) -> AnyMeasure:
    """One step of recall, ξ⁺ = Φ(ξ) for step size τ = 1.

    For Gaussians Φ(ξ) = (Σ wᵢ(ξ) Tᵢ)_# ξ, Tᵢ the optimal transport map from ξ to Xᵢ
    (the retrieval map of arXiv:2509.23162), and (1−τ)·id + τ·Σ wᵢTᵢ is pushed forward for
    other τ; for vectors x⁺ = x + τ(Σ wᵢyᵢ − x). The energy falls, for `Bures` and
    `Euclidean` by E(ξ) − E(Φ(ξ)) ≥ D(ξ, Φ(ξ)).

    **Arguments:** as in `energy`; the damping `step_size` τ > 0, descending for τ ≤ 1. Where a
    `separation` gives no pattern any weight, the step stays where it is.

    **Returns:** a measure of the query's type; its factor has as many columns as the larger
    of the query's and the patterns'.

    **Raises:** as `energy`; `ValueError` for a step size that is not positive.
    """
    query = fit_query(memory, query)
    beta = inverse_temperature(memory, beta)
    step_size = _positive(memory, "step_size", step_size)
    check_separation(separation)
    return _step(memory, query, beta, step_size, separation=separation)


@compiled(static=("separation",))
def _step(
    memory: Memory, query: AnyMeasure, beta: Array, step_size: Array, *, separation: Separation
) -> AnyMeasure:
    search = Exhaustive()
    move = partial(_move, partial(search.look, separation=separation))
    resolution = _resolution(memory, beta, search)
    return in_tiles(move, queries_at_once(memory), memory, query, beta, step_size, resolution)


def _move(
    look: _descent.Look,
    memory: Memory,
    query: AnyMeasure,
    beta: Array,
    step_size: Array,
    resolution: Array,
) -> AnyMeasure:
    geometry, (found, neglected) = memory.geometry, look(memory, query, beta)
    moved = _descent.move(memory, query, found, step_size)
    if geometry.attempts == 1:
        return moved

    def descend(query: AnyMeasure, args: tuple) -> AnyMeasure:
        found, neglected, *rest = args
        walk = _descent.start(look, rest[0], query, rest[1])
        place = _descent.Place(query, found, neglected)
        walk = walk._replace(place=place, looked=jnp.array(True))
        return _descent.go_on(look, walk, tuple(rest)).place.measure

    doubtful = ~geometry.surely_descends(found.view, found.pull, step_size, moved)
    args = (found, neglected, memory, beta, step_size, resolution)
    return compute_if(doubtful & (found.weight != 0), descend, moved, query, args)


def _positive(memory: Memory, name: str, value: Any) -> Float[Array, ""]:
    return _checks.positive(name, value, working_dtype(memory.dtype))


def recall(
    memory: Memory,
    query: AnyMeasure,
    beta: ArrayLike,
    *,
    max_steps: int = 50,
    step_size: ArrayLike = 1.0,
    tol: ArrayLike | None = None,
    search: Search = Exhaustive(),
    adjoint: Adjoint = Unrolled(),
    separation: Separation = LogSumExp(),
    save_trace: bool = False,
) -> Recall:
    """Steps from the query until a fixed point: what the memory holds nearest to it.

    A fixed point ξ = Φ(ξ) is a barycentre of the patterns with its own Gibbs weights.
    Where β is large enough, β min Dᵢⱼ ≳ log N + 5, there is one by each pattern; where it is
    small, patterns share one, and the status says `MIXTURE`.

    **Arguments:** `memory`, `query`, `beta`, `step_size` as in `step`. `max_steps` ≥ 1.
    `tol` ≥ 0: stop when the residual, the distance W₂(ξ, Φ(ξ)), is at most this; 0 takes all
    `max_steps`; if None,
    eps^0.7 (1e-5 in float32, 1e-11 in float64) times the root mean square size of the
    patterns, W₂(Xᵢ, δ₀). `search`: which patterns each step looks at, all of them or
    `Certified()`, for large memories. `adjoint`: how to
    differentiate: `Unrolled()`, `Implicit()` or `OneStep()`. `separation`: the shape of the
    energy. `save_trace`: keep energy, residual and measure after each step.
    Changing β, step size, tol or values of the same shape does not recompile.

    **Returns:** a `Recall`. `jax.vmap(jdam.recall, (None, 0, None))(memory, queries, beta)`
    recalls a batch; it ends when its last query does, and a query that fails says so in its
    own status without touching the others.

    **Raises:** as `step`, and for arguments that are not of these kinds.
    """
    query = fit_query(memory, query)
    beta = inverse_temperature(memory, beta)
    step_size = _positive(memory, "step_size", step_size)
    tol = None if tol is None else check_tolerance(memory, tol)
    max_steps = _checks.positive_int("max_steps", max_steps)
    for name, value, kind in (("search", search, Search), ("adjoint", adjoint, Adjoint)):
        if not isinstance(value, kind):
            example = "Unrolled" if kind is Adjoint else "Exhaustive"
            raise TypeError(f"{name} must be one of jdam's, as jdam.{example}(); got {value!r}")
    check_separation(separation)
    if not isinstance(save_trace, bool):
        raise TypeError(f"save_trace must be a bool; got {save_trace!r}")
    return _recall(
        memory,
        query,
        beta,
        step_size,
        tol,
        max_steps=max_steps,
        search=search,
        adjoint=adjoint,
        separation=separation,
        save_trace=save_trace,
    )


def recall_batch(
    memory: Memory,
    queries: AnyMeasure,
    beta: ArrayLike,
    *,
    batch_size: int = 256,
    max_steps: int = 50,
    step_size: ArrayLike = 1.0,
    tol: ArrayLike | None = None,
    search: Search = Exhaustive(),
    adjoint: Adjoint = Unrolled(),
    separation: Separation = LogSumExp(),
    save_trace: bool = False,
) -> Recall:
    """`recall` of a batch of queries (Q,), `batch_size` of them after one another: for more than
    `jax.vmap` could hold the state of.

    **Arguments:** as of `recall`; `queries` with one batch axis, which may be empty; `batch_size`
    ≥ 1.

    **Returns:** a `Recall` whose leaves lead with (Q,).

    **Raises:** as `recall`.
    """
    queries = memory.geometry.check("queries", queries, 1)
    fit_query(memory, any_of(queries))
    beta = inverse_temperature(memory, beta)
    step_size = _positive(memory, "step_size", step_size)
    tol = default_tolerance(memory) if tol is None else check_tolerance(memory, tol)
    batch_size = _checks.positive_int("batch_size", batch_size)
    settings = (
        ("max_steps", max_steps),
        ("search", search),
        ("adjoint", adjoint),
        ("separation", separation),
        ("save_trace", save_trace),
    )
    return _recall_batch(memory, queries, beta, step_size, tol, batch_size, settings)


@partial(jax.jit, static_argnames=("batch_size", "settings"))
def _recall_batch(
    memory: Memory,
    queries: AnyMeasure,
    beta: Array,
    step_size: Array,
    tol: Array,
    batch_size: int,
    settings: tuple[tuple[str, Any], ...],
) -> Recall:
    def one(query: AnyMeasure) -> Recall:
        return recall(memory, query, beta, step_size=step_size, tol=tol, **dict(settings))

    # Differentiated, one batch at a time too.
    return map_in_chunks(jax.checkpoint(one), batch_size, queries)


def check_tolerance(memory: Memory, tol: Any) -> Float[Array, ""]:
    """`tol` as a checked scalar ≥ 0."""
    return _checks.nonnegative_scalar("tol", tol, working_dtype(memory.dtype))


def default_tolerance(memory: Memory) -> Float[Array, ""]:
    """eps^0.7 times the root mean square size of the patterns: a distance."""
    eps = float(jnp.finfo(working_dtype(memory.dtype)).eps)
    return eps**0.7 * jax.lax.stop_gradient(units(memory)[0])


def units(memory: Memory) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`Geometry.scale` and `Geometry.resolution` of its patterns."""
    if memory.units is not None:
        return memory.units
    return _units_of(memory.patterns, memory.geometry)


@compiled(rounded=False)
def _units_of(
    patterns: AnyMeasure, geometry: Geometry
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    return geometry.scale(patterns), geometry.resolution(patterns)


def _resolution(memory: Memory, beta: Array, search: Search) -> Float[Array, ""]:
    """The smallest change of energy that says anything: by rounding, or by mass left out."""
    return jax.lax.stop_gradient(jnp.maximum(units(memory)[1], search.tolerance / beta))


class _State(NamedTuple):
    walk: _descent.Walk
    residual: Array
    stalled: Array  # neither energy nor residual falls any more
    num_steps: Array
    neglected: Array  # the worst so far
    unsolved: Array  # likewise


@compiled(static=("max_steps", "search", "adjoint", "separation", "save_trace"))
def _recall(
    memory: Memory,
    query: AnyMeasure,
    beta: Array,
    step_size: Array,
    tol: Array | None,
    *,
    max_steps: int,
    search: Search,
    adjoint: Adjoint,
    separation: Separation,
    save_trace: bool,
) -> Recall:
    tol = default_tolerance(memory) if tol is None else tol
    run = partial(
        _run,
        max_steps=max_steps,
        search=search,
        adjoint=adjoint,
        separation=separation,
        save_trace=save_trace,
    )
    return in_tiles(run, None, memory, query, beta, step_size, tol)


def _run(
    memory: Memory,
    query: AnyMeasure,
    beta: Array,
    step_size: Array,
    tol: Array,
    *,
    max_steps: int,
    search: Search,
    adjoint: Adjoint,
    separation: Separation,
    save_trace: bool,
) -> Recall:
    look = partial(search.look, separation=separation)
    resolution = _resolution(memory, beta, search)

    def advance(state: _State, args: tuple) -> _State:
        memory, beta, step_size, _, resolution = args
        walk = _descent.go_on(look, state.walk, (memory, beta, step_size, resolution))
        found = walk.place.found
        residual = memory.geometry.residual(found.view, found.pull)
        residual = jax.lax.stop_gradient(jnp.where(found.weight == 0, 0, residual))
        return _State(
            walk=walk,
            residual=residual,
            stalled=walk.ended & (residual >= state.residual),
            num_steps=state.num_steps + 1,
            neglected=jnp.maximum(state.neglected, walk.place.neglected),
            unsolved=jnp.maximum(state.unsolved, found.unsolved),
        )

    def settle(state: _State, measure: AnyMeasure, args: tuple) -> _State:
        memory, beta, *_ = args
        place = _descent.Place(measure, *look(memory, measure, beta, state.walk.place.found.guess))
        return state._replace(walk=state.walk._replace(place=place))

    def plain_step(measure: AnyMeasure, args: tuple) -> AnyMeasure:
        memory, beta, step_size, *_ = args
        return _descent.move(memory, measure, look(memory, measure, beta)[0], step_size)

    def pending(state: _State, args: tuple) -> Array:  # no step can mend NaN
        walk, tol = state.walk, args[3]
        unfinished = (state.residual > tol) & ~state.stalled | (tol == 0)
        return unfinished & jnp.isfinite(walk.place.found.energy) | ~walk.looked

    def observe(state: _State) -> Trace | None:
        place = state.walk.place
        return Trace(place.found.energy, state.residual, place.measure) if save_trace else None

    nothing = jnp.zeros((), memory.dtype)
    state = _State(
        walk=_descent.start(look, memory, query, beta),
        residual=jnp.full((), jnp.inf, memory.dtype),
        stalled=jnp.array(False),
        num_steps=jnp.array(-1, jnp.int32),
        neglected=nothing,
        unsolved=nothing,
    )
    loop = Loop(
        advance,
        pending,
        observe,
        measure=lambda state: state.walk.place.measure,
        settle=settle,
        step=plain_step,
        conserved=lambda measure, args, tangent: args[0].geometry.conserved(measure, tangent),
        length=max_steps + 1,
        at_once=search.queries_at_once(memory),
    )
    end, trace = adjoint.run(loop, state, (memory, beta, step_size, tol, resolution))
    return report(
        end.walk.place,
        residual=end.residual,
        tol=tol,
        num_steps=end.num_steps,
        stalled=end.stalled,
        unsolved=end.unsolved,
        neglected=end.neglected,
        certified=end.neglected <= search.tolerance,
        valid=jnp.isfinite(tol) & (step_size > 0) & ~jnp.isnan(end.neglected),
        trace=jax.tree.map(lambda leaf: leaf[1:], trace),
    )
