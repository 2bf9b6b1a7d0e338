import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam
from tests.helpers import gaussians

EYE = np.eye(3)
ZERO = np.zeros(3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: jdam.Gaussian(ZERO, np.ones(3)),
            ValueError,
            r"factor must have shape .*; got \(3,\)",
        ),
        (lambda: jdam.Gaussian(ZERO, np.eye(2)), ValueError, r"factor must have shape .*\(2, 2\)"),
        (lambda: jdam.Gaussian(ZERO, np.ones((3, 0))), ValueError, "factor must have shape"),
        (lambda: jdam.Gaussian(1.0, EYE), ValueError, "mean must have shape"),
        (lambda: jdam.Gaussian(np.zeros((2, 3)), EYE), ValueError, "factor must have shape"),
        (
            lambda: jdam.Gaussian([0, 0, 0], EYE),
            TypeError,
            "mean must have a floating dtype; got int",
        ),
        (
            lambda: jdam.Gaussian(ZERO, np.eye(3, dtype=int)),
            TypeError,
            "factor must have a floating",
        ),
        (lambda: jdam.Gaussian("zero", EYE), TypeError, "mean must be an array of floats; got str"),
        (
            lambda: jdam.Gaussian(ZERO.astype("f4"), EYE),
            TypeError,
            "factor must have the dtype of mean",
        ),
        (lambda: jdam.Gaussian(ZERO * np.nan, EYE), ValueError, "mean must be finite; got 3 of 3"),
        (lambda: jdam.Gaussian(ZERO, EYE / 0.0), ValueError, "factor must be finite"),
        (
            lambda: jdam.Gaussian.from_covariance(ZERO, np.ones((3, 2))),
            ValueError,
            "covariance must have shape",
        ),
        (
            lambda: jdam.Gaussian.from_covariance(ZERO, EYE * np.nan),
            ValueError,
            "covariance must be finite",
        ),
        (
            lambda: jdam.Gaussian.from_covariance(ZERO, np.triu(np.ones((3, 3)))),
            ValueError,
            "must be symmetric",
        ),
        (
            lambda: jdam.Gaussian.from_covariance(ZERO, EYE + 1e-9 * np.triu(EYE + 1)),
            ValueError,
            "must be symmetric",
        ),
        (
            lambda: jdam.Gaussian.from_covariance(ZERO, np.diag([1, 1, -0.1])),
            ValueError,
            "positive semidefinite",
        ),
        (
            lambda: jdam.Gaussian.from_covariance(ZERO, np.diag([1, 1, -1e-9])),
            ValueError,
            "positive semidefinite",
        ),
        (
            lambda: jdam.Gaussian.from_samples(ZERO),
            ValueError,
            r"samples must have shape \(…, n, d\)",
        ),
        (
            lambda: jdam.Gaussian.from_samples(EYE, np.ones(3)),
            ValueError,
            "weights must sum to one",
        ),
        (
            lambda: jdam.Gaussian.from_samples(EYE, np.array([2.0, -1, 0])),
            ValueError,
            "weights must be ≥ 0",
        ),
        (
            lambda: jdam.Gaussian.from_samples(EYE, np.ones(2) / 2),
            ValueError,
            "weights must have shape",
        ),
        (lambda: jdam.Gaussian.from_samples(EYE * np.inf), ValueError, "samples must be finite"),
        (lambda: jdam.DiagonalGaussian(ZERO, -np.ones(3)), ValueError, "scale must be ≥ 0; got -1"),
        (lambda: jdam.DiagonalGaussian(ZERO, EYE), ValueError, "scale must have the shape of mean"),
        (
            lambda: jdam.DiagonalGaussian(ZERO, ZERO.astype("f4")),
            TypeError,
            "scale must have the dtype",
        ),
        (
            lambda: jdam.DiagonalGaussian.from_variance(ZERO, -np.ones(3)),
            ValueError,
            "variance must be ≥ 0",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_covariance_roundtrip(rng):
    covariance = np.asarray(gaussians(rng, 4, 5).covariance)
    g = jdam.Gaussian.from_covariance(np.zeros((4, 5)), covariance)
    np.testing.assert_allclose(g.covariance, covariance, atol=1e-13)
    np.testing.assert_allclose(g.factor, np.swapaxes(g.factor, -1, -2), atol=1e-13)  # Σ^½
    assert (g.dim, g.rank, g.batch_shape, g.dtype) == (5, 5, (4,), np.float64)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_singular_covariances_are_welcome(rng, dtype):
    """Rank-deficient sample covariances have eigenvalues a rounding below zero."""
    for d in (2, 10, 80):
        samples = rng.normal(size=(d // 2 + 1, d)).astype(dtype)
        covariance = np.cov(samples.T, bias=True).astype(dtype)
        g = jdam.Gaussian.from_covariance(np.zeros(d, dtype), covariance)
        tolerance = 20 * d * np.finfo(dtype).eps
        np.testing.assert_allclose(g.covariance, covariance, atol=tolerance)


def test_samples(rng):
    samples, weights = rng.normal(size=(2, 30, 4)), rng.dirichlet(np.ones(30), 2)
    g = jdam.Gaussian.from_samples(samples, weights)
    for i in range(2):
        expected = np.cov(samples[i].T, aweights=weights[i], bias=True)
        np.testing.assert_allclose(g.covariance[i], expected, atol=1e-14)
        np.testing.assert_allclose(g.mean[i], weights[i] @ samples[i], atol=1e-14)
    assert g.factor.shape == (2, 4, 4)
    few = jdam.Gaussian.from_samples(samples[0, :3])
    assert few.rank == 3
    np.testing.assert_allclose(few.covariance, np.cov(samples[0, :3].T, bias=True), atol=1e-14)
    assert float(jnp.abs(jdam.Gaussian.from_samples(samples[0, :1]).covariance).max()) == 0.0


def test_indefinite_under_jit_is_nan(rng):
    make = jax.jit(jdam.Gaussian.from_covariance)
    assert np.isnan(make(ZERO, np.diag([1.0, 1.0, -1.0])).factor).all()
    batch = make(np.zeros((2, 3)), np.stack([EYE, -EYE]))
    assert np.isfinite(batch.factor[0]).all()
    assert np.isnan(batch.factor[1]).all()
    memory = jdam.store(jdam.Gaussian(np.zeros((1, 3)), EYE[None]))

    @jax.jit
    def recall(covariance):
        return jdam.recall(memory, jdam.Gaussian.from_covariance(ZERO, covariance), 1.0)

    assert int(recall(-EYE).status) == jdam.Status.NONFINITE
    assert int(recall(EYE).status) == jdam.Status.CONVERGED


def test_indexing_and_padding(rng):
    g = gaussians(rng, 5, 3, rank=2)
    assert g[1].batch_shape == ()
    assert g[1:3].batch_shape == (2,)
    assert g[jnp.array([0, 4])].mean.shape == (2, 3)
    assert len(g) == len(list(g)) == 5
    with pytest.raises(IndexError, match="index 5 is out of range for a batch of 5"):
        g[5]
    with pytest.raises(TypeError, match="cannot be indexed"):
        g[0][0]
    with pytest.raises(TypeError, match="has no length"):
        len(g[0])
    padded = g.pad(4)
    assert padded.rank == 4
    assert padded.pad(3) is padded
    np.testing.assert_array_equal(padded.covariance, g.covariance)


def test_constants_inside_jit_are_checked():
    eye, zero = jnp.eye(3), jnp.zeros(3)

    @jax.jit
    def total(scale):
        made = (
            jdam.Gaussian(zero, eye),
            jdam.Gaussian.from_covariance(zero, eye),
            jdam.Gaussian.from_samples(eye, jnp.full(3, 1 / 3)),
            jdam.DiagonalGaussian(zero, zero + 1),
        )
        return scale * sum(jnp.trace(g.covariance) for g in made)

    np.testing.assert_allclose(total(1.0), 3 + 3 + 2 / 3 + 3, rtol=1e-12)
    bad = zero * jnp.nan
    with pytest.raises(ValueError, match="mean must be finite"):
        jax.jit(lambda x: jdam.Gaussian(bad, eye * x).mean)(1.0)


def test_measures_are_immutable(rng):
    with pytest.raises(AttributeError):
        gaussians(rng, 1, 2).mean = 0.0


def test_diagonal(rng):
    variance = rng.uniform(size=(2, 3))
    g = jdam.DiagonalGaussian.from_variance(np.zeros((2, 3)), variance)
    np.testing.assert_allclose(g.variance, variance, rtol=1e-15)
    np.testing.assert_allclose(g.covariance[1], np.diag(variance[1]), rtol=1e-15)


def test_lists_are_arrays():
    g = jdam.Gaussian([0.0, 1.0], [[1.0, 0.0], [0.0, 2.0]])
    np.testing.assert_array_equal(g.covariance, np.diag([1.0, 4.0]))


def test_derivative_of_the_root_at_a_spherical_covariance(rng):
    """d tr(B Σ^½) at Σ = I is ½ tr(B dΣ), where eigh's derivative is NaN."""
    b = rng.normal(size=(3, 3))
    b = b + b.T
    gradient = jax.grad(lambda c: jnp.sum(b * jdam.Gaussian.from_covariance(ZERO, c).factor))(EYE)
    np.testing.assert_allclose(gradient, b / 2, atol=1e-12)


def test_point_cloud(rng):
    cloud = jdam.PointCloud(rng.normal(size=(3, 5, 2)))
    assert (cloud.dim, cloud.num_atoms, cloud.batch_shape, len(cloud)) == (2, 5, (3,), 3)
    np.testing.assert_allclose(cloud.weights, 0.2)
    np.testing.assert_allclose(cloud[1].mean, np.asarray(cloud.points[1]).mean(0))
    padded = cloud.pad(7)
    assert padded.num_atoms == 7
    np.testing.assert_allclose(padded.mean, cloud.mean)


def test_ragged_clouds(rng):
    points = [rng.normal(size=(n, 2)) for n in (3, 1, 4)]
    weights = [rng.dirichlet(np.ones(n)) for n in (3, 1, 4)]
    cloud = jdam.PointCloud.from_ragged(points, weights)
    assert cloud.points.shape == (3, 4, 2)
    np.testing.assert_array_equal(cloud.weights[0], np.append(weights[0], 0))
    uniform = jdam.PointCloud.from_ragged(points)
    np.testing.assert_allclose(uniform.weights[0], [1 / 3, 1 / 3, 1 / 3, 0])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jdam.PointCloud(np.ones(3)), ValueError, "points must have shape"),
        (lambda: jdam.PointCloud(np.ones((2, 2)), np.array([0.5, 0.6])), ValueError, "sum to one"),
        (lambda: jdam.PointCloud(np.ones((2, 2)), np.array([1.5, -0.5])), ValueError, "≥ 0"),
        (lambda: jdam.PointCloud(np.full((2, 2), np.nan)), ValueError, "points must be finite"),
        (lambda: jdam.PointCloud(np.ones((2, 2), int)), TypeError, "floating dtype"),
        (lambda: jdam.PointCloud.from_ragged([]), ValueError, "at least one cloud"),
        (
            lambda: jdam.PointCloud.from_ragged([np.ones((2, 2)), np.ones((2, 3))]),
            ValueError,
            "points of cloud 1 must have shape",
        ),
        (
            lambda: jdam.PointCloud.from_ragged(
                [np.ones((1, 2))] * 2, [np.ones(1), 2 * np.ones(1)]
            ),
            ValueError,
            "cloud 1: weights must sum to one",
        ),
    ],
)
def test_bad_clouds(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ------------------------------------------------------------------ moments


@pytest.mark.full
@pytest.mark.parametrize(("num", "offset"), [(1000, 1e3), (100_000, 3e4), (50, 1e6)])
def test_samples_far_from_zero(rng, num, offset):
    samples = (rng.normal(size=(num, 2)) + offset).astype(np.float32)
    found = jdam.Gaussian.from_samples(samples)
    exact = samples.astype(np.float64)
    np.testing.assert_allclose(found.covariance, np.cov(exact.T, bias=True), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1.2e-7)


def test_equal_samples_have_no_covariance():
    samples = np.full((100_000, 3), 1234.567, np.float32)
    found = jdam.Gaussian.from_samples(samples)
    assert (found.mean == samples[0]).all()
    assert (found.covariance == 0).all()


def test_mean_of_many_atoms(rng):
    points = (rng.normal(size=(100_000, 2)) + 1000).astype(np.float32)
    exact = points.astype(np.float64).mean(0)
    np.testing.assert_allclose(jdam.PointCloud(points).mean, exact, rtol=3e-7)


def derivative(function, x, direction, size=1e-5):
    return (function(x + size * direction) - function(x - size * direction)) / (2 * size)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["all vary", "one is constant", "fewer than dimensions"])
