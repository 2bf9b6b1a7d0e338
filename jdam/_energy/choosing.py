"""Choice of β from data."""

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
from jdam._core.loops import bisect
from jdam._core.mesh import in_one_piece
from jdam._core.progress import check_progress, wait
from jdam._energy.energy import fit_queries
from jdam._energy.pairs import pairs
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory, check_memory

#: A query is told apart if its nearest pattern has the weight `WEIGHT`; at the suggested β, this
#: fraction of the queries is.
WEIGHT, QUANTILE = 0.99, 0.95
#: The largest number of patterns that are all compared, and the size of the sample of more.
MAX_PATTERNS, SAMPLE_SIZE = 256, 24
#: The mean of −log w below which a larger β is not likelier in a relevant way.
MAX_LOSS = 1e-4
BISECTIONS = 50
#: The range of the search for log β, with β in inverse units of the median gap.
LOG_BETA_RANGE = -16, 40

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
    """Return a β for recall, in inverse units of D, so that it scales with the unit of length.

    - **From the patterns alone**: a β at which 95 % of the patterns are told apart, that is, have
      99 % of the Gibbs weight at themselves. Of more than 256 patterns a sample of 24, one of each
      24th of them and the same in each call, is compared with all. The fraction of all patterns is
      then 92 %, with a standard error of 5 %. The standard error of β depends on how much the
      distances between neighbours vary: it is 2 % for normal vectors in 256 dimensions, 9 % in 16
      and 19 % in 2; 5 % for Gaussians in 8 dimensions and 30 % in 2; 70 % for vectors whose lengths
      are log-normal with σ = 1. `jdam.suggest_beta(memory, memory[:1000])` uses a larger sample.
    - **With queries**, better if they are distributed like those to come: a β at which 95 % of the
      queries are told apart, so that their nearest pattern, right or wrong, has 99 % of the weight.
      Recall then ends at the nearest pattern about as often.
    - **With queries and targets**, the indices of the patterns that the queries belong to: the most
      likely β. It maximises Σⱼ log w_targetⱼ(ξⱼ), which is concave in β, so that weights are
      calibrated probabilities. If a larger β is always likelier, because all queries are nearest to
      their targets, it is the smallest β at which the mean of −log w is 10⁻⁴. If targets are often
      not the nearest, it is small, and recall may mix patterns; the β from queries alone does not.
    - **With queries and labels**, the classes that the queries belong to: the most likely β for
      classes, the same with w summed over all patterns of a class.
    - **With `pattern_labels` alone**: the most likely β for the classes of the patterns, where each
      pattern is a query to all others (leave-one-out, as in neighbourhood components analysis,
      Goldberger et al. 2004). Of more than 256 patterns a sample of 256 is used. Patterns that are
      alone in their class are not used; if none is left, or all are of one class, the result is the
      one from the patterns alone.

    The logger "jdam" logs the criterion of the value at level DEBUG. Patterns that coincide cannot
    be told apart at any β, and count as one. All queries are compared with all patterns. Outside of
    `jax.jit` this is computed part by part, and Ctrl-C stops it.

    **Arguments:**

    - `memory`: N patterns.
    - `queries`: measures with one batch axis (Q,), or a list of single ones.
    - `targets`: (Q,), ints, the index of the pattern of each query.
    - `labels`: (Q,), ints or strings, the class of each query.
    - `pattern_labels`: (N,), the class of each pattern; None for `memory.values` if `labels` are
      given.
    - `progress`: as in `pairwise`.

    **Returns:** a scalar > 0; if all patterns are the same, 1 over their mean square norm.

    **Raises:** as `pairwise`; `TypeError`, `ValueError` or `IndexError` for targets that are no
    indices of patterns, for labels that no pattern has, for both targets and labels, and for either
    without queries.
    """
    check_memory(memory)
    if labels is not None:
        if targets is not None:
            raise ValueError("targets and labels are alternatives: give one of them")
        targets, pattern_labels = labels, _pattern_labels(memory, pattern_labels)
    progress = check_progress(progress)
    log_prior = in_one_piece(memory.log_weights)[: memory.capacity]
    label_sample: np.ndarray | None = None
    if queries is None:
        if targets is not None:
            raise ValueError("targets or labels need queries, one for each; got none")
        sampled = _sample(len(memory), log_prior)
        if pattern_labels is not None:
            label_sample = _sample_with_companions(memory, log_prior, pattern_labels)
            sampled = sampled if label_sample is None else label_sample
        takes_all = len(sampled) == memory.capacity and memory.layout is None
        measures, name = memory.patterns if takes_all else memory[sampled], "patterns"
    else:
        measures, name = fit_queries(memory, queries), "queries"
        if length_of(measures) == 0:
            raise ValueError("queries must hold at least one query; got 0")
    divergences = in_one_piece(pairs(memory, measures, "suggest_beta", progress))
    _check_divergences(divergences, name)
    if label_sample is not None:
        target_indices, classes = resolve_targets(
            memory, np.asarray(pattern_labels)[sampled], pattern_labels, len(sampled)
        )
        log_priors = jnp.tile(log_prior, (len(sampled), 1))
        log_priors = log_priors.at[jnp.arange(len(sampled)), sampled].set(-jnp.inf)
        beta = _most_likely_beta(divergences, log_priors, target_indices, classes)
        reason = f"is the likeliest for the classes of {len(sampled)} patterns, each left out"
    elif targets is None:
        beta = _separating_beta(divergences, log_prior)
        reason = f"separates 95 % of {len(divergences)} {name} from the other patterns"
    else:
        target_indices, classes = resolve_targets(memory, targets, pattern_labels, len(divergences))
        beta = _most_likely_beta(divergences, log_prior[None], target_indices, classes)
        reason = "is the likeliest for " + ("targets" if classes is None else "labels")
    scale, _ = memory.magnitudes()
    beta = _within_range(divergences, beta, in_one_piece(scale))
    if checks.is_concrete(beta):
        wait(beta)
        logger.debug("suggest_beta: %.4g %s", float(beta), reason)
    return beta


