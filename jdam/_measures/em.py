"""Maximum likelihood fit of a Gaussian mixture to weighted samples: expectation–maximisation (EM)
from k-means++ starts. `jdam.GaussianMixture.from_samples` is the public function."""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from jdam._core.lapack import cholesky, solve_lower
from jdam._core.linalg import safe_log
from jdam._core.loops import while_loop
from jdam._measures.k_means import assigned_masses, k_means

#: Number of random starts, of which the one of largest likelihood is returned; and the largest
#: number of EM iterations.
STARTS, MOST = 4, 200
#: Lower bound on the variances, in units of the mean variance of the samples; and the gain of mean
#: log-likelihood, in nats, at which EM stops.
FLOOR, REST = 1e-6, 1e-5
#: A second lower bound on the variances, in units of machine epsilon times the trace of the
#: component's covariance: Cholesky needs it where components differ much in size.
ROUNDING = 8


#: The logarithms of the weights (K,) of the components of a mixture, their means (K, d), and
#: Cholesky factors (K, d, d) of their covariances.
Components: TypeAlias = tuple[Array, Array, Array]


class _Fit(NamedTuple):
    """The state of the EM loop."""

    components: Components
    likelihood: Float[Array, ""]  # mean log-likelihood before the last M step
    gain: Float[Array, ""]  # its increase in the last iteration
    rounds: Int[Array, ""]


def fit_mixture(
    samples: Float[Array, "n d"],
    weights: Float[Array, " n"],
    key: Array,
    *,
    num_components: int,
) -> Components:
    """The components of largest likelihood Σₙ aₙ log Σₖ pₖ N(xₙ; mₖ, Σₖ) among those at which EM
    from `STARTS` random starts ends."""
    # Samples far from zero are centred twice, since the second mean is rounded less.
    centre = weights @ samples
    points = samples - centre[None]
    centre_again = weights @ points
    points = points - centre_again[None]
    unit = jnp.sqrt(weights @ jnp.vecdot(points, points) / samples.shape[1])
    unit = jnp.where(unit > 0, unit, 1)
    points = points / unit

    def fit_from(key: Array) -> _Fit:
        centres = k_means(key, points, weights, num=num_components)
        start = _m_step(points, assigned_masses(points, weights, centres))
        return _run_em(points, weights, start)

    fits = jax.vmap(fit_from)(jax.random.split(key, STARTS))
    best = fits.likelihood.argmax()
    log_weights, means, factors = (leaf[best] for leaf in fits.components)
    return log_weights, centre[None] + (centre_again[None] + unit * means), unit * factors


def _run_em(points: Float[Array, "n d"], weights: Float[Array, " n"], start: Components) -> _Fit:
    """EM from `start` until the mean log-likelihood rises by `REST` or less."""

    def body_fun(fit: _Fit) -> _Fit:
        log_weights, means, factors = fit.components
        joint = log_densities(points, means, factors) + log_weights[None]
        log_density = jax.nn.logsumexp(joint, axis=1)
        likelihood = weights @ log_density
        masses = weights[:, None] * jnp.exp(joint - log_density[:, None])
        gain = likelihood - fit.likelihood
        return _Fit(_m_step(points, masses), likelihood, gain, fit.rounds + 1)

    def cond_fun(fit: _Fit) -> Array:
        result: Array = (fit.rounds < MOST) & ((fit.rounds < 2) | (fit.gain > REST))
        return result

    low = jnp.full((), -jnp.inf, points.dtype)
    initial = _Fit(start, low, -low, jnp.array(0, jnp.int32))
    final: _Fit = while_loop(cond_fun, body_fun, initial, points, weights)
    return final


def _m_step(points: Float[Array, "n d"], masses: Float[Array, "n K"]) -> Components:
    """The M step: the components of largest likelihood, given the mass aₙrₙₖ of each sample at
    each component (its weight times its responsibility)."""
    total = masses.sum(0)
    safe = jnp.where(total > 0, total, 1)
    means = masses.T @ points / safe[:, None]

    def covariance(mass: Float[Array, " n"], mean: Float[Array, " d"]) -> Float[Array, "d d"]:
        gaps = points - mean[None]
        return gaps.T @ (mass[:, None] * gaps)

    covariances = jax.vmap(covariance)(masses.T, means) / safe[:, None, None]
    traces = jnp.trace(covariances, axis1=1, axis2=2)
    floor = FLOOR + ROUNDING * jnp.finfo(means.dtype).eps * traces
    diagonal = jnp.eye(points.shape[1], dtype=means.dtype)
    covariances = covariances + floor[:, None, None] * diagonal[None]
    return safe_log(total), means, cholesky(covariances)


def log_densities(
    points: Float[Array, "n d"], means: Float[Array, "K d"], factors: Float[Array, "K d d"]
) -> Float[Array, "n K"]:
    """Log-densities log N(xₙ; mₖ, LₖLₖᵀ) in nats, for lower triangular Lₖ."""

    def of_component(mean: Float[Array, " d"], factor: Float[Array, "d d"]) -> Float[Array, " n"]:
        whitened = solve_lower(factor, (points - mean[None]).T)
        log_volume = jnp.log(jnp.abs(jnp.diagonal(factor))).sum()
        constant = mean.size * jnp.log(2 * jnp.asarray(jnp.pi, mean.dtype)) / 2
        logs: Array = -(whitened * whitened).sum(0) / 2 - log_volume - constant
        return logs

    result: Array = jax.vmap(of_component)(means, factors).T
    return result
