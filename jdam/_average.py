"""One look of a query at the patterns: a streamed log-sum-exp, in which no array of all
(query, pattern) pairs of measures ever exists."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jdam._batching import compute_if
from jdam._derivatives import ITERATED, full_precision, jvp
from jdam._layout import Layout, first_index, gathered, lowest, own, total
from jdam._loops import scan
from jdam.geometry.protocol import AnyMeasure, AnyView, Comparison, batch_size
from jdam.memory import Memory
from jdam.separation import LogSumExp, Separation, heaviest, levels, mass


class GibbsAverage(NamedTuple):
    """What a query learns from all patterns, wᵢ ∝ πᵢ exp(−βDᵢ) being their Gibbs weights."""

    view: AnyView  # of the query, as `Geometry.move` wants it
    energy: Float[Array, ""]  # −β⁻¹ log Σ πᵢ exp(−βDᵢ)
    pull: AnyMeasure  # Σ wᵢ·pullᵢ, None if not asked for
    nearest: Int[Array, ""]  # the heaviest pattern
    weight: Float[Array, ""]  # its weight
    unsolved: Float[Array, ""]  # Gibbs mass of the patterns whose comparison missed its tolerance
    guess: Any  # to start the next look from


class Block(NamedTuple):
    """Some patterns, and all that goes with them; leaves lead with (B,)."""

    number: Int[Array, " B"]  # in the memory
    patterns: AnyMeasure
    log_prior: Float[Array, " B"] | None
    prepared: Any
    guess: Any


class Running(NamedTuple):
    """An average that is not yet over."""

    lowest: Float[Array, ""]  # level so far
    nearest: Int[Array, ""]
    mass: Float[Array, ""]  # Σ exp(−β(level − lowest))
    pull: AnyMeasure  # Σ exp(−β(level − lowest))·pull
    unsolved: Float[Array, ""]  # that sum over comparisons that missed their tolerance


def gibbs_average(
    memory: Memory,
    query: AnyMeasure,
    beta: Float[Array, ""],
    *,
    separation: Separation = LogSumExp(),
    block_size: int | None = None,
    with_pull: bool = True,
    guess: Any = None,
) -> GibbsAverage:
    """The energy and the weighted average of the pulls: from approximate divergences where they
    are good enough, from exact ones if not."""
    settings = Settings(separation, block_size, with_pull)
    if type(separation) is not LogSumExp:  # a subclass may weigh otherwise
        return _average(settings, memory, query, beta, guess)

    def average(query: AnyMeasure, args: tuple[Memory, Array, Any], *, exact: bool) -> GibbsAverage:
        memory, beta, guess = args
        return _average(settings._replace(exact=exact), memory, query, beta, guess)

    doubtful = memory.geometry.approximation_errs(query, memory.patterns, beta)
    args = (memory, beta, guess)
    if doubtful is None:
        return average(query, args, exact=True)
    doubtful = total(doubtful.astype(jnp.int32), memory.layout) > 0  # for one, for all
    approximate = average(query, args, exact=False)
    return compute_if(doubtful, partial(average, exact=True), approximate, query, args)


class Settings(NamedTuple):
    """What of an average is not traced."""

    separation: Separation
    block_size: int | None
    with_pull: bool
    exact: bool = True


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _average(
    settings: Settings, memory: Memory, query: AnyMeasure, beta: Float[Array, ""], guess: Any
) -> GibbsAverage:
    in_one = type(settings.separation) is LogSumExp
    return (_average_in_one if in_one else _average_in_two)(settings, memory, query, beta, guess)


@partial(_average.defjvp, symbolic_zeros=True)
@full_precision
def _average_jvp(settings: Settings, primals: tuple, tangents: tuple) -> Any:
    # Derivatives of a block hold more than its comparisons, and tiles of queries end here.
    memory, *_ = primals
    most = memory.geometry.derivatives_at_once(memory.patterns)
    size = most if settings.block_size is None else min(most, settings.block_size)
    return jvp(partial(_average.fun, settings._replace(block_size=size)), primals, tangents)


def _average_in_one(
    settings: Settings, memory: Memory, query: AnyMeasure, beta: Float[Array, ""], guess: Any
) -> GibbsAverage:
    """The average by `LogSumExp`, accumulated over blocks of patterns."""
    _, block_size, with_pull, exact = settings
    view = memory.geometry.view(query)

    def look(running: Running, block: Block) -> tuple[Running, Any]:
        found = memory.geometry.compare(view, block.patterns, block.prepared, block.guess, exact)
        return absorb(running, found, block, beta), found.guess

    blocks = cut_into_blocks(memory, block_size, guess)
    start = nothing_yet(memory, view, with_pull)
    end, guesses = over_blocks(look, start, blocks, view, beta)
    end = merge(end, beta, memory.layout)
    return conclude(view, end, beta, in_a_row(guesses, len(memory)))


def nothing_yet(memory: Memory, view: AnyView, with_pull: bool = True) -> Running:
    """The average before its first pattern."""
    nothing = jnp.array(0, memory.dtype)
    return Running(
        lowest=jnp.array(jnp.inf, memory.dtype),
        nearest=jnp.array(0, jnp.int32),
        mass=nothing,
        pull=_no_pull(memory, view) if with_pull else None,
        unsolved=nothing,
    )


def absorb(running: Running, found: Comparison, block: Block, beta: Array) -> Running:
    """The average with some more patterns, relative to the lowest level so far (online
    softmax)."""
    height = levels(found.divergence, block.log_prior, beta)
    # Energy and average do not depend on the reference, only their rounding does.
    fixed = jax.lax.stop_gradient(height)
    low = fixed.min()
    lowest = jnp.minimum(running.lowest, low)
    reference = jnp.where(lowest == jnp.inf, 0, lowest)  # a block may be switched off whole
    masses = mass(height - reference, beta)
    decay = mass(running.lowest - reference, beta)
    pulls = None if running.pull is None else found.pull
    return Running(
        lowest=lowest,
        nearest=jnp.where(
            low < running.lowest, block.number[_first(fixed == low)], running.nearest
        ),
        mass=decay * running.mass + masses.sum(),
        pull=jax.tree.map(
            lambda total, pull: decay * total + jnp.tensordot(masses, pull, 1),
            running.pull,
            pulls,
        ),
        unsolved=decay * running.unsolved + _missed(found, masses),
    )


def merge(part: Running, beta: Array, layout: Layout | None) -> Running:
    """The average over all parts of a memory that is spread over devices."""
    if layout is None:
        return part
    least = lowest(part.lowest, layout)
    decay = mass(part.lowest - jnp.where(least == jnp.inf, 0, least), beta)
    last = jnp.iinfo(jnp.int32).max
    sums = jax.tree.map(lambda leaf: decay * leaf, (part.mass, part.pull, part.unsolved))
    whole, pull, unsolved = total(sums, layout)
    nearest = lowest(jnp.where(part.lowest == least, part.nearest, last), layout)
    return Running(least, nearest, whole, pull, unsolved)


def conclude(view: AnyView, end: Running, beta: Array, guess: Any) -> GibbsAverage:
    """What an average that is over tells."""
    return GibbsAverage(
        view=view,
        energy=end.lowest - jnp.log(end.mass) / beta,
        pull=jax.tree.map(lambda total: total / end.mass, end.pull),
        nearest=end.nearest,
        weight=1 / end.mass,
        unsolved=jax.lax.stop_gradient(end.unsolved / end.mass),
        guess=guess,
    )


def _average_in_two(
    settings: Settings, memory: Memory, query: AnyMeasure, beta: Float[Array, ""], guess: Any
) -> GibbsAverage:
    """The average by weights that are known only when all divergences are: a pass over the
    patterns for these, and one for the pulls, unless one block is all."""
    separation, block_size, with_pull, _ = settings
    view = memory.geometry.view(query)

    def compare(block: Block) -> Comparison:
        return memory.geometry.compare(view, block.patterns, block.prepared, block.guess, True)

    def absorb(total: AnyMeasure, weighted: tuple[Block, Array]) -> tuple[AnyMeasure, None]:
        block, weights = weighted
        pulls = compare(block).pull
        return jax.tree.map(lambda x, y: x + jnp.tensordot(weights, y, 1), total, pulls), None

    blocks = cut_into_blocks(memory, block_size, guess)
    once = batch_size(blocks) == 1  # all pulls fit in memory together

    def look(_: None, block: Block) -> tuple[None, Comparison]:
        found = compare(block)
        return None, found if once and with_pull else found._replace(pull=None)

    found = in_a_row(over_blocks(look, None, blocks, view)[1], len(memory))
    layout, num = memory.layout, len(memory)
    everything = gathered(found.divergence, layout), gathered(memory.log_prior, layout)
    all_weights = separation.weights(*everything, beta)
    weights = own(all_weights, num, layout)
    pull = jax.tree.map(lambda pulls: jnp.tensordot(weights, pulls, 1), found.pull)
    if with_pull and not once:
        blocks = cut_into_blocks(memory, block_size, found.guess)
        count, size = blocks.number.shape
        padded = jnp.pad(weights, (0, count * size - num)).reshape(count, size)
        pull, _ = over_blocks(absorb, _no_pull(memory, view), (blocks, padded), view)
    unsolved = jnp.asarray(_missed(found, weights), memory.dtype)
    return GibbsAverage(
        view=view,
        energy=separation.energy(*everything, beta),
        pull=total(pull, layout),
        nearest=heaviest(all_weights, everything[0]),
        weight=all_weights.max(),
        unsolved=jax.lax.stop_gradient(total(unsolved, layout)),
        guess=found.guess,
    )


def compare_all(memory: Memory, query: AnyMeasure) -> Float[Array, " N"]:
    """D(ξ, Xᵢ) to every pattern."""
    view = memory.geometry.view(query)

    def look(_: None, block: Block) -> tuple[None, Array]:
        found = memory.geometry.compare(view, block.patterns, block.prepared, block.guess, True)
        return None, found.divergence

    found = in_a_row(over_blocks(look, None, cut_into_blocks(memory), view)[1], len(memory))
    return gathered(found, memory.layout)


def _no_pull(memory: Memory, view: AnyView) -> AnyMeasure:
    def pull_of_first(memory: Memory, view: AnyView) -> AnyMeasure:
        one, prepared = jax.tree.map(lambda leaf: leaf[:1], (memory.patterns, memory.prepared))
        guess = memory.geometry.first_guess(prepared)
        return memory.geometry.compare(view, one, prepared, guess, True).pull

    pulls = jax.eval_shape(pull_of_first, memory, view)
    return jax.tree.map(lambda pull: jnp.zeros(pull.shape[1:], pull.dtype), pulls)


def _missed(found: Comparison, masses: Array) -> Array | int:
    """The mass of comparisons that missed their tolerance."""
    return 0 if found.missed is None else jnp.where(found.missed, masses, 0).sum()


def _first(marks: Array) -> Int[Array, ""]:
    """Index of the first true entry: an `argmax` that XLA vectorises."""
    size = marks.shape[0]
    return jnp.where(marks, jnp.arange(size, dtype=jnp.int32), size - 1).min()


def in_a_row(blocks: Any, num: int) -> Any:
    """What was found for blocks of patterns, (blocks, B, …), as (N, …)."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num], blocks)


