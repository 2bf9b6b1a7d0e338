"""What is drawn is what is meant: the numbers of the artists, not their looks."""

import subprocess
import sys

import jax
import matplotlib as mpl
import numpy as np
import pytest
from numpy.testing import assert_allclose

import jdam
from tests.helpers import mixtures

mpl.use("Agg")
import matplotlib.pyplot as plt

FULL = jdam.Gaussian(np.array([1.0, -2.0, 0.5]), np.tril(np.ones((3, 3))) + np.eye(3))
DIAGONAL = jdam.DiagonalGaussian(np.array([1.0, 2.0]), np.array([0.5, 3.0]))


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    figure.canvas.draw()  # what cannot be drawn fails here
    plt.close(figure)


def recalled(memory, query, beta=5.0, **options):
    return jdam.recall(memory, query, beta, save_trace=True, **options)


def line_memory(kind=jdam.DiagonalGaussian):
    mean, scale = np.array([[-1.0], [1.0]]), np.array([[0.5], [0.8]])
    return jdam.store(kind(mean, scale if kind is jdam.DiagonalGaussian else scale[..., None]))


def plane_gaussians():
    """Three of the covariance 1."""
    mean = np.array([[0.0, 0.0], [5.0, 1.0], [-4.0, 3.0]])
    return jdam.Gaussian(mean, np.stack([np.eye(2)] * 3))


def surface(ax, memory, beta=1.0, **options):
    """The energies of the grid, which a landscape gives to `contourf`."""
    with pytest.MonkeyPatch.context() as patch:
        given = []
        patch.setattr(ax, "contourf", lambda *arguments, **style: given.append(arguments))
        jdam.plot.landscape(memory, beta, ax=ax, **options)
    return given[0][2]


def clouds(rng, num=2):
    return jdam.PointCloud(rng.normal(size=(num, 4, 2)) + 4 * np.arange(num)[:, None, None])


@pytest.mark.parametrize(("gaussian", "axes"), [(FULL, (0, 2)), (FULL, (2, 1)), (DIAGONAL, (0, 1))])
def test_ellipses_are_contours_of_the_marginal(ax, gaussian, axes):
    assert jdam.plot.ellipses(gaussian, axes=axes, num_std=1.5, ax=ax) is ax
    (path,) = ax.collections[0].get_paths()
    pair = list(axes)
    away = path.vertices - np.asarray(gaussian.mean)[pair]
    inverse = np.linalg.inv(np.asarray(gaussian.covariance)[np.ix_(pair, pair)])
    assert_allclose(np.einsum("ni,ij,nj->n", away, inverse, away), 1.5**2, rtol=1e-9)
    assert ax.viewLim.contains(*path.vertices.min(0))
    assert ax.viewLim.contains(*path.vertices.max(0))


def test_singular_gaussians_are_segments_and_points(ax):
    batch = jdam.Gaussian(np.zeros((2, 2)), np.array([[[3.0], [4.0]], [[0.0], [0.0]]]))
    jdam.plot.ellipses(batch, num_std=2, color="red", ax=ax)
    segment, point = (path.vertices for path in ax.collections[0].get_paths())
    assert_allclose(segment @ [4.0, -3.0], 0, atol=1e-12)
    assert_allclose(np.linalg.norm(segment, axis=1).max(), 10)
    assert_allclose(point, 0, atol=1e-12)
    (dot,) = ax.collections[1].get_offsets()  # an outline of no length would not be seen
    assert_allclose(dot, 0, atol=1e-12)
    assert_allclose(ax.collections[1].get_facecolor(), [mpl.colors.to_rgba("red")])
    assert ax.collections[0].get_facecolor().size == 0  # a colour is that of the line


def test_units_are_as_long_on_both_axes(ax, rng):
    jdam.plot.ellipses(DIAGONAL, ax=ax)
    assert ax.get_aspect() == 1
    ax.set_aspect("auto")
    jdam.plot.cloud(clouds(rng), ax=ax)
    assert ax.get_aspect() == 1


@pytest.mark.parametrize(
    ("memory", "labels"),
    [
        (line_memory(), ("mean", "standard deviation")),
        (jdam.store(np.array([[0.0], [1.0]])), ("x", "energy")),
        (jdam.store(np.eye(2)), ("x₁", "x₂")),
    ],
)
def test_landscapes_say_what_their_axes_are(ax, memory, labels):
    jdam.plot.landscape(memory, 2.0, ax=ax)
    assert (ax.get_xlabel(), ax.get_ylabel()) == labels


