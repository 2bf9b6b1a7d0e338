"""Mixtures of Gaussians."""

import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jdam._core import checks
from jdam._core.batching import map_in_batches
from jdam._core.compile import compiled
from jdam._core.lapack import triangle
from jdam._core.linalg import rotation_part, safe_log
from jdam._measures.base import Measure, with_leaves
from jdam._measures.em import Components, fit_mixture, log_densities
from jdam._measures.gaussian import Gaussian
from jdam._measures.moments import factor_of, weighted_mean
from jdam._measures.simplex import free_weights, simplex_weights, weights_of

#: How many samples times components times dimensions to fit at once.
NUMBERS = 2**20

#: What to do with a list of arrays of different shapes.
RAGGED = "make a mixture of each, for jdam.stack; or fill them up, with weights of 0"


class GaussianMixture(Measure):
    """The mixture Σₖ pₖ N(mₖ, Lₖ Lₖᵀ) of K Gaussians, its components.

    Components are in no order; those of weight 0 are padding: they change nothing, and stay at
    weight 0. Factors may have any number r ≥ 1 of columns, and be 0: point masses.

    **Arguments:** `weights` p (…, K) on the simplex, ≥ 0 and of sum 1 for each mixture; `mean` m
    (…, K, d) and `factor` L (…, K, d, r) of the components, which are the attributes `weights`,
    `means` and `factors`. The attributes `mean` and `covariance` are the moments of the mixture.

    **Raises:** `TypeError` for dtypes that are not floating or differ; `ValueError` for shapes
    that do not fit and, where values are concrete, for NaN, infinity, negative weights and
    weights that do not sum to one.
    """

    weights: Float[Array, "*batch K"]
    means: Float[Array, "*batch K d"]
    factors: Float[Array, "*batch K d r"]

    padding: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "K": {"weights": "constant", "means": "edge", "factors": "edge"},
        "r": {"factors": "constant"},
    }

    def __init__(self, weights: ArrayLike, mean: ArrayLike, factor: ArrayLike):
        components = Gaussian(mean, factor)
        if components.mean.ndim < 2 or 0 in components.mean.shape[-2:]:
            raise ValueError(
                f"mean must have shape (…, K, d), K, d ≥ 1; got {components.mean.shape}"
            )
        self.weights = simplex_weights(weights, mean=components.mean)
        self.means, self.factors = components.mean, components.factor

    @property
    def num_components(self) -> int:
        """The number K of components, padding included."""
        return self.means.shape[-2]

    @property
    def rank(self) -> int:
        """The number r of columns of the factors."""
        return self.factors.shape[-1]

    @property
    def components(self) -> Gaussian:
        """The components, (…, K)."""
        return Gaussian(self.means, self.factors)

    @property
    def mean(self) -> Float[Array, "*batch d"]:
        """Σ pₖmₖ."""
        return weighted_mean(self.means, self.weights)

    @property
    def covariance(self) -> Float[Array, "*batch d d"]:
        """Σ pₖ(LₖLₖᵀ + (mₖ − m)(mₖ − m)ᵀ)."""
        return _wide(self).covariance

    @property
    def moments(self) -> Gaussian:
        """The Gaussian of the same mean and covariance, its factor d×d at most."""
        wide = _wide(self)
        if wide.rank <= wide.dim:
            return wide
        rows = wide.factor.mT
        ones = jnp.ones(rows.shape[:-1], rows.dtype)
        return with_leaves(wide, wide.mean, factor_of(rows, ones))

    def unconstrained(self) -> "GaussianMixture":
        """Logarithms for weights, with 0 for those of padding."""
        return with_leaves(self, free_weights(self.weights), self.means, self.factors)

    def constrained(self, free: "GaussianMixture") -> "GaussianMixture":
        """The mixture of these logarithms of weights, with the padding of this one."""
        weights = weights_of(free.weights, self.weights)
        return with_leaves(self, weights, free.means, free.factors)

    def gauge(self, tangent: "GaussianMixture") -> "GaussianMixture":
        """Rotations of each factor, and all of components of weight 0."""
        still = super().gauge(tangent)
        turned = jax.vmap(rotation_part)(self.factors, tangent.factors)
        off = (self.weights == 0)[:, None]
        means = jnp.where(off, tangent.means, 0)
        factors = jnp.where(off[..., None], tangent.factors, turned)
        return with_leaves(still, still.weights, means, factors)

    def describe(self) -> str:
        sizes = f"dim={self.dim}, num_components={self.num_components}, rank={self.rank}"
        return f"GaussianMixture({sizes})"

    def sample(self, key: Array, num: int) -> Float[Array, "*batch num d"]:
        """So many independent samples of each mixture."""
        num = checks.positive_int("num", num)
        return _sample(self, key, num=num)

    def log_density(self, x: ArrayLike) -> Float[Array, " *points"]:
        """log Σₖ pₖ N(x; mₖ, LₖLₖᵀ) of a single mixture at points x (…, d), in nats.

        Not finite where a component of weight > 0 is singular, and so has no density.

        **Raises:** `ValueError` for a batch of mixtures (use `jax.vmap`) and points of another
        dimension.
        """
        x = checks.float_array("x", x)
        checks.same_dtype(mixture=self.means, x=x)
        if self.batch_shape:
            raise ValueError(f"a batch {self.batch_shape} of mixtures needs jax.vmap")
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape (…, d), d = {self.dim}; got {x.shape}")
        return _log_density(self, x)

    @classmethod
    def from_samples(
        cls,
        samples: ArrayLike,
        num_components: int,
        *,
        key: Array,
        weights: ArrayLike | None = None,
    ) -> "GaussianMixture":
        """The mixture that the samples are likeliest of, as far as EM finds it.

        From the likeliest of four starts by k-means++, to the rest of the mean log-likelihood.
        Variances are at least 10⁻⁶ of the samples' mean variance, so that components of few or
        of coincident samples are no point masses of infinite density. All in float32 at least.

        **Arguments:** `samples` (…, n, d), each batch entry a mixture of its own; `num_components`
        K ≤ n; `key`, a `jax.random` key; `weights` a (…, n) on the simplex, uniform if None, of
        which 0 is padding.

        **Returns:** batch shape (…), factors d×d and lower triangular.

        **Raises:** as `Gaussian.from_samples`; `ValueError` for more components than samples.
        """
        samples = checks.float_array("samples", samples, ragged=RAGGED)
        if samples.ndim < 2 or 0 in samples.shape[-2:]:
            raise ValueError(f"samples must have shape (…, n, d), n, d ≥ 1; got {samples.shape}")
        checks.finite("samples", samples)
        num = checks.positive_int("num_components", num_components)
        if num > samples.shape[-2]:
            raise ValueError(
                f"num_components must be at most n = {samples.shape[-2]}, the number of samples; "
                f"got {num}"
            )
        if weights is None:
            weights = jnp.full(samples.shape[:-1], 1 / samples.shape[-2], samples.dtype)
        weights = simplex_weights(weights, samples=samples)
        return cls(*_fit(samples, weights, key, num_components=num))


