"""What is asked of a memory: one step of recall, a recall, a batch of them."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jdam._core import checks
from jdam._core.batching import batch_size as length_of
from jdam._core.batching import in_batches, map_in_batches
from jdam._core.compile import compiled, working_dtype
from jdam._core.mesh import on_local_shards
from jdam._core.progress import check_progress, in_parts, is_here, rows_from
from jdam._energy.certified import choose
from jdam._energy.energy import fit_queries, fit_query, inverse_temperature
from jdam._energy.pairs import TILES
from jdam._energy.search import Exhaustive, Search
from jdam._energy.separation import LogSumExp, Separation
from jdam._energy.separation import check as check_separation
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory
from jdam._recall.acceleration import Acceleration, Anderson, TrustRegion
from jdam._recall.adjoint import Adjoint, Unrolled
from jdam._recall.result import Recall
from jdam._recall.solver import Solver
from jdam.geometry.protocol import Geometry

#: How many plain steps come first where acceleration is chosen: short recalls are steps repeated.
PLAIN = 8
#: Stands for the tolerances of the geometry, in the same program as any number.
DEFAULT = -1.0


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
    # Where it is proved that full steps never raise the energy, there is nothing to check.
    attempts = 1 if memory.geometry.max_backtracks else 0
    solver = Solver(Exhaustive(), separation, attempts)
    return _step(memory, query, beta, step_size, solver=solver)


@compiled(static=("solver",))
def _step(
    memory: Memory, query: AnyMeasure, beta: Array, step_size: Array, *, solver: Solver
) -> AnyMeasure:
    def run(memory: Memory, query: AnyMeasure, beta: Array, step_size: Array) -> AnyMeasure:
        end = solver.run(query, solver.problem(memory, beta, step_size))
        return end.measure if solver.max_steps else end.candidate

    return in_batches(run, None, memory, query, beta, step_size)  # a spread batch, where it is


def _positive(memory: Memory, name: str, value: Any) -> Float[Array, ""]:
    return checks.positive(name, value, working_dtype(memory.dtype))


def recall(
    memory: Memory,
    query: AnyMeasure,
    beta: ArrayLike,
    *,
    max_steps: int | None = None,
    step_size: ArrayLike = 1.0,
    tol: ArrayLike | None = None,
    search: Search | None = None,
    adjoint: Adjoint = Unrolled(),
    separation: Separation = LogSumExp(),
    acceleration: Acceleration | str | None = "auto",
    save_trace: bool = False,
) -> Recall:
    """Steps from the query until a fixed point: what the memory holds nearest to it.

    A fixed point ξ = Φ(ξ) is a barycentre of the patterns with its own Gibbs weights.
    Where β is large enough, β min Dᵢⱼ ≳ log N + 5, there is one by each pattern; where it is
    small, patterns share one, and the status says `MIXTURE`.

    **Arguments:**

    - `memory`, `query`, `beta`, `step_size` as in `step`.
    - `max_steps` ≥ 1; if None 50, 150 for `Sinkhorn` with ρ and 256 for `Chamfer`.
    - `tol` ≥ 0: stop when the residual, the distance W₂(ξ, Φ(ξ)), is at most this; 0 takes all
      `max_steps`. If None, eps^0.7 (1e-5 in float32, 1e-11 in float64) times the root mean square
      size of the patterns, W₂(Xᵢ, δ₀). For point clouds, if None, √ε/2000; a residual up to √ε/200
      (√ε/1000 with ρ) counts as converged where the energy no longer falls. For `Chamfer` √ε/10⁴.
    - `search`: which patterns each step compares: all of them, `Exhaustive()`, or few, with a proof
      that the others do not matter, `Certified()`. None chooses: of 512 and more full Gaussians,
      mixtures or point clouds (without ρ) few where that is soon proved, else all; the recall is
      that of `Exhaustive` up to 1e-8 in every weight, and 1e-12 in float64.
    - `adjoint`: how to differentiate: `Unrolled()`, `Implicit()` or `OneStep()`.
    - `separation`: the shape of the energy.
    - `acceleration`: what is tried before each plain step, and taken where the energy does not
      rise: `Anderson(depth)` combines the last steps, which costs nothing; `TrustRegion()` takes
      Newton steps, for `Sinkhorn`; None nothing. "auto" is None, and for `Sinkhorn` without ρ
      `Anderson(5)` after eight plain steps. Fixed points are the same. Where basins meet a query
      may end in another, of no higher energy. `Anderson(3)` is good where plain steps are many:
      Gaussians near the β at which patterns merge, and clouds whose atoms are to be placed exactly.
    - `save_trace`: keep energy, residual and measure after each step.

    Changing β, step size, tol or values of the same shape does not recompile, nor does `max_steps`
    up to the same power of two.

    **Returns:** a `Recall`. `jax.vmap(jdam.recall, (None, 0, None))(memory, queries, beta)`
    recalls a batch; it ends when its last query does, and a query that fails says so in its
    own status without touching the others.

    **Raises:** as `step`, and for arguments that are not of these kinds; `ValueError` for the
    derivative of `TrustRegion()` steps by `Unrolled()`.
    """
    query = fit_query(memory, query)
    beta = inverse_temperature(memory, beta)
    step_size = _positive(memory, "step_size", step_size)
    tol = check_tolerance(memory, tol)
    return _recall_checked(
        memory,
        query,
        beta,
        step_size,
        tol,
        max_steps=max_steps,
        search=search,
        adjoint=adjoint,
        separation=separation,
        acceleration=acceleration,
        save_trace=save_trace,
    )


def _recall_checked(
    memory: Memory,
    query: AnyMeasure,
    beta: Array,
    step_size: Array,
    tol: Array,
    *,
    max_steps: int | None,
    search: Search | None,
    adjoint: Adjoint,
    separation: Separation,
    acceleration: Acceleration | str | None,
    save_trace: bool,
) -> Recall:
    max_steps = memory.geometry.default_steps if max_steps is None else max_steps
    max_steps = checks.positive_int("max_steps", max_steps)
    check_separation(separation)
    search = choose(search, memory, separation)
    for name, value, kind in (("search", search, Search), ("adjoint", adjoint, Adjoint)):
        if not isinstance(value, kind):
            example = "Unrolled" if kind is Adjoint else "Exhaustive"
            raise TypeError(f"{name} must be one of jdam's, as jdam.{example}(); got {value!r}")
    if not isinstance(save_trace, bool):
        raise TypeError(f"save_trace must be a bool; got {save_trace!r}")
    # One program for all numbers of steps up to a power of two.
    length = 1 << (max_steps - 1).bit_length()
    acceleration = _accelerated(memory, acceleration)
    solver = Solver(search, separation, length, acceleration, save_trace)
    limits = tol, jax.device_put(np.int32(max_steps))
    found: Recall = _recall(memory, query, beta, step_size, limits, solver=solver, adjoint=adjoint)
    if length == max_steps or not save_trace:
        return found
    trace = jax.tree.map(lambda leaf: leaf[:max_steps], found.trace)
    shorter: Recall = eqx.tree_at(lambda recalled: recalled.trace, found, trace)
    return shorter


def _accelerated(memory: Memory, acceleration: Any) -> Acceleration | None:
    """The acceleration asked for, or the geometry's own."""
    if isinstance(acceleration, str) and acceleration == "auto":
        depth = memory.geometry.default_acceleration
        return Anderson(depth, delay=PLAIN) if depth else None
    if acceleration is not None and not isinstance(acceleration, Acceleration):
        raise TypeError(
            "acceleration must be jdam.Anderson(), jdam.TrustRegion(), None or 'auto'; "
            f"got {acceleration!r}"
        )
    has_retraction = type(memory.geometry).retraction is not Geometry.retraction
    if isinstance(acceleration, TrustRegion) and not has_retraction:
        raise ValueError(
            "acceleration=jdam.TrustRegion() needs a geometry with a retraction, as Sinkhorn; got "
            f"{memory.geometry}: jdam.Anderson() suits all"
        )
    return acceleration