def neighbour_divergence(memory: Memory) -> Float[Array, ""]:
    """Return the median over patterns of the divergence to the nearest other pattern, a unit for β:

        u = medianᵢ minⱼ (D(Xᵢ, Xⱼ) − minₖ D(Xᵢ, Xₖ)), over j with a nonzero difference,

    which is medianᵢ min_{j≠i} D(Xᵢ, Xⱼ) if D(Xᵢ, Xᵢ) = 0. β·u is dimensionless: at a pattern,
    e^(−βu) is the ratio of the weight of its nearest neighbour to its own. Patterns that coincide
    count as one. Of more than 256 patterns a sample of 24 is used, the same in each call, as by
    `suggest_beta`; the standard error is then about that of β there.

    **Arguments:**

    - `memory`: the patterns; those of prior 0 are ignored.

    **Returns:** a scalar > 0, in units of D; if all patterns are the same, their mean square norm,
    which is 1/`suggest_beta`.

    **Raises:** as `pairwise`; `ValueError` for divergences that are NaN.
    """
    check_memory(memory)
    log_prior = in_one_piece(memory.log_weights)[: memory.capacity]
    sample = memory[_sample(len(memory), log_prior)]
    divergences = in_one_piece(pairs(memory, sample, "neighbour_divergence", None))
    _check_divergences(divergences, "patterns")
    scale, _ = memory.magnitudes()
    unit = _neighbour_median(divergences, log_prior)
    return 1 / _within_range(divergences, 1 / unit, in_one_piece(scale))


