"""The energy and the average pull at a query, computed block by block to save memory."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PyTree

from jdam._core.batching import batch_size, equal_parts, masked_cond
from jdam._core.derivatives import ITERATED, full_precision, jvp
from jdam._core.loops import scan, stacked, zeros_of
from jdam._core.mesh import all_rows, first_index, local_rows, of_one_part, pmin, psum
from jdam._energy.evaluation import Block, Evaluation, Nearest
from jdam._energy.separation import (
    LogSumExp,
    Separation,
    heaviest,
    relative_prior,
    unsolved_mass,
)
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory
from jdam.geometry.protocol import AnyView, Comparison, Geometry, Patterns


class Settings(NamedTuple):
    """Static settings of an evaluation."""

    separation: Separation = LogSumExp()
    block_size: int | None = None
    with_pull: bool = True  # False: the energy alone


def evaluate(
    settings: Settings,
    memory: Memory,
    query: AnyMeasure,
    beta: Float[Array, ""],
    guess: PyTree = None,
) -> Evaluation:
    """Return the energy at a query and the average of the pulls.

    Divergences are those of `Geometry.approximation` where its rounding does not show.
    Comparisons start from `guess`; None stands for `Geometry.first_guess`.
    """
    cheaper = None
    if type(settings.separation) is LogSumExp:  # a subclass may define other weights
        cheaper = memory.geometry.approximation(query, memory.patterns, beta)
    if cheaper is None:
        return _evaluate(settings, memory, query, beta, guess)

    def exactly(query: AnyMeasure, others: tuple[Memory, Array, PyTree]) -> Evaluation:
        memory, beta, guess = others
        return _evaluate(settings, memory, query, beta, guess)

    geometry, errs = cheaper
    errs = psum(errs.astype(jnp.int32), memory.layout) > 0  # all devices do the same
    approximate = _evaluate(settings, replace(memory, geometry=geometry), query, beta, guess)
    return masked_cond(errs, exactly, approximate, query, (memory, beta, guess))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _evaluate(
    settings: Settings, memory: Memory, query: AnyMeasure, beta: Float[Array, ""], guess: PyTree
) -> Evaluation:
    streams = type(settings.separation) is LogSumExp
    return (_in_one_sweep if streams else _in_two_sweeps)(settings, memory, query, beta, guess)


@partial(_evaluate.defjvp, symbolic_zeros=True)
@full_precision
def _evaluate_jvp(
    settings: Settings, primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]
) -> PyTree:
    # The derivative of a block needs more memory than its comparisons, and the derivative of
    # `in_batches` evaluates all queries at once.
    memory, *_ = primals
    most = memory.geometry.batch_sizes(memory.patterns).differentiated
    size = most if settings.block_size is None else min(most, settings.block_size)
    return jvp(partial(_evaluate.fun, settings._replace(block_size=size)), primals, tangents)


def _in_one_sweep(
    settings: Settings, memory: Memory, query: AnyMeasure, beta: Float[Array, ""], guess: PyTree
) -> Evaluation:
    """Return the evaluation in one pass over the patterns, whose sums are added block by block."""
    separation, view = LogSumExp(), view_of(memory.geometry, query)
    prior = total_prior(memory)

    def of_block(comparison: Comparison, block: Block) -> tuple[PyTree, PyTree]:
        sums = separation.sums(comparison, block, beta, prior[0], settings.with_pull)
        return sums, comparison.guess

    blocks = cut_into_blocks(memory, settings.block_size, guess)
    add = partial(separation.total, beta=beta)
    sums, guesses = sweep(of_block, memory, view, blocks, beta, prior[0], add=add)
    sums = separation.over_shards(sums, beta, memory.layout)
    guesses = _join_blocks(guesses, memory.capacity)
    return separation.finish(sums, prior, beta, view, guesses)


def total_prior(memory: Memory) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return log max πᵢ and Σ πᵢ / max π, over all patterns."""
    if memory.log_prior is None:
        count = memory.capacity * (1 if memory.layout is None else memory.layout.parts)
        return jnp.zeros((), memory.dtype), jnp.full((), count, memory.dtype)
    top = -pmin(-memory.log_prior.max(), memory.layout)
    prior, _ = relative_prior(memory.log_prior, memory.log_prior, top)
    return top, psum(prior.sum(), memory.layout)


def _in_two_sweeps(
    settings: Settings, memory: Memory, query: AnyMeasure, beta: Float[Array, ""], guess: PyTree
) -> Evaluation:
    """Return the evaluation in two passes: the divergences, which determine the weights, then the
    average of the pulls. One pass suffices if one block holds all patterns.
    """
    view, layout, num = view_of(memory.geometry, query), memory.layout, memory.capacity
    blocks = cut_into_blocks(memory, settings.block_size, guess)
    one_block = settings.with_pull and batch_size(blocks) == 1  # all pulls fit in memory

    def collect(comparison: Comparison, block: Block) -> tuple[None, Comparison]:
        return None, comparison if one_block else comparison._replace(pull=None)

    def pulled(comparison: Comparison, block: Block) -> tuple[AnyMeasure, None]:
        return _weighted(block.weights, comparison.pull), None

    comparisons = _join_blocks(sweep(collect, memory, view, blocks)[1], num)
    terms = all_rows(comparisons.divergence, layout), all_rows(memory.log_prior, layout)
    all_weights = settings.separation.weights(*terms, beta)
    weights = local_rows(all_weights, num, layout)
    pull = None
    if one_block:
        pull = _weighted(weights, comparisons.pull)
    elif settings.with_pull:
        blocks = cut_into_blocks(memory, settings.block_size, comparisons.guess)
        count, size = blocks.indices.shape
        padded = jnp.pad(weights, (0, count * size - num)).reshape(count, size)
        pull, _ = sweep(pulled, memory, view, blocks._replace(weights=padded))
    unsolved = psum(unsolved_mass(comparisons, weights), layout)
    pattern = heaviest(all_weights, *terms)
    row = pattern - first_index(num, layout)
    details = (comparisons.inliers, comparisons.pose)
    details = jax.tree.map(lambda rows: rows[jnp.clip(row, 0, num - 1)], details)
    details = of_one_part(details, (row >= 0) & (row < num), layout)
    energy = settings.separation.energy(*terms, beta)
    return Evaluation(
        view=view,
        energy=energy,
        shifted_energy=energy,
        pull=psum(pull, layout),
        nearest=Nearest(pattern, terms[0][pattern], *details),
        weight=all_weights.max(),
        unsolved=jax.lax.stop_gradient(unsolved),
        neglected=jnp.zeros_like(beta),
        guess=comparisons.guess,
    )