def recall_batch(
    memory: Memory,
    queries: AnyMeasure,
    beta: ArrayLike,
    *,
    batch_size: int = 256,
    max_steps: int | None = None,
    step_size: ArrayLike = 1.0,
    tol: ArrayLike | None = None,
    search: Search | None = None,
    adjoint: Adjoint = Unrolled(),
    separation: Separation = LogSumExp(),
    acceleration: Acceleration | str | None = "auto",
    save_trace: bool = False,
    progress: bool | None = None,
) -> Recall:
    """`recall` of a batch of queries (Q,), `batch_size` of them after one another: for more than
    `jax.vmap` could hold the state of.

    Outside of `jax.jit` the device is asked for one batch after another, or for several that are
    quick, and Ctrl-C stops the call as soon as it comes. The batch that the device works at it
    still ends: a smaller `batch_size` shows progress more often, and is sooner over.

    **Arguments:** as of `recall`; `queries` with one batch axis, which may be empty; `batch_size`
    ≥ 1; `progress`: True draws a progress bar of the parts, False none, and None one on a terminal
    after 2 seconds.

    **Returns:** a `Recall` whose leaves lead with (Q,).

    **Raises:** as `recall`; `TypeError` for a `progress` that is no bool.
    """
    queries = fit_queries(memory, queries)
    beta = inverse_temperature(memory, beta)
    step_size = _positive(memory, "step_size", step_size)
    tol = check_tolerance(memory, tol)
    batch_size = checks.positive_int("batch_size", batch_size)
    progress = check_progress(progress)
    settings = (
        ("max_steps", max_steps),
        ("search", search),
        ("adjoint", adjoint),
        ("separation", separation),
        ("acceleration", acceleration),
        ("save_trace", save_trace),
    )
    args = (memory, queries, beta, step_size, tol)
    static = {"batch_size": batch_size, "settings": settings}
    num, at_once = length_of(queries), _recall_batch_size(memory, batch_size)
    result: Recall
    if num == 0 or memory.layout is not None or not is_here(args):
        result = _recall_batch(*args, **static)
        return result

    def part(start: Any, *, widths: tuple[int]) -> Recall:
        some = rows_from(queries, start, width=widths[0])
        found: Recall = _recall_batch(memory, some, beta, step_size, tol, **static)
        return found

    result = in_parts(part, (num,), (at_once,), "recall_batch", progress)
    return result


