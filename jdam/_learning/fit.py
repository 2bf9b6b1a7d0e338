"""Learning with optax: a memory from queries and targets, and a measure down the energy."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float
from tqdm import trange

from jdam._core import checks
from jdam._core.batching import batch_size as length_of
from jdam._core.compile import compiled, working_dtype
from jdam._core.loops import scan
from jdam._energy.energy import divergences, energy, fit_query, inverse_temperature
from jdam._energy.search import Exhaustive
from jdam._energy.separation import LogSumExp, Separation
from jdam._energy.separation import check as check_separation
from jdam._learning.parametrize import (
    BETA,
    PATTERNS,
    PRIOR,
    Rebuild,
    but_beta,
    check_learn,
    parametrize,
)
from jdam._measures.base import AnyMeasure, constrained, unconstrained
from jdam._memory.memory import Memory, store
from jdam._recall.recall import check_tolerance, recall, tolerances
from jdam._recall.result import Recall
from jdam._recall.solver import Solver

#: (memory, β, query, target) ↦ how wrong the memory is about one query.
Loss: TypeAlias = Callable[[Memory, Array, Any, Any], Float[Array, ""]]

LEARNABLE = (PATTERNS, BETA, PRIOR)


def recall_error(
    memory: Memory, beta: Array, query: AnyMeasure, target: AnyMeasure
) -> Float[Array, ""]:
    """D(Φ(ξ), Y): how far one step of recall from the query ends from the target, a squared
    distance."""
    recalled = recall(memory, query, beta, max_steps=1).measure
    wanted = store(jax.tree.map(lambda leaf: leaf[None], target), memory.geometry)
    return divergences(wanted, recalled)[0]


class FitState(eqx.Module):
    """Where a fit has come to: `memory` and `beta` are what has been learned."""

    memory: Memory
    beta: Float[Array, ""]
    #: What is learned, in coordinates without constraints and at least in float32: the optimizer's
    #: steps and squares of slopes would vanish in halves.
    free: dict[str, Any]
    optimizer_state: Any


@dataclass(frozen=True)
class Learner:
    """How to learn a memory: pure functions `init` and `update`, as those of optax.

    **Arguments:** an optax `optimizer`; `loss(memory, beta, query, target)` of one query and its
    target, any pytree, `jdam.recall_error` if not given; `learn`, some of "beta", whose logarithm
    the optimizer moves, and of what `jdam.parametrize` knows: "patterns", "prior", and parameters
    of the geometry, as "epsilon". Measures remain measures; atoms of weight 0 and patterns that
    the prior switches off stay so.
    """

    optimizer: optax.GradientTransformation
    loss: Loss = recall_error
    learn: tuple[str, ...] = LEARNABLE

    def __post_init__(self) -> None:
        check_learn(self.learn)

    def init(self, memory: Memory, beta: ArrayLike) -> FitState:
        """The state before the first update."""
        beta = inverse_temperature(memory, beta).astype(memory.dtype)
        free = {BETA: jnp.log(beta).astype(working_dtype(memory.dtype))}
        free = {} if BETA not in self.learn else free
        if named := but_beta(self.learn):
            free |= parametrize(memory, named)[0]
        return FitState(memory, beta, free, self.optimizer.init(free))

    def update(
        self, state: FitState, queries: AnyMeasure, targets: Any
    ) -> tuple[FitState, Float[Array, ""]]:
        """One step of the optimizer on a batch of queries and targets, and the mean loss
        before it. Jitted; new batches of the same shape do not recompile."""
        result: tuple[FitState, Array] = _update(self, state, queries, targets)
        return result


@partial(jax.jit, static_argnums=0)
def _update(
    learner: Learner, state: FitState, queries: AnyMeasure, targets: Any
) -> tuple[FitState, Float[Array, ""]]:
    def mean_loss(free: dict[str, Any]) -> Float[Array, ""]:
        memory, beta = _constrained(state, free)
        losses = jax.vmap(partial(learner.loss, memory, beta))(queries, targets)
        return losses.mean()

    loss, slope = jax.value_and_grad(mean_loss)(state.free)
    free, optimizer_state = _moved(learner.optimizer, slope, state.optimizer_state, state.free)
    memory, beta = _constrained(state, free)
    return FitState(memory, beta, free, optimizer_state), loss


def _constrained(state: FitState, free: dict[str, Any]) -> tuple[Memory, Array]:
    memory, beta = state.memory, state.beta
    if BETA in free:
        beta = jnp.exp(free[BETA]).astype(memory.dtype)
    if named := but_beta(tuple(free)):
        memory = Rebuild(memory, named)({name: free[name] for name in named})
    return memory, beta


def _moved(
    optimizer: optax.GradientTransformation, slope: Any, optimizer_state: Any, free: Any
) -> tuple[Any, Any]:
    # Users may have set JAX to be stricter than optax is.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        change, optimizer_state = optimizer.update(slope, optimizer_state, free)
        return optax.apply_updates(free, change), optimizer_state


class Fit(eqx.Module):
    """What `jdam.fit` learned.

    memory: the learned memory.
    beta:   the learned β.
    losses: (T,), the mean loss of each batch before its update.
    """

    memory: Memory
    beta: Float[Array, ""]
    losses: Float[Array, " T"]


def fit(
    memory: Memory,
    beta: ArrayLike,
    queries: AnyMeasure,
    targets: Any,
    optimizer: optax.GradientTransformation,
    *,
    loss: Loss = recall_error,
    learn: tuple[str, ...] = LEARNABLE,
    num_steps: int = 200,
    batch_size: int | None = None,
    key: Array | None = None,
    progress: bool = True,
) -> Fit:
    """Learn patterns, β and prior from queries (M,) and what should be made of each.

    Minimises the mean over pairs of `loss(memory, beta, query, target)`, by default the
    divergence D(Φ(ξ), Y) between one step of recall from the query and its target, from the
    given memory and β on. `Learner` is the pure `init` and `update` of which this is the loop.

    **Arguments:** `queries`: measures with one batch axis (M,); `targets`: a pytree of arrays that
    lead with (M,), measures for the default loss. `optimizer`: any of optax. `loss`, `learn`: as in
    `Learner`. `batch_size`: pairs of each step, drawn by `key`; all of them if None.
    `progress`: whether to draw a progress bar, on a terminal.

    **Returns:** the learned `memory` and `beta`, and the `losses` of all steps.

    **Raises:** `TypeError` or `ValueError` for arguments that are not of these kinds.
    """
    num_steps = checks.positive_int("num_steps", num_steps)
    queries = memory.geometry.check("queries", queries, 1)
    num = length_of(queries)
    if num == 0:
        raise ValueError("queries must hold at least one query; got 0")
    if any(jnp.shape(leaf)[:1] != (num,) for leaf in jax.tree.leaves(targets)):
        raise ValueError(f"targets must lead with (M,) = ({num},), one a query")
    size = num if batch_size is None else checks.positive_int("batch_size", batch_size)
    if size > num:
        raise ValueError(f"batch_size must be at most the number of queries {num}; got {size}")
    key = jax.random.key(0) if key is None else key
    learner = Learner(optimizer, loss, tuple(learn))
    state, losses = learner.init(memory, beta), []
    # None: no bar where there is no terminal, as in logs.
    with trange(num_steps, disable=None if progress else True, desc="fit") as steps:
        for step in steps:
            batch = queries, targets
            if size < num:
                drawn = jax.random.choice(jax.random.fold_in(key, step), num, (size,), False)
                batch = jax.tree.map(lambda leaf, drawn=drawn: jnp.asarray(leaf)[drawn], batch)
            state, mean = learner.update(state, *batch)
            losses.append(mean)
            if not steps.disable:
                steps.set_postfix(loss=f"{float(mean):.4g}")
    return Fit(state.memory, state.beta, jnp.stack(losses))


def descend(
    memory: Memory,
    query: AnyMeasure,
    beta: ArrayLike,
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int = 200,
    tol: ArrayLike | None = None,
    separation: Separation = LogSumExp(),
) -> Recall:
    """Minimise the energy itself, from the query on, by an optax optimizer instead of steps of
    recall.

    The optimizer moves factors, points and logarithms of weights (all of a point cloud,
    whatever κ), so that the measure remains one. Its learning rate is in units of these.

    **Arguments:** `memory`, `query`, `beta`, `separation` as in `energy`; `optimizer`: any
    of optax, hashable, which recompiles for each new object; `num_steps` ≥ 1; `tol`: as in
    `recall`, for the status alone.

    **Returns:** a `Recall` of the last iterate; `num_steps` is that of all. Batches by `jax.vmap`.

    **Raises:** as `recall`.
    """
    query = fit_query(memory, query)
    beta = inverse_temperature(memory, beta)
    tol = check_tolerance(memory, tol)
    num_steps = checks.positive_int("num_steps", num_steps)
    check_separation(separation)
    return _descend(
        memory, query, beta, tol, optimizer=optimizer, num_steps=num_steps, separation=separation
    )


@compiled(static=("optimizer", "num_steps", "separation"))
def _descend(
    memory: Memory,
    query: AnyMeasure,
    beta: Array,
    tol: Array,
    *,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    separation: Separation,
) -> Recall:
    def height(free: AnyMeasure) -> Float[Array, ""]:
        return energy(memory, constrained(query, free), beta, separation=separation)

    def turn(carry: tuple[AnyMeasure, Any], _: None) -> tuple[tuple[AnyMeasure, Any], None]:
        free, optimizer_state = carry
        return _moved(optimizer, jax.grad(height)(free), optimizer_state, free), None

    free = unconstrained(query)
    start = (free, optimizer.init(free))
    (free, _), _ = scan(turn, start, None, memory, query, beta, length=num_steps)
    measure = constrained(query, free)
    solver = Solver(Exhaustive(), separation)
    tol, goal = tolerances(memory, query, tol)
    problem = solver.problem(memory, beta, jnp.ones_like(beta))._replace(tol=tol, goal=goal)
    state = solver.run(measure, problem)  # of no steps: it evaluates
    state = state._replace(num_steps=jnp.array(num_steps, jnp.int32))
    return solver.report(state, problem)
