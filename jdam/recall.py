"""One step of recall, the loop, and its result."""

import enum
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jdam import _checks, _descent
from jdam._batching import compute_if, in_tiles
from jdam._compile import compiled, working_dtype
from jdam.adjoint import Unrolled
from jdam.energy import fit_query, gibbs_average, inverse_temperature, queries_at_once
from jdam.geometry.protocol import AnyMeasure
from jdam.memory import Memory
from jdam.search import Exhaustive


class Status(enum.IntEnum):
    """How a recall ended; int32 under jit. Of several that apply the last named counts."""

    CONVERGED = 0  #: a fixed point, and one pattern holds more than half of the Gibbs mass
    MIXTURE = 1  #: a fixed point between patterns: raise beta to recall one
    MAX_STEPS = 2  #: not yet a fixed point: raise max_steps, beta or tol
    SOLVER = 3  #: an inner solver missed its tolerance: raise its iterations or epsilon
    UNCERTIFIED = 4  #: the search cannot bound what it left out: raise its candidates
    NONFINITE = 5  #: NaN or infinity in query, memory or on the way; beta, step_size or tol ≤ 0


class Trace(eqx.Module):
    """What recall saw after each step; after convergence entries repeat the last."""

    energy: Float[Array, " T"]
    residual: Float[Array, " T"]
    measure: AnyMeasure  # (T, …)


class Recall(eqx.Module):
    """The result of `jdam.recall`. All numbers belong to `measure`, not to a step before it; in
    half precision to the measure before it was rounded, for the work is done in float32."""

    measure: AnyMeasure  #: what was recalled, of the query's type
    nearest: Int[Array, ""]  #: index of the heaviest pattern
    weight: Float[Array, ""]  #: its Gibbs weight
    energy: Float[Array, ""]  #: E(measure)
    residual: Float[Array, ""]  #: how far a full step would go, a distance (W₂ for `Bures`)
    num_steps: Int[Array, ""]  #: steps taken
    status: Int[Array, ""]  #: a `jdam.Status`
    neglected: Float[Array, ""]  #: bound on the Gibbs mass left out by the search, over all steps
    trace: Trace | None = None

    def __repr__(self) -> str:
        if not _checks.is_concrete(self.status):
            return super().__repr__()
        codes, counts = np.unique(np.asarray(self.status), return_counts=True)
        names = [Status(code).name for code in codes]
        if self.status.ndim == 0:
            return (
                f"Recall({names[0]} after {self.num_steps} steps: nearest={self.nearest}, "
                f"weight={self.weight:.4g}, energy={self.energy:.4g}, residual={self.residual:.1e})"
            )
        listed = ", ".join(f"{count} {name}" for name, count in zip(names, counts, strict=True))
        return f"Recall(batch of {self.status.shape}: {listed})"


def step(
    memory: Memory, query: AnyMeasure, beta: ArrayLike, step_size: ArrayLike = 1.0
) -> AnyMeasure:
    """One step of recall, ξ⁺ = Φ(ξ) for step size τ = 1.

    For Gaussians Φ(ξ) = (Σ wᵢ(ξ) Tᵢ)_# ξ, Tᵢ the optimal transport map from ξ to Xᵢ
    (the retrieval map of arXiv:2509.23162), and (1−τ)·id + τ·Σ wᵢTᵢ is pushed forward for
    other τ; for vectors x⁺ = x + τ(Σ wᵢyᵢ − x). The energy falls, for `Bures` and
    `Euclidean` by E(ξ) − E(Φ(ξ)) ≥ D(ξ, Φ(ξ)).

    **Arguments:** as in `energy`; the damping `step_size` τ > 0, descending for τ ≤ 1.

    **Returns:** a measure of the query's type; its factor has as many columns as the larger
    of the query's and the patterns'.

    **Raises:** as `energy`; `ValueError` for a step size that is not positive.
    """
    query = fit_query(memory, query)
    beta = inverse_temperature(memory, beta)
    return _step(memory, query, beta, _positive(memory, "step_size", step_size))


@compiled()
def _step(memory: Memory, query: AnyMeasure, beta: Array, step_size: Array) -> AnyMeasure:
    return in_tiles(_move, queries_at_once(memory), memory, query, beta, step_size)