def _recall_batch_size(memory: Memory, batch_size: int) -> int:
    """How many queries to ask a device for at a time: a batch, or several that are quick. Less than
    a batch would take longer, as queries of many steps would keep too few others busy."""
    queries, patterns, _ = memory.geometry.batch_sizes(memory.patterns)
    num = TILES * queries * patterns // memory.capacity
    return max(batch_size, num - num % batch_size)


@partial(jax.jit, static_argnames=("batch_size", "settings"))
def _recall_batch(
    memory: Memory,
    queries: AnyMeasure,
    beta: Array,
    step_size: Array,
    tol: Array,
    *,
    batch_size: int,
    settings: tuple[tuple[str, Any], ...],
) -> Recall:
    def on_one_device(memory: Memory, queries: AnyMeasure, *others: Array) -> Recall:
        beta, step_size, tol = others

        def one(query: AnyMeasure) -> Recall:
            return _recall_checked(memory, query, beta, step_size, tol, **dict(settings))

        # Differentiated, one batch at a time too.
        found: Recall = map_in_batches(jax.checkpoint(one), batch_size, queries)
        return found

    args = (memory, queries, beta, step_size, tol)
    batched = tuple(jax.tree.map(lambda _, mark=arg is queries: mark, arg) for arg in args)
    result: Recall = on_local_shards(on_one_device, batched, args)
    return result


def check_tolerance(memory: Memory, tol: Any) -> Float[Array, ""]:
    """`tol` as a checked scalar ≥ 0, or `DEFAULT`."""
    dtype = working_dtype(memory.dtype)
    if tol is None:
        default: Array = jax.device_put(np.asarray(DEFAULT, dtype))  # which compiles nothing
        return default
    return checks.nonnegative_scalar("tol", tol, dtype)


def tolerances(memory: Memory, query: AnyMeasure, tol: Array) -> tuple[Array, Array]:
    """The residual that is small enough and the one at which to stop: both `tol`, or those of the
    geometry."""
    scale, _ = memory.magnitudes()
    defaults = jax.lax.stop_gradient(memory.geometry.tolerances(query, scale))
    enough, sought = (jnp.where(tol == DEFAULT, default, tol) for default in defaults)
    return enough, sought


@compiled(static=("solver", "adjoint"))
def _recall(
    memory: Memory,
    query: AnyMeasure,
    beta: Array,
    step_size: Array,
    limits: tuple[Array, Array],
    *,
    solver: Solver,
    adjoint: Adjoint,
) -> Recall:
    def run(memory: Memory, query: AnyMeasure, *others: Any) -> Recall:
        beta, step_size, (tol, max_steps) = others
        tol, goal = tolerances(memory, query, tol)
        problem = solver.problem(memory, beta, step_size)
        problem = problem._replace(tol=tol, goal=goal, max_steps=max_steps)
        return solver.report(adjoint.run(solver, query, problem), problem)

    return in_batches(run, None, memory, query, beta, step_size, limits)
