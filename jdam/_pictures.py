"""The NumPy code of `jdam.plot`: checks, projections, grids and trajectories as arrays, without
matplotlib."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jdam._energy.energy import divergences, fit_query
from jdam._energy.match import positions
from jdam._measures.base import AnyMeasure, Measure, check_like, dim_of
from jdam._measures.gaussian import DiagonalGaussian, Gaussian
from jdam._measures.mixture import GaussianMixture
from jdam._measures.point_cloud import PointCloud
from jdam._memory.memory import Memory, check_memory
from jdam._recall.result import Recall, Trace

#: The name of each kind of measure in `kind` and in messages.
KINDS: dict[Any, str] = {
    Gaussian: "Gaussians",
    DiagonalGaussian: "Gaussians",
    GaussianMixture: "mixtures",
    PointCloud: "point clouds",
}
#: The array that changes under a translation of a measure, if it is not "mean".
MOVED: dict[Any, str] = {PointCloud: "points", GaussianMixture: "means"}
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def numpy(array: ArrayLike) -> np.ndarray:
    """Return the values as a NumPy array of float64."""
    return np.asarray(array, np.float64)


def coordinates(name: str, dim: int, axes: Any) -> list[int]:
    """Return `axes`, checked to be two different coordinates below `dim`, as a list."""
    if dim < 2:
        raise ValueError(f"{name} must have dimension d ≥ 2; got {dim}")
    pair = tuple(axes)
    valid = len(pair) == 2 and all(isinstance(i, int | np.integer) for i in pair)
    if not valid or pair[0] == pair[1] or not all(0 <= i < dim for i in pair):
        raise ValueError(f"axes must be two different coordinates below {dim}; got {axes!r}")
    return [int(i) for i in pair]


def frame(
    name: str, measures: AnyMeasure, axes: Any, *, of: str = "", line: bool = False
) -> tuple[list[int], tuple[str, str]]:
    """Return the coordinates that are drawn, and the labels of both axes.

    For Gaussians in one dimension these are the mean and the standard deviation. If `line` is True,
    measures in one dimension have one coordinate, and the second axis is the energy. `of` is
    appended to the names of coordinates.
    """
    if on_half_plane(measures):
        return [0, 1], ("mean", "standard deviation")
    dim = dim_of(measures)
    if dim is None:
        raise TypeError(f"{name} must have a dimension d; got {type(measures).__name__}")
    if line and dim == 1:
        return [0], (f"x{of}", "energy")
    pair = coordinates(name, dim, axes)
    return pair, labels(pair, dim, of)


def labels(pair: list[int], dim: int, of: str = "") -> tuple[str, str]:
    """Return the labels x₁, x₂, … of two of `dim` coordinates."""
    among = f" (of {dim} coordinates)" if dim > 2 else ""
    first, second = (f"x{i + 1}".translate(SUBSCRIPTS) + of + among for i in pair)
    return first, second


def outlines(
    gaussian: Gaussian | DiagonalGaussian, pair: list[int], num_std: float, num_points: int = 120
) -> np.ndarray:
    """Return points (N, num_points, 2) on the contours m + num_std·Σ^½u, |u| = 1, of the marginals
    on two coordinates.
    """
    if isinstance(gaussian, DiagonalGaussian):
        factor = numpy(gaussian.scale)[..., pair, None] * np.eye(2)
    else:
        factor = numpy(gaussian.factor)[..., pair, :]
    # The singular values of the factor resolve thin ellipses that a rounded covariance would lose.
    u, s, _ = np.linalg.svd(factor.reshape(-1, *factor.shape[-2:]), full_matrices=False)
    if s.shape[-1] == 1:
        u, s = u.repeat(2, -1), s * [1.0, 0.0]
    angles = np.linspace(0, 2 * np.pi, num_points, endpoint=False)
    circle = num_std * np.stack([np.cos(angles), np.sin(angles)])
    mean = numpy(gaussian.mean)[..., pair].reshape(-1, 1, 2)
    result: np.ndarray = mean + ((u * s[:, None]) @ circle).swapaxes(-1, -2)
    return result


def deviations(gaussian: Gaussian | DiagonalGaussian) -> np.ndarray:
    """Return the standard deviation (…, d) of each coordinate."""
    if isinstance(gaussian, DiagonalGaussian):
        return numpy(gaussian.scale)
    result: np.ndarray = np.linalg.norm(numpy(gaussian.factor), axis=-1)
    return result


def on_half_plane(measures: AnyMeasure) -> bool:
    """Return whether the measures are Gaussians in one dimension, which are drawn as points (mean,
    standard deviation).
    """
    return isinstance(measures, Gaussian | DiagonalGaussian) and measures.dim == 1


def places(measures: AnyMeasure) -> np.ndarray:
    """Return the points that represent measures: vectors themselves, (mean, standard deviation) of
    Gaussians in one dimension, and the means of other measures.
    """
    if on_half_plane(measures):
        return np.concatenate([numpy(measures.mean), deviations(measures)], -1)
    has_mean = isinstance(measures, Gaussian | DiagonalGaussian | GaussianMixture | PointCloud)
    return numpy(measures.mean if has_mean else measures)


def stages(trace: object, start: AnyMeasure | None) -> AnyMeasure:
    """Return the measures of one recall in order, as a batch that ends with the last change.
    `start`, if given, is the first of them.
    """
    steps = trace.trace if isinstance(trace, Recall) else trace
    if steps is None:
        raise ValueError("trace must be that of a recall with save_trace=True; got None")
    if not isinstance(steps, Trace):
        raise TypeError(f"trace must be a jdam.Trace or jdam.Recall; got {type(trace).__name__}")
    if steps.energy.ndim != 1:
        raise ValueError(
            f"trace must be of one recall; got a batch of {steps.energy.shape[:-1]}: "
            "jax.tree.map(lambda leaf: leaf[i], trace) is the i-th"
        )
    measure = steps.measure
    if start is not None:
        if isinstance(start, Measure) and type(start) is not type(measure):
            expected = type(measure).__name__
            raise TypeError(f"start must be a {expected}, as recalled; got {type(start).__name__}")
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


def nearest(memory: Memory, trace: Recall | Trace, last: AnyMeasure) -> AnyMeasure:
    """Return the pattern that was recalled: `Recall.nearest`, or for a `Trace` the pattern of least
    divergence from its last measure `last`.
    """
    check_memory(memory)
    last = memory.geometry.check("trace.measure", last, 0)
    check_like("trace.measure", last, memory.patterns, "the memory")
    if isinstance(trace, Recall):
        return memory[int(trace.nearest)]
    return memory[int(np.argmin(divergences(memory, last)))]


def kind(memory: Memory, allowed: tuple[str, ...]) -> str:
    """Return the kind and dimension of the patterns, as "2-D vectors", checked to be one of the
    names `allowed`, which may be without dimension.
    """
    check_memory(memory)
    patterns = memory.patterns
    name = KINDS.get(type(patterns), type(patterns).__name__)
    if isinstance(patterns, jax.Array | np.ndarray):
        name = "vectors"
    full_name = f"{dim_of(patterns)}-D {name}"
    if full_name not in allowed and name not in allowed:
        raise ValueError(f"memory must hold {' or '.join(allowed)}; got {full_name}")
    return full_name


def check_type(name: str, measure: object, *allowed: type) -> None:
    """Raise `TypeError` unless the measure has one of the types `allowed`."""
    if not isinstance(measure, allowed):
        names = " or ".join(f"jdam.{kind.__name__}" for kind in allowed)
        raise TypeError(f"{name} must be a {names}; got {type(measure).__name__}")


def links(
    query: AnyMeasure, pattern: AnyMeasure, plan: Array, pair: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the lines (L, 2, 2) between atoms or components, and their masses (L,) in the
    transport plan. Masses below 1 % of the largest are omitted, since they would be invisible.
    """
    x, y, mass = numpy(positions(query))[:, pair], numpy(positions(pattern))[:, pair], numpy(plan)
    rows, columns = np.nonzero(mass > 0.01 * mass.max())
    return np.stack([x[rows], y[columns]], 1), mass[rows, columns]


