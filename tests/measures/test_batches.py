"""Lists of measures, and samples of different numbers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam
from tests.cases import every_kind_in_full, problem
from tests.helpers import clouds, diagonals, gaussians, vectors


@every_kind_in_full
def test_stack_undoes_indexing(rng, kind):
    memory, _ = problem(rng, kind)
    singles = [memory[i] for i in range(len(memory))]
    stacked = jdam.stack(singles)
    chex.assert_trees_all_equal(stacked, memory.patterns, strict=True)
    again = jax.jit(lambda *singles: jdam.stack(list(singles)))(*singles)
    np.testing.assert_array_equal(*(jax.tree.leaves(m)[0] for m in (again, stacked)))


def test_ranks_and_atoms_are_padded(rng):
    low, high = gaussians(rng, 1, 3, rank=1)[0], gaussians(rng, 1, 3)[0]
    both = jdam.stack([low, high])
    assert both.rank == 3
    np.testing.assert_array_equal(both[0].covariance, low.covariance)
    few = jdam.PointCloud(rng.normal(size=(2, 3)))
    many = jdam.PointCloud(rng.normal(size=(4, 3)), rng.dirichlet(np.ones(4)))
    both = jdam.stack([few, many])
    np.testing.assert_array_equal(both.weights[0], [0.5, 0.5, 0, 0])
    np.testing.assert_array_equal(both.points[1], many.points)


@pytest.mark.full
def test_memories_of_lists(rng):
    patterns = clouds(rng, 3, 2)
    geometry = jdam.Sinkhorn(0.5)
    ragged = [jdam.PointCloud(rng.normal(size=(n, 2))) for n in (3, 7)]
    memory = jdam.store(ragged, geometry)
    assert len(memory) == 2
    alone = [jdam.divergences(jdam.store([c], geometry), patterns[0])[0] for c in ragged]
    np.testing.assert_allclose(jdam.divergences(memory, patterns[0]), alone, rtol=1e-9)
    assert len(memory.append([patterns[0], patterns[1]])) == 4
    lists = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    np.testing.assert_array_equal(jdam.store(lists).patterns, lists)
    np.testing.assert_array_equal(jdam.stack([np.array(x) for x in lists]), lists)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda r: [], ValueError, "measures must hold at least one measure"),
        (lambda r: gaussians(r, 2, 2), TypeError, "measures must be a list .*; got Gaussian"),
        (lambda r: [gaussians(r, 2, 2)], ValueError, r"measures\[0\] must be a single measure"),
        (
            lambda r: [gaussians(r, 1, 2)[0], diagonals(r, 1, 2)[0]],
            TypeError,
            r"measures\[1\] must be a Gaussian, measures\[0\]'s kind; got DiagonalGaussian",
        ),
        (
            lambda r: [gaussians(r, 1, 2)[0], gaussians(r, 1, 3)[0]],
            ValueError,
            r"measures\[1\] must have measures\[0\]'s dimension d = 2; got 3",
        ),
        (
            lambda r: [gaussians(r, 1, 2)[0], gaussians(r, 1, 2, dtype=np.float32)[0]],
            TypeError,
            r"measures\[1\] must have measures\[0\]'s dtype float64; got float32",
        ),
        (lambda r: [vectors(r, 2, 2)], ValueError, r"measures\[0\] must be a vector \(d,\)"),
        (lambda r: [np.arange(2)], TypeError, r"measures\[0\] must be a jdam.Measure or an array"),
        (lambda r: [np.ones(2), np.ones(3)], ValueError, "d = 2; got 3"),
    ],
)
def test_what_does_not_go_together_is_named(rng, make, error, message):
    with pytest.raises(error, match=message):
        jdam.stack(make(rng))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gaussians_of_samples_of_any_number(rng, dtype):
    numbers = (5, 1, 2, 17, 3, 40, 1)
    samples = [(3 + rng.normal(size=(n, 4))).astype(dtype) for n in numbers]
    found = jdam.Gaussian.from_ragged_samples(samples)
    assert found.dtype == dtype
    assert found.factor.shape == (7, 4, 4)
    tolerance = (
        {"rtol": 2e-6, "atol": 2e-6} if dtype is np.float32 else {"rtol": 1e-13, "atol": 1e-14}
    )
    for gaussian, x in zip(found, samples, strict=True):
        np.testing.assert_allclose(gaussian.mean, x.mean(0), **tolerance)
        np.testing.assert_allclose(gaussian.covariance, np.cov(x.T, bias=True), **tolerance)
    assert not np.asarray(found.factor[1]).any()


@pytest.mark.full
def test_weighted_samples_of_any_number(rng):
    numbers = (3, 9, 2)
    samples = [rng.normal(size=(n, 5)) for n in numbers]
    weights = [rng.dirichlet(np.ones(n)) for n in numbers]
    found = jdam.Gaussian.from_ragged_samples(samples, weights)
    for gaussian, x, a in zip(found, samples, weights, strict=True):
        one = jdam.Gaussian.from_samples(x, a)
        np.testing.assert_allclose(gaussian.covariance, one.covariance, atol=1e-15)
    thin = jdam.Gaussian.from_ragged_samples([rng.normal(size=(n, 50)) for n in (3, 4)])
    assert thin.factor.shape == (2, 50, 4)
    slope = jax.grad(lambda x: jdam.Gaussian.from_ragged_samples([x, samples[1]]).covariance.sum())
    assert jnp.isfinite(slope(jnp.asarray(samples[0]))).all()
    bad = [weights[0], weights[1], 2 * weights[2]]
    with pytest.raises(ValueError, match="Gaussian 2: weights must sum to one"):
        jdam.Gaussian.from_ragged_samples(samples, bad)
    for wrong in (weights[1][:2], np.append(weights[1], 0), np.array(1.0)):
        for make in (jdam.Gaussian.from_ragged_samples, jdam.PointCloud.from_ragged):
            with pytest.raises(ValueError, match="weights of .* 1 must be one for each of 9"):
                make(samples, [weights[0], wrong, weights[2]])
    with pytest.raises(ValueError, match="samples of Gaussian 1 must have shape"):
        jdam.Gaussian.from_ragged_samples([samples[0], samples[1][:, :2]])
    with pytest.raises(ValueError, match="samples must hold at least one Gaussian"):
        jdam.Gaussian.from_ragged_samples([])


def table(rng, dtype=np.float32):
    """Rows of three groups of 4, 1 and 3, in no order, with masses and two features."""
    labels = np.array(["b", "a", "b", "c", "c", "b", "c", "b"])
    rows = rng.normal(size=(8, 2)).astype(dtype)
    return (
        rows,
        labels,
        rng.uniform(0.5, 2, size=8).astype(dtype),
        np.eye(2, dtype=dtype)[[0, 1] * 4],
    )


def test_clouds_of_groups_of_rows(rng):
    rows, labels, masses, features = table(rng)
    clouds, names = jdam.PointCloud.from_groups(rows, labels, masses, features)
    assert list(names) == ["a", "b", "c"]
    assert clouds.points.shape == (3, 4, 2)
    assert clouds.dtype == np.float32
    for name, cloud in zip(names, clouds, strict=True):
        own, on = labels == name, np.asarray(cloud.weights) > 0
        np.testing.assert_array_equal(cloud.points[on], rows[own])
        np.testing.assert_array_equal(cloud.features[on], features[own])
        np.testing.assert_allclose(cloud.weights[on], masses[own] / masses[own].sum(), rtol=1e-6)
    numbers = np.array([7, -2, 7, 0, 0, 7, 0, 7])
    clouds, names = jdam.PointCloud.from_groups(rows, numbers)
    np.testing.assert_array_equal(names, [-2, 0, 7])
    np.testing.assert_allclose(clouds.weights[1, :3], np.full(3, 1 / 3), rtol=1e-6)
    np.testing.assert_array_equal(clouds.points[2], rows[numbers == 7])


def test_clouds_of_data_frames(rng):
    pandas = pytest.importorskip("pandas")
    rows, labels, masses, _ = table(rng)
    frame = pandas.DataFrame({"id": labels, "x": rows[:, 0], "y": rows[:, 1], "mass": masses})
    clouds, names = jdam.PointCloud.from_groups(frame[["x", "y"]], frame["id"], frame["mass"])
    for (name, part), own, cloud in zip(frame.groupby("id"), names, clouds, strict=True):
        assert name == own
        wanted = np.average(part[["x", "y"]], axis=0, weights=part["mass"])
        np.testing.assert_allclose(cloud.mean, wanted, rtol=1e-5)
    # A name by row, as after a merge: the index of a frame plays no part.
    shuffled = frame.sample(frac=1, random_state=0)
    again, _ = jdam.PointCloud.from_groups(shuffled[["x", "y"]], shuffled["id"].astype("category"))
    np.testing.assert_allclose(again.mean[0], clouds.mean[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"points": np.ones(8)}, ValueError, r"points must have shape \(R, d\).*; got \(8,\)"),
        ({"points": np.ones((8, 2), int)}, TypeError, "points must have a floating dtype"),
        ({"groups": [1, 2]}, ValueError, r"groups must have shape \(R,\) = \(8,\).*; got \(2,\)"),
        (
            {"groups": [1.0] * 7 + [np.nan]},
            ValueError,
            "groups must have a label for each row; got",
        ),
        ({"groups": np.array(["a"] * 7 + [None])}, TypeError, "groups must be labels of one kind"),
        ({"weights": np.ones(3)}, ValueError, r"weights must have shape \(R,\) = \(8,\)"),
        ({"weights": np.full(8, -1.0)}, ValueError, "weights must be ≥ 0 and finite"),
        ({"weights": np.arange(8) != 1}, ValueError, "weights must not be 0 in a whole .*'a'"),
        ({"features": np.ones(8)}, ValueError, r"features must have shape \(R, k\) = \(8, k\)"),
    ],
)
def test_mistakes_in_tables_are_named(rng, change, error, message):
    rows, labels, _, _ = table(rng)
    with pytest.raises(error, match=message):
        jdam.PointCloud.from_groups(**{"points": rows, "groups": labels} | change)


def test_tensors_of_torch_go_in_and_out_by_dlpack(rng):
    torch = pytest.importorskip("torch")
    points = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    clouds = jdam.PointCloud(jnp.from_dlpack(points))
    assert clouds.dtype == jnp.float32
    np.testing.assert_array_equal(clouds.points, points.numpy())
    patterns = torch.from_numpy(rng.normal(size=(6, 3)))
    memory = jdam.store(jnp.from_dlpack(patterns))
    assert memory.dtype == jnp.float64
    result = jdam.recall(memory, jnp.from_dlpack(patterns[2] + 0.01), 20.0)
    back = torch.from_dlpack(result.measure)
    assert back.dtype == torch.float64
    wanted = torch.softmax(-20 * ((patterns - back) ** 2).sum(1), 0) @ patterns
    torch.testing.assert_close(back, wanted, rtol=1e-5, atol=1e-5)
    assert int(torch.from_dlpack(result.nearest)) == 2


def test_arrays_of_numpy_go_in_and_out_by_dlpack(rng):
    clouds = jdam.PointCloud(jnp.from_dlpack(rng.normal(size=(4, 5, 3))))
    np.testing.assert_array_equal(np.from_dlpack(clouds.points), clouds.points)


RAGGED = [np.ones((3, 2)), np.ones((4, 2))]


@pytest.mark.parametrize("hold", [list, lambda arrays: np.array([*arrays, None], object)[:2]])
@pytest.mark.parametrize(
    ("make", "cure"),
    [
        (jdam.PointCloud, "points .* jdam.PointCloud.from_ragged takes"),
        (jdam.Gaussian.from_samples, "samples .* jdam.Gaussian.from_ragged_samples takes"),
        (lambda x: jdam.Gaussian(np.ones((2, 2)), x), "factor .* jdam.stack fills up"),
        (
            lambda x: jdam.GaussianMixture.from_samples(x, 2, key=jax.random.key(0)),
            "samples .* make a mixture of each, for jdam.stack",
        ),
        (jdam.store, "must be .* jdam.PointCloud.from_ragged and jdam.Gaussian.from_ragged_samp"),
    ],
)
def test_lists_of_arrays_of_different_shapes_are_told_where_to_go(hold, make, cure):
    with pytest.raises(TypeError, match=cure) as raised:
        make(hold(RAGGED))
    assert "must be an array of floats; got 2 arrays of different shapes: " in str(raised.value)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (np.array(["a", "bc"]), "dtype <U2"),
        (np.array([None, 1.0]), "dtype object"),
        (np.array(["2020-01-01"], "datetime64[D]"), r"dtype datetime64\[D\]"),
        (["cat", "dog"], "a list of str"),
        ((None, None), "a tuple of NoneType"),
        ([[1.0, 2.0], [3.0]], "2 arrays of different shapes: jdam.PointCloud.from_ragged takes"),
        ([[[1.0, 2.0], [3.0]], [[1.0]]], "2 arrays of different shapes"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_array_of_floats_is_named(value, got):
    with pytest.raises(TypeError, match=f"points must be an array of floats; got {got}"):
        jdam.PointCloud(value)


def test_bad_lists_of_different_numbers_are_named():
    for make, name, one in (
        (jdam.PointCloud.from_ragged, "points", "cloud"),
        (jdam.Gaussian.from_ragged_samples, "samples", "Gaussian"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a list of an array for each {one}"):
            make(5)
        with pytest.raises(ValueError, match=f"{name} of {one} 1 must have rows of one length"):
            make([RAGGED[0], [[1.0, 2.0], [3.0]]])
        with pytest.raises(TypeError, match=f"{one} 0: {name} must be an array of floats; got dty"):
            make([np.full((3, 2), "a"), np.full((4, 2), "a")])
    with pytest.raises(TypeError, match=r"measures\[0\] must be an array of floats; got a list of"):
        jdam.stack([["cat", "dog"]])
