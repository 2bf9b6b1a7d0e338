"""Coordinates in which an optimiser may move a measure freely and it stays one."""

from functools import singledispatch

import jax
import jax.numpy as jnp

from jdam.geometry.protocol import AnyMeasure, with_leaves
from jdam.measures import DiagonalGaussian, PointCloud


@singledispatch
def to_free(measure: AnyMeasure) -> AnyMeasure:
    """Arrays and Gaussians as they are: every factor gives a covariance."""
    return measure


@singledispatch
def from_free(like: AnyMeasure, free: AnyMeasure) -> AnyMeasure:
    """The measure at these coordinates, of the kind and with the padding of `like`."""
    return free


@from_free.register
def _(like: DiagonalGaussian, free: DiagonalGaussian) -> DiagonalGaussian:
    return with_leaves(like, free.mean, jnp.abs(free.scale))


@to_free.register
def _(measure: PointCloud) -> PointCloud:
    """Logarithms for weights, with 0 for those of padding."""
    weights = measure.weights
    on = weights > 0
    logits = jnp.where(on, jnp.log(jnp.where(on, weights, 1)), 0)
    return with_leaves(measure, measure.points, logits)


@from_free.register
def _(like: PointCloud, free: PointCloud) -> PointCloud:
    weights = jax.nn.softmax(free.weights, where=like.weights > 0)
    return with_leaves(like, free.points, weights)