def drawn(measures, ax, **options):
    is_cloud = isinstance(measures, jdam.PointCloud)
    (jdam.plot.cloud if is_cloud else jdam.plot.ellipses)(measures, ax=ax, **options)
    last = ax.collections[-1]
    return last.get_facecolor() if is_cloud else last.get_edgecolor()


@pytest.mark.parametrize("name", ["full", "diagonal", "mixture", "cloud"])
def test_each_pattern_of_a_batch_has_the_next_colour(ax, rng, name):
    batch, each = {
        "full": (plane_gaussians(), 1),
        "diagonal": (jdam.DiagonalGaussian(np.eye(3), np.ones((3, 3))), 1),
        "mixture": (mixtures(rng, 3, 2), 3),
        "cloud": (clouds(rng, 3), 4),
    }[name]
    ax.set_prop_cycle(color=["red", "green"])
    wanted = mpl.colors.to_rgba_array(["red", "green", "red"]).repeat(each, axis=0)
    assert_allclose(drawn(batch, ax)[:, :3], wanted[:, :3])
    wanted = mpl.colors.to_rgba_array(["green", "red", "green"]).repeat(each, axis=0)
    assert_allclose(drawn(batch, ax)[:, :3], wanted[:, :3])  # the cycle goes on
    for style in ({"color": "blue"}, {"fc" if name == "cloud" else "ec": "blue"}):
        colours = drawn(batch, ax, **style)[:, :3]
        assert_allclose(colours, [mpl.colors.to_rgb("blue")] * len(colours))


def test_more_patterns_than_colours(ax):
    colours = drawn(jdam.DiagonalGaussian(np.zeros((75, 2)), np.ones((75, 2))), ax)
    assert_allclose(colours, [mpl.colors.to_rgba(f"C{i}") for i in range(75)])


def test_points_and_faint_components_without_a_line(ax, rng):
    """The colour "none" has no row in matplotlib."""
    jdam.plot.ellipses(jdam.Gaussian(np.zeros(2), np.zeros((2, 1))), edgecolor="none", ax=ax)
    assert_allclose(drawn(mixtures(rng, 2, 3), ax, edgecolor="none"), 0)


def test_projections_are_said_and_labels_kept(ax, rng):
    jdam.plot.ellipses(DIAGONAL, axes=(1, 0), ax=ax)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x₂", "x₁")
    jdam.plot.ellipses(FULL, ax=ax)
    assert ax.get_xlabel() == "x₂"
    ax.set(xlabel="", ylabel="mine")
    jdam.plot.cloud(jdam.PointCloud(rng.normal(size=(9, 12))), axes=(11, 2), ax=ax)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x₁₂ (of 12 coordinates)", "mine")
    jdam.plot.landscape(jdam.store(np.eye(2)), 1.0, ax=ax)
    assert ax.get_ylabel() == "mine"


def way(memory, query):
    return lambda ax: jdam.plot.trajectory(recalled(memory, query, max_steps=2), ax=ax)


@pytest.mark.parametrize(
    ("draw", "labels"),
    [
        (way(jdam.store(np.eye(3)), np.eye(3)[0]), ["x₁ (of 3 coordinates)", "x₂ (of 3 coordinates)"]),
        (way(line_memory(), line_memory()[0]), ["mean", "standard deviation"]),
        (lambda ax: jdam.plot.field(jdam.store(np.eye(2)), 1.0, ax=ax), ["x₁", "x₂"]),
        (lambda ax: jdam.plot.field(line_memory(), 1.0, ax=ax), ["mean", "standard deviation"]),
        (lambda ax: jdam.plot.capacity([2, 4, 6], [3, 9, 20], ax=ax), ["dimension d", "largest number N of patterns recalled"]),
    ],
)  # fmt: skip
def test_axes_are_labelled(ax, draw, labels):
    draw(ax)
    assert [ax.get_xlabel(), ax.get_ylabel()] == labels


def test_ellipses_draw_on_the_current_axes_in_the_next_colour(ax):
    for colour in ("C0", "C1"):
        assert jdam.plot.ellipses(DIAGONAL) is ax
        assert_allclose(ax.collections[-1].get_edgecolor()[0], mpl.colors.to_rgba(colour))