def cut_into_blocks(memory: Memory, block_size: int | None = None, guess: Any = None) -> Block:
    """The memory cut into equal blocks along a new leading axis.

    The last block is filled up with copies of the last pattern, switched off by the prior.
    """
    num = len(memory)
    size = memory.geometry.tile(memory.patterns)[1] if block_size is None else block_size
    # Blocks that N is a multiple of need no filling, and so no copy of the memory.
    size = next((s for s in range(min(size, num), size // 2, -1) if num % s == 0), size)
    count = math.ceil(num / size)
    size = math.ceil(num / count)
    missing = count * size - num

    def cut(leaf: Array, **fill: Any) -> Array:
        if missing:
            leaf = jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1), **fill)
        return leaf.reshape(count, size, *leaf.shape[1:])

    prior = memory.log_prior
    if missing and prior is None:
        prior = jnp.zeros(num, memory.dtype)
    if guess is None:
        guess = memory.geometry.first_guess(memory.prepared)

    def cut_all(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: cut(leaf, mode="edge"), tree)

    return Block(
        number=jnp.arange(count * size, dtype=jnp.int32).reshape(count, size)
        + first_index(num, memory.layout),
        patterns=cut_all(memory.patterns),
        log_prior=None if prior is None else cut(prior, constant_values=-jnp.inf),
        prepared=cut_all(memory.prepared),
        guess=cut_all(guess),
    )


def over_blocks(look: Callable[..., Any], start: Any, blocks: Any, *others: Any) -> tuple[Any, Any]:
    """`lax.scan` over blocks, whose derivative looks again instead of remembering, but for what
    took iterations to find."""
    if batch_size(blocks) == 1:
        carry, found = look(start, jax.tree.map(lambda leaf: leaf[0], blocks))
        return carry, jax.tree.map(lambda leaf: leaf[None], found)
    policy = jax.checkpoint_policies.save_only_these_names(ITERATED)
    return scan(jax.checkpoint(look, prevent_cse=False, policy=policy), start, blocks, *others)