def _check_divergences(divergences: Float[Array, "Q N"], name: str) -> None:
    """Raise `ValueError` for concrete divergences that are NaN."""
    if checks.is_concrete(divergences):
        xp, values = checks.within_reach(divergences)
        if xp.isnan(values).any():
            raise ValueError(f"{name} must be at finite divergences from all patterns; got NaN")


@compiled(rounded=False)
def _neighbour_median(
    divergences: Float[Array, "Q N"], log_prior: Float[Array, " N"]
) -> Float[Array, ""]:
    """Return the median gap to the nearest distinct pattern; NaN if all patterns coincide."""
    gaps, _, distinct = _gaps_and_odds(divergences, log_prior[None])
    nearest_gap = jnp.where(distinct, gaps, jnp.inf).min(1)
    return jnp.nanmedian(jnp.where(nearest_gap < jnp.inf, nearest_gap, jnp.nan))


def _pattern_labels(memory: Memory, pattern_labels: ArrayLike | None) -> ArrayLike:
    """Return the class of each pattern: `pattern_labels`, or the values of the memory, one array
    (N,).
    """
    if pattern_labels is not None:
        return pattern_labels
    values = jax.tree.leaves(memory.values)
    if len(values) != 1 or np.ndim(values[0]) != 1:
        raise ValueError(
            "labels need pattern_labels, the class of each pattern, or a memory whose values are "
            "one array (N,); got neither"
        )
    labels: np.ndarray = np.asarray(values[0])[: len(memory)]
    return labels


def _sample(num: int, log_prior: Float[Array, " N"]) -> np.ndarray:
    """Return the indices of the patterns to compare, without those of prior 0."""
    active = np.arange(num)
    if checks.is_concrete(log_prior):
        active = np.flatnonzero(np.asarray(log_prior)[:num] != -np.inf)
    return _subsample(active, SAMPLE_SIZE)


def _subsample(active: np.ndarray, size: int) -> np.ndarray:
    """Return all indices if they are few, else one of each of `size` equal parts, drawn with a
    fixed seed.
    """
    if len(active) <= MAX_PATTERNS:
        return active
    positions = np.arange(size) + np.random.default_rng(0).random(size)
    sample: np.ndarray = active[(positions * len(active) / size).astype(int)]
    return sample


def _sample_with_companions(
    memory: Memory, log_prior: Float[Array, " N"], pattern_labels: ArrayLike
) -> np.ndarray | None:
    """Return the indices of patterns to compare with the others, without those of prior 0 or alone
    in their class; None if there are none, or only one class.
    """
    labels = _checked_labels(memory, pattern_labels)
    active = np.arange(len(labels))
    if checks.is_concrete(log_prior):
        active = np.flatnonzero(np.asarray(log_prior)[: len(labels)] != -np.inf)
    _, classes, counts = np.unique(labels[active], return_inverse=True, return_counts=True)
    eligible = active[counts[classes] > 1]
    return _subsample(eligible, MAX_PATTERNS) if len(eligible) and len(counts) > 1 else None


def _checked_labels(memory: Memory, pattern_labels: ArrayLike) -> np.ndarray:
    labels = np.asarray(pattern_labels)
    if labels.shape != (len(memory),):
        raise ValueError(
            f"pattern_labels must have shape (N,) = ({len(memory)},); got {labels.shape}"
        )
    return labels


