"""What `jdam.plot` draws, in numbers: projections, grids, ways of recalls. No matplotlib here."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jdam._energy.energy import divergences, fit_query
from jdam._energy.match import places as places_of
from jdam._measures.base import AnyMeasure, Measure, dim_of
from jdam._measures.gaussian import DiagonalGaussian, Gaussian
from jdam._measures.mixture import GaussianMixture
from jdam._measures.point_cloud import PointCloud
from jdam._memory.memory import Memory, check_against, check_memory
from jdam._recall.result import Recall, Trace

KINDS: dict[Any, str] = {
    Gaussian: "Gaussians",
    DiagonalGaussian: "Gaussians",
    GaussianMixture: "mixtures",
    PointCloud: "point clouds",
}
#: The array by which a measure is translated, if it is not its mean.
MOVED: dict[Any, str] = {PointCloud: "points", GaussianMixture: "means"}
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


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


def frame(
    name: str, measures: AnyMeasure, axes: Any, *, of: str = "", line: bool = False
) -> tuple[list[int], tuple[str, str]]:
    """The coordinates that are drawn, and their labels; those of Gaussians in one dimension are
    mean and standard deviation; on a `line` it is the only one, and the energy."""
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
    """The labels of two of `dim` coordinates."""
    among = f" (of {dim} coordinates)" if dim > 2 else ""
    first, second = (f"x{i + 1}".translate(SUBSCRIPTS) + of + among for i in pair)
    return first, second


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


def deviations(gaussian: Gaussian | DiagonalGaussian) -> np.ndarray:
    """The standard deviation (…, d) of each coordinate."""
    if isinstance(gaussian, DiagonalGaussian):
        return numpy(gaussian.scale)
    result: np.ndarray = np.linalg.norm(numpy(gaussian.factor), axis=-1)
    return result


def on_half_plane(measures: AnyMeasure) -> bool:
    """Whether these are Gaussians in one dimension, drawn as (mean, standard deviation)."""
    return isinstance(measures, Gaussian | DiagonalGaussian) and measures.dim == 1


def places(measures: AnyMeasure) -> np.ndarray:
    """Vectors as they are, Gaussians in one dimension as (mean, standard deviation), means of
    others."""
    if on_half_plane(measures):
        return np.concatenate([numpy(measures.mean), deviations(measures)], -1)
    known = isinstance(measures, Gaussian | DiagonalGaussian | GaussianMixture | PointCloud)
    return numpy(measures.mean if known else measures)


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


def nearest(memory: Memory, trace: Recall | Trace, last: AnyMeasure) -> AnyMeasure:
    """The pattern at which a recall ended with the measure `last`."""
    check_memory(memory)
    last = memory.geometry.check("trace.measure", last, 0)
    check_against(memory, "trace.measure", last)
    if isinstance(trace, Recall):
        return memory[int(trace.nearest)]
    return memory[int(np.argmin(divergences(memory, last)))]


def kind(memory: Memory, wanted: tuple[str, ...]) -> str:
    """What the memory holds, as "2-D vectors"; one of those `wanted`, with or without "2-D"."""
    check_memory(memory)
    patterns = memory.patterns
    name = KINDS.get(type(patterns), type(patterns).__name__)
    if isinstance(patterns, jax.Array | np.ndarray):
        name = "vectors"
    found = f"{dim_of(patterns)}-D {name}"
    if found not in wanted and name not in wanted:
        raise ValueError(f"memory must hold {' or '.join(wanted)}; got {found}")
    return found


def check_type(name: str, measure: Any, *wanted: type) -> None:
    """Raise unless the measure is of one of these kinds."""
    if not isinstance(measure, wanted):
        names = " or ".join(f"jdam.{kind.__name__}" for kind in wanted)
        raise TypeError(f"{name} must be a {names}; got {type(measure).__name__}")


def links(
    query: AnyMeasure, pattern: AnyMeasure, plan: Any, pair: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The ends (L, 2, 2) and masses (L,) of a plan, of which what is too little to be seen is left
    out."""
    x, y, mass = numpy(places_of(query))[:, pair], numpy(places_of(pattern))[:, pair], numpy(plan)
    rows, columns = np.nonzero(mass > 0.01 * mass.max())
    return np.stack([x[rows], y[columns]], 1), mass[rows, columns]


