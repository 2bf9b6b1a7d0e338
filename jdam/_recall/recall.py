"""The public functions `step`, `recall` and `recall_batch`: checks of arguments around the
solver.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jdam._core import checks
from jdam._core.batching import batch_size as length_of
from jdam._core.batching import map_in_batches, power_of_two
from jdam._core.compile import compiled, working_dtype
from jdam._core.mesh import on_local_shards
from jdam._core.progress import check_progress, in_parts, is_here, rows_from
from jdam._energy.certified import choose
from jdam._energy.energy import fit_queries, fit_query, inverse_temperature, positive_for
from jdam._energy.pairs import TILES
from jdam._energy.search import Exhaustive, Search
from jdam._energy.separation import LogSumExp, Separation
from jdam._energy.separation import check as check_separation
from jdam._measures.base import AnyMeasure
from jdam._memory.mapped import MappedMemory
from jdam._memory.memory import Memory
from jdam._recall.acceleration import Acceleration, Anderson, TrustRegion
from jdam._recall.adjoint import Adjoint, Unrolled
from jdam._recall.mapped import recall_from_file
from jdam._recall.result import Recall
from jdam._recall.solver import DEFAULT, Solver
from jdam.geometry.protocol import Geometry

#: Delay of the default acceleration: short recalls are then sequences of `step`.
PLAIN = 8


def step(
    memory: Memory,
    query: AnyMeasure,
    beta: ArrayLike,
    step_size: ArrayLike = 1.0,
    *,
    separation: Separation = LogSumExp(),
) -> AnyMeasure:
    """Return the measure after one step of recall: Φ(ξ) for step size τ = 1.

    For Gaussians Φ(ξ) = (Σ wᵢ(ξ) Tᵢ)_# ξ, where Tᵢ is the optimal transport map from ξ to Xᵢ (the
    retrieval map of arXiv:2509.23162); for other τ the map is (1−τ)·id + τ·Σ wᵢTᵢ. For vectors
    x⁺ = x + τ(Σ wᵢyᵢ − x). The energy falls, for `Bures` and `Euclidean` by
    E(ξ) − E(Φ(ξ)) ≥ D(ξ, Φ(ξ)).

    **Arguments:**

    - `memory`, `query`, `beta` as in `energy`.
    - `step_size` τ > 0: the length of the step; for τ ≤ 1 the energy does not rise.
    - `separation`: the shape of the energy. If it gives no pattern any weight, the query is
      returned.

    **Returns:** a measure of the query's type. The factor of a Gaussian has as many columns as the
    larger of the query's and the patterns'.

    **Raises:** as `energy`; `ValueError` for a step size that is not positive.
    """
    query = fit_query(memory, query)
    beta = inverse_temperature(memory, beta)
    step_size = positive_for(memory, "step_size", step_size)
    check_separation(separation)
    # Where full steps never raise the energy, the candidate is not evaluated.
    solver = Solver(Exhaustive(), separation, max_steps=min(memory.geometry.max_backtracks, 1))
    return _step(memory, query, beta, step_size, solver=solver)


def _batch_size(memory: Memory, *, solver: Solver, **_: Any) -> int | None:
    """Return None if the loop of the solver has a work queue, which has a batch size of its own."""
    return None if solver.max_steps else solver.search.query_batch_size(memory)


@compiled(static=("solver",), batch_size=_batch_size)
def _step(
    memory: Memory, query: AnyMeasure, beta: Array, step_size: Array, *, solver: Solver
) -> AnyMeasure:
    problem = solver.problem(memory, query, beta, step_size)
    if solver.max_steps:
        return Unrolled().run(solver, query, problem).measure
    evaluation = solver.evaluate(query, problem, solver.search.first_guess(memory))
    return solver.move(query, evaluation, problem)


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
    """Return the fixed point that steps from the query reach, with its status.

    A fixed point ξ = Φ(ξ) is a barycentre of the patterns with its own Gibbs weights.
    For large β, β min Dᵢⱼ ≳ log N + 5, there is one near each pattern; for small β several patterns
    share one, and the status is `MIXTURE`.

    **Arguments:**

    - `memory`, `query`, `beta`, `step_size` as in `step`.
    - `max_steps` ≥ 1; None for 50, 200 for `Sinkhorn` with ρ or another cost, 256 for `Chamfer`.
    - `tol` ≥ 0: the recall ends when the residual, the distance W₂(ξ, Φ(ξ)), is at most this; 0
      takes all `max_steps`. None for eps^0.7 (1e-5 in float32, 1e-11 in float64) times the root
      mean square norm of the patterns, W₂(Xᵢ, δ₀). For `Sinkhorn` None is √ε/2000, and a residual
      up to √ε/200 counts as converged if the recall stagnated. For `Chamfer` None is √ε/10⁴.
    - `search`: the patterns that each step compares: all of them, `Exhaustive()`, or few, with a
      proof that the others do not matter, `Certified()`. None uses `Certified` for 512 and more
      patterns on one device under `Bures` (full covariances), `MixtureWasserstein` or `Sinkhorn`
      (without ρ and another cost), else `Exhaustive`; the recall is that of `Exhaustive` up to 1e-8
      in every weight, and 1e-12 in float64.
    - `adjoint`: how to differentiate: `Unrolled()`, `Implicit()` or `OneStep()`.
    - `separation`: the shape of the energy.
    - `acceleration`: a proposal, tried before each plain one and taken if the energy does not
      rise. `Anderson(depth)` combines the last steps and costs no evaluation; `TrustRegion()` takes
      Newton steps, for `Sinkhorn`; None takes plain steps. "auto" is `Anderson(5)` after eight
      plain steps for `Sinkhorn`, and None for all other geometries. Fixed points are the same; a
      query between basins may end in another one, of no higher energy. `Anderson(3)` pays if there
      are many plain steps: Gaussians near the β at which patterns merge, and clouds whose atoms are
      to be placed exactly.
    - `save_trace`: whether to store energy, residual and measure after each step.

    Changes of β, step size, tol or values of the same shape do not recompile, nor do changes of
    `max_steps` up to the same power of two.

    **Returns:** a `Recall`. `jax.vmap(jdam.recall, (None, 0, None))(memory, queries, beta)` recalls
    a batch, which ends with its last query; the failure of a query appears in its own status and
    does not affect the others.

    **Raises:** as `step`, and for arguments that are not of these kinds; `ValueError` for the
    derivative of `TrustRegion()` steps by `Unrolled()`.
    """
    query = fit_query(memory, query)
    beta = inverse_temperature(memory, beta)
    step_size = positive_for(memory, "step_size", step_size)
    tol = check_tolerance(memory, tol)
    max_steps = memory.geometry.default_steps if max_steps is None else max_steps
    max_steps = checks.positive_int("max_steps", max_steps)
    check_separation(separation)
    search = choose(search, memory, separation)
    if not isinstance(adjoint, Adjoint):
        raise TypeError(f"adjoint must be one of jdam's, as jdam.Unrolled(); got {adjoint!r}")
    if not isinstance(save_trace, bool):
        raise TypeError(f"save_trace must be a bool; got {save_trace!r}")
    # One compiled program serves all numbers of steps up to a power of two.
    length = power_of_two(max_steps)
    acceleration = _checked_acceleration(memory, acceleration)
    solver = Solver(search, separation, length, acceleration, save_trace)
    limits = tol, jax.device_put(np.int32(max_steps))
    result: Recall = _recall(memory, query, beta, step_size, limits, solver=solver, adjoint=adjoint)
    if length == max_steps or not save_trace:
        return result
    trace = jax.tree.map(lambda leaf: leaf[:max_steps], result.trace)
    truncated: Recall = eqx.tree_at(lambda recalled: recalled.trace, result, trace)
    return truncated


def _checked_acceleration(memory: Memory, acceleration: Any) -> Acceleration | None:
    """Return the acceleration; for "auto" the default of the geometry."""
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
    memory: Memory | MappedMemory,
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
    """Return `recall` of a batch of queries (Q,), `batch_size` of them after one another.

    This is for batches whose state is too large for `jax.vmap`. Outside of `jax.jit` each program
    on the device computes one batch, or several short ones, and Ctrl-C stops the call between
    programs: with a smaller `batch_size` it stops sooner and the progress bar has more parts.

    From a memory in a file (`jdam.open`) the cells that a query needs are read, until it is proved
    that the others do not matter at the query and after any of its steps. (Attempts that were
    rejected saw the cells read so far.)

    **Arguments:**

    - `queries`: measures with one batch axis (Q,), which may be empty, or a list of single ones.
    - `batch_size` ≥ 1.
    - `progress`: True draws a progress bar of the parts, False none, and None one on a terminal
      after 2 seconds.
    - the others as in `recall`.

    **Returns:** a `Recall` whose leaves lead with (Q,).

    **Raises:** as `recall`; `TypeError` for a `progress` that is no bool.
    """
    settings: dict[str, Any] = {
        "max_steps": max_steps,
        "search": search,
        "adjoint": adjoint,
        "separation": separation,
        "acceleration": acceleration,
        "save_trace": save_trace,
    }
    if isinstance(memory, MappedMemory):
        settings |= {"step_size": step_size, "tol": tol, "progress": progress}
        return recall_from_file(
            memory, queries, beta, recall_batch, batch_size=batch_size, **settings
        )
    queries = fit_queries(memory, queries)
    beta = inverse_temperature(memory, beta)
    step_size = positive_for(memory, "step_size", step_size)
    tol = None if tol is None else check_tolerance(memory, tol)
    batch_size = checks.positive_int("batch_size", batch_size)
    progress = check_progress(progress)
    args = (memory, queries, beta, step_size, tol)
    static = {"batch_size": batch_size, "settings": tuple(settings.items())}
    num, at_once = length_of(queries), _recall_batch_size(memory, batch_size)
    result: Recall
    if num == 0 or memory.layout is not None or not is_here(args):
        result = _recall_batch(*args, **static)
        return result

    def part(start: Any, *, widths: tuple[int]) -> Recall:
        rows = rows_from(queries, start, width=widths[0])
        results: Recall = _recall_batch(memory, rows, beta, step_size, tol, **static)
        return results

    result = in_parts(part, (num,), (at_once,), "recall_batch", progress)
    return result


def _recall_batch_size(memory: Memory, batch_size: int) -> int:
    """Return the number of queries of one program on the device: a batch, or several short ones.
    Fewer than a batch would take longer, because queries of many steps would leave the device idle.
    """
    queries, patterns, _ = memory.geometry.batch_sizes(memory.patterns)
    num = TILES * queries * patterns // memory.capacity
    return max(batch_size, num - num % batch_size)


@partial(jax.jit, static_argnames=("batch_size", "settings"))
def _recall_batch(
    memory: Memory,
    queries: AnyMeasure,
    beta: Array,
    step_size: Array,
    tol: Array | None,
    *,
    batch_size: int,
    settings: tuple[tuple[str, Any], ...],
) -> Recall:
    def on_one_device(memory: Memory, queries: AnyMeasure, *others: Any) -> Recall:
        beta, step_size, tol = others

        def one(query: AnyMeasure) -> Recall:
            return recall(memory, query, beta, step_size=step_size, tol=tol, **dict(settings))

        # With `checkpoint` derivatives are computed one batch at a time too.
        results: Recall = map_in_batches(jax.checkpoint(one), batch_size, queries)
        return results

    args = (memory, queries, beta, step_size, tol)
    batched = tuple(jax.tree.map(lambda _, mark=arg is queries: mark, arg) for arg in args)
    result: Recall = on_local_shards(on_one_device, batched, args)
    return result


def check_tolerance(memory: Memory, tol: Any) -> Float[Array, ""]:
    """Return `tol` as a checked scalar ≥ 0; for None `DEFAULT`."""
    if tol is None:
        number = np.asarray(DEFAULT, working_dtype(memory.dtype))
        default: Array = jax.device_put(number)  # `jnp` would compile
        return default
    return positive_for(memory, "tol", tol, or_zero=True)


@compiled(static=("solver", "adjoint"), batch_size=_batch_size)
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
    tol, max_steps = limits
    problem = solver.problem(memory, query, beta, step_size, tol=tol, max_steps=max_steps)
    return solver.report(adjoint.run(solver, query, problem), problem)