def test_areas_of_atoms_are_weights_and_padding_is_not_seen(ax):
    points = np.array([[[0.0, 1.0, 5.0], [2.0, 3.0, 5.0], [9.0, 9.0, 9.0]]])
    cloud = jdam.PointCloud(points, np.array([[0.25, 0.75, 0.0]]))
    assert jdam.plot.cloud(cloud, axes=(1, 0), size=100, ax=ax, lw=1, c=[1, 2, 3]) is ax
    drawn = ax.collections[0]
    assert_allclose(drawn.get_sizes()[:2], [25, 75])
    shown = np.ma.filled(drawn.get_offsets(), np.nan)
    assert_allclose(shown, [[1, 0], [3, 2], [np.nan, np.nan]])


@pytest.mark.parametrize("start", [True, False])
def test_way_of_a_gaussian(ax, rng, start):
    patterns = jdam.Gaussian(4 * np.eye(3), rng.normal(size=(3, 3, 2)))
    query = jdam.Gaussian(np.array([3.0, 0.5, 0.2]), rng.normal(size=(3, 1)))
    found = recalled(jdam.store(patterns), query, 0.3)
    trace = found if start else found.trace
    jdam.plot.trajectory(trace, start=query if start else None, axes=(2, 0), ax=ax)
    (line,) = ax.lines
    path = line.get_xydata()
    assert_allclose(path[-1], np.asarray(found.measure.mean)[[2, 0]])
    if start:
        assert_allclose(path[0], [0.2, 3.0])
    assert len(path) <= int(found.num_steps) + 1 + start  # nothing is repeated at the end
    last = ax.collections[0].get_paths()[-1].vertices
    assert_allclose(last[:-1].mean(0), path[-1], atol=1e-9)


@pytest.mark.parametrize("given", [jdam.match, lambda *_: 1, lambda *_: None])
def test_matched_atoms_are_joined(rng, ax, given):
    """By lines as opaque as their masses are large."""
    points = rng.normal(size=(2, 5, 3))
    memory = jdam.store(jdam.PointCloud(points), jdam.Chamfer(0.01, rho=0.1))
    query = jdam.PointCloud(points[1, [3, 0, 2]])
    drawn = jdam.plot.match(memory, query, given(memory, query), axes=(2, 0), color="red", ax=ax)
    assert drawn is ax
    pattern, lines, atoms = ax.collections
    assert_allclose(pattern.get_offsets(), points[1][:, [2, 0]])
    assert_allclose(atoms.get_offsets(), points[1, [3, 0, 2]][:, [2, 0]])
    plan = np.asarray(jdam.match(memory, query).plan)
    shown = plan > 0.01 * plan.max()
    assert_allclose(lines.get_edgecolor()[:, 3], plan[shown] / plan.max(), rtol=1e-6)
    assert_allclose(
        [path.vertices[0] for path in lines.get_paths()],
        query.points[np.nonzero(shown)[0]][:, [2, 0]],
    )


def test_matched_components_are_joined(rng, ax):
    memory = jdam.store(mixtures(rng, 2, 2))
    jdam.plot.match(memory, memory[0], ax=ax)
    means = np.asarray(memory[0].means)
    lines = next(c for c in ax.collections if isinstance(c, mpl.collections.LineCollection))
    assert_allclose([path.vertices for path in lines.get_paths()], np.stack([means, means], 1))
    with pytest.raises(TypeError, match="memory must have a geometry of transport plans"):
        jdam.plot.match(jdam.store(plane_gaussians()), plane_gaussians()[0])


@pytest.mark.parametrize("kind", [jdam.Gaussian, jdam.DiagonalGaussian])
def test_way_on_the_half_plane(ax, kind):
    memory = line_memory(kind)
    found = recalled(memory, memory[1])
    jdam.plot.trajectory(found, ax=ax)
    assert_allclose(ax.lines[0].get_xydata()[-1], [1, 0.8], atol=1e-2)


def test_way_of_a_vector(ax):
    found = recalled(jdam.store(np.eye(2)), np.array([0.9, 0.2]))
    jdam.plot.trajectory(found, start=np.array([0.9, 0.2]), color="k", ax=ax)
    path = ax.lines[0].get_xydata()
    assert_allclose(path[[0, -1]], [[0.9, 0.2], found.measure])


