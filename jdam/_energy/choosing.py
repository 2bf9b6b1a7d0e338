"""Choosing β from data."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from jdam._core import checks
from jdam._core.batching import batch_size as length_of
from jdam._core.compile import compiled
from jdam._core.loops import repeat
from jdam._core.mesh import in_one_piece
from jdam._core.progress import check_progress, wait
from jdam._energy.energy import fit_queries
from jdam._energy.pairs import pairs
from jdam._measures.base import AnyMeasure
from jdam._memory.checked import length_or_capacity
from jdam._memory.memory import Memory, check_memory

#: Told apart is a query whose nearest pattern has this weight, and at β this share of queries is.
WEIGHT, SHARE = 0.99, 0.95
#: Of more patterns than this, how many stand for all of them.
ALL, SAMPLE = 256, 24
#: A mean of −log w below which a larger β is not likelier in any way that matters.
CERTAIN = 1e-4
HALVINGS = 50
#: In which range to look for log β, in units of the median gap.
SPAN = -16, 40

logger = logging.getLogger("jdam")


def suggest_beta(
    memory: Memory,
    queries: AnyMeasure | None = None,
    targets: ArrayLike | None = None,
    *,
    labels: ArrayLike | None = None,
    pattern_labels: ArrayLike | None = None,
    progress: bool | None = None,
) -> Float[Array, ""]:
    """A β to recall with, in the inverse units of D: it follows the unit of length.

    - **From the patterns alone** one at which they are told apart: 95 % of them have 99 % of the
      Gibbs weight at themselves. Of more than 256 patterns 24 are asked, the same each time, one of
      each 24th of them, and compared with all, so that 95 % is 92 % of all, with a standard error
      of 5 %. That of β depends on how much the distances between neighbours vary: it is 2 % for
      normal vectors in 256 dimensions, 9 % in 16 and 19 % in 2; 5 % for Gaussians in 8 dimensions
      and 30 % in 2; 70 % for vectors whose lengths are log-normal with σ = 1. Where that matters,
      more patterns can be asked: `jdam.suggest_beta(memory, memory[:1000])`.
    - **With queries**, better, if they are as those to come: one at which 95 % of these are told
      apart, so that their nearest pattern has 99 % of the weight, right or wrong. Recall then
      ends at the nearest pattern about as often, and need not pass by others.
    - **With queries and targets**, the indices of the patterns that they belong to, the likeliest:
      it maximises Σⱼ log w_targetⱼ(ξⱼ), which is concave in β, so that weights are calibrated
      probabilities. Where a larger β is always likelier, as all queries are nearest to their
      targets, the first at which the mean of −log w is 10⁻⁴. Where targets are often not the
      nearest it is small, and recall may mix patterns: the second way makes it decide.
    - **With queries and labels**, the classes that they belong to, the likeliest for classes: the
      same with w summed over all patterns of a class.
    - **With `pattern_labels` alone**, the likeliest for the classes of the patterns, each asked of
      all others (leave-one-out, as in neighbourhood components analysis, Goldberger et al. 2004).
      Of more than 256 patterns 256 are asked. Patterns alone in their class are not; where none is
      left, or all are of one class, the result is that from the patterns alone.

    The reason of the value is logged at level DEBUG by the logger "jdam". Patterns that coincide
    are not told apart at any β, and count as one. All queries are compared with all patterns:
    outside of `jax.jit` part by part, and Ctrl-C stops that.

    **Arguments:** a `memory`; `queries` with one batch axis (Q,), or a list; `targets` (Q,), ints;
    `labels` (Q,), ints or strings; `pattern_labels` (N,), the class of each pattern, those of
    `memory.values` if None; `progress`: a bar, as of `pairwise`.

    **Returns:** a scalar > 0; where all patterns are the same, 1 over the mean square of their
    size.

    **Raises:** as `pairwise`; `TypeError`, `ValueError` or `IndexError` for targets that are no
    indices of patterns, labels of no pattern, both, or either without queries.
    """
    check_memory(memory)
    if labels is not None:
        if targets is not None:
            raise ValueError("targets and labels say the same in two ways: give one of them")
        targets, pattern_labels = labels, _labels_of(memory, pattern_labels)
    progress = check_progress(progress)
    log_prior = in_one_piece(memory.log_weights)[: memory.capacity]
    labelled: np.ndarray | None = None
    if queries is None:
        if targets is not None:
            raise ValueError("targets or labels need queries, whose they are; got none")
        own = _sample(len(memory), log_prior)
        if pattern_labels is not None:
            labelled = _with_others(memory, log_prior, pattern_labels)
            own = own if labelled is None else labelled
        whole = len(own) == memory.capacity and memory.layout is None
        asked, who = memory.patterns if whole else memory[own], "patterns"
    else:
        asked, who = fit_queries(memory, queries), "queries"
        if length_of(asked) == 0:
            raise ValueError("queries must hold at least one query; got 0")
    divergences = in_one_piece(pairs(memory, asked, "suggest_beta", progress))
    _check_divergences(divergences, who)
    if labelled is not None:
        owner, classes = owners(memory, np.asarray(pattern_labels)[own], pattern_labels, len(own))
        others = jnp.tile(log_prior, (len(own), 1)).at[jnp.arange(len(own)), own].set(-jnp.inf)
        beta = _likeliest(divergences, others, owner, classes)
        reason = f"is the likeliest for the classes of {len(own)} patterns, each left out"
    elif targets is None:
        beta = _apart(divergences, log_prior)
        reason = f"tells 95 % of {len(divergences)} {who} apart"
    else:
        owner, classes = owners(memory, targets, pattern_labels, len(divergences))
        beta = _likeliest(divergences, log_prior[None], owner, classes)
        reason = "is the likeliest for " + ("targets" if classes is None else "labels")
    scale, _ = memory.magnitudes()
    beta = _positive(beta, in_one_piece(scale), divergences)
    if checks.is_concrete(beta):
        wait(beta)
        logger.debug("suggest_beta: %.4g %s", float(beta), reason)
    return beta


def neighbour_divergence(memory: Memory) -> Float[Array, ""]:
    """The median over patterns of the divergence to the nearest other pattern, a unit for β:

        u = medianᵢ minⱼ (D(Xᵢ, Xⱼ) − minₖ D(Xᵢ, Xₖ)), over j at which the difference is not 0,

    which is medianᵢ min_{j≠i} D(Xᵢ, Xⱼ) where D(Xᵢ, Xᵢ) = 0. β·u is a number without unit:
    e^(−βu) is the weight of a pattern's nearest neighbour at the pattern, in units of its own.
    Patterns that coincide count as one. Of more than 256 patterns 24 are asked, as by
    `suggest_beta`, the same each time; the standard error then is about that of β there.

    **Arguments:** a `memory`. Patterns that its prior switches off play no part.

    **Returns:** a scalar > 0, in units of D; where all patterns are the same, the mean square of
    their size, as 1/`suggest_beta`.

    **Raises:** as `pairwise`; `ValueError` for divergences that are NaN.
    """
    check_memory(memory)
    log_prior = in_one_piece(memory.log_weights)[: memory.capacity]
    asked = memory[_sample(len(memory), log_prior)]
    divergences = in_one_piece(pairs(memory, asked, "neighbour_divergence", None))
    _check_divergences(divergences, "patterns")
    scale, _ = memory.magnitudes()
    unit = _neighbour(divergences, log_prior)
    return 1 / _positive(1 / unit, in_one_piece(scale), divergences)


def _check_divergences(divergences: Float[Array, "Q N"], who: str) -> None:
    """Raise `ValueError` for concrete divergences that are NaN."""
    if checks.is_concrete(divergences):
        xp, values = checks.within_reach(divergences)
        if xp.isnan(values).any():
            raise ValueError(f"{who} must be at finite divergences from all patterns; got NaN")


@compiled()
def _neighbour(divergences: Float[Array, "Q N"], log_prior: Float[Array, " N"]) -> Float[Array, ""]:
    """NaN where no two patterns can be told apart."""
    gaps, _, rivals = _gaps(divergences, log_prior[None])
    least = jnp.where(rivals, gaps, jnp.inf).min(1)
    return jnp.nanmedian(jnp.where(least < jnp.inf, least, jnp.nan))


def _labels_of(memory: Memory, pattern_labels: ArrayLike | None) -> ArrayLike:
    """The classes of the patterns: those given, or the values of the memory, one array (N,)."""
    if pattern_labels is not None:
        return pattern_labels
    values = jax.tree.leaves(memory.values)
    if len(values) != 1 or np.ndim(values[0]) != 1:
        raise ValueError(
            "labels need pattern_labels, the class of each pattern, or a memory whose values are "
            "one array (N,); got neither"
        )
    found: np.ndarray = np.asarray(values[0])[: len(memory)]
    return found


def _sample(num: int, log_prior: Float[Array, " N"]) -> np.ndarray:
    """Which patterns to ask, of those that are on."""
    on = np.arange(num)
    if checks.is_concrete(log_prior):
        on = np.flatnonzero(np.asarray(log_prior)[:num] != -np.inf)
    return _some(on, SAMPLE)


def _some(on: np.ndarray, size: int) -> np.ndarray:
    """All if they are few, else one at random of each of equal parts, the same ones each time."""
    if len(on) <= ALL:
        return on
    parts = np.arange(size) + np.random.default_rng(0).random(size)
    chosen: np.ndarray = on[(parts * len(on) / size).astype(int)]
    return chosen


def _with_others(
    memory: Memory, log_prior: Float[Array, " N"], pattern_labels: ArrayLike
) -> np.ndarray | None:
    """Which patterns to ask of the others, of those that are on and not alone in their class; None
    where there is none, or one class."""
    labels = _checked_labels(memory, pattern_labels)
    on = np.arange(len(labels))
    if checks.is_concrete(log_prior):
        on = np.flatnonzero(np.asarray(log_prior)[: len(labels)] != -np.inf)
    _, classes, counts = np.unique(labels[on], return_inverse=True, return_counts=True)
    several = on[counts[classes] > 1]
    return _some(several, ALL) if len(several) and len(counts) > 1 else None


def _checked_labels(memory: Memory, pattern_labels: ArrayLike) -> np.ndarray:
    labels = np.asarray(pattern_labels)
    if labels.shape != (len(memory),):
        raise ValueError(
            f"pattern_labels must have shape (N,) = ({len(memory)},); got {labels.shape}"
        )
    return labels


def owners(
    memory: Memory, targets: ArrayLike, pattern_labels: ArrayLike | None, num: int
) -> tuple[Int[Array, " Q"], Int[Array, " N"] | None]:
    """The pattern that each of `num` queries belongs to, and no classes; or where `pattern_labels`
    are given and targets are labels, a pattern of its class, and the classes by number."""
    if pattern_labels is None:
        return _indices(memory, targets, num), None
    labels, wanted = _checked_labels(memory, pattern_labels), np.asarray(targets)
    if wanted.shape != (num,):
        raise ValueError(f"labels must have shape (Q,) = ({num},); got {wanted.shape}")
    names, first, classes = np.unique(labels, return_index=True, return_inverse=True)
    place = np.searchsorted(names, wanted).clip(max=len(names) - 1)
    unknown = wanted[names[place] != wanted]
    if unknown.size:
        raise ValueError(f"labels must be among those of the patterns; got {unknown[0]}")
    free = memory.capacity - len(memory)
    classes = np.concatenate([classes, np.full(free, classes[-1])])
    return jnp.asarray(first[place], jnp.int32), jnp.asarray(classes, jnp.int32)


def _indices(memory: Memory, targets: ArrayLike, num: int) -> Int[Array, " Q"]:
    indices = jnp.asarray(targets)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"targets must be integers; got {indices.dtype}")
    if indices.shape != (num,):
        raise ValueError(f"targets must have shape (Q,) = ({num},); got {indices.shape}")
    log_prior = in_one_piece(memory.log_weights)[: memory.capacity]
    if checks.is_concrete(indices, log_prior):
        found, num = np.unique(np.asarray(indices)), length_or_capacity(memory)
        for i in found[[0, -1]]:
            checks.index(i, num, "a memory")
        off = found[np.asarray(log_prior)[found % num] == -np.inf]
        if off.size:
            raise ValueError(f"targets must be switched on by the prior; pattern {off[0]} is off")
    return memory.from_start(indices)


@compiled()
def _apart(divergences: Float[Array, "Q N"], log_prior: Float[Array, " N"]) -> Float[Array, ""]:
    """NaN where no two patterns can be told apart."""
    gaps, odds, rivals = _gaps(divergences, log_prior[None])
    odds = jnp.where(rivals, odds, 0)
    least = jnp.where(rivals, gaps, jnp.inf).min(1)
    unit = jnp.where(least < jnp.inf, least, 1)
    wanted = WEIGHT / (1 - WEIGHT)
    # Of βD, D the gap to the nearest rival: Σ oddsₖ exp(−βgapₖ) is surely small enough at the top.
    top = jnp.maximum(jnp.log(odds.sum(1) * wanted), 0)

    def halve(ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        rest = (odds * jnp.exp(-(middle / unit)[:, None] * gaps)).sum(1)
        enough = rest * wanted <= 1
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    _, found = repeat(HALVINGS, halve, (jnp.zeros_like(top), top), gaps)
    betas = jnp.where(least < jnp.inf, found / unit, jnp.nan)
    return jnp.nanquantile(betas, SHARE)


@compiled()
def _likeliest(
    divergences: Float[Array, "Q N"],
    log_prior: Float[Array, "#Q N"],
    targets: Int[Array, " Q"],
    classes: Int[Array, " N"] | None,
) -> Float[Array, ""]:
    """NaN likewise."""
    gaps, odds, rivals = _gaps(divergences, log_prior)
    unit = jnp.nanmedian(jnp.where(rivals, gaps, jnp.nan))
    gaps, rows = gaps / jnp.where(unit > 0, unit, 1), jnp.arange(len(gaps), dtype=jnp.int32)
    if classes is None:  # what coincides with the target is it
        own = jnp.abs(gaps - gaps[rows, targets][:, None]) <= _tie(gaps)
    else:
        own = classes[None] == classes[targets][:, None]
    log_odds = jnp.where(odds > 0, jnp.log(jnp.where(odds > 0, odds, 1)), -jnp.inf)

    def loss_and_slope(log_beta: Array) -> tuple[Array, Array]:
        """The mean of −log Σ w over the class, and its derivative in β."""
        logits = log_odds - jnp.exp(log_beta) * gaps
        total, part = (jax.nn.logsumexp(logits, 1, where=where) for where in (odds > 0, own))
        mean, of_class = (
            (jax.nn.softmax(logits, 1, where=where) * gaps).sum(1) for where in (odds > 0, own)
        )
        return (total - part).mean(), (of_class - mean).mean()

    # The loss is convex in β where classes are single patterns, else it may have several minima.
    grid = jnp.arange(*SPAN, dtype=gaps.dtype)
    losses = jax.lax.map(lambda log_beta: loss_and_slope(log_beta)[0], grid)
    best = grid[jnp.argmax(losses <= jnp.maximum(jnp.nanmin(losses), CERTAIN))]

    def halve(ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        loss, slope = loss_and_slope(middle)
        more = (slope < 0) & (loss > CERTAIN)
        return jnp.where(more, middle, low), jnp.where(more, high, middle)

    low, high = repeat(HALVINGS, halve, (best - 1, best + 1), gaps)
    result: Array = jnp.exp((low + high) / 2) / unit
    return result


def _gaps(
    divergences: Float[Array, "Q N"], log_prior: Float[Array, "#Q N"]
) -> tuple[Float[Array, "Q N"], Float[Array, "Q N"], Bool[Array, "Q N"]]:
    """How much farther than the nearest all patterns are, their prior in units of its, and which
    of them are patterns that do not coincide with it."""
    log_prior = jnp.broadcast_to(log_prior, divergences.shape)
    on = log_prior > -jnp.inf
    distances = jnp.where(on, divergences, jnp.inf)
    nearest = distances.argmin(1)[:, None]
    lowest = distances.min(1, keepdims=True)
    gaps = jnp.where(on, divergences - lowest, 0)
    shares = jnp.where(on, log_prior - jnp.take_along_axis(log_prior, nearest, 1), 0)
    odds = jnp.where(on, jnp.exp(shares), 0)
    size = jnp.where(on, jnp.abs(divergences), 0)
    return gaps, odds, on & (gaps > _tie(size))


def _tie(divergences: Float[Array, "Q N"]) -> Float[Array, "Q 1"]:
    """What divergences of patterns that coincide may differ by."""
    rounding = 64 * float(jnp.finfo(divergences.dtype).eps)
    return rounding * divergences.max(1, keepdims=True)


@compiled()
def _positive(
    beta: Float[Array, ""], scale: Float[Array, ""], divergences: Float[Array, "Q N"]
) -> Float[Array, ""]:
    """Return β within the range of its dtype; 1/scale² where it is NaN, because all patterns are
    the same; NaN where a divergence is NaN."""
    limits = jnp.finfo(beta.dtype)
    alone = 1 / jnp.where(scale > 0, scale, 1) ** 2
    chosen = jnp.where(jnp.isnan(beta), alone, beta)
    chosen = jnp.where(jnp.isnan(divergences).any(), jnp.nan, chosen)
    return jnp.clip(chosen, float(limits.tiny), float(limits.max) / 4)
