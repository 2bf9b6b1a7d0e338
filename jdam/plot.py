"""Pictures of measures, recalls and energies by matplotlib, which `jdam[plot]` installs.

Every function draws on the axes `ax`, the current ones if None, and returns them; other keywords
style what is drawn. Axes without labels get them, x₁, x₂, … for coordinates of measures.
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
from jdam._memory.memory import Memory, check_against
from jdam._recall.recall import step
from jdam._recall.result import Recall, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OF_ELLIPSES = (Gaussian, DiagonalGaussian, GaussianMixture)
#: Memories that have a landscape.
LANDSCAPES = ("Gaussians", "mixtures", "point clouds", "1-D vectors", "2-D vectors")


def ellipses(
    gaussian: Gaussian | DiagonalGaussian | GaussianMixture,
    *,
    axes: tuple[int, int] = (0, 1),
    num_std: float = 2.0,
    ax: "Axes | None" = None,
    **style: Any,
) -> "Axes":
    """The contours (x−m)ᵀΣ⁻¹(x−m) = `num_std`² of Gaussians, of their marginals on two
    coordinates `axes`; those of singular ones are segments and dots. Of mixtures those of
    all components, the fainter the less they weigh. Each Gaussian or mixture of a batch has the
    next colour of the cycle, unless `color` or `edgecolor` says otherwise.

    **Arguments:** `gaussian`, a single one or a batch, d ≥ 2; `style` of a
    `matplotlib.collections.PolyCollection`.

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
    # A colour is that of the line; whoever wants a filled ellipse says so by facecolor.
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
    """The atoms of point clouds, their areas proportional to their weights; atoms of weight 0 are
    not seen. Each cloud of a batch has the next colour of the property cycle, and where atoms have
    features, as one-hot labels, each label has one, unless `c`, `color` or `facecolor` says
    otherwise. One unit is as long on both axes.

    **Arguments:** `cloud`, a single one or a batch, d ≥ 2; `size`, the area in points² that the
    atoms of a cloud share; `style` of `Axes.scatter`.

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
    # Of a marker of no size the edge would still be drawn.
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
    """The way of one recall, up to where it stood still, and the pattern at which it ended.

    Of Gaussians and mixtures, the path of the means, and ellipses of its stages 0, 1, 2, 4, 8, …
    and the last, the later the darker; of Gaussians in one dimension the path of (mean, standard
    deviation), as on a `landscape`.
    Of point clouds, the paths of the atoms, as dark as their weight was, and the cloud at the end.
    Of vectors, the path.
    The pattern is drawn if there is a `memory`: as broad grey ellipses, as grey rings around its
    atoms, three times as large, or as a white cross.

    **Arguments:** `trace`, of one recall with `save_trace=True`, or that `Recall`; `start`, its
    query, if the way is to begin there; `memory`, the one that was asked, of which the pattern
    `Recall.nearest` is drawn, or, of a `Trace`, the one of least divergence from its last measure;
    `axes`, two coordinates to project on; `num_std` as in `ellipses` and `size` as in `cloud`;
    `style` of the path, a `matplotlib.lines.Line2D`, or of the paths of atoms, a
    `matplotlib.collections.LineCollection`.

    **Raises:** `TypeError` for anything else, and for a memory of other measures; `ValueError`
    for a recall without a trace, for a batch of recalls, for d < 2 where there is nothing to draw,
    for a memory of another dimension, and for `axes` that are not two of the coordinates.
    """
    stages = pictures.stages(trace, start)
    pair, names = pictures.frame("trace.measure", stages, axes)
    pattern = None if memory is None else pictures.nearest(memory, trace, stages[-1])
    ax = artists.labelled(artists.axes(ax), names)
    if pattern is not None:
        _pattern(pattern, pair, ax, num_std, size)
    if isinstance(stages, PointCloud):
        return _atom_paths(stages, pair, size, ax, style)
    from matplotlib.colors import to_rgba
    from matplotlib.lines import Line2D

    path = pictures.places(stages)[:, pair]
    (line,) = ax.plot(*path.T, **artists.styled(style, Line2D, marker=".", linewidth=1.2))
    if isinstance(stages, OF_ELLIPSES) and not pictures.on_half_plane(stages):
        last = len(stages) - 1
        shown = sorted({0, last} | {2**k for k in range(last.bit_length()) if 2**k < last})
        fading = [to_rgba(line.get_color(), a) for a in np.linspace(0.25, 1, len(shown))]
        look = {"edgecolor": fading, "zorder": line.get_zorder()}
        ellipses(stages[np.array(shown)], axes=axes, num_std=num_std, ax=ax, **look)
    return ax


def _pattern(pattern: AnyMeasure, pair: list[int], ax: "Axes", num_std: float, size: float) -> None:
    """A pattern beneath what is drawn later, and so wide that this does not cover it."""
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
    """What of a query belongs to what of a pattern: lines between their atoms, or between the means
    of components, the darker the more mass the plan of `jdam.match` takes along them. The pattern
    is drawn as in `trajectory`, the query as a `cloud` or as `ellipses`.

    **Arguments:** `memory` and `query` as of `jdam.match`; `matched`, its result, or the index of
    the pattern, or None for the nearest; `axes`, `num_std` and `size` as in `trajectory`; `style`
    of a `matplotlib.collections.LineCollection`.

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
    """The energy E as filled contours; in one dimension, except of Gaussians, a curve.

    Of Gaussians in one dimension, over (mean, standard deviation); of vectors on the line and in
    the plane, over them. Of other Gaussians, mixtures and point clouds, over the place of the
    query: it is translated so that two coordinates of its mean are those of the grid, while its
    shape, and its mean in other coordinates, are held.

    Levels lie closer near the minimum: E grows like a squared distance, so that they come out
    evenly spaced.

    **Arguments:** `memory` and `beta` as in `jdam.energy`; `query`, the measure that is translated,
    the first pattern if None; `axes`, along which two coordinates; `xs` and `ys`, the grid, which
    encloses the patterns if None; `style` of `Axes.contourf`, or of `Axes.plot` for a curve. Of
    clouds and mixtures the grid has fewer points, for each takes as long as a step of recall: in
    a large memory, pass smaller `xs` and `ys`.

    **Raises:** as `jdam.energy`; `ValueError` for a memory of other measures, for a `query` where
    nothing is translated, for `axes` that are not two of the coordinates, and for `xs` or `ys`
    that do not rise.
    """
    kind = pictures.kind(memory, LANDSCAPES)
    beta = inverse_temperature(memory, beta)
    still = kind == "1-D Gaussians" or kind.endswith("vectors")
    if still and query is not None:
        raise ValueError(f"query must be None for {kind}, of which no shape is held; got {query!r}")
    of = "" if still else " of the mean"
    pair, names = pictures.frame("memory", memory.patterns, axes, of=of, line=True)
    if len(pair) == 1 and ys is not None:
        raise ValueError(f"ys must be None for {kind}, of which a curve is drawn; got {ys!r}")
    quick = len(pair) == 1 or still or kind.endswith("Gaussians")
    xs, ys = pictures.grid(memory, pair, (xs, ys), (101, 81) if quick else (41, 33))
    queries = pictures.queries(memory, query, pair, xs, ys)
    found = pictures.numpy(jax.vmap(energy, (None, 0, None))(memory, queries, beta))
    ax = artists.labelled(artists.axes(ax), names)
    if ys is None:
        ax.plot(xs, found, **style)
    else:
        artists.contours(ax, xs, ys, found.reshape(len(ys), len(xs)), style)
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
    """Arrows of one step of recall, from where it starts to where it ends.

    Of Gaussians in the plane, how the step from `query` moves points, by its map
    x ↦ m⁺ + L⁺L⁻¹(x − m); of Gaussians in one dimension, how it moves (mean, standard deviation),
    on their `landscape`; of vectors in the plane, how it moves them.

    **Arguments:** `memory` and `beta` as in `jdam.step`; `query`, of Gaussians in the plane only,
    its covariance not singular; `xs` and `ys`, the grid, which encloses the patterns if None;
    `style` of `Axes.quiver`.

    **Raises:** as `jdam.step`; `ValueError` for a memory of other measures, for a `query` that is
    missing or has no place, and for `xs` or `ys` that do not rise.
    """
    kind = pictures.kind(memory, ("2-D Gaussians", "1-D Gaussians", "2-D vectors"))
    beta = inverse_temperature(memory, beta)
    if (query is None) == (kind == "2-D Gaussians"):
        wanted = "given for 2-D Gaussians and for nothing else"
        raise ValueError(f"query must be {wanted}; got {query!r} for {kind}")
    pair, names = pictures.frame("memory", memory.patterns, (0, 1))
    xs, ys = pictures.grid(memory, pair, (xs, ys), (17, 15))
    if query is None:
        starts = pictures.queries(memory, None, pair, xs, ys)
        ends = jax.vmap(step, (None, 0, None))(memory, starts, beta)
        before, after = pictures.places(starts), pictures.places(ends)
    else:
        check_against(memory, "query", query)
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
    """The largest numbers N of patterns recalled, `counts`, against dimension, on a logarithmic
    axis, with the line log N = a + b·d of `fit_exponent`.

    **Arguments:** `dims`, `counts` and `errors` as in `fit_exponent`; `fit`, whether to draw the
    line; `style` of `Axes.errorbar`.

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
        slope, error, intercept = fit_exponent(dims, counts, spread)
        digits = 1 - math.floor(math.log10(error)) if 1e-9 < error < math.inf else 3
        label = f"slope {slope:.{max(digits, 0)}f} ± {error:.{max(digits, 0)}f}"
        ends = np.array([d.min(), d.max()])
        colour = drawn.lines[0].get_color()
        ax.plot(ends, np.exp(intercept + slope * ends), color=colour, lw=1.2, label=label)
    return ax


def fit_exponent(
    dims: ArrayLike, counts: ArrayLike, errors: ArrayLike | None = None
) -> tuple[float, float, float]:
    """The line log N = a + b·d through numbers of patterns, by least squares.

    **Arguments:** `dims` d and `counts` N > 0, of one length; `errors`, the standard errors of
    the counts, > 0, by which points are weighted; if None all logarithms are equally uncertain, and
    as much as they scatter around the line.

    **Returns:** the slope b, its standard error, and the intercept a.

    **Raises:** `ValueError` for lengths that differ, values that are not finite or not > 0, or
    too few dimensions: two different ones, and without errors three points.
    """
    d, log_counts, log_errors = pictures.measured(dims, counts, errors)
    weights = np.ones_like(d) if log_errors is None else log_errors**-2
    centre = np.average(d, weights=weights)
    inertia = np.sum(weights * (d - centre) ** 2)
    slope = np.sum(weights * (d - centre) * log_counts) / inertia
    intercept = np.average(log_counts, weights=weights) - slope * centre
    residuals = log_counts - intercept - slope * d
    scatter = np.sum(residuals**2) / (len(d) - 2) if log_errors is None else 1.0
    return float(slope), float(np.sqrt(scatter / inertia)), float(intercept)


def _atom_paths(
    stages: PointCloud, pair: list[int], size: float, ax: "Axes", style: dict[str, Any]
) -> "Axes":
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba

    points, weights = pictures.numpy(stages.points)[..., pair], pictures.numpy(stages.weights)
    style = artists.styled(style, LineCollection, linewidth=0.8)
    colour = style.pop("color", None)
    colour = artists.next_colours(ax, 1)[0] if colour is None else colour
    steps = np.stack([points[:-1], points[1:]], axis=2).reshape(-1, 2, 2)
    dark = (weights[:-1] / weights.max(axis=1, keepdims=True)[:-1]).ravel()
    faded = [to_rgba(colour, 0.6 * alpha) for alpha in dark]
    ax.add_collection(LineCollection(list(steps), **{"edgecolor": faded} | style))
    return cloud(stages[-1], axes=(pair[0], pair[1]), size=size, ax=ax, color=colour)