def test_atoms_have_the_colours_of_their_labels(ax, rng):
    labels = np.array([[0, 1, 1], [2, 0, 1]])
    points = rng.normal(size=(2, 3, 2))
    jdam.plot.cloud(jdam.PointCloud(points, None, np.eye(3)[labels]), ax=ax)
    jdam.plot.cloud(jdam.PointCloud(points, None, labels[..., None]), ax=ax)
    hot, graded = (np.array(artist.get_facecolors()) for artist in ax.collections)
    for colours in (hot, graded):
        assert len(np.unique(colours, axis=0)) == 3
        same = (colours[:, None] == colours[None]).all(-1)
        np.testing.assert_array_equal(same, labels.ravel()[:, None] == labels.ravel())


@pytest.mark.full
def test_way_of_a_cloud(ax, rng):
    patterns = clouds(rng)
    query = jdam.PointCloud(patterns.points[0] + 0.3)
    memory = jdam.store(patterns, jdam.Sinkhorn(0.1, hellinger_scale=1.0))
    found = recalled(memory, query, max_steps=3)
    jdam.plot.trajectory(found, start=query, size=40, ax=ax)
    paths, end = ax.collections
    segments = np.array(paths.get_segments())
    assert segments.shape == (3 * 4, 2, 2)
    assert_allclose(segments[:4, 0], query.points)
    assert_allclose(segments[-4:, 1], found.measure.points)
    assert_allclose(end.get_sizes(), 40 * np.asarray(found.measure.weights))


@pytest.mark.parametrize("of_recall", [True, False])
def test_ways_end_at_the_pattern(ax, rng, of_recall):
    patterns = clouds(rng)
    memory = jdam.store(patterns, jdam.Sinkhorn(0.1))
    found = recalled(memory, jdam.PointCloud(patterns.points[1] + 0.3), max_steps=3)
    jdam.plot.trajectory(found if of_recall else found.trace, memory=memory, ax=ax)
    assert_allclose(ax.collections[0].get_offsets(), patterns.points[1])
    assert ax.collections[0].get_facecolor().size == 0


def test_ways_end_at_ellipses_and_crosses(ax):
    patterns = plane_gaussians()
    found = recalled(jdam.store(patterns), patterns[1], max_steps=2)
    jdam.plot.trajectory(found, memory=jdam.store(patterns), ax=ax)
    pattern = ax.collections[0].get_paths()[0].vertices[:-1]
    assert_allclose(pattern.mean(0), patterns.mean[1], atol=1e-9)
    assert_allclose(
        np.ptp(pattern, axis=0), 4 * np.sqrt(np.diag(patterns.covariance[1])), rtol=1e-3
    )
    line = line_memory()
    jdam.plot.trajectory(recalled(line, line[1]), memory=line, ax=ax)
    assert_allclose(ax.lines[-2].get_xydata(), [[1, 0.8]])
    vectors = jdam.store(np.eye(3))
    jdam.plot.trajectory(recalled(vectors, np.eye(3)[1]), memory=vectors, axes=(1, 2), ax=ax)
    assert_allclose(ax.lines[-2].get_xydata(), [[1, 0]])


@pytest.mark.full
def test_way_of_a_mixture(ax, rng):
    patterns = mixtures(rng, 2, 3)
    memory = jdam.store(patterns)
    found = recalled(memory, patterns[1], max_steps=2)
    jdam.plot.trajectory(found, memory=memory, axes=(0, 2), ax=ax)
    path = ax.lines[-1].get_xydata()
    assert_allclose(path[-1], np.asarray(found.measure.mean)[[0, 2]])
    assert len(ax.collections[0].get_paths()) == 3


@pytest.mark.parametrize("kind", [jdam.Gaussian, jdam.DiagonalGaussian])
def test_landscape_over_the_mean(ax, rng, kind):
    """Of one pattern E = W₂²: |m − m₁|² and what the covariances differ, at every m."""
    scale = np.array([[0.5, 1.0, 0.3]])
    factor = scale if kind is jdam.DiagonalGaussian else np.stack([np.diag(scale[0])])
    memory = jdam.store(kind(np.array([[1.0, 2.0, 3.0]]), factor))
    query = kind(np.array([9.0, 5.0, 9.0]), 2 * factor[0])
    xs, ys = np.array([0.0, 1.0, 2.0]), np.array([2.0, 4.0])
    levels = surface(ax, memory, query=query, axes=(2, 0), xs=xs, ys=ys)
    wanted = (xs - 3) ** 2 + (ys[:, None] - 1) ** 2 + 3.0**2 + np.sum(scale**2)
    assert_allclose(levels, wanted, rtol=1e-9)
    assert ax.get_xlabel() == "x₃ of the mean (of 3 coordinates)"


