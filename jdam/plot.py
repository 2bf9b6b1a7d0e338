"""Figures of measures, recalls and energies by matplotlib, which `jdam[plot]` installs.

Every function draws on the axes `ax`, the current axes if None, labels them if they have no labels,
and returns them. Other keyword arguments (`style`) are those of the artist.
"""

import math
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jdam import _artists as artists
from jdam import _pictures as pictures
from jdam._energy import match as matching
from jdam._energy.energy import energy, inverse_temperature
from jdam._measures.base import AnyMeasure
from jdam._measures.gaussian import DiagonalGaussian, Gaussian
from jdam._measures.mixture import GaussianMixture
from jdam._measures.point_cloud import PointCloud
from jdam._memory.memory import Memory
from jdam._recall.recall import step
from jdam._recall.result import Recall, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OF_ELLIPSES = (Gaussian, DiagonalGaussian, GaussianMixture)
#: The kinds of memory for which `landscape` is defined.
LANDSCAPES = ("Gaussians", "mixtures", "point clouds", "1-D vectors", "2-D vectors")


def ellipses(
    gaussian: Gaussian | DiagonalGaussian | GaussianMixture,
    *,
    axes: tuple[int, int] = (0, 1),
    num_std: float = 2.0,
    ax: "Axes | None" = None,
    **style: Any,
) -> "Axes":
    """Draw the contours (x−m)ᵀΣ⁻¹(x−m) = `num_std`² of Gaussians; for singular covariances these
    are segments and dots. For mixtures all components are drawn, with less opacity for smaller
    weights. Unless `color` or `edgecolor` is given, each Gaussian or mixture of a batch has the
    next colour of the property cycle.

    **Arguments:**

    - `gaussian`: a Gaussian or mixture, or a batch, d ≥ 2.
    - `axes`: two coordinates, whose marginals are drawn.
    - `num_std`: the radius of the contours in standard deviations, > 0.
    - `style`: keyword arguments of `matplotlib.collections.PolyCollection`.

    **Raises:** `TypeError` for other measures; `ValueError` for d < 2, for `axes` that are not
    two of the coordinates and for `num_std` ≤ 0.
    """
    pictures.check_type("gaussian", gaussian, *OF_ELLIPSES)
    pair = pictures.coordinates("gaussian", gaussian.dim, axes)
    if not 0 < num_std < math.inf:
        raise ValueError(f"num_std must be finite and > 0; got {num_std:g}")
    ax = artists.axes(ax)
    from matplotlib.collections import PolyCollection

    style = artists.styled(
        style, PolyCollection, facecolor="none", linewidth=1.5, joinstyle="round"
    )
    # `color` would fill the ellipses too, which are filled by `facecolor` only.
    colour = style.pop("color", None)
    if "edgecolor" not in style:
        num = math.prod(gaussian.batch_shape)
        style["edgecolor"] = artists.next_colours(ax, num) if colour is None else colour
    if isinstance(gaussian, GaussianMixture):
        style["edgecolor"] = artists.faded(style["edgecolor"], pictures.numpy(gaussian.weights))
        gaussian = gaussian.components
    outlines = pictures.outlines(gaussian, pair, num_std)
    ax.add_collection(PolyCollection(list(outlines), **style))
    artists.dots(ax, outlines, style["edgecolor"])
    ax.autoscale_view()
    ax.set_aspect("equal")
    return artists.labelled(ax, pictures.labels(pair, gaussian.dim))


def cloud(
    cloud: PointCloud,
    *,
    axes: tuple[int, int] = (0, 1),
    size: float = 900.0,
    ax: "Axes | None" = None,
    **style: Any,
) -> "Axes":
    """Draw the atoms of point clouds, with areas proportional to their weights, on axes of equal
    scale. Unless `c`, `color` or `facecolor` is given, each cloud of a batch, or each label if the
    atoms have features as one-hot labels, has a colour of the property cycle.

    **Arguments:**

    - `cloud`: a cloud or a batch, d ≥ 2.
    - `axes`: two coordinates to project on.
    - `size`: the total area of the atoms of a cloud in points², > 0.
    - `style`: keyword arguments of `Axes.scatter`.

    **Raises:** `TypeError` for other measures; `ValueError` for d < 2, for `axes` that are not
    two of the coordinates and for `size` ≤ 0.
    """
    pictures.check_type("cloud", cloud, PointCloud)
    pair = pictures.coordinates("cloud", cloud.dim, axes)
    if not 0 < size < math.inf:
        raise ValueError(f"size must be finite and > 0; got {size:g}")
    ax = artists.axes(ax)
    weights = pictures.numpy(cloud.weights).ravel()
    points = pictures.numpy(cloud.points)[..., pair].reshape(-1, 2)
    # The edge of a marker of size 0 would be drawn.
    points = np.where(weights[:, None] > 0, points, np.nan)
    from matplotlib.collections import PathCollection

    style = artists.styled(style, PathCollection, linewidth=0, alpha=0.75)
    free = not {"c", "color", "facecolor"} & set(style)
    if free and cloud.features is not None:
        style["c"] = artists.colours_of(ax, pictures.numpy(cloud.features))
    elif free and cloud.batch_shape:
        colours = artists.next_colours(ax, math.prod(cloud.batch_shape), filled=True)
        style["c"] = colours.repeat(cloud.num_atoms, axis=0)
    ax.scatter(*points.T, s=size * weights, **style)  # type: ignore[misc]
    ax.set_aspect("equal")
    return artists.labelled(ax, pictures.labels(pair, cloud.dim))


