"""The average of the pulls: of all comparisons with patterns only some exist at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam._core.batching import batch_size, equal_parts, masked_cond
from jdam._core.derivatives import ITERATED, full_precision, jvp
from jdam._core.loops import scan
from jdam._core.mesh import all_rows, first_index, local_rows, of_one_part, pmin, psum
from jdam._energy.evaluation import Block, Evaluation, Nearest
from jdam._energy.separation import LogSumExp, Separation, heaviest, unsolved_mass
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory
from jdam.geometry.protocol import AnyView, Comparison, Geometry, Patterns


class Settings(NamedTuple):
    """The static settings of an evaluation."""

    separation: Separation = LogSumExp()
    block_size: int | None = None
    with_pull: bool = True  # else the energy alone
    exact: bool = True


def evaluate(
    settings: Settings, memory: Memory, query: AnyMeasure, beta: Float[Array, ""], guess: Any = None
) -> Evaluation:
    """The energy and the average of the pulls: from approximate divergences where they are good
    enough, from exact ones if not. Comparisons start from a guess, None for the patterns' own."""
    if type(settings.separation) is not LogSumExp:  # a subclass may weigh otherwise
        return _evaluate(settings, memory, query, beta, guess)
    doubtful = memory.geometry.approximation_errs(query, memory.patterns, beta)
    if doubtful is None:
        return _evaluate(settings, memory, query, beta, guess)

    def exactly(query: AnyMeasure, others: tuple[Memory, Array, Any]) -> Evaluation:
        memory, beta, guess = others
        return _evaluate(settings, memory, query, beta, guess)

    doubtful = psum(doubtful.astype(jnp.int32), memory.layout) > 0  # for one, for all
    approximate = _evaluate(settings._replace(exact=False), memory, query, beta, guess)
    return masked_cond(doubtful, exactly, approximate, query, (memory, beta, guess))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _evaluate(
    settings: Settings, memory: Memory, query: AnyMeasure, beta: Float[Array, ""], guess: Any
) -> Evaluation:
    streams = type(settings.separation) is LogSumExp
    return (_in_one_sweep if streams else _in_two_sweeps)(settings, memory, query, beta, guess)