@pytest.mark.full
@pytest.mark.parametrize("given", [True, False])
def test_landscape_over_the_translation_of_a_cloud(ax, rng, given):
    """Of one cloud and itself moved by t: S_ε = ½|t|², whatever ε."""
    pattern = jdam.PointCloud(rng.normal(size=(1, 5, 2)))
    memory = jdam.store(pattern, jdam.Sinkhorn(0.3))
    query = jdam.PointCloud(pattern.points[0] + 7) if given else None
    mean = np.asarray(pattern.mean[0])
    away = np.array([-0.5, 0.0, 1.0])
    levels = surface(ax, memory, query=query, xs=mean[0] + away, ys=mean[1] + away)
    assert_allclose(levels, (away**2 + away[:, None] ** 2) / 2, atol=1e-5)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x₁ of the mean", "x₂ of the mean")


@pytest.mark.full
def test_landscape_over_the_place_of_a_mixture(ax):
    mean = np.array([[[0.0, 0.0], [2.0, 0.0]]])
    memory = jdam.store(jdam.GaussianMixture(np.full((1, 2), 0.5), mean, np.ones((1, 2, 2, 1))))
    levels = surface(ax, memory, xs=[1.0, 2.0], ys=[0.0, 3.0])
    assert_allclose(levels, [[0, 1], [9, 10]], atol=1e-9)


@pytest.mark.full
def test_landscape_of_clouds_on_the_line_is_a_curve(ax):
    memory = jdam.store(jdam.PointCloud(np.array([[[0.0], [1.0]]])), jdam.Sinkhorn(0.3))
    jdam.plot.landscape(memory, 1.0, xs=[0.0, 0.5, 2.5], ax=ax)
    assert_allclose(ax.lines[0].get_ydata(), [0.125, 0, 2], atol=1e-5)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x of the mean", "energy")


def test_landscapes_enclose_the_patterns_that_are_there(ax):
    """Neither the free slots of a memory nor padding."""
    memory = jdam.store(plane_gaussians(), capacity=7)
    jdam.plot.landscape(memory, 1.0, ys=[0.0, 1.0], ax=ax)
    low, high = memory[:3].mean[:, 0] - 2, memory[:3].mean[:, 0] + 2
    assert_allclose(ax.get_xlim(), [low.min(), high.max()])


@pytest.mark.parametrize("kind", [jdam.Gaussian, jdam.DiagonalGaussian])
def test_landscape_and_field_on_the_half_plane(ax, kind):
    memory = line_memory(kind)
    xs, ys = np.array([-1.0, 0.0, 1.0]), np.array([0.2, 0.5, 0.8])
    assert jdam.plot.landscape(memory, 20.0, xs=xs, ys=ys, ax=ax) is ax
    drawn = ax.collections[0]
    # Each pattern is its own minimum, up to the other's share.
    assert_allclose(drawn.norm.vmin, 0, atol=1e-9)
    assert_allclose(drawn.norm.vmax, 1 + 0.3**2, rtol=0.05)
    assert jdam.plot.field(memory, 20.0, xs=xs, ys=ys, ax=ax) is ax
    arrows = ax.collections[-1]
    ends = arrows.XY + np.stack([arrows.U, arrows.V], -1)
    assert_allclose(ends[::3], np.tile([-1, 0.5], (3, 1)), atol=1e-6)  # from m = −1


def test_landscapes_of_vectors(ax):
    jdam.plot.landscape(jdam.store(np.array([[0.0], [1.0]])), 50.0, xs=[0.0, 0.25, 1.0], ax=ax)
    assert_allclose(ax.lines[0].get_ydata(), [0, 0.0625, 0], atol=1e-6)
    jdam.plot.landscape(jdam.store(np.array([[0.0, 1.0], [2.0, 1.0]])), 1.0, ax=ax)
    jdam.plot.field(jdam.store(np.array([[0.0, 1.0]])), 1.0, ax=ax)
    arrows = ax.collections[-1]
    assert_allclose(arrows.XY + np.stack([arrows.U, arrows.V], -1), [[0, 1]] * 255, atol=1e-9)


