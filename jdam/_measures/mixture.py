"""Mixtures of Gaussians: representation, moments, densities, samples, and the fit by EM."""

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
from jdam._measures.simplex import free_weights, simplex_weights, weighted, weights_of

#: Bound on n·K·d, summed over the mixtures of a batch that are fitted at the same time.
NUMBERS = 2**20

#: Advice in error messages about lists of arrays of different shapes.
RAGGED = "make a mixture of each, for jdam.stack; or fill them up, with weights of 0"


class GaussianMixture(Measure):
    """The mixture Σₖ pₖ N(mₖ, Lₖ Lₖᵀ) of K Gaussians, its components.

    The order of the components has no meaning. Components of weight 0 are padding: they do not
    change the measure, and their weight stays 0. Factors may have any number r ≥ 1 of columns; a
    factor of zeros is a point mass.

    **Arguments:**

    - `weights`: p, (…, K) on the simplex (≥ 0, with sum 1 for each mixture).
    - `mean`: the means m of the components, (…, K, d); the attribute is `means`.
    - `factor`: the factors L of the components, (…, K, d, r); the attribute is `factors`.

    The attributes `mean` and `covariance` are the moments of the mixture.

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
        """The components as a `Gaussian` of batch shape (…, K)."""
        return Gaussian(self.means, self.factors)

    @property
    def mean(self) -> Float[Array, "*batch d"]:
        """Σ pₖmₖ."""
        return weighted_mean(self.means, self.weights)

    @property
    def covariance(self) -> Float[Array, "*batch d d"]:
        """Σ pₖ(LₖLₖᵀ + (mₖ − m)(mₖ − m)ᵀ)."""
        return _wide_moments(self).covariance

    @property
    def moments(self) -> Gaussian:
        """The Gaussian of the same mean and covariance, with a factor of at most d columns."""
        wide = _wide_moments(self)
        if wide.rank <= wide.dim:
            return wide
        rows = wide.factor.mT
        ones = jnp.ones(rows.shape[:-1], rows.dtype)
        return with_leaves(wide, wide.mean, factor_of(rows, ones))

    def unconstrained(self) -> "GaussianMixture":
        """The mixture with log pₖ for the weights, and 0 for the weights of padding."""
        return with_leaves(self, free_weights(self.weights), self.means, self.factors)

    def constrained(self, free: "GaussianMixture") -> "GaussianMixture":
        """The mixture with weights softmax(`free.weights`) and the padding of this mixture."""
        weights = weights_of(free.weights, self.weights)
        return with_leaves(self, weights, free.means, free.factors)

    def gauge(self, tangent: "GaussianMixture") -> "GaussianMixture":
        """The projection of `tangent` on rotations of each factor, and on all changes of components
        of weight 0."""
        zero = super().gauge(tangent)
        rotations = jax.vmap(rotation_part)(self.factors, tangent.factors)
        off = (self.weights == 0)[:, None]
        means = jnp.where(off, tangent.means, 0)
        factors = jnp.where(off[..., None], tangent.factors, rotations)
        return with_leaves(zero, zero.weights, means, factors)

    def describe(self) -> str:
        sizes = f"dim={self.dim}, num_components={self.num_components}, rank={self.rank}"
        return f"GaussianMixture({sizes})"

    def sample(self, key: Array, num: int) -> Float[Array, "*batch num d"]:
        """Draw `num` independent samples of each mixture with the random `key`."""
        num = checks.positive_int("num", num)
        return _sample(self, key, num=num)

    def log_density(self, x: ArrayLike) -> Float[Array, " *points"]:
        """The log-density log Σₖ pₖ N(x; mₖ, LₖLₖᵀ) of a single mixture, in nats.

        It is not finite if a component of weight > 0 has a singular covariance, and therefore no
        density.

        **Arguments:**

        - `x`: points, (…, d).

        **Raises:** `ValueError` for a batch of mixtures (use `jax.vmap`) and for points of another
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
        """The maximum likelihood mixture of the samples, by expectation–maximisation (EM).

        EM runs from four k-means++ starts, each until its mean log-likelihood stops rising, and
        the result of largest likelihood is returned: a local maximum. Variances are at least 10⁻⁶
        times the mean variance of the samples, so that components of few or of coincident samples
        are not point masses of infinite density. The dtype of the computation is at least float32.

        **Arguments:**

        - `samples`: x, (…, n, d); one mixture is fitted for each batch entry.
        - `num_components`: K ≤ n.
        - `key`: a `jax.random` key.
        - `weights`: a, (…, n) on the simplex, where 0 is padding; uniform if None.

        **Returns:** a mixture of batch shape (…) with lower triangular factors, d×d.

        **Raises:** as `Gaussian.from_samples`; `ValueError` for more components than samples.
        """
        samples, weights = weighted("samples", samples, weights, RAGGED)
        num = checks.positive_int("num_components", num_components)
        if num > samples.shape[-2]:
            raise ValueError(
                f"num_components must be at most n = {samples.shape[-2]}, the number of samples; "
                f"got {num}"
            )
        return cls(*_fit(samples, weights, key, num_components=num))


def _wide_moments(mixture: GaussianMixture) -> Gaussian:
    """The moments, with a factor of K(r + 1) columns: √pₖLₖ and √pₖ(mₖ − m) of each component."""
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
    """The weights, means and factors of one fit for each batch entry, in batches of bounded
    memory."""
    *batch, num, dim = samples.shape
    keys = jax.random.split(key, math.prod(batch))
    flat = samples.reshape(-1, num, dim), weights.reshape(-1, num), keys

    def fit_one(item: tuple[Array, Array, Array]) -> Components:
        return fit_mixture(*item, num_components=num_components)

    at_once = max(1, NUMBERS // (num * num_components * dim))
    components = map_in_batches(fit_one, at_once, flat)
    log_weights, means, factors = (leaf.reshape(*batch, *leaf.shape[1:]) for leaf in components)
    return jax.nn.softmax(log_weights), means, factors


@compiled()
def _log_density(mixture: GaussianMixture, x: Float[Array, "*points d"]) -> Float[Array, "*points"]:
    logs = safe_log(mixture.weights)
    missing = max(0, mixture.dim - mixture.rank)
    rows = jnp.pad(mixture.factors, [(0, 0), (0, 0), (0, missing)]).mT
    points = x.reshape(-1, mixture.dim)
    joint = log_densities(points, mixture.means, triangle(rows).mT) + logs[None]
    joint = jnp.where(mixture.weights[None] > 0, joint, -jnp.inf)
    log_density: Array = jax.nn.logsumexp(joint, axis=1)
    return log_density.reshape(x.shape[:-1])


@compiled(static=("num",))
def _sample(mixture: GaussianMixture, key: Array, *, num: int) -> Float[Array, "*batch num d"]:
    index_key, normal_key = jax.random.split(key)
    batch = mixture.batch_shape
    logits = safe_log(mixture.weights)[..., None, :]
    indices = jax.random.categorical(index_key, logits, shape=(*batch, num))
    noise = jax.random.normal(normal_key, (*batch, num, mixture.rank), mixture.dtype)
    means = jnp.take_along_axis(mixture.means, indices[..., None], axis=-2)
    factors = jnp.take_along_axis(mixture.factors, indices[..., None, None], axis=-3)
    return means + jnp.matvec(factors, noise)
