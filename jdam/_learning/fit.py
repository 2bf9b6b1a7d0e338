"""Learning with optax: `fit` and `Learner` for memories, and `descend`, which minimises the energy
over a measure."""

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
from jaxtyping import Float, PyTree
from tqdm import trange

from jdam._core import checks
from jdam._core.batching import batch_size as length_of
from jdam._core.compile import compiled
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
    check_learn,
    parametrize,
    without_beta,
)
from jdam._measures.base import AnyMeasure, constrained, unconstrained
from jdam._memory.memory import Memory, store
from jdam._recall.adjoint import Unrolled
from jdam._recall.recall import check_tolerance, recall
from jdam._recall.result import Recall
from jdam._recall.solver import Solver

#: A loss (memory, β, query, target) ↦ scalar for one query and its target.
Loss: TypeAlias = Callable[[Memory, Array, PyTree, PyTree], Float[Array, ""]]

LEARNABLE = (PATTERNS, BETA, PRIOR)


def recall_error(
    memory: Memory, beta: Array, query: AnyMeasure, target: AnyMeasure
) -> Float[Array, ""]:
    """Return the loss D(Φ(ξ), Y): the divergence between the measure after one step of recall from
    the query ξ and the target Y.

    **Arguments:**

    - `memory`, `beta`, `query`: as in `recall`.
    - `target`: Y, a measure of the type of the query.

    **Returns:** a scalar, in squared units of distance.
    """
    recalled = recall(memory, query, beta, max_steps=1).measure
    target_memory = store(jax.tree.map(lambda leaf: leaf[None], target), memory.geometry)
    return divergences(target_memory, recalled)[0]


class FitState(eqx.Module):
    """The state of a fit: `memory` and `beta` are the current results."""

    memory: Memory
    beta: Float[Array, ""]
    #: The parameters in unconstrained coordinates. Their dtype is at least float32, since steps of
    #: the optimizer and squares of gradients may underflow in half precision.
    free: dict[str, Any]
    optimizer_state: PyTree


@dataclass(frozen=True)
class Learner:
    """The pure functions `init` and `update` of a fit, in the manner of optax.

    Measures remain measures under all updates. Atoms of weight 0 and patterns of prior 0 remain so.

    **Arguments:**

    - `optimizer`: an optax optimizer.
    - `loss`: a function (memory, beta, query, target) ↦ scalar of one query and its target, which
      may be any pytree; `jdam.recall_error` by default.
    - `learn`: a tuple of names: "beta" (the optimizer changes log β), and those of
      `jdam.parametrize`: "patterns", "prior", and parameters of the geometry, as "epsilon".

    **Raises:** `ValueError` if `learn` is not a tuple of names.
    """

    optimizer: optax.GradientTransformation
    loss: Loss = recall_error
    learn: tuple[str, ...] = LEARNABLE

    def __post_init__(self) -> None:
        check_learn(self.learn)

    def init(self, memory: Memory, beta: ArrayLike) -> FitState:
        """Return the state before the first update, for a `memory` and β > 0 to begin with.

        **Raises:** as `parametrize`; `TypeError` or `ValueError` for a β that is not a number > 0.
        """
        beta = inverse_temperature(memory, beta)
        free = {BETA: jnp.log(beta)}
        free = {} if BETA not in self.learn else free
        if names := without_beta(self.learn):
            free |= parametrize(memory, names)[0]
        return FitState(memory, beta, free, self.optimizer.init(free))

    def update(
        self, state: FitState, queries: AnyMeasure, targets: PyTree
    ) -> tuple[FitState, Float[Array, ""]]:
        """Take one step of the optimizer on a batch.

        The function is jitted; batches of the same shape do not recompile.

        **Arguments:**

        - `state`: the state after `init` or the last update.
        - `queries`: measures with one batch axis (M,).
        - `targets`: a pytree of arrays with the leading axis (M,).

        **Returns:** the new state, and the mean loss of the batch before the step.
        """
        result: tuple[FitState, Array] = _update(self, state, queries, targets)
        return result


@partial(jax.jit, static_argnums=0)
def _update(
    learner: Learner, state: FitState, queries: AnyMeasure, targets: PyTree
) -> tuple[FitState, Float[Array, ""]]:
    def mean_loss(free: dict[str, Any]) -> Float[Array, ""]:
        memory, beta = _constrained(state, free)
        losses = jax.vmap(partial(learner.loss, memory, beta))(queries, targets)
        return losses.mean()

    loss, gradient = jax.value_and_grad(mean_loss)(state.free)
    free, optimizer_state = _updated(learner.optimizer, gradient, state.optimizer_state, state.free)
    memory, beta = _constrained(state, free)
    return FitState(memory, beta, free, optimizer_state), loss