def _wide(mixture: GaussianMixture) -> Gaussian:
    """The moments, with a factor of a column for each column and each component."""
    mean, root = mixture.mean, jnp.sqrt(mixture.weights)
    gaps = (mixture.means - mean[..., None, :])[..., None]
    columns = root[..., None, None] * jnp.concatenate([mixture.factors, gaps], axis=-1)
    columns = jnp.moveaxis(columns, -3, -2)
    return Gaussian(mean, columns.reshape(*columns.shape[:-2], -1))


@compiled(static=("num_components",))
def _fit(
    samples: Float[Array, "*batch n d"],
    weights: Float[Array, "*batch n"],
    key: Array,
    *,
    num_components: int,
) -> tuple[Array, Array, Array]:
    """Weights, means and factors, some mixtures at a time."""
    *batch, num, dim = samples.shape
    keys = jax.random.split(key, math.prod(batch))
    flat = samples.reshape(-1, num, dim), weights.reshape(-1, num), keys

    def one(item: tuple[Array, Array, Array]) -> Components:
        return fit_mixture(*item, num_components=num_components)

    at_once = max(1, NUMBERS // (num * num_components * dim))
    found = map_in_batches(one, at_once, flat)
    weights = jax.nn.softmax(found.log_weights)
    leaves = weights, found.means, found.factors
    weights, means, factors = (leaf.reshape(*batch, *leaf.shape[1:]) for leaf in leaves)
    return weights, means, factors


@compiled()
def _log_density(mixture: GaussianMixture, x: Float[Array, "*points d"]) -> Float[Array, "*points"]:
    logs = safe_log(mixture.weights)
    missing = max(0, mixture.dim - mixture.rank)
    rows = jnp.pad(mixture.factors, [(0, 0), (0, 0), (0, missing)]).mT
    components = Components(logs, mixture.means, triangle(rows).mT)
    points = x.reshape(-1, mixture.dim)
    joint = log_densities(points, components) + logs[None]
    joint = jnp.where(mixture.weights[None] > 0, joint, -jnp.inf)
    found: Array = jax.nn.logsumexp(joint, axis=1)
    return found.reshape(x.shape[:-1])


@compiled(static=("num",))
def _sample(mixture: GaussianMixture, key: Array, *, num: int) -> Float[Array, "*batch num d"]:
    which, normal = jax.random.split(key)
    batch = mixture.batch_shape
    logits = safe_log(mixture.weights)[..., None, :]
    drawn = jax.random.categorical(which, logits, shape=(*batch, num))
    noise = jax.random.normal(normal, (*batch, num, mixture.rank), mixture.dtype)
    means = jnp.take_along_axis(mixture.means, drawn[..., None], axis=-2)
    factors = jnp.take_along_axis(mixture.factors, drawn[..., None, None], axis=-3)
    return means + jnp.matvec(factors, noise)
