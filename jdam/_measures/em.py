"""Gaussian mixtures fitted to samples: expectation–maximisation from k-means++."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jdam._core.lapack import cholesky, solve_lower
from jdam._core.linalg import safe_log
from jdam._core.loops import repeat, while_loop

#: Starts, of which the likeliest is kept; rounds of k-means each; and of EM, at most.
STARTS, LLOYD, MOST = 4, 10, 200
#: What variances are floored at, in units of the samples' own, and when a mean log-likelihood has
#: come to rest.
FLOOR, REST = 1e-6, 1e-5
#: And in units of their component's own times the machine epsilon, for the sake of Cholesky factors
#: where components differ a lot in size.
ROUNDING = 8


class Components(NamedTuple):
    """The parameters of a mixture, covariances as Cholesky factors."""

    log_weights: Float[Array, " K"]
    means: Float[Array, "K d"]
    factors: Float[Array, "K d d"]


class _Samples(NamedTuple):
    """Weighted samples, of mean 0 and mean variance 1."""

    points: Float[Array, "n d"]
    weights: Float[Array, " n"]


class _Fit(NamedTuple):
    components: Components
    likelihood: Float[Array, ""]  # the mean log-likelihood before the last round
    gain: Float[Array, ""]
    rounds: Int[Array, ""]


def fit_mixture(
    samples: Float[Array, "n d"],
    weights: Float[Array, " n"],
    key: Array,
    *,
    num_components: int,
) -> Components:
    """The likeliest of some local maxima of Σₙ aₙ log Σₖ pₖ N(xₙ; mₖ, Σₖ)."""
    centre = weights @ samples
    points = samples - centre[None]
    centre_again = weights @ points  # of samples far from zero the rest has more digits
    points = points - centre_again[None]
    unit = jnp.sqrt(weights @ jnp.vecdot(points, points) / samples.shape[1])
    unit = jnp.where(unit > 0, unit, 1)
    held = _Samples(points / unit, weights)
    keys = jax.random.split(key, STARTS)
    fits = jax.vmap(lambda key: _maximise(held, _start(key, held, num_components)))(keys)
    best: Components = jax.tree.map(lambda leaf: leaf[fits.likelihood.argmax()], fits.components)
    means = centre[None] + (centre_again[None] + unit * best.means)
    return Components(best.log_weights, means, unit * best.factors)


def _start(key: Array, samples: _Samples, num: int) -> Components:
    """Clusters of k-means from k-means++: each centre a sample, drawn with the square of its
    distance from those before."""
    points, weights = samples
    keys = jax.random.split(key, num)
    first = points[_draw(keys[0], weights)]

    def add(i: Int[Array, ""], centres: Float[Array, "K d"]) -> Float[Array, "K d"]:
        taken = jnp.arange(num, dtype=jnp.int32) < i
        gaps = jnp.where(taken[None], _squares(points, centres), jnp.inf).min(1)
        # Of fewer different samples than components some are taken twice.
        chances = jnp.where((weights * gaps).sum() > 0, weights * gaps, weights)
        return centres.at[i].set(points[_draw(keys[i], chances)])

    def regroup(centres: Float[Array, "K d"]) -> Float[Array, "K d"]:
        shares = _nearest(samples, centres)
        total = shares.sum(0)[:, None]
        return jnp.where(total > 0, shares.T @ points / jnp.where(total > 0, total, 1), centres)

    centres = jax.lax.fori_loop(1, num, add, jnp.broadcast_to(first, (num, first.size)))
    centres = repeat(LLOYD, regroup, centres, samples)
    return _maximised(samples, _nearest(samples, centres))


def _draw(key: Array, chances: Float[Array, " n"]) -> Int[Array, ""]:
    return jax.random.categorical(key, safe_log(chances))


def _squares(points: Float[Array, "n d"], centres: Float[Array, "K d"]) -> Float[Array, "n K"]:
    gaps = points[:, None] - centres[None]
    return jnp.vecdot(gaps, gaps)


def _nearest(samples: _Samples, centres: Float[Array, "K d"]) -> Float[Array, "n K"]:
    """The weight of each sample, at its nearest centre."""
    nearest = _squares(samples.points, centres).argmin(1)
    return samples.weights[:, None] * jax.nn.one_hot(nearest, len(centres), dtype=centres.dtype)


def _maximise(samples: _Samples, start: Components) -> _Fit:
    """EM until the likelihood rests."""

    def turn(fit: _Fit) -> _Fit:
        joint = log_densities(samples.points, fit.components) + fit.components.log_weights[None]
        each = jax.nn.logsumexp(joint, axis=1)
        likelihood = samples.weights @ each
        shares = samples.weights[:, None] * jnp.exp(joint - each[:, None])
        gain = likelihood - fit.likelihood
        return _Fit(_maximised(samples, shares), likelihood, gain, fit.rounds + 1)

    def rising(fit: _Fit) -> Array:
        goes_on: Array = (fit.rounds < MOST) & ((fit.rounds < 2) | (fit.gain > REST))
        return goes_on

    low = jnp.full((), -jnp.inf, samples.points.dtype)
    begin = _Fit(start, low, -low, jnp.array(0, jnp.int32))
    end: _Fit = while_loop(rising, turn, begin, samples)
    return end


def _maximised(samples: _Samples, shares: Float[Array, "n K"]) -> Components:
    """The likeliest components for these shares of the samples."""
    total = shares.sum(0)
    safe = jnp.where(total > 0, total, 1)
    means = shares.T @ samples.points / safe[:, None]

    def covariance(share: Float[Array, " n"], mean: Float[Array, " d"]) -> Float[Array, "d d"]:
        gaps = samples.points - mean[None]
        return gaps.T @ (share[:, None] * gaps)

    covariances = jax.vmap(covariance)(shares.T, means) / safe[:, None, None]
    own = jnp.trace(covariances, axis1=1, axis2=2)
    floor = FLOOR + ROUNDING * jnp.finfo(means.dtype).eps * own
    diagonal = jnp.eye(samples.points.shape[1], dtype=means.dtype)
    covariances = covariances + floor[:, None, None] * diagonal[None]
    return Components(safe_log(total), means, cholesky(covariances))


def log_densities(points: Float[Array, "n d"], components: Components) -> Float[Array, "n K"]:
    """log N(xₙ; mₖ, LₖLₖᵀ) for lower triangular Lₖ."""

    def one(mean: Float[Array, " d"], factor: Float[Array, "d d"]) -> Float[Array, " n"]:
        white = solve_lower(factor, (points - mean[None]).T)
        volume = jnp.log(jnp.abs(jnp.diagonal(factor))).sum()
        constant = mean.size * jnp.log(2 * jnp.asarray(jnp.pi, mean.dtype)) / 2
        logs: Array = -(white * white).sum(0) / 2 - volume - constant
        return logs

    found: Array = jax.vmap(one)(components.means, components.factors).T
    return found