def trajectory(
    trace: Recall | Trace,
    *,
    start: AnyMeasure | None = None,
    memory: Memory | None = None,
    axes: tuple[int, int] = (0, 1),
    num_std: float = 2.0,
    size: float = 300.0,
    ax: "Axes | None" = None,
    **style: Any,
) -> "Axes":
    """Draw the trajectory of one recall up to its last change, and the recalled pattern.

    - Gaussians and mixtures: the path of the means, and ellipses after 0, 1, 2, 4, 8, … steps and
      at the end, with increasing opacity.
    - Gaussians in one dimension: the path of (mean, standard deviation), as on a `landscape`.
    - Point clouds: the paths of the atoms, more opaque for larger weights, and the last cloud.
    - Vectors: the path.

    The pattern is drawn as wide grey ellipses, grey rings around its atoms, or a white cross.

    **Arguments:**

    - `trace`: a `Recall` of one query with `save_trace=True`, or its `Trace`.
    - `start`: the query, if the trajectory is to begin there.
    - `memory`: the memory, if a pattern is to be drawn: that of `Recall.nearest`, or for a `Trace`
      the one of least divergence from its last measure.
    - `axes`, `num_std`, `size`: as in `ellipses` and `cloud`.
    - `style`: keyword arguments of `Line2D`, or for clouds `LineCollection`, of matplotlib.

    **Raises:** `TypeError` for arguments of other types, and for a memory of other measures;
    `ValueError` for a recall without trace, for a batch of recalls, for d < 2 except for Gaussians,
    for a memory of another dimension, and for `axes` that are not two of the coordinates.
    """
    stages = pictures.stages(trace, start)
    pair, names = pictures.frame("trace.measure", stages, axes)
    pattern = None if memory is None else pictures.nearest(memory, trace, stages[-1])
    ax = artists.labelled(artists.axes(ax), names)
    if pattern is not None:
        _pattern(pattern, pair, ax, num_std, size)
    if isinstance(stages, PointCloud):
        points, weights = pictures.numpy(stages.points)[..., pair], pictures.numpy(stages.weights)
        colour = artists.atom_paths(ax, points, weights, style)
        return cloud(stages[-1], axes=(pair[0], pair[1]), size=size, ax=ax, color=colour)
    from matplotlib.colors import to_rgba
    from matplotlib.lines import Line2D

    path = pictures.places(stages)[:, pair]
    (line,) = ax.plot(*path.T, **artists.styled(style, Line2D, marker=".", linewidth=1.2))
    if isinstance(stages, OF_ELLIPSES) and not pictures.on_half_plane(stages):
        last = len(stages) - 1
        drawn = sorted({0, last} | {2**k for k in range(last.bit_length()) if 2**k < last})
        colours = [to_rgba(line.get_color(), a) for a in np.linspace(0.25, 1, len(drawn))]
        look = {"edgecolor": colours, "zorder": line.get_zorder()}
        ellipses(stages[np.array(drawn)], axes=axes, num_std=num_std, ax=ax, **look)
    return ax


def _pattern(pattern: AnyMeasure, pair: list[int], ax: "Axes", num_std: float, size: float) -> None:
    """Draw a pattern beneath all else, and wide enough to be visible around it."""
    axes = (pair[0], pair[1])
    if isinstance(pattern, PointCloud):
        rings = {"facecolor": "none", "edgecolor": "0.45", "linewidth": 1.0, "alpha": 1.0}
        cloud(pattern, axes=axes, size=3 * size, ax=ax, zorder=1, **rings)
    elif isinstance(pattern, OF_ELLIPSES) and not pictures.on_half_plane(pattern):
        style = {"edgecolor": (0.45, 0.45, 0.45, 0.4), "linewidth": 7.0, "zorder": 1}
        ellipses(pattern, axes=axes, num_std=num_std, ax=ax, **style)
    else:
        cross: dict[str, Any] = {
            "color": "white",
            "markeredgecolor": "black",
            "markersize": 11,
            "zorder": 1,
        }
        ax.plot(*pictures.places(pattern)[pair], "X", **cross)