@pytest.mark.parametrize("kind", [jdam.Gaussian, jdam.DiagonalGaussian])
def test_field_in_the_plane_is_the_transport_map(ax, rng, kind):
    """Of a single pattern: the gradient of a convex function that carries query to pattern."""
    shape = (2, 2) if kind is jdam.Gaussian else (2,)
    query = kind(rng.normal(size=2), 0.1 + np.abs(rng.normal(size=shape)))
    pattern = kind(rng.normal(size=(1, 2)), 0.1 + np.abs(rng.normal(size=(1, *shape))))
    xs = ys = np.array([0.0, 1.0])
    jdam.plot.field(jdam.store(pattern), 1.0, query=query, xs=xs, ys=ys, ax=ax)
    arrows = ax.collections[0]
    ends = arrows.XY + np.stack([arrows.U, arrows.V], -1)
    linear = np.stack([ends[1] - ends[0], ends[2] - ends[0]], -1)
    assert_allclose(linear, linear.T, atol=1e-9)
    assert np.linalg.eigvalsh(linear).min() > 0
    assert_allclose(linear @ query.covariance @ linear.T, pattern.covariance[0], atol=1e-9)
    assert_allclose(ends[0] + linear @ query.mean, pattern.mean[0], atol=1e-9)


def test_fit_finds_an_exact_line():
    dims = np.array([5, 10, 20, 30])
    for errors in (None, np.array([0.1, 5.0, 1.0, 1.0])):
        slope, error, intercept = jdam.plot.fit_exponent(dims, np.exp(2 + 0.1 * dims), errors)
        assert_allclose([slope, intercept], [0.1, 2])
        assert errors is not None or error < 1e-12


@pytest.mark.parametrize("known", [True, False])
def test_standard_error_of_the_slope(rng, known):
    """That of weighted least squares is (XᵀWX)⁻¹, and that of many noisy fits."""
    dims = np.linspace(4, 40, 10)
    noise = np.linspace(0.02, 0.2, 10) if known else np.full(10, 0.1)
    fits = []
    for _ in range(1500):
        counts = np.exp(1 + 0.12 * dims + noise * rng.normal(size=10))
        fits.append(jdam.plot.fit_exponent(dims, counts, counts * noise if known else None))
    slopes, errors, _ = np.transpose(fits)
    assert_allclose(np.sqrt(np.mean(errors**2)), slopes.std(), rtol=0.08)
    assert_allclose(slopes.mean(), 0.12, atol=4 * slopes.std() / np.sqrt(1500))
    if known:
        design = np.stack([np.ones(10), dims], 1) / noise[:, None]
        assert_allclose(errors, np.sqrt(np.linalg.inv(design.T @ design)[1, 1]), rtol=1e-9)


def test_capacity_draws_points_and_line(ax):
    dims, counts = np.array([4, 8, 12]), np.array([10.0, 19.0, 43.0])
    assert jdam.plot.capacity(dims, counts, errors=0.1 * counts, color="green", ax=ax) is ax
    assert ax.get_yscale() == "log"
    points, *_, line = ax.lines
    assert_allclose(points.get_xydata(), np.stack([dims, counts], 1))
    slope, error, intercept = jdam.plot.fit_exponent(dims, counts, 0.1 * counts)
    assert_allclose(line.get_ydata(), np.exp(intercept + slope * np.array([4, 12])))
    assert line.get_label() == f"slope {slope:.3f} ± {error:.3f}"
    jdam.plot.capacity(dims, counts, fit=False, ax=ax)
    assert ax.lines[-1].get_label().startswith("_")


