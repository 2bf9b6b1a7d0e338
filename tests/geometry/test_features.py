"""Atoms with features: the plain cost of z = (x, √λ u), of which only x moves."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jdam
from tests.cases import close, only_full
from tests.helpers import check_derivatives, near
from tests.memory.test_files import same

SCALE, EPSILON, BETA = 0.7, 0.2, 3.0
GEOMETRIES = {
    "balanced": jdam.Sinkhorn(EPSILON, feature_scale=SCALE),
    "reweighted": jdam.Sinkhorn(EPSILON, hellinger_scale=0.3, feature_scale=SCALE),
    "unbalanced": jdam.Sinkhorn(EPSILON, rho=0.5, feature_scale=SCALE),
    "one-sided": jdam.Chamfer(EPSILON, rho=0.5, feature_scale=SCALE),
}


def labelled(rng, num, n=5, d=2, k=3):
    points = rng.normal(size=(num, n, d)) + rng.normal(size=(num, 1, d))
    weights = rng.dirichlet(np.full(n, 5.0), size=num)
    return jdam.PointCloud(points, weights, jax.nn.one_hot(rng.integers(0, k, (num, n)), k))


def lifted(cloud, scale=SCALE):
    points = jnp.concatenate([cloud.points, np.sqrt(scale) * cloud.features], -1)
    return jdam.PointCloud(points, cloud.weights)


def plain(cloud):
    return jdam.PointCloud(cloud.points, cloud.weights)


def without_scale(geometry):
    return type(geometry)(
        geometry.epsilon, rho=geometry.rho, hellinger_scale=geometry.hellinger_scale
    )


@pytest.fixture
def patterns(rng):
    return labelled(rng, 4)


def problem(rng, patterns, geometry, off=0.3):
    """A memory, a query near its second pattern, and the memory of z."""
    memory = jdam.store(patterns, geometry)
    other = jdam.store(lifted(patterns), without_scale(geometry))
    return memory, near(rng, memory[1], off), other


@pytest.mark.parametrize("name", ["one-sided", *only_full("balanced")])
def test_they_are_coordinates(rng, patterns, name):
    memory, query, other = problem(rng, patterns, GEOMETRIES[name])
    found = jdam.divergences(memory, query)
    close(found, jdam.divergences(other, lifted(query)), rtol=1e-12, atol=1e-12)
    assert (found[1] < np.delete(found, 1)).all()
    moved, wanted = jdam.step(memory, query, BETA), jdam.step(other, lifted(query), BETA)
    same(moved.features, query.features)
    close(moved.points, wanted.points[:, :2], rtol=1e-9, atol=1e-9)
    close(moved.weights, wanted.weights, rtol=1e-9)


@pytest.mark.full
@pytest.mark.parametrize("name", ["reweighted", "one-sided"])
def test_recall_lowers_the_energy_and_keeps_features(rng, patterns, name):
    memory, query, _ = problem(rng, patterns, GEOMETRIES[name])
    run = jax.jit(partial(jdam.recall, max_steps=15, save_trace=True))
    found = run(memory, query, 20.0)
    energies = np.append(jdam.energy(memory, query, 20.0), found.trace.energy)
    assert (np.diff(energies) < 1e-12).all()
    assert found.nearest == 1
    same(found.measure.features, query.features)
    bold = jdam.recall(memory, query, 20.0, acceleration=jdam.Anderson(), max_steps=5)
    same(bold.measure.features, query.features)
    assert bold.energy < energies[0]


def test_labels_tell_clouds_apart_that_points_do_not():
    points, labels = 3.0 * np.eye(4), np.eye(2)[[0, 0, 1, 1]]
    clouds = [jdam.PointCloud(points, None, u) for u in (labels, labels[::-1])]
    # Every atom keeps its place and pays λ for its label.
    for scale in (0.0, 0.4, 1.0):
        memory = jdam.store(clouds, jdam.Sinkhorn(0.05, feature_scale=scale))
        close(jdam.divergences(memory, clouds[0]), np.array([0, scale]), atol=1e-9)


@pytest.mark.full
def test_without_a_price_they_do_not_count(rng, patterns):
    memory = jdam.store(patterns, jdam.Sinkhorn(EPSILON, feature_scale=0.0))
    other = jdam.store(plain(patterns), jdam.Sinkhorn(EPSILON))
    query = near(rng, memory[1], 0.3)
    close(jdam.divergences(memory, query), jdam.divergences(other, plain(query)), atol=1e-13)
    moved, wanted = (jdam.step(m, q, BETA) for m, q in ((memory, query), (other, plain(query))))
    close(moved.points, wanted.points, rtol=1e-12, atol=1e-12)


@pytest.mark.full
def test_derivatives(rng, patterns):
    """In points, features and the price, of query and patterns."""
    query = near(rng, patterns[1], 0.3)

    def energy(points, features, others, scale):
        geometry = jdam.Sinkhorn(EPSILON, feature_scale=scale)
        held = jdam.PointCloud(patterns.points, patterns.weights, others)
        cue = jdam.PointCloud(points, query.weights, features)
        return jdam.energy(jdam.store(held, geometry), cue, BETA)

    at = query.points, query.features, patterns.features, jnp.float64(SCALE)
    check_derivatives(energy, at, rtol=1e-6, atol=1e-6)
    slope = partial(jax.grad(energy, argnums=3), *at[:3])
    rise = (energy(*at[:3], 1e-6) - energy(*at[:3], 0.0)) / 1e-6
    close(slope(0.0), rise, rtol=1e-4)


@pytest.mark.full
def test_derivatives_of_a_recall(rng, patterns):
    """Where features do not move, the query's own go through."""
    memory, query, _ = problem(rng, patterns, GEOMETRIES["balanced"])

    def ended(points, features, adjoint):
        cue = jdam.PointCloud(points, query.weights, features)
        found = jdam.recall(memory, cue, 2.0, adjoint=adjoint, tol=1e-11, max_steps=200, acceleration=None)  # fmt: skip
        return jnp.sum(found.measure.features**2) + jnp.sum(found.measure.points**2)

    slope = jax.jit(jax.grad(ended, argnums=(0, 1)), static_argnums=2)
    found, wanted = (
        slope(query.points, query.features, a) for a in (jdam.Implicit(), jdam.Unrolled())
    )
    close(found, wanted, atol=1e-6)