@partial(_evaluate.defjvp, symbolic_zeros=True)
@full_precision
def _evaluate_jvp(settings: Settings, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    # Derivatives of a block hold more than its comparisons, and tiles of queries end here.
    memory, *_ = primals
    most = memory.geometry.batch_sizes(memory.patterns).differentiated
    size = most if settings.block_size is None else min(most, settings.block_size)
    return jvp(partial(_evaluate.fun, settings._replace(block_size=size)), primals, tangents)


def _in_one_sweep(
    settings: Settings, memory: Memory, query: AnyMeasure, beta: Float[Array, ""], guess: Any
) -> Evaluation:
    """By sums that are accumulated pattern after pattern."""
    separation, view = LogSumExp(), view_of(memory.geometry, query)

    def accumulate(sums: Any, found: Comparison, block: Block) -> tuple[Any, Any]:
        return separation.accumulate(sums, found, block, beta), found.guess

    sweep = Sweep(accumulate, settings.exact)
    blocks = cut_into_blocks(memory, settings.block_size, guess)
    first = jax.tree.map(lambda leaf: leaf[0], blocks.patterns)
    nothing = separation.empty(zero_comparison(memory, view, first), settings.with_pull)
    sums, guesses = sweep.over(memory, view, blocks, nothing, beta)
    sums = separation.merge(sums, beta, memory.layout)
    guesses = _in_a_row(guesses, memory.capacity)
    return separation.finish(sums, total_prior(memory), beta, view, guesses)


def total_prior(memory: Memory) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """log max πᵢ, and Σ πᵢ in units of that."""
    prior = relative_prior(memory, memory.log_prior)
    if prior is None:
        count = memory.capacity * (1 if memory.layout is None else memory.layout.parts)
        return jnp.zeros((), memory.dtype), jnp.full((), count, memory.dtype)
    return _top(memory), psum(prior.sum(), memory.layout)


def relative_prior(memory: Memory, log_prior: Array | None) -> Float[Array, " B"] | None:
    """πᵢ/max π of some patterns of the memory, or of all; None if all are 1."""
    if log_prior is None:
        return None
    on = log_prior != -jnp.inf
    return jnp.where(on, jnp.exp(jnp.where(on, log_prior, 0) - _top(memory)), 0)


def _top(memory: Memory) -> Float[Array, ""]:
    assert memory.log_prior is not None
    return -pmin(-memory.log_prior.max(), memory.layout)


def _in_two_sweeps(
    settings: Settings, memory: Memory, query: AnyMeasure, beta: Float[Array, ""], guess: Any
) -> Evaluation:
    """By weights that are known only when all divergences are: a sweep for these, and one for the
    pulls unless one block is all."""
    view, layout, num = view_of(memory.geometry, query), memory.layout, memory.capacity
    blocks = cut_into_blocks(memory, settings.block_size, guess)
    first = jax.tree.map(lambda leaf: leaf[0], blocks.patterns)
    zero = zero_comparison(memory, view, first)
    at_once = settings.with_pull and batch_size(blocks) == 1  # all pulls fit in memory

    def keep(_: None, found: Comparison, block: Block) -> tuple[None, Comparison]:
        return None, found if at_once else found._replace(pull=None)

    def add(total: AnyMeasure, found: Comparison, block: Any) -> tuple[AnyMeasure, None]:
        return jax.tree.map(partial(_add, block.weights), total, found.pull), None

    found = _in_a_row(Sweep(keep).over(memory, view, blocks, None)[1], num)
    everything = all_rows(found.divergence, layout), all_rows(memory.log_prior, layout)
    all_weights = settings.separation.weights(*everything, beta)
    weights = local_rows(all_weights, num, layout)
    pull = None
    if at_once:
        pull = jax.tree.map(partial(_add, weights), zero.pull, found.pull)
    elif settings.with_pull:
        blocks = cut_into_blocks(memory, settings.block_size, found.guess)
        count, size = blocks.indices.shape
        padded = jnp.pad(weights, (0, count * size - num)).reshape(count, size)
        pull, _ = Sweep(add).over(memory, view, blocks._replace(weights=padded), zero.pull)
    unsolved = psum(unsolved_mass(found, weights), layout)
    pattern = heaviest(all_weights, *everything)
    row = pattern - first_index(num, layout)
    details = (found.inliers, found.pose)
    details = jax.tree.map(lambda rows: rows[jnp.clip(row, 0, num - 1)], details)
    details = of_one_part(details, (row >= 0) & (row < num), layout)
    energy = settings.separation.energy(*everything, beta)
    return Evaluation(
        view=view,
        energy=energy,
        relative=energy,
        pull=psum(pull, layout),
        nearest=Nearest(pattern, everything[0][pattern], *details),
        weight=all_weights.max(),
        unsolved=jax.lax.stop_gradient(unsolved),
        neglected=jnp.zeros_like(beta),
        guess=found.guess,
    )


def _add(weights: Float[Array, " B"], total: Array, pulls: Array) -> Array:
    return total + jnp.tensordot(weights, pulls, 1)


def zero_comparison(memory: Memory, view: AnyView, patterns: Patterns) -> Comparison:
    """Zeros in the shapes of a comparison with one pattern."""
    shapes = jax.eval_shape(compare, memory.geometry, view, patterns)
    zero: Comparison = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), shapes)
    return zero


def compare_all(memory: Memory, query: AnyMeasure) -> Float[Array, " N"]:
    """D(ξ, Xᵢ) to every pattern."""

    def keep(_: None, found: Comparison, block: Block) -> tuple[None, Array]:
        return None, found.divergence

    blocks, view = cut_into_blocks(memory, None, None), view_of(memory.geometry, query)
    divergences = Sweep(keep).over(memory, view, blocks, None)[1]
    result: Array = all_rows(_in_a_row(divergences, memory.capacity), memory.layout)
    return result


