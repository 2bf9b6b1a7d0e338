"""Means and covariance factors of weighted samples.

They are accurate for samples far from zero, and have derivatives where covariances are singular and
weights vanish, where plain formulas of `jax.numpy` lose digits or return NaN.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PyTree

from jdam._core.compile import compiled
from jdam._core.derivatives import full_precision
from jdam._core.lapack import qr, svd, triangle
from jdam._core.linalg import long_sum, psd_root


@compiled()
def weighted_mean(
    points: Float[Array, "*batch n d"], weights: Float[Array, "*batch n"]
) -> Float[Array, "*batch d"]:
    """The weighted mean Σ aₖxₖ."""
    return _mean(points, weights)


def _mean(points: Array, weights: Array) -> Array:
    return long_sum((weights[..., None] * points).mT)


@compiled()
def moments(
    samples: Float[Array, "*batch n d"], weights: Float[Array, "*batch n"]
) -> tuple[Float[Array, "*batch d"], Float[Array, "*batch d r"]]:
    """The weighted mean and a factor of the weighted covariance. The factor consists of the
    weighted centred samples where n < d, and is their triangular QR factor otherwise."""
    # Samples are shifted by one of them and then by their mean, since small numbers are rounded
    # less.
    heaviest = weights.argmax(-1)[..., None, None]
    centre = jax.lax.stop_gradient(jnp.take_along_axis(samples, heaviest, axis=-2))
    shift = jax.lax.stop_gradient(_mean(samples - centre, weights)[..., None, :])
    shifted = (samples - centre) - shift
    offset = _mean(shifted, weights)[..., None, :]
    mean = centre + (shift + offset)
    return mean[..., 0, :], factor_of(shifted - offset, weights)


@jax.custom_jvp
def factor_of(centred: Float[Array, "*batch n d"], weights: Float[Array, "*batch n"]) -> Array:
    """A factor L of Σ aₖcₖcₖᵀ, (d, n) where n < d and triangular (d, d) otherwise."""
    scaled = jnp.sqrt(weights)[..., None] * centred
    return (scaled if centred.shape[-2] < centred.shape[-1] else triangle(scaled)).mT


@factor_of.defjvp
@full_precision
def _factor_of_jvp(
    primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]
) -> tuple[Array, Array]:
    # With A = diag(√a) C = Q Lᵀ, dL = dAᵀQ satisfies dL Lᵀ + L dLᵀ = d(AᵀA), also where A is rank
    # deficient. It differs from the derivative of the triangular factor by a rotation. The term in
    # da uses Q = diag(√a) C L⁻ᵀ, so that it needs no division by √a.
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
    """The matrix Q with orthonormal columns and A = Q Lᵀ. It is a function of its own because its
    derivative, for second derivatives of `factor_of`, is dQ = (dA − Q dLᵀ) L⁻ᵀ."""
    result: Array = qr(rows)[0]
    return result


@_basis.defjvp
@full_precision
def _basis_jvp(primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]) -> tuple[Array, Array]:
    (rows, factor), (drows, dfactor) = primals, tangents
    basis = _basis(rows, factor)
    return basis, (drows - basis @ dfactor.mT) @ _pseudo_inverse(factor).mT


def _pseudo_inverse(factor: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """The pseudo-inverse L⁺, without derivative."""
    left, values, right = svd(jax.lax.stop_gradient(factor))
    threshold = factor.shape[-1] * float(jnp.finfo(factor.dtype).eps) * values[..., :1]
    nonzero = values > threshold
    inverse = jnp.where(nonzero, 1 / jnp.where(nonzero, values, 1), 0)
    result: Array = right.mT @ (inverse[..., None] * left.mT)
    return result


@compiled()
def covariance_root(
    covariance: Float[Array, "*batch d d"],
) -> tuple[Float[Array, " *batch"], Float[Array, " *batch"], Float[Array, "*batch d d"]]:
    """The asymmetry, the negativity and the symmetric root of a covariance.

    **Returns:**

    - the asymmetry |Σ − Σᵀ|_F, in units of the rounding allowed, 10·max(d, 10)·eps·|Σ|_F.
    - the negativity |S² − Σ|_F, where S is the root of the positive part of Σ, in the same units.
    - the root Σ^½, NaN where one of these exceeds 1.
    """
    # Σ is scaled to a largest entry of 1, since squares of its entries may overflow or underflow.
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
