"""The energy and everything that follows from one pass over the patterns: a streamed
log-sum-exp, in which no array of all (query, pattern) pairs of measures ever exists."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from jdam import _checks
from jdam._batching import compute_if, in_tiles
from jdam._compile import compiled, working_dtype
from jdam.geometry.protocol import AnyMeasure, AnyView, Comparison, batch_size
from jdam.memory import Memory, check_against
from jdam.separation import LogSumExp, Separation, heaviest, levels, mass
from jdam.separation import check as check_separation


class GibbsAverage(NamedTuple):
    """What a query learns from all patterns, wᵢ ∝ πᵢ exp(−βDᵢ) being their Gibbs weights."""

    view: AnyView  # of the query, as `Geometry.move` wants it
    energy: Float[Array, ""]  # −β⁻¹ log Σ πᵢ exp(−βDᵢ)
    pull: AnyMeasure  # Σ wᵢ·pullᵢ, None if not asked for
    nearest: Int[Array, ""]  # the heaviest pattern
    weight: Float[Array, ""]  # its weight
    unsolved: Float[Array, ""]  # Gibbs mass of the patterns whose comparison missed its tolerance
    guess: Any  # to start the next look from


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
    if not isinstance(separation, LogSumExp):
        return _average_in_two(memory, query, beta, guess, block_size, with_pull, separation)

    def average(query: AnyMeasure, args: tuple[Memory, Array, Any], *, exact: bool) -> GibbsAverage:
        memory, beta, guess = args
        return _average(memory, query, beta, guess, block_size, with_pull, exact)

    doubtful = memory.geometry.approximation_errs(query, memory.patterns, beta)
    args = (memory, beta, guess)
    if doubtful is None:
        return average(query, args, exact=True)
    approximate = average(query, args, exact=False)
    return compute_if(doubtful, partial(average, exact=True), approximate, query, args)


def _average(
    memory: Memory,
    query: AnyMeasure,
    beta: Float[Array, ""],
    guess: Any,
    block_size: int | None,
    with_pull: bool,
    exact: bool,
) -> GibbsAverage:
    """The average by `LogSumExp`, accumulated over blocks of patterns relative to the lowest
    level so far (online softmax)."""
    view = memory.geometry.view(query)

    def compare(block: _Block) -> Comparison:
        return memory.geometry.compare(view, block.patterns, block.prepared, block.guess, exact)

    def absorb(running: _Running, block: _Block) -> tuple[_Running, Any]:
        found = compare(block)
        height = levels(found.divergence, block.log_prior, beta)
        # Energy and average do not depend on the reference, only their rounding does.
        fixed = jax.lax.stop_gradient(height)
        low = fixed.min()
        lowest = jnp.minimum(running.lowest, low)
        reference = jnp.where(lowest == jnp.inf, 0, lowest)  # a block may be switched off whole
        masses = mass(height - reference, beta)
        decay = mass(running.lowest - reference, beta)
        return _Running(
            lowest=lowest,
            nearest=jnp.where(
                low < running.lowest, block.start + _first(fixed == low), running.nearest
            ),
            mass=decay * running.mass + masses.sum(),
            pull=jax.tree.map(
                lambda total, pull: decay * total + jnp.tensordot(masses, pull, 1),
                running.pull,
                found.pull if with_pull else None,
            ),
            unsolved=decay * running.unsolved + _missed(found, masses),
        ), found.guess

    blocks = _blocks(memory, block_size, guess)
    start = _Running(
        lowest=jnp.array(jnp.inf, memory.dtype),
        nearest=jnp.array(0, jnp.int32),
        mass=jnp.array(0, memory.dtype),
        pull=_no_pull(compare, blocks) if with_pull else None,
        unsolved=jnp.array(0, memory.dtype),
    )
    end, guesses = _over_blocks(absorb, start, blocks)
    return GibbsAverage(
        view=view,
        energy=end.lowest - jnp.log(end.mass) / beta,
        pull=jax.tree.map(lambda total: total / end.mass, end.pull),
        nearest=end.nearest,
        weight=1 / end.mass,
        unsolved=jax.lax.stop_gradient(end.unsolved / end.mass),
        guess=_in_a_row(guesses, len(memory)),
    )


def _average_in_two(
    memory: Memory,
    query: AnyMeasure,
    beta: Float[Array, ""],
    guess: Any,
    block_size: int | None,
    with_pull: bool,
    separation: Separation,
) -> GibbsAverage:
    """The average by weights that are known only when all divergences are: a pass over the
    patterns for these, and one for the pulls, unless one block is all."""
    view = memory.geometry.view(query)

    def compare(block: _Block) -> Comparison:
        return memory.geometry.compare(view, block.patterns, block.prepared, block.guess, True)

    def absorb(total: AnyMeasure, weighted: tuple[_Block, Array]) -> tuple[AnyMeasure, None]:
        block, weights = weighted
        pulls = compare(block).pull
        return jax.tree.map(lambda x, y: x + jnp.tensordot(weights, y, 1), total, pulls), None

    blocks = _blocks(memory, block_size, guess)
    once = batch_size(blocks) == 1  # all pulls fit in memory together

    def look(_: None, block: _Block) -> tuple[None, Comparison]:
        found = compare(block)
        return None, found if once and with_pull else found._replace(pull=None)

    found = _in_a_row(_over_blocks(look, None, blocks)[1], len(memory))
    weights = separation.weights(found.divergence, memory.log_prior, beta)
    pull = jax.tree.map(lambda pulls: jnp.tensordot(weights, pulls, 1), found.pull)
    if with_pull and not once:
        blocks = _blocks(memory, block_size, found.guess)
        count, size = jax.tree.leaves(blocks.patterns)[0].shape[:2]
        padded = jnp.pad(weights, (0, count * size - len(memory))).reshape(count, size)
        pull, _ = _over_blocks(absorb, _no_pull(compare, blocks), (blocks, padded))
    return GibbsAverage(
        view=view,
        energy=separation.energy(found.divergence, memory.log_prior, beta),
        pull=pull,
        nearest=heaviest(weights, found.divergence),
        weight=weights.max(),
        unsolved=jax.lax.stop_gradient(jnp.asarray(_missed(found, weights), memory.dtype)),
        guess=found.guess,
    )


def _no_pull(compare: Callable[[Any], Comparison], blocks: Any) -> AnyMeasure:
    pulls = jax.eval_shape(compare, jax.tree.map(lambda leaf: leaf[0], blocks)).pull
    return jax.tree.map(lambda pull: jnp.zeros(pull.shape[1:], pull.dtype), pulls)


def _missed(found: Comparison, masses: Array) -> Array | int:
    """The mass of comparisons that missed their tolerance."""
    return 0 if found.missed is None else jnp.where(found.missed, masses, 0).sum()


def divergences(memory: Memory, query: AnyMeasure) -> Float[Array, " N"]:
    """D(ξ, Xᵢ) to every pattern: W₂² (cost |x−y|²) for `Bures`, the Sinkhorn divergence S_ε
    (cost ½|x−y|²) for `Sinkhorn`, |x−y|² for `Euclidean`.

    **Arguments:** a `memory` and one `query` of its patterns' type, dimension and dtype.
    `jax.vmap(jdam.divergences, (None, 0))` takes a batch of queries.

    **Returns:** (N,), in squared units of distance.

    **Raises:** `TypeError` or `ValueError` for a query that does not fit the memory.
    """
    return _divergences(memory, fit_query(memory, query))


@compiled()
def _divergences(memory: Memory, query: AnyMeasure) -> Float[Array, " N"]:
    return in_tiles(_compare_all, queries_at_once(memory), memory, query)


def queries_at_once(memory: Memory) -> int:
    """How many queries of a batch to compare with the patterns at once."""
    return memory.geometry.tile(memory.patterns)[0]


def _compare_all(memory: Memory, query: AnyMeasure) -> Float[Array, " N"]:
    view = memory.geometry.view(query)

    def compare(_: None, block: _Block) -> tuple[None, Array]:
        found = memory.geometry.compare(view, block.patterns, block.prepared, block.guess, True)
        return None, found.divergence

    return _in_a_row(_over_blocks(compare, None, _blocks(memory))[1], len(memory))


def _in_a_row(blocks: Any, num: int) -> Any:
    """What was found for blocks of patterns, (blocks, B, …), as (N, …)."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num], blocks)