@partial(jax.jit, static_argnames="exact")
def compare(
    geometry: Geometry, view: AnyView, patterns: Patterns, *, exact: bool = True
) -> Comparison:
    """`Geometry.compare`, traced once for all that compare alike."""
    return geometry.compare(view, patterns, exact=exact)


@jax.jit
def view_of(geometry: Geometry, query: AnyMeasure) -> AnyView:
    """`Geometry.view`, likewise."""
    return geometry.view(query)


class Sweep(NamedTuple):
    """Comparisons of a query with block after block of the patterns.

    `accumulate(carry, comparison, block)` gives the next carry and what to keep of the block."""

    accumulate: Callable[[Any, Comparison, Any], tuple[Any, Any]]
    exact: bool = True

    def over(self, memory: Memory, view: AnyView, blocks: Any, start: Any, *others: Any) -> Any:
        """The last carry, and what was kept, stacked. `others` is what `accumulate` closes over.

        The derivative compares again instead of remembering, but for what took iterations to find.
        """

        def turn(carry: Any, block: Any) -> tuple[Any, Any]:
            found = compare(memory.geometry, view, block.patterns, exact=self.exact)
            _check_comparison(memory, found, block)
            return self.accumulate(carry, found, block)

        if batch_size(blocks) == 1:
            carry, kept = turn(start, jax.tree.map(lambda leaf: leaf[0], blocks))
            return carry, jax.tree.map(lambda leaf: leaf[None], kept)
        policy = jax.checkpoint_policies.save_only_these_names(ITERATED)
        again = jax.checkpoint(turn, prevent_cse=False, policy=policy)
        return scan(again, start, blocks, view, memory.geometry, *others)


def _check_comparison(memory: Memory, found: Comparison, block: Block) -> None:
    """Geometries are written by others too."""
    wanted, got = block.indices.shape, found.divergence.shape
    if got != wanted or any(leaf.shape[:1] != wanted for leaf in jax.tree.leaves(found.pull)):
        raise ValueError(
            f"compare of {type(memory.geometry).__name__} must return divergences of shape (B,) = "
            f"{wanted} and pulls that lead with it; got {got} and "
            f"{jax.tree.map(jnp.shape, found.pull)}"
        )


def _in_a_row(blocks: Any, num: int) -> Any:
    """What was kept of blocks of patterns, (blocks, B, …), as (N, …)."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num], blocks)


def cut_into_blocks(memory: Memory, block_size: int | None, guess: Any) -> Block:
    """The memory cut into equal blocks along a new leading axis.

    The last block is filled up with copies of the last pattern, switched off by the prior.
    """
    num = memory.capacity
    size = block_size or memory.geometry.batch_sizes(memory.patterns).patterns
    count, size = equal_parts(num, min(size, num))
    missing = count * size - num

    def cut(leaf: Array, **fill: Any) -> Array:
        if missing:
            leaf = jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1), **fill)
        return leaf.reshape(count, size, *leaf.shape[1:])

    log_prior = memory.log_prior
    prior = relative_prior(memory, log_prior)
    if missing and log_prior is None:
        log_prior, prior = jnp.zeros(num, memory.dtype), jnp.ones(num, memory.dtype)
    if guess is None:
        guess = memory.geometry.first_guess(memory.prepared)
    patterns = Patterns(memory.patterns, memory.prepared, guess)
    index = jnp.arange(count * size, dtype=jnp.int32).reshape(count, size)
    return Block(
        indices=index + first_index(num, memory.layout),
        patterns=jax.tree.map(lambda leaf: cut(leaf, mode="edge"), patterns),
        log_prior=None if log_prior is None else cut(log_prior, constant_values=-jnp.inf),
        prior=None if prior is None else cut(prior, constant_values=0),
    )