def match(
    memory: Memory,
    query: AnyMeasure,
    matched: matching.Match | int | None = None,
    *,
    axes: tuple[int, int] = (0, 1),
    num_std: float = 2.0,
    size: float = 900.0,
    ax: "Axes | None" = None,
    **style: Any,
) -> "Axes":
    """Draw the transport plan of `jdam.match` as lines between the atoms of query and pattern, or
    between the means of their components, more opaque for larger masses. The pattern is drawn as in
    `trajectory`, the query as a `cloud` or as `ellipses`.

    **Arguments:**

    - `memory`, `query`: as in `jdam.match`.
    - `matched`: the result of `jdam.match`, or the index of the pattern; None for the nearest.
    - `axes`, `num_std`, `size`: as in `ellipses` and `cloud`.
    - `style`: keyword arguments of `matplotlib.collections.LineCollection`.

    **Raises:** as `jdam.match`; `ValueError` for d < 2 and for other `axes` than two coordinates.
    """
    if not isinstance(matched, matching.Match):
        matched = matching.match(memory, query, matched)
    pair = pictures.coordinates("query", query.dim, axes)
    pattern, ax = memory[int(matched.index)], artists.axes(ax)
    _pattern(pattern, pair, ax, num_std, size)
    artists.links(ax, *pictures.links(query, pattern, matched.plan, pair), style)
    if isinstance(query, PointCloud):
        return cloud(query, axes=axes, size=size, ax=ax, zorder=3)
    return ellipses(query, axes=axes, num_std=num_std, ax=ax, zorder=3)


def landscape(
    memory: Memory,
    beta: ArrayLike,
    *,
    query: AnyMeasure | None = None,
    axes: tuple[int, int] = (0, 1),
    xs: ArrayLike | None = None,
    ys: ArrayLike | None = None,
    ax: "Axes | None" = None,
    **style: Any,
) -> "Axes":
    """Draw the energy E as filled contours, or in one dimension, except for Gaussians, as a curve.

    For Gaussians in one dimension E is a function of (mean, standard deviation), and for vectors in
    one or two dimensions a function of the vector. For other Gaussians, mixtures and point clouds E
    is that of translations of a query, a function of two coordinates of its mean. Levels are denser
    near the minimum, so that contours of a squared distance are evenly spaced.

    **Arguments:**

    - `memory`, `beta`: as in `jdam.energy`.
    - `query`: the measure that is translated; the first pattern if None.
    - `axes`: two coordinates along which it is translated.
    - `xs`, `ys`: the increasing coordinates of the grid, which encloses the patterns if they are
      None. For clouds and mixtures each grid point takes the time of a step of recall; the default
      grid is smaller for them.
    - `style`: keyword arguments of `Axes.contourf`, or of `Axes.plot` for a curve.

    **Raises:** as `jdam.energy`; `ValueError` for a memory of other measures, for a `query` that is
    not translated, for `axes` that are not two of the coordinates, and for `xs` or `ys` that are
    not increasing.
    """
    kind = pictures.kind(memory, LANDSCAPES)
    beta = inverse_temperature(memory, beta)
    points_only = kind == "1-D Gaussians" or kind.endswith("vectors")
    if points_only and query is not None:
        raise ValueError(f"query must be None for {kind}, not translations; got {query!r}")
    of = "" if points_only else " of the mean"
    pair, names = pictures.frame("memory", memory.patterns, axes, of=of, line=True)
    if len(pair) == 1 and ys is not None:
        raise ValueError(f"ys must be None for {kind}, drawn as a curve; got {ys!r}")
    is_fast = len(pair) == 1 or points_only or kind.endswith("Gaussians")
    xs, ys = pictures.grid(memory, pair, (xs, ys), (101, 81) if is_fast else (41, 33))
    queries = pictures.queries(memory, query, pair, xs, ys)
    energies = pictures.numpy(jax.vmap(energy, (None, 0, None))(memory, queries, beta))
    ax = artists.labelled(artists.axes(ax), names)
    if ys is None:
        ax.plot(xs, energies, **style)
    else:
        artists.contours(ax, xs, ys, energies.reshape(len(ys), len(xs)), style)
    return ax