def test_derivatives_of_moments(rng, kind):
    """In samples and along the simplex in weights, to second order, against differences."""
    num = 3 if kind == "fewer than dimensions" else 7
    samples, weights = rng.normal(size=(num, 4)), rng.dirichlet(np.ones(num))
    if kind == "one is constant":
        samples[:, 1] = 2.0
    memory = jdam.store(gaussians(rng, 1, 4))

    @jax.jit
    def distance(samples, weights):
        return jdam.divergences(memory, jdam.Gaussian.from_samples(samples, weights))[0]

    slope = jax.jit(jax.grad(distance, argnums=(0, 1)))
    along = rng.normal(size=samples.shape)
    if kind == "one is constant":
        along[:, 1] = 0  # where it would leave, the distance has a kink
    shift = rng.normal(size=num)
    shift = weights * (shift - weights @ shift)
    by_samples, by_weights = slope(samples, weights)
    assert np.isfinite(by_samples).all()
    expected = derivative(lambda x: distance(x, weights), samples, along)
    np.testing.assert_allclose((by_samples * along).sum(), expected, rtol=1e-6)
    expected = derivative(lambda w: distance(samples, w), weights, shift)
    np.testing.assert_allclose(by_weights @ shift, expected, rtol=1e-6)
    curvature = jax.jvp(lambda x: slope(x, weights)[0], (samples,), (along,))[1]
    assert np.isfinite(curvature).all()
    if kind == "all vary":
        expected = derivative(lambda x: np.asarray(slope(x, weights)[0]), samples, along)
        np.testing.assert_allclose(curvature, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.full
def test_derivative_in_a_weight_of_zero(rng):
    samples, weights = rng.normal(size=(8, 3)), np.r_[0, 0, np.full(6, 1 / 6)]
    memory, shift = jdam.store(gaussians(rng, 1, 3)), np.r_[1, 0, -1, np.zeros(5)]

    def distance(weights):
        return jdam.divergences(memory, jdam.Gaussian.from_samples(samples, weights))[0]

    one_sided = [(distance(weights + h * shift) - distance(weights)) / h for h in (1e-6, 2e-6)]
    expected = 2 * one_sided[0] - one_sided[1]
    np.testing.assert_allclose(jax.grad(distance)(weights) @ shift, expected, rtol=1e-5)


def test_derivative_in_a_weight_of_zero_does_not_depend_on_the_batch(rng):
    """A standard deviation of 3·10⁻⁴ of the other is none that rounding explains."""
    samples = rng.normal(size=(5, 2)).astype(np.float32) * np.float32([1, 3e-4])
    weights = np.float32([0.2, 0.3, 0.1, 0.4, 0])
    change = np.float32([0, 0, 0, -1, 1])

    def derivative(*batch):
        points, at, along = (
            jnp.broadcast_to(x, (*batch, *x.shape)) for x in (samples, weights, change)
        )
        return jax.jvp(lambda w: jdam.Gaussian.from_samples(points, w).factor, (at,), (along,))[1]

    np.testing.assert_allclose(derivative(8192)[0], derivative(), rtol=1e-2)


@pytest.mark.parametrize("num", [2, 5])
def test_derivatives_where_all_mass_is_on_one_sample(rng, num):
    memory, samples = jdam.store(gaussians(rng, 1, 3)), rng.normal(size=(num, 3))

    def distance(samples, weights):
        return jdam.divergences(memory, jdam.Gaussian.from_samples(samples, weights))[0]

    slopes = jax.grad(distance, argnums=(0, 1))(samples, np.eye(num)[0])
    assert all(np.isfinite(slope).all() for slope in slopes)


def test_derivative_of_a_variance_of_zero():
    def total(variance):
        return jdam.DiagonalGaussian.from_variance(np.ones(2), variance).scale.sum()

    np.testing.assert_allclose(jax.grad(total)(np.array([0.0, 4.0])), [0, 0.25])


@pytest.mark.parametrize("unit", [1e-22, 1e-12, 1.0, 1e12, 1e26, 1e30])
def test_covariances_of_any_unit(unit):
    covariance = (unit * np.array([[2.0, 1.0], [1.0, 3.0]])).astype(np.float32)
    zero = np.zeros(2, np.float32)
    found = jdam.Gaussian.from_covariance(zero, covariance).covariance
    np.testing.assert_allclose(found, covariance, rtol=2e-6)
    for wrong, message in (([[1, 0], [0, -1]], "semidefinite"), ([[1, 0.5], [0, 1]], "symmetric")):
        with pytest.raises(ValueError, match=message):
            jdam.Gaussian.from_covariance(zero, (unit * np.array(wrong)).astype(np.float32))


@pytest.mark.parametrize(
    ("dtype", "num"),
    [("float16", 200), ("float16", 2000), ("bfloat16", 30), ("float32", 200_000), ("float64", 50)],
)
def test_sums_of_weights(rng, dtype, num):
    """Good weights have a rounding of their own, and that of the sum they were divided by."""
    points = jnp.zeros((num, 1), dtype)
    drawn = rng.exponential(size=num)
    in_dtype = jnp.asarray(drawn, dtype)
    jdam.PointCloud(points, jnp.asarray(drawn / drawn.sum(), dtype))
    jdam.PointCloud(points, in_dtype / in_dtype.sum())
    jdam.PointCloud(points, jnp.full(num, 1 / num, dtype))
    for total in (0.0, 0.5, 0.9, 1.1, 2.0):
        with pytest.raises(ValueError, match="weights must sum to one"):
            jdam.PointCloud(points, jnp.asarray(total * drawn / drawn.sum(), dtype))