def resolve_targets(
    memory: Memory, targets: ArrayLike, pattern_labels: ArrayLike | None, num: int
) -> tuple[Int[Array, " Q"], Int[Array, " N"] | None]:
    """Return the index of a pattern for each query, and the class of each pattern as a number.

    Without `pattern_labels`, `targets` are the indices, and the classes are None. With them,
    `targets` are labels, and the index is that of a pattern of the class.
    """
    if pattern_labels is None:
        return _checked_targets(memory, targets, num), None
    labels, target_labels = _checked_labels(memory, pattern_labels), np.asarray(targets)
    if target_labels.shape != (num,):
        raise ValueError(f"labels must have shape (Q,) = ({num},); got {target_labels.shape}")
    names, first_index, classes = np.unique(labels, return_index=True, return_inverse=True)
    position = np.searchsorted(names, target_labels).clip(max=len(names) - 1)
    unknown = target_labels[names[position] != target_labels]
    if unknown.size:
        raise ValueError(f"labels must be among those of the patterns; got {unknown[0]}")
    log_prior = in_one_piece(memory.log_weights)[: len(labels)]
    if checks.is_concrete(log_prior):
        active = labels[np.asarray(log_prior) != -np.inf]
        excluded = target_labels[~np.isin(target_labels, active)]
        if excluded.size:
            raise ValueError(
                f"labels must be of patterns that the prior leaves on; all of {excluded[0]} are off"
            )
    num_free = memory.capacity - len(memory)
    classes = np.concatenate([classes, np.full(num_free, classes[-1])])
    return jnp.asarray(first_index[position], jnp.int32), jnp.asarray(classes, jnp.int32)


def _checked_targets(memory: Memory, targets: ArrayLike, num: int) -> Int[Array, " Q"]:
    indices = jnp.asarray(targets)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"targets must be integers; got {indices.dtype}")
    if indices.shape != (num,):
        raise ValueError(f"targets must have shape (Q,) = ({num},); got {indices.shape}")
    log_prior = in_one_piece(memory.log_weights)[: memory.capacity]
    if checks.is_concrete(indices, log_prior):
        distinct, num = np.unique(np.asarray(indices)), memory.length_or_capacity
        for i in distinct[[0, -1]]:
            checks.index(i, num, "a memory")
        excluded = distinct[np.asarray(log_prior)[distinct % num] == -np.inf]
        if excluded.size:
            raise ValueError(
                f"targets must be switched on by the prior; pattern {excluded[0]} is off"
            )
    return memory.from_start(indices)


@compiled(rounded=False)
def _separating_beta(
    divergences: Float[Array, "Q N"], log_prior: Float[Array, " N"]
) -> Float[Array, ""]:
    """Return the β at which `QUANTILE` of the queries have the weight `WEIGHT` at their nearest
    pattern; NaN if all patterns coincide.
    """
    gaps, odds, distinct = _gaps_and_odds(divergences, log_prior[None])
    odds = jnp.where(distinct, odds, 0)
    nearest_gap = jnp.where(distinct, gaps, jnp.inf).min(1)
    unit = jnp.where(nearest_gap < jnp.inf, nearest_gap, 1)
    weight_ratio = WEIGHT / (1 - WEIGHT)
    # In units of 1/`unit`: at this β, Σ oddsₖ exp(−βgapₖ) is certainly small enough.
    upper = jnp.maximum(jnp.log(odds.sum(1) * weight_ratio), 0)

    def too_small(scaled_beta: Array) -> Array:
        mass_of_others = (odds * jnp.exp(-(scaled_beta / unit)[:, None] * gaps)).sum(1)
        return ~(mass_of_others * weight_ratio <= 1)  # NaN counts as too small

    _, roots = bisect(too_small, jnp.zeros_like(upper), upper, BISECTIONS, gaps)
    betas = jnp.where(nearest_gap < jnp.inf, roots / unit, jnp.nan)
    return jnp.nanquantile(betas, QUANTILE)