def _weighted(weights: Any, pulls: AnyMeasure) -> AnyMeasure:
    """Return Σ wᵢ·pullᵢ."""
    return jax.tree.map(partial(jnp.tensordot, weights, axes=1), pulls)


def compare_all(memory: Memory, query: AnyMeasure) -> Float[Array, " N"]:
    """Return D(ξ, Xᵢ) for every pattern, (N,)."""

    def collect(comparison: Comparison, block: Block) -> tuple[None, Array]:
        return None, comparison.divergence

    blocks, view = cut_into_blocks(memory, None, None), view_of(memory.geometry, query)
    divergences = sweep(collect, memory, view, blocks)[1]
    result: Array = all_rows(_join_blocks(divergences, memory.capacity), memory.layout)
    return result


@jax.jit
def compare(geometry: Geometry, view: AnyView, patterns: Patterns) -> Comparison:
    """Return `Geometry.compare(view, patterns)`; `jax.jit` lets all callers share one trace."""
    return geometry.compare(view, patterns)


@jax.jit
def view_of(geometry: Geometry, query: AnyMeasure) -> AnyView:
    """Return `Geometry.view(query)`; `jax.jit` lets all callers share one trace."""
    return geometry.view(query)


def total_of(parts: PyTree) -> PyTree:
    """Return the sum over the leading axis."""
    return jax.tree.map(lambda leaf: leaf.sum(0), parts)


def sweep(
    function: Callable[[Comparison, Block], tuple[PyTree, PyTree]],
    memory: Memory,
    view: AnyView,
    blocks: Block,
    *others: Any,
    add: Callable[[PyTree], PyTree] = total_of,
) -> PyTree:
    """Compare a query with one block of patterns after another, and return a sum over all blocks
    and the stacked outputs.

    `function(comparison, block)` returns the summand and the output of a block; `add` returns the
    sum of several summands, stacked, of which zeros are neutral. `others` are the arrays that these
    functions close over. The derivative recomputes the comparisons; only results of iterative
    solvers, named `ITERATED`, are stored.
    """

    def of_block(block: Block) -> tuple[PyTree, PyTree]:
        comparison = compare(memory.geometry, view, block.patterns)
        _check_comparison(memory, comparison, block)
        return function(comparison, block)

    def body_fun(carry: PyTree, block: Block) -> tuple[PyTree, PyTree]:
        summand, output = of_block(block)
        return add(stacked(carry, summand)), output

    first: Block = jax.tree.map(lambda leaf: leaf[0], blocks)
    if batch_size(blocks) == 1:
        total, output = of_block(first)
        return total, jax.tree.map(lambda leaf: leaf[None], output)
    zero, _ = zeros_of(of_block, first)
    policy = jax.checkpoint_policies.save_only_these_names(ITERATED)
    remat_body_fun = jax.checkpoint(body_fun, prevent_cse=False, policy=policy)
    return scan(remat_body_fun, zero, blocks, view, memory.geometry, *others)


def _check_comparison(memory: Memory, comparison: Comparison, block: Block) -> None:
    """Raise `ValueError` unless the comparison leads with (B,): users write geometries too."""
    expected, actual = block.indices.shape, comparison.divergence.shape
    if actual != expected or any(
        leaf.shape[:1] != expected for leaf in jax.tree.leaves(comparison.pull)
    ):
        raise ValueError(
            f"compare of {type(memory.geometry).__name__} must return divergences of shape (B,) = "
            f"{expected} and pulls that lead with it; got {actual} and "
            f"{jax.tree.map(jnp.shape, comparison.pull)}"
        )


def _join_blocks(blocks: PyTree, num: int) -> PyTree:
    """Return the outputs of blocks, (blocks, B, …), as rows (N, …)."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num], blocks)


def cut_into_blocks(memory: Memory, block_size: int | None, guess: PyTree) -> Block:
    """Return the memory cut into equal blocks along a new leading axis.

    The last block is padded with copies of the last pattern, whose prior is 0.
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
    if missing and log_prior is None:
        log_prior = jnp.zeros(num, memory.dtype)
    if guess is None:
        guess = memory.geometry.first_guess(memory.prepared)
    patterns = Patterns(memory.patterns, memory.prepared, guess)
    index = jnp.arange(count * size, dtype=jnp.int32).reshape(count, size)
    return Block(
        indices=index + first_index(num, memory.layout),
        patterns=jax.tree.map(lambda leaf: cut(leaf, mode="edge"), patterns),
        log_prior=None if log_prior is None else cut(log_prior, constant_values=-jnp.inf),
    )