def field(
    memory: Memory,
    beta: ArrayLike,
    *,
    query: Gaussian | None = None,
    xs: ArrayLike | None = None,
    ys: ArrayLike | None = None,
    ax: "Axes | None" = None,
    **style: Any,
) -> "Axes":
    """Draw one step of recall as a vector field on a grid.

    For Gaussians in the plane the arrows show the map x ↦ m⁺ + L⁺L⁻¹(x − m) of the step from
    `query`, for Gaussians in one dimension the change of (mean, standard deviation), as on a
    `landscape`, and for vectors in the plane the change of the vector.

    **Arguments:**

    - `memory`, `beta`: as in `jdam.step`.
    - `query`: for Gaussians in the plane, a query with a nonsingular covariance; otherwise None.
    - `xs`, `ys`: as in `landscape`.
    - `style`: keyword arguments of `Axes.quiver`.

    **Raises:** as `jdam.step`; `ValueError` for a memory of other measures, for a `query` that is
    missing, singular or not allowed, and for `xs` or `ys` that are not increasing.
    """
    kind = pictures.kind(memory, ("2-D Gaussians", "1-D Gaussians", "2-D vectors"))
    beta = inverse_temperature(memory, beta)
    if (query is None) == (kind == "2-D Gaussians"):
        condition = "given for 2-D Gaussians and for nothing else"
        raise ValueError(f"query must be {condition}; got {query!r} for {kind}")
    pair, names = pictures.frame("memory", memory.patterns, (0, 1))
    xs, ys = pictures.grid(memory, pair, (xs, ys), (17, 15))
    if query is None:
        starts = pictures.queries(memory, None, pair, xs, ys)
        ends = jax.vmap(step, (None, 0, None))(memory, starts, beta)
        before, after = pictures.places(starts), pictures.places(ends)
    else:
        before = pictures.points(xs, ys)
        after = pictures.transported(query, step(memory, query, beta), before)
    ax = artists.labelled(artists.axes(ax), names)
    from matplotlib.quiver import Quiver

    style = artists.styled(style, Quiver, angles="xy", scale_units="xy", scale=1, width=0.003)
    ax.quiver(*before.T, *(after - before).T, **style)
    return ax


def capacity(
    dims: ArrayLike,
    counts: ArrayLike,
    *,
    errors: ArrayLike | None = None,
    fit: bool = True,
    ax: "Axes | None" = None,
    **style: Any,
) -> "Axes":
    """Draw the largest numbers N of recalled patterns on a logarithmic axis over the dimension,
    with the line log N = a + b·d of `fit_exponent`.

    **Arguments:**

    - `dims`, `counts`, `errors`: as in `fit_exponent`.
    - `fit`: whether to draw the line.
    - `style`: keyword arguments of `Axes.errorbar`.

    **Raises:** as `fit_exponent`.
    """
    d, log_counts, log_errors = pictures.measured(dims, counts, errors)
    ax = artists.labelled(
        artists.axes(ax), ("dimension d", "largest number N of patterns recalled")
    )
    counts = np.exp(log_counts)
    spread = None if log_errors is None else counts * log_errors
    from matplotlib.lines import Line2D

    drawn = ax.errorbar(d, counts, spread, **artists.styled(style, Line2D, fmt="o", capsize=3))
    ax.set_yscale("log")
    if fit:
        slope, error, intercept = pictures.fitted_line(d, log_counts, log_errors)
        digits = 1 - math.floor(math.log10(error)) if 1e-9 < error < math.inf else 3
        label = f"slope {slope:.{max(digits, 0)}f} ± {error:.{max(digits, 0)}f}"
        ends = np.array([d.min(), d.max()])
        colour = drawn.lines[0].get_color()
        ax.plot(ends, np.exp(intercept + slope * ends), color=colour, lw=1.2, label=label)
    return ax


def fit_exponent(
    dims: ArrayLike, counts: ArrayLike, errors: ArrayLike | None = None
) -> tuple[float, float, float]:
    """Fit the line log N = a + b·d to numbers of patterns by least squares.

    **Arguments:**

    - `dims`: dimensions d > 0, (n,).
    - `counts`: numbers N > 0, (n,).
    - `errors`: standard errors > 0 of the counts, the weights of the fit, (n,). If None, all log N
      have the same error, which is estimated from their scatter about the line.

    **Returns:** the slope b, its standard error, and the intercept a.

    **Raises:** `ValueError` for lengths that differ, for values that are not finite or not > 0, and
    for fewer than two different dimensions, or fewer than three points if `errors` is None.
    """
    return pictures.fitted_line(*pictures.measured(dims, counts, errors))