@compiled(rounded=False)
def _most_likely_beta(
    divergences: Float[Array, "Q N"],
    log_prior: Float[Array, "#Q N"],
    targets: Int[Array, " Q"],
    classes: Int[Array, " N"] | None,
) -> Float[Array, ""]:
    """Return the β that maximises the mean log weight of the targets, or of their classes; NaN if
    all patterns coincide.
    """
    gaps, odds, distinct = _gaps_and_odds(divergences, log_prior)
    unit = jnp.nanmedian(jnp.where(distinct, gaps, jnp.nan))
    gaps, rows = gaps / jnp.where(unit > 0, unit, 1), jnp.arange(len(gaps), dtype=jnp.int32)
    if classes is None:  # patterns that coincide with the target count as it
        in_class = jnp.abs(gaps - gaps[rows, targets][:, None]) <= _gap_tolerance(gaps)
    else:
        in_class = classes[None] == classes[targets][:, None]
    log_odds = jnp.where(odds > 0, jnp.log(jnp.where(odds > 0, odds, 1)), -jnp.inf)

    def loss_and_slope(log_beta: Array) -> tuple[Array, Array]:
        """Return the mean of −log Σ w over the class, and its derivative in β."""
        logits = log_odds - jnp.exp(log_beta) * gaps
        log_mass, log_class_mass = (
            jax.nn.logsumexp(logits, 1, where=where) for where in (odds > 0, in_class)
        )
        mean_gap, class_gap = (
            (jax.nn.softmax(logits, 1, where=where) * gaps).sum(1) for where in (odds > 0, in_class)
        )
        return (log_mass - log_class_mass).mean(), (class_gap - mean_gap).mean()

    # The loss is convex in β for classes of single patterns, else it may have several minima.
    grid = jnp.arange(*LOG_BETA_RANGE, dtype=gaps.dtype)
    losses = jax.lax.map(lambda log_beta: loss_and_slope(log_beta)[0], grid)
    start = grid[jnp.argmax(losses <= jnp.maximum(jnp.nanmin(losses), MAX_LOSS))]

    def too_small(log_beta: Array) -> Array:
        loss, slope = loss_and_slope(log_beta)
        return (slope < 0) & (loss > MAX_LOSS)

    low, high = bisect(too_small, start - 1, start + 1, BISECTIONS, gaps)
    result: Array = jnp.exp((low + high) / 2) / unit
    return result


def _gaps_and_odds(
    divergences: Float[Array, "Q N"], log_prior: Float[Array, "#Q N"]
) -> tuple[Float[Array, "Q N"], Float[Array, "Q N"], Bool[Array, "Q N"]]:
    """Compare all patterns with the nearest one of each query.

    **Returns:** the gaps D(ξ, Xₖ) − min D; the odds πₖ/π of the nearest; and whether a pattern
    counts and does not coincide with the nearest.
    """
    log_prior = jnp.broadcast_to(log_prior, divergences.shape)
    active = log_prior > -jnp.inf
    distances = jnp.where(active, divergences, jnp.inf)
    nearest = distances.argmin(1)[:, None]
    least = distances.min(1, keepdims=True)
    gaps = jnp.where(active, divergences - least, 0)
    log_odds = jnp.where(active, log_prior - jnp.take_along_axis(log_prior, nearest, 1), 0)
    odds = jnp.where(active, jnp.exp(log_odds), 0)
    sizes = jnp.where(active, jnp.abs(divergences), 0)
    return gaps, odds, active & (gaps > _gap_tolerance(sizes))


def _gap_tolerance(divergences: Float[Array, "Q N"]) -> Float[Array, "Q 1"]:
    """Return the largest rounding error of the divergences, below which patterns coincide."""
    rounding = 64 * float(jnp.finfo(divergences.dtype).eps)
    return rounding * divergences.max(1, keepdims=True)


@compiled(rounded=False)
def _within_range(
    divergences: Float[Array, "Q N"], beta: Float[Array, ""], scale: Float[Array, ""]
) -> Float[Array, ""]:
    """Return β within the range of its dtype; 1/scale² if it is NaN because all patterns are the
    same; NaN if a divergence is NaN.
    """
    limits = jnp.finfo(beta.dtype)
    default = 1 / jnp.where(scale > 0, scale, 1) ** 2
    result = jnp.where(jnp.isnan(beta), default, beta)
    result = jnp.where(jnp.isnan(divergences).any(), jnp.nan, result)
    return jnp.clip(result, float(limits.tiny), float(limits.max) / 4)