@pytest.mark.full
def test_certified_recall(rng):
    patterns = labelled(rng, 24)
    memory = jdam.store(patterns, jdam.Sinkhorn(EPSILON, feature_scale=SCALE))
    query = near(rng, memory[5], 0.1)
    run = partial(jdam.recall, memory, query, 20.0, max_steps=3, acceleration=None)
    found, wanted = (run(search=s) for s in (jdam.Certified(2), jdam.Exhaustive()))
    close(found.measure, wanted.measure, rtol=1e-6, atol=1e-8)
    assert (found.nearest, found.status) == (wanted.nearest, wanted.status)

    @jax.jit
    def levels(memory, query):
        held = jdam.Patterns(memory.patterns, memory.prepared)
        return [bound(memory.geometry.view(query), held) for bound in memory.geometry.bounds(held)]

    exact = jdam.divergences(memory, query)
    for level in levels(memory, query):
        assert (level <= exact).all()


@pytest.mark.full
def test_theory(patterns):
    memory, other = (
        jdam.store(clouds, jdam.Sinkhorn(EPSILON, hellinger_scale=0.3, feature_scale=SCALE))
        for clouds in (patterns, lifted(patterns))
    )
    theory = jdam.theory
    close(theory.weight_stiffness(memory), theory.weight_stiffness(other), rtol=1e-9)
    found, wanted = (theory.shk_constants(m, 1) for m in (memory, other))
    close([found.diameter, found.gradient], [wanted.diameter, wanted.gradient], rtol=1e-12)
    assert found.smoothness <= wanted.smoothness * (1 + 1e-9)  # fewer directions
    distances = theory.separations(memory)
    close(distances, theory.separations(jdam.store(plain(patterns), memory.geometry)), rtol=0.5)
    assert int(theory.certify(memory, memory[1], 50.0).index) in (-1, 1)


@pytest.mark.full
def test_batches(rng, patterns):
    memory, _, _ = problem(rng, patterns, GEOMETRIES["balanced"])
    queries = near(rng, patterns, 0.1)
    many = jax.vmap(jdam.step, (None, 0, None))(memory, queries, 20.0)
    close(many[2], jdam.step(memory, queries[2], 20.0), rtol=1e-7, atol=1e-7)
    found = jdam.pairwise(memory, queries)[2]
    close(found, jdam.divergences(memory, queries[2]), rtol=1e-9, atol=1e-12)


@pytest.mark.full
def test_completion(rng, patterns):
    memory, query, _ = problem(rng, patterns, GEOMETRIES["balanced"])
    found = jdam.attend(memory, query, 1e3, memory, num_steps=2)
    same(found.features, memory[1].features)
    close(found.points, memory[1].points, atol=0.05)


def test_files(rng, patterns, tmp_path):
    memory = jdam.store(patterns, GEOMETRIES["reweighted"], capacity=6)
    jdam.save(tmp_path / "memory", memory)
    same(jdam.load(tmp_path / "memory"), memory)
    assert "feature_scale=0.7" in repr(jdam.load(tmp_path / "memory"))


def test_files_of_before_there_were_features(patterns, tmp_path):
    memory = jdam.store(plain(patterns), jdam.Sinkhorn(EPSILON))
    jdam.save(tmp_path / "memory", memory)
    with safetensors.safe_open(tmp_path / "memory", "numpy") as file:
        description = json.loads(file.metadata()["memory"])
    del description["patterns"]["fields"]["features"]
    arrays = safetensors.numpy.load_file(tmp_path / "memory")
    del arrays[description["geometry"]["fields"].pop("feature_scale")["array"]]
    text = json.dumps(description, sort_keys=True)
    held = ((name, x.shape, [x]) for name, x in sorted(arrays.items()))
    header = {"format": "jdam", "version": "1", "memory": text}
    header["checksum"] = jdam._memory.files._checksum(text, held)
    (tmp_path / "old").write_bytes(safetensors.numpy.save(arrays, header))
    same(jdam.load(tmp_path / "old"), memory)


