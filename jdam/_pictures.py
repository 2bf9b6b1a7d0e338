"""What `jdam.plot` draws, in numbers: projections, grids, ways of recalls. No matplotlib here."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdam._measures.base import AnyMeasure, Measure
from jdam._measures.gaussian import DiagonalGaussian, Gaussian
from jdam._measures.point_cloud import PointCloud
from jdam._memory.memory import Memory
from jdam._recall.result import Recall, Trace


def numpy(array: Any) -> np.ndarray:
    """The values in double precision, as matplotlib wants them."""
    return np.asarray(array, np.float64)


def coordinates(name: str, dim: int, axes: Any) -> list[int]:
    """`axes` checked to be two of `dim` coordinates."""
    if dim < 2:
        raise ValueError(f"{name} must have dimension d ≥ 2; got {dim}")
    pair = tuple(axes)
    valid = len(pair) == 2 and all(isinstance(i, int | np.integer) for i in pair)
    if not valid or pair[0] == pair[1] or not all(0 <= i < dim for i in pair):
        raise ValueError(f"axes must be two different coordinates below {dim}; got {axes!r}")
    return [int(i) for i in pair]


def outlines(
    gaussian: Gaussian | DiagonalGaussian, pair: list[int], num_std: float, num_points: int = 120
) -> np.ndarray:
    """Points (N, num_points, 2) of the contours of marginals, m + num_std·Σ^½u, |u| = 1."""
    if isinstance(gaussian, DiagonalGaussian):
        factor = numpy(gaussian.scale)[..., pair, None] * np.eye(2)
    else:
        factor = numpy(gaussian.factor)[..., pair, :]
    # The singular value decomposition of the factor keeps what the covariance would round away.
    u, s, _ = np.linalg.svd(factor.reshape(-1, *factor.shape[-2:]), full_matrices=False)
    if s.shape[-1] == 1:
        u, s = u.repeat(2, -1), s * [1.0, 0.0]
    angles = np.linspace(0, 2 * np.pi, num_points, endpoint=False)
    circle = num_std * np.stack([np.cos(angles), np.sin(angles)])
    mean = numpy(gaussian.mean)[..., pair].reshape(-1, 1, 2)
    result: np.ndarray = mean + ((u * s[:, None]) @ circle).swapaxes(-1, -2)
    return result


def deviation(gaussian: Gaussian | DiagonalGaussian) -> np.ndarray:
    """The standard deviation of Gaussians in one dimension."""
    if isinstance(gaussian, DiagonalGaussian):
        return numpy(gaussian.scale)[..., 0]
    result: np.ndarray = np.linalg.norm(numpy(gaussian.factor)[..., 0, :], axis=-1)
    return result


def places(measures: AnyMeasure) -> np.ndarray:
    """Vectors as they are, Gaussians in one dimension as (mean, standard deviation)."""
    if isinstance(measures, Gaussian | DiagonalGaussian):
        return np.stack([numpy(measures.mean)[..., 0], deviation(measures)], -1)
    return numpy(measures)


def stages(trace: Any, start: AnyMeasure | None) -> AnyMeasure:
    """The measures of one recall in order, as a batch, up to where nothing changes any more."""
    found = trace.trace if isinstance(trace, Recall) else trace
    if found is None:
        raise ValueError("trace must be that of a recall with save_trace=True; got None")
    if not isinstance(found, Trace):
        raise TypeError(f"trace must be a jdam.Trace or jdam.Recall; got {type(trace).__name__}")
    if found.energy.ndim != 1:
        raise ValueError(
            f"trace must be of one recall; got a batch of {found.energy.shape[:-1]}: "
            "jax.tree.map(lambda leaf: leaf[i], trace) is the i-th"
        )
    measure = found.measure
    if start is not None:
        if isinstance(start, Measure) and type(start) is not type(measure):
            wanted = type(measure).__name__
            raise TypeError(f"start must be a {wanted}, as recalled; got {type(start).__name__}")
        if isinstance(start, Gaussian) and isinstance(measure, Gaussian):
            start = start.pad(measure.rank)
        got = [jnp.shape(leaf) for leaf in jax.tree.leaves(start)]
        shapes = [leaf.shape[1:] for leaf in jax.tree.leaves(measure)]
        if got != shapes:
            raise ValueError(f"start must have the recalled shapes {shapes}; got {got}")
        measure = jax.tree.map(
            lambda first, rest: np.concatenate([np.asarray(first)[None], rest]), start, measure
        )
    leaves = [np.asarray(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(measure)]
    moves = np.any([(np.diff(leaf, axis=0) != 0).any(-1) for leaf in leaves], axis=0)
    end = 1 + int(np.flatnonzero(moves)[-1] + 1 if moves.any() else 0)
    return jax.tree.map(lambda leaf: leaf[:end], measure)


def kind(memory: Memory, wanted: tuple[str, ...]) -> str:
    """What the memory holds, one of those `wanted`."""
    patterns = memory.patterns
    if isinstance(patterns, Gaussian | DiagonalGaussian):
        name = "Gaussians"
    else:
        name = "point clouds" if isinstance(patterns, PointCloud) else "vectors"
    found = f"{jax.tree.leaves(patterns)[0].shape[-1]}-D {name}"
    if found not in wanted:
        raise ValueError(f"memory must hold {' or '.join(wanted)}; got {found}")
    return found


def grid(
    memory: Memory, kind: str, xs: Any, ys: Any, sizes: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """`xs` and `ys`, checked; where None such that they enclose the patterns."""
    patterns = memory.patterns
    if kind == "1-D Gaussians":
        where = places(patterns)
        margin, highest = where[:, 1].max(), 1.3 * where[:, 1].max()
        spans = [(where[:, 0], margin), (np.array([0, highest or 1]), 0)]
    elif kind == "2-D Gaussians":
        edges = outlines(patterns, [0, 1], 2.0).reshape(-1, 2)
        spans = [(edges[:, 0], 0), (edges[:, 1], 0)]
    else:
        where = numpy(patterns)
        spans = [(column, 0.3 * np.ptp(where, axis=0).max()) for column in where.T]
    given, found = [xs, ys], []
    for (values, margin), array, size in zip(spans, given, sizes, strict=False):
        if values.min() == values.max() and not margin:
            margin = 1.0
        low, high = values.min() - margin, values.max() + margin
        found.append(np.linspace(low, high, size) if array is None else numpy(array))
    if len(found) == 1 and ys is not None:
        raise ValueError(f"ys must be None for {kind}; got an array")
    for name, array in zip(("xs", "ys"), found, strict=False):
        if array.ndim != 1 or len(array) < 2 or not (np.diff(array) > 0).all():
            raise ValueError(f"{name} must be a rising array of two or more; got {array.tolist()}")
    if kind == "1-D Gaussians" and found[1][0] < 0:
        raise ValueError(f"ys must be ≥ 0, standard deviations; got {found[1][0]:g}")
    return found[0], found[1] if len(found) == 2 else np.zeros(1)


def queries(memory: Memory, kind: str, xs: np.ndarray, ys: np.ndarray) -> AnyMeasure:
    """A measure of the memory's kind at every point of the grid, row by row."""
    x, y = (jnp.asarray(a.reshape(-1, 1), memory.dtype) for a in np.meshgrid(xs, ys))
    if isinstance(memory.patterns, DiagonalGaussian):
        return DiagonalGaussian(x, y)
    if isinstance(memory.patterns, Gaussian):
        return Gaussian(x, y[..., None])
    return x if kind == "1-D vectors" else jnp.concatenate([x, y], -1)


def transported(
    query: Gaussian | DiagonalGaussian, moved: Gaussian | DiagonalGaussian, points: np.ndarray
) -> np.ndarray:
    """Where the map x ↦ m⁺ + L⁺L⁻¹(x − m) of a step from `query` to `moved` takes points."""
    if isinstance(query, Gaussian) and isinstance(moved, Gaussian):
        before, after = numpy(query.pad(moved.rank).factor), numpy(moved.factor)
    else:
        before, after = (np.diag(numpy(g.scale)) for g in (query, moved))  # type: ignore[union-attr]
    if np.linalg.matrix_rank(before) < len(before):
        raise ValueError("query must have a covariance of full rank; got a singular one")
    along = after @ np.linalg.pinv(before)
    result: np.ndarray = numpy(moved.mean) + (points - numpy(query.mean)) @ along.T
    return result