def grid(
    memory: Memory, pair: list[int], given: tuple[Any, Any], sizes: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray | None]:
    """`given` arrays, checked; where None such that they enclose the patterns. On the line the
    second is None."""
    ends = extent(memory[: len(memory)], pair)
    found = []
    for name, span, array, size in zip(("xs", "ys"), ends, given, sizes, strict=False):
        values = np.linspace(*span, size) if array is None else numpy(array)
        if values.ndim != 1 or len(values) < 2 or not (np.diff(values) > 0).all():
            wanted = "a rising array of two or more"
            raise ValueError(f"{name} must be {wanted}; got {values.tolist()}")
        found.append(values)
    if on_half_plane(memory.patterns) and found[1][0] < 0:
        raise ValueError(f"ys must be ≥ 0, standard deviations; got {found[1][0]:g}")
    return found[0], found[1] if len(found) == 2 else None


def extent(patterns: AnyMeasure, pair: list[int]) -> list[tuple[float, float]]:
    """The interval of each coordinate that patterns fill, of Gaussians in one dimension those of
    (mean, standard deviation)."""
    if on_half_plane(patterns):
        where, widest = places(patterns), deviations(patterns).max()
        low = np.array([where[:, 0].min() - widest, 0])
        high = np.array([where[:, 0].max() + widest, 1.3 * widest or 1])
    else:
        where, reach = spread(patterns)
        low, high = (where - reach).min(0)[pair], (where + reach).max(0)[pair]
    return [(a, b) if a < b else (a - 1, b + 1) for a, b in zip(low, high, strict=True)]


def spread(patterns: AnyMeasure) -> tuple[np.ndarray, np.ndarray]:
    """Points (M, d) that patterns fill, and how far around them: two standard deviations of
    Gaussians, nothing around atoms, and some room around vectors."""
    if isinstance(patterns, PointCloud):
        return numpy(patterns.points)[numpy(patterns.weights) > 0], np.zeros(1)
    if isinstance(patterns, GaussianMixture):
        held = numpy(patterns.weights) > 0
        return numpy(patterns.means)[held], 2 * deviations(patterns.components)[held]
    if isinstance(patterns, Gaussian | DiagonalGaussian):
        return numpy(patterns.mean), 2 * deviations(patterns)
    where = numpy(patterns)
    return where, 0.3 * np.ptp(where, axis=0).max(keepdims=True)


def points(xs: np.ndarray, ys: np.ndarray | None) -> np.ndarray:
    """The points (M, 2) of the grid, row by row, or (M, 1) of the line."""
    return np.stack([a.ravel() for a in np.meshgrid(*([xs] if ys is None else [xs, ys]))], -1)


def queries(
    memory: Memory, query: AnyMeasure | None, pair: list[int], xs: Any, ys: Any
) -> AnyMeasure:
    """A measure at every point of the grid, row by row: of Gaussians in one dimension the one of
    this mean and standard deviation, of others `query`, the first pattern if None, translated."""
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
    """The batch (M,) of a single measure translated by `shifts` (M, d)."""
    moved = MOVED.get(type(query), "mean")
    array = getattr(query, moved) if isinstance(query, Measure) else query
    by = shifts.reshape(len(shifts), *[1] * (array.ndim - 1), -1)
    found = jnp.asarray(numpy(array)[None] + by, array.dtype)
    if not isinstance(query, Measure):
        return found
    batch = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(shifts), *leaf.shape)), query)
    return eqx.tree_at(lambda measure: getattr(measure, moved), batch, found)


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


def measured(dims: Any, counts: Any, errors: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    """Dimensions, logarithms of counts and their standard errors, all checked."""
    d, n = numpy(dims), numpy(counts)
    given = {"dims": d, "counts": n} | ({} if errors is None else {"errors": numpy(errors)})
    for name, array in given.items():
        if array.ndim != 1 or array.shape != d.shape:
            raise ValueError(f"{name} must have shape (n,), as dims; got {array.shape}")
        if not (np.isfinite(array).all() and (array > 0).all()):
            raise ValueError(f"{name} must be finite and > 0; got {array.tolist()}")
    least = 3 if errors is None else 2
    if len(np.unique(d)) < 2 or len(d) < least:
        wanted = f"at least {least} points, two of them different"
        raise ValueError(f"dims must hold {wanted}; got {d.tolist()}")
    return d, np.log(n), None if errors is None else given["errors"] / n