def batch(found):
    return jax.tree.map(lambda leaf: leaf[None], found)


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda p: p.ellipses(np.eye(2)), TypeError, "gaussian must be a jdam.Gaussian or jdam"),
        (lambda p: p.ellipses(line_memory()[0]), ValueError, "gaussian must have dimension d ≥ 2; got 1"),
        (lambda p: p.ellipses(FULL, axes=(0, 3)), ValueError, "axes must be two different coordinates below 3"),
        (lambda p: p.ellipses(FULL, axes=(1, 1)), ValueError, "axes must be two different"),
        (lambda p: p.ellipses(FULL, num_std=0), ValueError, "num_std must be finite and > 0; got 0"),
        (lambda p: p.cloud(FULL), TypeError, "cloud must be a jdam.PointCloud; got Gaussian"),
        (lambda p: p.cloud(jdam.PointCloud(np.eye(2)), size=-1), ValueError, "size must be finite"),
        (lambda p: p.trajectory(jdam.recall(line_memory(), line_memory()[0], 1.0)), ValueError, "save_trace=True"),
        (lambda p: p.trajectory(FULL), TypeError, "trace must be a jdam.Trace or jdam.Recall; got Gaussian"),
        (lambda p: p.trajectory(batch(recalled(line_memory(), line_memory()[0]))), ValueError, "of one recall; got a batch"),
        (lambda p: p.trajectory(recalled(line_memory(), line_memory()[0]), start=FULL), TypeError, "start must be a Diag"),
        (lambda p: p.trajectory(recalled(line_memory(), line_memory()[0]), start=DIAGONAL), ValueError, "start must have"),
        (lambda p: p.landscape(jdam.store(np.eye(3)), 1.0), ValueError, "memory must hold Gaussians or .* or 2-D vectors; got 3-D vectors"),
        (lambda p: p.landscape(line_memory(), -1.0), ValueError, "beta must be finite and > 0"),
        (lambda p: p.landscape(line_memory(), 1.0, xs=[1.0, 0.0]), ValueError, "xs must be a rising array"),
        (lambda p: p.landscape(line_memory(), 1.0, ys=[-1.0, 0.0]), ValueError, "ys must be ≥ 0"),
        (lambda p: p.landscape(jdam.store(np.ones((2, 1))), 1.0, ys=[0.0, 1.0]), ValueError, "ys must be None for 1-D vectors"),
        (lambda p: p.landscape(line_memory(), 1.0, query=line_memory()[0]), ValueError, "query must be None for 1-D Gaussians"),
        (lambda p: p.landscape(jdam.store(np.eye(2)), 1.0, query=np.ones(2)), ValueError, "query must be None for 2-D vectors"),
        (lambda p: p.landscape(jdam.store(plane_gaussians()), 1.0, query=FULL), ValueError, "query must have the memory's dim"),
        (lambda p: p.landscape(jdam.store(plane_gaussians()), 1.0, query=DIAGONAL), TypeError, "query must be a .*Gaussian"),
        (lambda p: p.landscape(jdam.store(plane_gaussians()), 1.0, axes=(0, 2)), ValueError, "axes must be two different"),
        (lambda p: p.trajectory(recalled(line_memory(), line_memory()[0]), memory=jdam.store(plane_gaussians())), TypeError, "trace.measure must be a"),
        (lambda p: p.trajectory(recalled(line_memory(), line_memory()[0]), memory=FULL), TypeError, "memory must be a jdam.Memory"),
        (lambda p: p.field(jdam.store(jdam.Gaussian(np.eye(2), np.ones((2, 2, 2)))), 1.0), ValueError, "query must be given for 2-D"),
        (lambda p: p.field(line_memory(), 1.0, query=line_memory()[0]), ValueError, "query must be given for 2-D"),
        (lambda p: p.field(jdam.store(jdam.Gaussian(np.eye(2), np.ones((2, 2, 1)))), 1.0, query=jdam.Gaussian(np.ones(2), np.ones((2, 1)))), ValueError, "query must have a covariance of full rank"),
        (lambda p: p.capacity([1, 2], [1, 2]), ValueError, "dims must hold at least 3 points"),
        (lambda p: p.capacity([1, 1, 1], [1, 2, 3]), ValueError, "two of them different"),
        (lambda p: p.fit_exponent([1, 2, 3], [1, 2]), ValueError, "counts must have shape"),
        (lambda p: p.fit_exponent([1, 2, 3], [1, 0, 2]), ValueError, "counts must be finite and > 0"),
        (lambda p: p.fit_exponent([1, 2], [1, 2], [0, 1]), ValueError, "errors must be finite and > 0"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(ax, draw, error, message):
    with pytest.raises(error, match=message):
        draw(jdam.plot)


@pytest.mark.full
def test_missing_matplotlib_is_said():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import jdam, numpy as np\n"
        "try: jdam.plot.cloud(jdam.PointCloud(np.eye(2, dtype='float32')))\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "jdam.plot needs matplotlib: pip install 'jdam[plot]'"


def test_light_components_are_faint(rng, ax):
    mixture = mixtures(rng, 2, 3)
    drawn = jdam.plot.ellipses(mixture, axes=(0, 2), ax=ax).collections[0]
    shares = np.asarray(mixture.weights / mixture.weights.max(1, keepdims=True)).reshape(-1)
    np.testing.assert_allclose(drawn.get_edgecolor()[:, 3], np.sqrt(shares))
    assert len(drawn.get_paths()) == 6