def _move(memory: Memory, query: AnyMeasure, beta: Array, step_size: Array) -> AnyMeasure:
    geometry, found = memory.geometry, gibbs_average(memory, query, beta)
    moved = geometry.move(found.view, found.pull, step_size)
    if geometry.attempts == 1:
        return moved

    def descend(query: AnyMeasure, args: tuple) -> AnyMeasure:
        found, *rest = args
        walk = _descent.start(Exhaustive(), rest[0], query, rest[1])
        place = walk.place._replace(found=found)
        walk = walk._replace(place=place, looked=jnp.array(True))
        return _descent.go_on(Exhaustive(), walk, tuple(rest)).place.measure

    doubtful = ~geometry.surely_descends(found.view, found.pull, step_size, moved)
    return compute_if(doubtful, descend, moved, query, (found, memory, beta, step_size))


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
    search: Exhaustive = Exhaustive(),
    adjoint: Unrolled = Unrolled(),
    save_trace: bool = False,
) -> Recall:
    """Steps from the query until a fixed point: what the memory holds nearest to it.

    A fixed point ξ = Φ(ξ) is a barycentre of the patterns with its own Gibbs weights.
    Where β is large enough, β min Dᵢⱼ ≳ log N + 5, there is one by each pattern; where it is
    small, patterns share one, and the status says `MIXTURE`.

    **Arguments:** `memory`, `query`, `beta`, `step_size` as in `step`. `max_steps` ≥ 1.
    `tol`: stop when the residual, the distance W₂(ξ, Φ(ξ)), is at most this; if None,
    eps^0.7 (1e-5 in float32, 1e-11 in float64) times the root mean square size of the
    patterns, W₂(Xᵢ, δ₀). `search`: which patterns each step looks at. `adjoint`: how to
    differentiate. `save_trace`: keep energy, residual and measure after each step.
    Changing β, step size, tol or values of the same shape does not recompile.

    **Returns:** a `Recall`. `jax.vmap(jdam.recall, (None, 0, None))(memory, queries, beta)`
    recalls a batch; it ends when its last query does, and a query that fails says so in its
    own status without touching the others.

    **Raises:** as `step`, and for arguments that are not of these kinds.
    """
    query = fit_query(memory, query)
    beta = inverse_temperature(memory, beta)
    step_size = _positive(memory, "step_size", step_size)
    tol = default_tolerance(memory) if tol is None else _positive(memory, "tol", tol)
    max_steps = _checks.positive_int("max_steps", max_steps)
    for name, value, kind in (("search", search, Exhaustive), ("adjoint", adjoint, Unrolled)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a jdam.{kind.__name__}(); got {value!r}")
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
        save_trace=save_trace,
    )


@compiled()
def default_tolerance(memory: Memory) -> Float[Array, ""]:
    """eps^0.7 times the root mean square size of the patterns: a distance."""
    eps = float(jnp.finfo(memory.dtype).eps)
    return eps**0.7 * jax.lax.stop_gradient(memory.geometry.scale(memory.patterns))


class _State(NamedTuple):
    walk: _descent.Walk
    residual: Array
    num_steps: Array
    neglected: Array  # the worst so far
    unsolved: Array  # likewise


@compiled(static=("max_steps", "search", "adjoint", "save_trace"))
def _recall(
    memory: Memory,
    query: AnyMeasure,
    beta: Array,
    step_size: Array,
    tol: Array,
    *,
    max_steps: int,
    search: Exhaustive,
    adjoint: Unrolled,
    save_trace: bool,
) -> Recall:
    def advance(state: _State, args: tuple[Memory, Array, Array]) -> _State:
        walk = _descent.go_on(search, state.walk, args)
        found = walk.place.found
        return _State(
            walk=walk,
            residual=jax.lax.stop_gradient(args[0].geometry.residual(found.view, found.pull)),
            num_steps=state.num_steps + 1,
            neglected=jnp.maximum(state.neglected, walk.place.neglected),
            unsolved=jnp.maximum(state.unsolved, found.unsolved),
        )

    def pending(state: _State) -> Array:  # no step can mend NaN
        walk = state.walk
        unfinished = (state.residual > tol) & jnp.isfinite(walk.place.found.energy) & ~walk.ended
        return unfinished | ~walk.looked

    def observe(state: _State) -> Trace | None:
        place = state.walk.place
        return Trace(place.found.energy, state.residual, place.measure) if save_trace else None

    nothing = jnp.zeros((), memory.dtype)
    state = _State(
        walk=_descent.start(search, memory, query, beta),
        residual=jnp.full((), jnp.inf, memory.dtype),
        num_steps=jnp.array(-1, jnp.int32),
        neglected=nothing,
        unsolved=nothing,
    )
    end, trace = adjoint.loop(
        advance,
        pending,
        observe,
        state,
        (memory, beta, step_size),
        length=max_steps + 1,
        at_once=queries_at_once(memory),
    )
    measure, found, _ = end.walk.place
    finite = jnp.isfinite(found.energy) & jnp.isfinite(end.residual) & jnp.isfinite(tol)
    finite &= step_size > 0
    rounding = float(jnp.finfo(memory.dtype).eps) ** 0.5
    return Recall(
        measure=measure,
        nearest=found.nearest,
        weight=found.weight,
        energy=found.energy,
        residual=end.residual,
        num_steps=end.num_steps,
        status=_status(
            (found.weight <= 0.5 + rounding, Status.MIXTURE),
            ((end.residual > tol) & ~end.walk.ended, Status.MAX_STEPS),
            (end.unsolved > rounding, Status.SOLVER),
            (~finite, Status.NONFINITE),
        ),
        neglected=end.neglected,
        trace=jax.tree.map(lambda leaf: leaf[1:], trace),
    )


def _status(*findings: tuple[Array, Status]) -> Int[Array, ""]:
    """The last status whose finding is true; CONVERGED if none is."""
    status = jnp.array(Status.CONVERGED, jnp.int32)
    for found, code in findings:
        status = jnp.where(found, jnp.int32(code), status)
    return status