def energy(
    memory: Memory, query: AnyMeasure, beta: ArrayLike, *, separation: Separation = LogSumExp()
) -> Float[Array, ""]:
    """E(ξ) = −β⁻¹ log Σᵢ πᵢ exp(−β D(ξ, Xᵢ)), πᵢ = 1 unless the memory has a prior.

    For Gaussians, D = W₂²: the energy of arXiv:2509.23162. Differentiable in query, patterns,
    β and prior, to second order.

    **Arguments:** a `memory`; one `query` of its patterns' type, dimension and dtype; the
    inverse temperature `beta` > 0, a scalar, per squared unit of distance; the `separation`,
    of which `jdam.Entmax` and `jdam.Epanechnikov` define other energies.

    **Raises:** `TypeError` or `ValueError` for a query that does not fit the memory, and
    for a β that is no positive number. Under a trace, β ≤ 0 gives NaN.
    """
    query = fit_query(memory, query)
    check_separation(separation)
    return _energy(memory, query, inverse_temperature(memory, beta), separation=separation)


@compiled(static=("separation",))
def _energy(
    memory: Memory, query: AnyMeasure, beta: Float[Array, ""], *, separation: Separation
) -> Float[Array, ""]:
    def look(memory: Memory, query: AnyMeasure, beta: Array) -> Array:
        return gibbs_average(memory, query, beta, separation=separation, with_pull=False).energy

    return in_tiles(look, queries_at_once(memory), memory, query, beta)


