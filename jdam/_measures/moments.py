"""Means, and factors of covariances, of samples: with the digits that samples far from zero leave,
and with derivatives where covariances are singular and weights vanish."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam._core.compile import compiled
from jdam._core.derivatives import full_precision
from jdam._core.lapack import qr, svd, triangle
from jdam._core.linalg import long_sum, psd_root


@compiled()
def weighted_mean(
    points: Float[Array, "*batch n d"], weights: Float[Array, "*batch n"]
) -> Float[Array, "*batch d"]:
    """Σ aₖxₖ."""
    return _mean(points, weights)


def _mean(points: Array, weights: Array) -> Array:
    return long_sum((weights[..., None] * points).mT)


@compiled()
def moments(
    samples: Float[Array, "*batch n d"], weights: Float[Array, "*batch n"]
) -> tuple[Float[Array, "*batch d"], Float[Array, "*batch d r"]]:
    """The weighted mean, and a factor of the weighted covariance: the weighted centred samples
    where n < d, their triangular QR factor otherwise."""
    # About a sample, then about the mean so found: each time less is left to round.
    heaviest = weights.argmax(-1)[..., None, None]
    centre = jax.lax.stop_gradient(jnp.take_along_axis(samples, heaviest, axis=-2))
    shift = jax.lax.stop_gradient(_mean(samples - centre, weights)[..., None, :])
    rest = (samples - centre) - shift
    offset = _mean(rest, weights)[..., None, :]
    mean = centre + (shift + offset)
    return mean[..., 0, :], factor_of(rest - offset, weights)


@jax.custom_jvp
def factor_of(centred: Float[Array, "*batch n d"], weights: Float[Array, "*batch n"]) -> Array:
    """A factor L of Σ aₖcₖcₖᵀ."""
    scaled = jnp.sqrt(weights)[..., None] * centred
    return (scaled if centred.shape[-2] < centred.shape[-1] else triangle(scaled)).mT


@factor_of.defjvp
@full_precision
def _factor_of_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    # Of A = diag(√a) C = Q Lᵀ the derivative dL = dAᵀQ has dL Lᵀ + L dLᵀ = d(AᵀA) for a fixed Q,
    # even where A has no full rank; and with Q = diag(√a) C L⁻ᵀ no root of a weight is divided by.
    (centred, weights), (dcentred, dweights) = primals, tangents
    factor = factor_of(centred, weights)
    root = jnp.sqrt(weights)
    on = root > 0
    safe = jnp.where(on, root, 1)
    if centred.shape[-2] < centred.shape[-1]:
        droot = jnp.where(on, dweights / (2 * safe), 0)
        return factor, (root[..., None] * dcentred + droot[..., None] * centred).mT
    basis = _basis(root[..., None] * centred, factor)
    unweighted = centred @ _pseudo_inverse(factor).mT
    unweighted = jnp.where(on[..., None], basis / safe[..., None], unweighted)
    dfactor = dcentred.mT @ (root[..., None] * basis)
    return factor, dfactor + (centred * (dweights / 2)[..., None]).mT @ unweighted


@jax.custom_jvp
def _basis(rows: Float[Array, "*batch n d"], factor: Float[Array, "*batch d d"]) -> Array:
    """Q with orthonormal columns and A = Q Lᵀ."""
    result: Array = qr(rows)[0]
    return result


@_basis.defjvp
@full_precision
def _basis_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    (rows, factor), (drows, dfactor) = primals, tangents
    basis = _basis(rows, factor)
    return basis, (drows - basis @ dfactor.mT) @ _pseudo_inverse(factor).mT


def _pseudo_inverse(factor: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """L⁺, which counts as constant."""
    left, values, right = svd(jax.lax.stop_gradient(factor))
    least = max(factor.shape) * float(jnp.finfo(factor.dtype).eps) * values[..., :1]
    kept = values > least
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    result: Array = right.mT @ (inverse[..., None] * left.mT)
    return result


@compiled()
def covariance_root(
    covariance: Float[Array, "*batch d d"],
) -> tuple[Float[Array, " *batch"], Float[Array, " *batch"], Float[Array, "*batch d d"]]:
    """|Σ − Σᵀ| and the size of Σ's negative part, in units of the rounding allowed, and Σ^½; NaN
    where either exceeds one. In units in which the largest entry is 1: squares of entries may be
    out of range."""
    size = jnp.abs(jax.lax.stop_gradient(covariance)).max((-1, -2), keepdims=True)
    size = jnp.where((size > 0) & (size < jnp.inf), size, 1)
    scaled = covariance / size
    symmetric = (scaled + scaled.mT) / 2
    root = psd_root(symmetric)
    dim, eps = covariance.shape[-1], float(jnp.finfo(covariance.dtype).eps)
    rounding = 10 * max(dim, 10) * eps * jnp.linalg.norm(scaled, axis=(-1, -2))
    unit = jnp.where(rounding > 0, rounding, 1)
    asymmetry = jnp.linalg.norm(scaled - scaled.mT, axis=(-1, -2)) / unit
    negativity = jnp.linalg.norm(root @ root - symmetric, axis=(-1, -2)) / unit
    valid = (asymmetry <= 1) & (negativity <= 1)
    return asymmetry, negativity, jnp.where(valid[..., None, None], root * jnp.sqrt(size), jnp.nan)