def _constrained(state: FitState, free: dict[str, Any]) -> tuple[Memory, Array]:
    """Return the memory and β with the parameters `free`, and all else as in `state`."""
    memory, beta = state.memory, state.beta
    if BETA in free:
        beta = jnp.exp(free[BETA])
    if names := without_beta(tuple(free)):
        memory = Rebuild(memory, names)({name: free[name] for name in names})
    return memory, beta


def _updated(
    optimizer: optax.GradientTransformation, gradient: PyTree, optimizer_state: PyTree, free: PyTree
) -> tuple[PyTree, PyTree]:
    """Return the parameters and the state of the optimizer after one update."""
    # optax relies on promotion, which users may have switched off.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, free)
        return optax.apply_updates(free, updates), optimizer_state


class Fit(eqx.Module):
    """The result of `jdam.fit`.

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
    targets: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    loss: Loss = recall_error,
    learn: tuple[str, ...] = LEARNABLE,
    num_steps: int = 200,
    batch_size: int | None = None,
    key: Array | None = None,
    progress: bool = True,
) -> Fit:
    """Learn patterns, β and prior from pairs of queries and targets.

    The mean of `loss(memory, beta, query, target)` over the pairs is minimised, by default the
    divergence D(Φ(ξ), Y) between the measure after one step of recall from the query and the
    target. This is a loop over `Learner.update`.

    **Arguments:**

    - `memory`, `beta`: the initial memory and inverse temperature.
    - `queries`: measures with one batch axis (M,).
    - `targets`: a pytree of arrays with the leading axis (M,), measures for the default loss.
    - `optimizer`: an optax optimizer.
    - `loss`, `learn`: as in `Learner`.
    - `num_steps`: the number T ≥ 1 of updates.
    - `batch_size`: the number of pairs of each update, drawn at random; all pairs if None.
    - `key`: the `jax.random` key of the batches; `jax.random.key(0)` if None.
    - `progress`: whether to show a progress bar, on a terminal only.

    **Returns:** a `Fit` with the learned `memory` and `beta`, and the `losses` of all updates.

    **Raises:** `TypeError` or `ValueError` for arguments outside these types and ranges.
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
    # disable=None: tqdm shows no bar if the output is not a terminal.
    with trange(num_steps, disable=None if progress else True, desc="fit") as steps:
        for step in steps:
            batch = queries, targets
            if size < num:
                rows = jax.random.choice(jax.random.fold_in(key, step), num, (size,), False)
                batch = jax.tree.map(lambda leaf, rows=rows: jnp.asarray(leaf)[rows], batch)
            state, mean_loss = learner.update(state, *batch)
            losses.append(mean_loss)
            if not steps.disable:
                steps.set_postfix(loss=f"{float(mean_loss):.4g}")
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
    """Minimise the energy from the query on by an optax optimizer, instead of steps of recall.

    The parameters are the coordinates of `Measure.unconstrained`: means and factors, or points and
    logarithms of weights, where the weights of a cloud change for any κ. The learning rate is in
    units of these coordinates.

    **Arguments:**

    - `memory`, `query`, `beta`, `separation`: as in `energy`. Use `jax.vmap` for batches of
      queries.
    - `optimizer`: an optax optimizer, hashable; each new object is compiled again.
    - `num_steps`: the number of updates, ≥ 1; there is no stopping criterion.
    - `tol`: as in `recall`, for the status only.

    **Returns:** a `Recall` of the last iterate.

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
    def energy_of(free: AnyMeasure) -> Float[Array, ""]:
        return energy(memory, constrained(query, free), beta, separation=separation)

    def body_fun(
        carry: tuple[AnyMeasure, PyTree], _: None
    ) -> tuple[tuple[AnyMeasure, PyTree], None]:
        free, optimizer_state = carry
        return _updated(optimizer, jax.grad(energy_of)(free), optimizer_state, free), None

    free = unconstrained(query)
    start = (free, optimizer.init(free))
    (free, _), _ = scan(body_fun, start, None, memory, query, beta, length=num_steps)
    measure = constrained(query, free)
    solver = Solver(Exhaustive(), separation)
    problem = solver.problem(memory, query, beta, jnp.ones_like(beta), tol=tol)
    state = Unrolled().run(solver, measure, problem)  # of no steps: it evaluates
    state = state._replace(num_steps=jnp.array(num_steps, jnp.int32))
    return solver.report(state, problem)