def gibbs_weights(
    memory: Memory, query: AnyMeasure, beta: ArrayLike, *, separation: Separation = LogSumExp()
) -> Float[Array, " N"]:
    """wᵢ(ξ) = softmaxᵢ(log πᵢ − β D(ξ, Xᵢ)), of shape (N,); other separations say how else.

    Arguments and errors as in `energy`.
    """
    return weigh(memory, query, beta, separation)[0]


def weigh(
    memory: Memory, query: AnyMeasure, beta: ArrayLike, separation: Separation
) -> tuple[Float[Array, " N"], Int[Array, ""]]:
    """The weights, and the heaviest pattern."""
    query = fit_query(memory, query)
    check_separation(separation)
    return _weigh(memory, query, inverse_temperature(memory, beta), separation=separation)


@compiled(static=("separation",))
def _weigh(
    memory: Memory, query: AnyMeasure, beta: Float[Array, ""], *, separation: Separation
) -> tuple[Float[Array, " N"], Int[Array, ""]]:
    def look(memory: Memory, query: AnyMeasure, beta: Array) -> tuple[Array, Array]:
        divergences = _compare_all(memory, query)
        weights = separation.weights(divergences, memory.log_prior, beta)
        return weights, heaviest(weights, divergences)

    return in_tiles(look, queries_at_once(memory), memory, query, beta)


def fit_query(memory: Memory, query: AnyMeasure) -> AnyMeasure:
    """The query, checked against the memory and padded to go with its patterns."""
    if not isinstance(memory, Memory):
        raise TypeError(f"memory must be a jdam.Memory, made by jdam.store; got {type(memory)}")
    query = memory.geometry.check("query", query, 0)
    check_against(memory, "query", query)
    return memory.geometry.match(query, memory.patterns)


def inverse_temperature(memory: Memory, beta: Any) -> Float[Array, ""]:
    """β as a checked scalar: NaN where a traced value is not positive."""
    return _checks.positive("beta", beta, working_dtype(memory.dtype))


class _Running(NamedTuple):
    lowest: Float[Array, ""]  # level so far
    nearest: Int[Array, ""]
    mass: Float[Array, ""]  # Σ exp(−β(level − lowest))
    pull: AnyMeasure  # Σ exp(−β(level − lowest))·pull
    unsolved: Float[Array, ""]  # that sum over comparisons that missed their tolerance


class _Block(NamedTuple):
    start: Int[Array, ""]  # index of the first pattern
    patterns: AnyMeasure  # (B,)
    log_prior: Float[Array, " B"] | None
    prepared: Any
    guess: Any


def _first(marks: Array) -> Int[Array, ""]:
    """Index of the first true entry: an `argmax` that XLA vectorises."""
    size = marks.shape[0]
    return jnp.where(marks, jnp.arange(size, dtype=jnp.int32), size - 1).min()


def _blocks(memory: Memory, block_size: int | None = None, guess: Any = None) -> _Block:
    """The memory cut into equal blocks along a new leading axis.

    The last block is filled up with copies of the last pattern, switched off by the prior.
    """
    num = len(memory)
    size = memory.geometry.tile(memory.patterns)[1] if block_size is None else block_size
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

    return _Block(
        start=jnp.arange(count, dtype=jnp.int32) * size,
        patterns=cut_all(memory.patterns),
        log_prior=None if prior is None else cut(prior, constant_values=-jnp.inf),
        prepared=cut_all(memory.prepared),
        guess=cut_all(guess),
    )


def _over_blocks(look: Any, start: Any, blocks: Any) -> tuple[Any, Any]:
    """`lax.scan` over blocks, whose derivative looks again instead of remembering."""
    if batch_size(blocks) == 1:
        carry, found = look(start, jax.tree.map(lambda leaf: leaf[0], blocks))
        return carry, jax.tree.map(lambda leaf: leaf[None], found)
    return jax.lax.scan(jax.checkpoint(look, prevent_cse=False), start, blocks)