@pytest.mark.full
def test_stacked_padded_and_ragged(rng):
    sizes = 3, 5, 2
    points = [rng.normal(size=(n, 2)) for n in sizes]
    features = [rng.integers(0, 2, (n, 3)) for n in sizes]
    ragged = jdam.PointCloud.from_ragged(points, features=features)
    single = [jdam.PointCloud(x, None, u) for x, u in zip(points, features, strict=True)]
    same(jdam.stack(single), ragged)
    assert ragged.sizes == {"n": 5, "d": 2, "k": 3}
    assert ragged.features.dtype == ragged.points.dtype
    memory = jdam.store(single[:2], GEOMETRIES["balanced"], capacity=3).append(single[2])
    other = jdam.store(ragged, GEOMETRIES["balanced"])
    close(jdam.divergences(memory, single[0]), jdam.divergences(other, single[0]), rtol=1e-9, atol=1e-12)  # fmt: skip
    close(jdam.divergences(other, single[0])[0], 0, atol=1e-9)
    changed = memory.replace(0, single[2])
    close(jdam.divergences(changed, single[2])[0], 0, atol=1e-9)
    with pytest.raises(
        ValueError, match="features of cloud 1 must be one for each of 5 points; got"
    ):
        jdam.PointCloud.from_ragged(points, features=[features[0], features[1][:4], features[2]])
    with pytest.raises(
        ValueError, match="features must hold one array for each of 3 clouds; got 2"
    ):
        jdam.PointCloud.from_ragged(points, features=features[:2])


@pytest.mark.full
def test_no_optimizer_moves_them(patterns):
    memory = jdam.store(patterns, GEOMETRIES["reweighted"])
    params, rebuild = jdam.parametrize(memory, ("patterns", "feature_scale"))
    assert set(params["patterns"]) == {"points", "weights"}
    close(params["feature_scale"], np.log(SCALE))
    slope = jax.grad(lambda p: jdam.energy(rebuild(p), patterns[0], BETA))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))
    close(rebuild(params).patterns, patterns, rtol=1e-12)
    with pytest.raises(ValueError, match="feature_scale must be > 0 to be learned; got 0"):
        jdam.parametrize(
            jdam.store(patterns, jdam.Sinkhorn(1.0, feature_scale=0)), ("feature_scale",)
        )


def test_in_units_of_the_patterns(patterns):
    found = jdam.Sinkhorn.relative(patterns, 0.1, feature_scale=0.5)
    unit = jdam.Sinkhorn.relative(plain(patterns), 1.0).epsilon
    close([found.epsilon, found.feature_scale], [0.1 * unit, 0.5 * unit], rtol=1e-12)


def test_perturbed(patterns):
    for where in ("mean", "covariance", "both", "atoms"):
        moved = jdam.random.perturb(jax.random.key(0), patterns, 0.01, where=where)
        same(moved.features, patterns.features)
        assert (moved.points != patterns.points).any()


def test_what_does_not_fit(rng, patterns):
    memory = jdam.store(patterns, GEOMETRIES["balanced"])
    other = jdam.store(plain(patterns), GEOMETRIES["balanced"])
    points, features = patterns[0].points, patterns[0].features
    fewer = jdam.PointCloud(points, None, features[:, :2])
    for query, held, message in (
        (
            plain(patterns[0]),
            memory,
            r"query must have features \(n, k\) as the memory has; got none",
        ),
        (patterns[0], other, "query must have no features, as the memory has none; got some"),
        (fewer, memory, "query must have the memory's size k = 3; got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            jdam.energy(held, query, BETA)
        with pytest.raises(ValueError, match=message.replace("query", "patterns", 1)):
            held.append(query)
    message = r"measures\[1\] must have features \(n, k\) as measures\[0\] has; got none"
    with pytest.raises(ValueError, match=message):
        jdam.stack([patterns[0], plain(patterns[0])])
    with pytest.raises(ValueError, match=r"measures\[0\]'s size k = 3; got 2"):
        jdam.stack([patterns[0], fewer])
    for bad, error, message in (
        (features[:3], ValueError, r"features must have shape .*; got \(3, 3\)"),
        (
            np.arange(5),
            ValueError,
            r"got \(5,\): jax.nn.one_hot\(labels, k\) makes features of labels",
        ),
        (
            features.astype("f4"),
            TypeError,
            "features must have the dtype of points, float64; got float32",
        ),
        (features * np.nan, ValueError, "features must be finite; got 15 of 15"),
        (["H"] * 5, TypeError, "features must be an array of floats; got"),
    ):
        with pytest.raises(error, match=message):
            jdam.PointCloud(points, None, bad)
    with pytest.raises(ValueError, match="feature_scale must be finite and ≥ 0; got -1"):
        jdam.Sinkhorn(0.1, feature_scale=-1.0)
    assert jdam.PointCloud(points, None, features > 0).features.dtype == points.dtype
