"""Two geometries as a user would write them: with public names, `check` and `compare` alone."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import jdam


class SlicedWasserstein(jdam.Geometry):
    """D = the mean over directions θ of W₂² between projections, on clouds of n atoms of equal
    weight; each pattern pulls an atom along θ to the atom of its rank."""

    directions: Float[Array, "k D"]  # of as many dimensions as are ever needed

    def check(self, name, measure, batch_ndim):
        if not isinstance(measure, jdam.PointCloud):
            raise TypeError(f"{name} must be a jdam.PointCloud; got {type(measure).__name__}")
        if len(measure.batch_shape) != batch_ndim:
            raise ValueError(f"{name} must have {batch_ndim} batch axes; got {measure.batch_shape}")
        return measure

    def compare(self, view, patterns):
        clouds, along = patterns.measures, self.directions[:, : view.dim]
        own = view.points @ along.T
        theirs = jnp.sort(clouds.points @ along.T, axis=-2)
        ranks = jnp.argsort(jnp.argsort(own, axis=0), axis=0)
        gap = jnp.take_along_axis(theirs, ranks[None], axis=1) - own[None]
        points = view.points[None] + gap @ along * (view.dim / jnp.sum(along**2))
        weights = jnp.broadcast_to(view.weights[None], clouds.weights.shape)
        return jdam.Comparison((gap**2).mean((1, 2)), jdam.PointCloud(points, weights))


class Histogram(jdam.Measure):
    """Probabilities of n bins in a row."""

    probabilities: Float[Array, "*batch n"]

    def unconstrained(self):
        return Histogram(jnp.log(self.probabilities))

    def constrained(self, free):
        return Histogram(jax.nn.softmax(free.probabilities))


class Cramer(jdam.Geometry):
    """D = Σ (F − G)², F and G being cumulative sums; patterns pull towards themselves."""

    def check(self, name, measure, batch_ndim):
        if not isinstance(measure, Histogram):
            raise TypeError(f"{name} must be a Histogram; got {type(measure).__name__}")
        if len(measure.batch_shape) != batch_ndim:
            raise ValueError(f"{name} must have {batch_ndim} batch axes; got {measure.batch_shape}")
        return measure

    def compare(self, view, patterns):
        probabilities = patterns.measures.probabilities
        gap = jnp.cumsum(view.probabilities[None] - probabilities, axis=-1)
        return jdam.Comparison(jnp.vecdot(gap, gap), patterns.measures)


def even_clouds(rng, num, d, n=5, dtype=np.float64):
    points = rng.normal(size=(num, n, d)) + 2 * rng.normal(size=(num, 1, d))
    return jdam.PointCloud(points.astype(dtype))


def histograms(rng, num, d, dtype=np.float64):
    return Histogram(jnp.asarray(rng.dirichlet(np.ones(2 * d), size=num), dtype))


def directions(count, dim=8):
    """Some orthonormal bases."""
    normal = np.random.default_rng(5).normal(size=(count, dim, dim))
    return jnp.asarray(np.linalg.qr(normal)[0].reshape(-1, dim))