def grid(
    memory: Memory, pair: list[int], given: tuple[Any, Any], sizes: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the coordinates xs and ys of a grid, or xs and None for a line: the arrays `given`,
    checked, or, where they are None, `sizes` points that enclose the patterns.
    """
    ends = extent(memory[: len(memory)], pair)
    arrays = []
    for name, span, array, size in zip(("xs", "ys"), ends, given, sizes, strict=False):
        values = np.linspace(*span, size) if array is None else numpy(array)
        if values.ndim != 1 or len(values) < 2 or not (np.diff(values) > 0).all():
            expected = "a rising array of two or more"
            raise ValueError(f"{name} must be {expected}; got {values.tolist()}")
        arrays.append(values)
    if on_half_plane(memory.patterns) and arrays[1][0] < 0:
        raise ValueError(f"ys must be ≥ 0, standard deviations; got {arrays[1][0]:g}")
    return arrays[0], arrays[1] if len(arrays) == 2 else None


def extent(patterns: AnyMeasure, pair: list[int]) -> list[tuple[float, float]]:
    """Return the intervals of the coordinates `pair` that contain the patterns; for Gaussians in
    one dimension those of (mean, standard deviation).
    """
    if on_half_plane(patterns):
        where, widest = places(patterns), deviations(patterns).max()
        low = np.array([where[:, 0].min() - widest, 0])
        high = np.array([where[:, 0].max() + widest, 1.3 * widest or 1])
    else:
        where, reach = spread(patterns)
        low, high = (where - reach).min(0)[pair], (where + reach).max(0)[pair]
    return [(a, b) if a < b else (a - 1, b + 1) for a, b in zip(low, high, strict=True)]


def spread(patterns: AnyMeasure) -> tuple[np.ndarray, np.ndarray]:
    """Return points (M, d) of patterns, and the margin that is shown around them: two standard
    deviations for Gaussians and components, 0 for atoms, and 30 % of the range for vectors.
    """
    if isinstance(patterns, PointCloud):
        return numpy(patterns.points)[numpy(patterns.weights) > 0], np.zeros(1)
    if isinstance(patterns, GaussianMixture):
        on = numpy(patterns.weights) > 0
        return numpy(patterns.means)[on], 2 * deviations(patterns.components)[on]
    if isinstance(patterns, Gaussian | DiagonalGaussian):
        return numpy(patterns.mean), 2 * deviations(patterns)
    where = numpy(patterns)
    return where, 0.3 * np.ptp(where, axis=0).max(keepdims=True)


def points(xs: np.ndarray, ys: np.ndarray | None) -> np.ndarray:
    """Return the points (M, 2) of a grid, row by row, or (M, 1) of a line if `ys` is None."""
    grid = [xs] if ys is None else np.meshgrid(xs, ys)
    return np.stack([axis.ravel() for axis in grid], -1)


def queries(
    memory: Memory, query: AnyMeasure | None, pair: list[int], xs: np.ndarray, ys: np.ndarray | None
) -> AnyMeasure:
    """Return a batch of measures, one for each point of the grid, row by row.

    For Gaussians in one dimension a point is the mean and the standard deviation. Otherwise the
    measures are translations of `query`, or of the first pattern if it is None.
    """
    where = points(xs, ys)
    if on_half_plane(memory.patterns):
        x, y = (jnp.asarray(where[:, i : i + 1], memory.dtype) for i in (0, 1))
        diagonal = isinstance(memory.patterns, DiagonalGaussian)
        return DiagonalGaussian(x, y) if diagonal else Gaussian(x, y[..., None])
    query = fit_query(memory, memory[0] if query is None else query)
    shifts = np.zeros((len(where), places(query).shape[-1]))
    shifts[:, pair] = where - places(query)[pair]
    return translated(query, shifts)


def translated(query: AnyMeasure, shifts: np.ndarray) -> AnyMeasure:
    """Return the batch (M,) of translations of a single measure by `shifts` (M, d)."""
    name = MOVED.get(type(query), "mean")
    array = getattr(query, name) if isinstance(query, Measure) else query
    by = shifts.reshape(len(shifts), *[1] * (array.ndim - 1), -1)
    moved = jnp.asarray(numpy(array)[None] + by, array.dtype)
    if not isinstance(query, Measure):
        return moved
    batch = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(shifts), *leaf.shape)), query)
    return eqx.tree_at(lambda measure: getattr(measure, name), batch, moved)


def transported(
    query: Gaussian | DiagonalGaussian, moved: Gaussian | DiagonalGaussian, points: np.ndarray
) -> np.ndarray:
    """Return the images of points under the map x ↦ m⁺ + L⁺L⁻¹(x − m) of the step from `query` to
    `moved`.
    """
    if isinstance(query, Gaussian) and isinstance(moved, Gaussian):
        before, after = numpy(query.pad(moved.rank).factor), numpy(moved.factor)
    else:
        before, after = (np.diag(numpy(g.scale)) for g in (query, moved))  # type: ignore[union-attr]
    if np.linalg.matrix_rank(before) < len(before):
        raise ValueError("query must have a covariance of full rank; got a singular one")
    linear = after @ np.linalg.pinv(before)
    result: np.ndarray = numpy(moved.mean) + (points - numpy(query.mean)) @ linear.T
    return result


def measured(
    dims: ArrayLike, counts: ArrayLike, errors: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray, Any]:
    """Return the dimensions, log counts, and standard errors of log counts (or None), checked."""
    d, n = numpy(dims), numpy(counts)
    given = {"dims": d, "counts": n} | ({} if errors is None else {"errors": numpy(errors)})
    for name, array in given.items():
        if array.ndim != 1 or array.shape != d.shape:
            raise ValueError(f"{name} must have shape (n,), as dims; got {array.shape}")
        if not (np.isfinite(array).all() and (array > 0).all()):
            raise ValueError(f"{name} must be finite and > 0; got {array.tolist()}")
    least = 3 if errors is None else 2
    if len(np.unique(d)) < 2 or len(d) < least:
        expected = f"at least {least} points, two of them different"
        raise ValueError(f"dims must hold {expected}; got {d.tolist()}")
    return d, np.log(n), None if errors is None else given["errors"] / n


def fitted_line(
    d: np.ndarray, log_counts: np.ndarray, log_errors: np.ndarray | None
) -> tuple[float, float, float]:
    """Return the slope, its standard error and the intercept of a least squares fit of log counts
    to dimensions, weighted by the errors unless they are None.
    """
    weights, scaling = (None, True) if log_errors is None else (1 / log_errors, "unscaled")
    line, covariance = np.polyfit(d, log_counts, 1, w=weights, cov=scaling)  # type: ignore[call-overload]
    return float(line[0]), float(np.sqrt(covariance[0, 0])), float(line[1])
