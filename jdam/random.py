"""Random measures: those of the papers' experiments, and perturbations of exact radius."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float

from jdam._core import checks
from jdam._core.derivatives import full_precision
from jdam._core.lapack import cholesky, qr
from jdam._core.linalg import squared_norm
from jdam._measures.base import AnyMeasure, Measure, with_leaves
from jdam._measures.gaussian import DiagonalGaussian, Gaussian
from jdam._measures.mixture import GaussianMixture
from jdam._measures.point_cloud import PointCloud

#: How often to try to place an atom at its distance from the others.
TRIES = 1000

# ------------------------------------------------------------------ the papers' memories


def wasserstein_sphere(
    key: Array,
    num: int,
    dim: int,
    *,
    bounds: tuple[float, float] | None = (1.0, 1.1),
    commuting: bool = True,
    dtype: DTypeLike | None = None,
) -> Gaussian:
    """Gaussians at W₂ distance R from δ₀, R² = d(λ_min + λ_max): the patterns of
    arXiv:2509.23162, Algorithms 2 and 3.

    Means are uniform on |μ|² = R²/2, spectra uniform on {λ ∈ [λ_min, λ_max]ᵈ, Σλ = R²/2}, and
    eigenvectors a random orthogonal U: one for all if `commuting`, one for each otherwise. The
    spectra are exact samples in a fixed number of operations.

    **Arguments:** `key`, a `jax.random` key; `num` N and `dim` d ≥ 1; `bounds` (λ_min, λ_max) of
    the eigenvalues, 0 ≤ λ_min ≤ λ_max. `bounds=None`, which needs `commuting=False`, are the
    general covariances of the paper's second experiment: Σ ∝ WWᵀ + I/100, W a normal matrix d×d,
    scaled to trace d, with |μ|² = d and so R² = 2d. `dtype`: JAX's default one if None.

    **Returns:** a `Gaussian` of batch shape (N,), with factors U√Λ.

    **Raises:** `TypeError` or `ValueError` for arguments that are not of these kinds.
    """
    num, dim = checks.positive_int("num", num), checks.positive_int("dim", dim)
    dtype = _float_dtype(dtype)
    if bounds is None:
        if commuting:
            raise ValueError("bounds must be given where commuting=True; got None")
        result: Gaussian = _wishart_sphere(key, num, dim, dtype)
        return result
    low, high = (np.asarray(bound) for bound in bounds)
    if not (0 <= low <= high < math.inf and high > 0):
        raise ValueError(f"bounds must be 0 ≤ λ_min ≤ λ_max, λ_max > 0, finite; got {bounds}")
    ends = jnp.asarray(low, dtype), jnp.asarray(high, dtype)
    sphere: Gaussian = _sphere(key, ends, num, dim, commuting)
    return sphere


@partial(jax.jit, static_argnums=(2, 3, 4))
def _sphere(
    key: Array, bounds: tuple[Array, Array], num: int, dim: int, commuting: bool
) -> Gaussian:
    for_means, for_spectra, for_bases = jax.random.split(key, 3)
    (low, high), dtype = bounds, bounds[0].dtype
    spectra = low + (high - low) * _middle_of_cube(for_spectra, num, dim, dtype)
    shape = (1,) if commuting else (num,)
    bases = _orthogonal(for_bases, (*shape, dim), dtype)
    means = jnp.sqrt(dim * (low + high) / 2) * _directions(for_means, (num, dim), dtype)
    return Gaussian(means, bases * jnp.sqrt(spectra)[:, None])


@partial(jax.jit, static_argnums=(1, 2, 3))
@full_precision
def _wishart_sphere(key: Array, num: int, dim: int, dtype: jnp.dtype) -> Gaussian:
    for_means, for_factors = jax.random.split(key)
    normal = jax.random.normal(for_factors, (num, dim, dim), dtype)
    factors = cholesky(normal @ normal.mT + jnp.eye(dim, dtype=dtype)[None] / 100)
    factors = factors * jnp.sqrt(dim / squared_norm(factors))[:, None, None]
    return Gaussian(math.sqrt(dim) * _directions(for_means, (num, dim), dtype), factors)


def _middle_of_cube(key: Array, num: int, dim: int, dtype: jnp.dtype) -> Float[Array, "N d"]:
    """Points uniform on {u ∈ [0, 1]ᵈ, Σu = d/2}.

    The slice Pₙ(s) = {u ∈ [0, 1]ⁿ, Σu = s} is made of cones from its centre (s/n, …, s/n) over
    its facets, uₖ = 0 and uₖ = 1, which are Pₙ₋₁(s) and Pₙ₋₁(s−1) again, at distances s/n and
    1 − s/n. So a uniform point lies on the segment from the centre to a uniform point of a facet
    chosen by the volumes of the cones, at a share r of it, r^(n−1) uniform on [0, 1].
    """
    lower = jnp.asarray(_chances_of_zero(dim), dtype)
    for_facets, for_shares, for_order = jax.random.split(key, 3)
    choices = jax.random.uniform(for_facets, (dim - 1, num), dtype)
    shares = jax.random.uniform(for_shares, (dim - 1, num), dtype)

    def descend(carry: tuple[Any, ...], level: tuple[Any, ...]) -> tuple[tuple[Any, ...], Array]:
        # A point of the slice reached so far is shift + scale·(point of the slice).
        ones, shift, scale = carry
        size, chances, choice, share = level
        share = share ** (1 / (size - 1))
        centre = (dim / 2 - ones.astype(dtype)) / size
        shift, scale = shift + scale * (1 - share) * centre, scale * share
        one = choice >= chances[ones]
        return (ones + one.astype(jnp.int32), shift, scale), shift + jnp.where(one, scale, 0)

    start = (jnp.zeros(num, jnp.int32), jnp.zeros(num, dtype), jnp.ones(num, dtype))
    sizes = jnp.arange(dim, 1, -1, dtype=dtype)
    (ones, shift, scale), points = jax.lax.scan(descend, start, (sizes, lower, choices, shares))
    last = shift + scale * (dim / 2 - ones.astype(dtype))
    points = jnp.concatenate([points, last[None]]).T
    points = jax.random.permutation(for_order, points, axis=1, independent=True)
    return jnp.clip(points, 0, 1)  # rounding


def _chances_of_zero(dim: int) -> np.ndarray:
    """(d−1, d+1): for n = d, …, 2 and s = d/2 − j, j = 0, …, d, the share of Pₙ(s) in cones over
    facets uₖ = 0. The volumes are those of the B-spline recursion, all of whose terms are ≥ 0:

        fₙ(s) = (s fₙ₋₁(s) + (n−s) fₙ₋₁(s−1)) / (n−1)
    """
    s = dim / 2 - np.arange(dim + 1)
    volume = ((s >= 0) & (s < 1)).astype(float)
    rows = []
    for n in range(2, dim + 1):
        zero, one = s * volume, (n - s) * np.append(volume[1:], 0)
        rows.append(np.divide(zero, zero + one, out=np.zeros_like(s), where=zero + one > 0))
        volume = (zero + one) / (n - 1)
    return np.reshape(rows[::-1], (dim - 1, dim + 1))


def separated_clouds(
    key: Array,
    num: int,
    num_atoms: int,
    dim: int,
    *,
    radius: float,
    shape_radius: float,
    margin: float,
    min_weight: float = 0.0,
    min_separation: float = 0.0,
    dtype: DTypeLike | None = None,
) -> PointCloud:
    """Point clouds with means far apart: SampAlgo of arXiv:2603.20656.

    Means are mᵢ = (a/√d)sᵢ, sᵢ uniform on {−1, 1}ᵈ and a = R − 2r − b; about them lie atoms
    yᵢⱼ = mᵢ + zᵢⱼ − z̄ᵢ, z uniform in the ball of radius r and at distances of at least
    `min_separation`; weights are uniform on the simplex where all are at least `min_weight`. So
    the mean of a cloud is mᵢ, its atoms lie in the ball of radius R − b about 0, and
    N ≤ √(2δ) exp(η²d/4) means are all at distances ≥ a√(2(1−η)) with probability ≥ 1 − δ
    (Theorem 1 and Lemmas 15, 16 there).

    **Arguments:** `key`; `num` N, `num_atoms` n, `dim` d ≥ 1; distances `radius` R,
    `shape_radius` r, `margin` b and `min_separation`, with R > 2r + b; `min_weight` in [0, 1/n].

    **Returns:** a `PointCloud` of batch shape (N,) with n atoms each.

    **Raises:** `TypeError` or `ValueError` for arguments that are not of these kinds;
    `ValueError` where atoms found no place at their distance in 1000 tries. Under a trace, those
    are NaN.
    """
    num, dim = checks.positive_int("num", num), checks.positive_int("dim", dim)
    num_atoms = checks.positive_int("num_atoms", num_atoms)
    lengths = {
        "radius": radius,
        "shape_radius": shape_radius,
        "margin": margin,
        "min_separation": min_separation,
    }
    for name, length in lengths.items():
        if not 0 <= length < math.inf:
            raise ValueError(f"{name} must be finite and ≥ 0; got {length}")
    if radius <= 2 * shape_radius + margin:
        raise ValueError(
            f"radius must be more than 2·shape_radius + margin = {2 * shape_radius + margin:g}, "
            f"for means to differ; got {radius:g}"
        )
    if not 0 <= min_weight * num_atoms <= 1:
        raise ValueError(f"min_weight must be in [0, 1/num_atoms]; got {min_weight}")
    lengths["min_weight"] = min_weight
    dtype = _float_dtype(dtype)
    settings = {name: jnp.asarray(value, dtype) for name, value in lengths.items()}
    points, weights = _clouds(key, settings, num, num_atoms, dim)
    if checks.is_concrete(points) and bool(jnp.isnan(points).any()):
        raise ValueError(
            f"min_separation must leave room for {num_atoms} atoms in a ball of radius "
            f"{shape_radius:g}; got {min_separation:g}"
        )
    return PointCloud(points, weights)


@partial(jax.jit, static_argnums=(2, 3, 4))
@full_precision
def _clouds(key: Array, settings: dict[str, Array], num: int, num_atoms: int, dim: int) -> Any:
    for_means, for_weights, for_shapes = jax.random.split(key, 3)
    least = settings["min_weight"]
    dtype = least.dtype
    free = jax.random.exponential(for_weights, (num, num_atoms), dtype)  # uniform on the simplex
    weights = least + (1 - num_atoms * least) * free / free.sum(-1, keepdims=True)
    length = settings["radius"] - 2 * settings["shape_radius"] - settings["margin"]
    means = length / math.sqrt(dim) * jax.random.rademacher(for_means, (num, dim), dtype)
    keys = jax.random.split(for_shapes, num)
    place = partial(_scatter, num_atoms=num_atoms, dim=dim)
    shapes = jax.vmap(place, (0, None, None))(
        keys, settings["shape_radius"], settings["min_separation"]
    )
    shapes = shapes - jnp.vecmat(weights, shapes)[:, None]
    return means[:, None] + shapes, weights


def _scatter(
    key: Array, radius: Array, separation: Array, *, num_atoms: int, dim: int
) -> Float[Array, "n d"]:
    """Atoms uniform in a ball, one after the other, each drawn again until it is far enough from
    those before; NaN where it is not after many tries."""

    def place(atoms: Array, item: tuple[Array, Array]) -> tuple[Array, None]:
        number, key = item

        def unfit(carry: tuple[Any, ...]) -> Array:
            tries, _, fits = carry
            result: Array = ~fits & (tries < TRIES)
            return result

        def draw(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            tries, _, _ = carry
            atom = radius * jax.random.ball(jax.random.fold_in(key, tries), dim, dtype=atoms.dtype)
            gap = atom[None] - atoms
            near = jnp.vecdot(gap, gap) < separation**2
            return tries + 1, atom, ~(near & (jnp.arange(num_atoms) < number)).any()

        start = (jnp.array(0), jnp.full(dim, jnp.nan, atoms.dtype), jnp.array(False))
        _, atom, fits = jax.lax.while_loop(unfit, draw, start)
        return atoms.at[number].set(jnp.where(fits, atom, jnp.nan)), None

    items = (jnp.arange(num_atoms), jax.random.split(key, num_atoms))
    return jax.lax.scan(place, jnp.zeros((num_atoms, dim), radius.dtype), items)[0]


# ------------------------------------------------------------------ perturbations


def perturb(
    key: Array, measure: AnyMeasure, radius: ArrayLike, *, where: str = "both"
) -> AnyMeasure:
    """A random measure at W₂ distance exactly `radius`, with cost |x−y|², from each of a batch.

    * `"mean"`: a translation in a uniform direction.
    * `"covariance"`: the image under x ↦ x + S(x − m), S symmetric with a uniform basis and
      normal eigenvalues, scaled to ∫|S(x−m)|² = radius². Signs are turned where I + S would not
      be ⪰ 0, which does not change that integral; so the map is the gradient of a convex
      function, it is optimal, and the radius is exact however large. For `DiagonalGaussian`
      S is diagonal; a Gaussian that is one point becomes one of a random covariance.
    * `"both"`: half of radius² each.
    * `"atoms"`, clouds only: each atom by `radius` in a direction of its own. Exact as long as
      none moves more than half the distance between two atoms, which is required.

    Each component of a `GaussianMixture` is perturbed by `radius`, which then is MW₂ as long as
    all stay nearer to their own than to other components.

    **Arguments:** `key`, one for the whole batch; `measure`, a Gaussian, a mixture, a cloud or an
    array (…, d) of vectors (which only have a mean), of any batch shape; `radius` ≥ 0, W₂ distances
    (not squared), a scalar or of the batch shape.

    **Raises:** `TypeError` or `ValueError` for arguments that are not of these kinds, and for
    radii that cannot be had: `"atoms"` beyond half the separation, `"covariance"` of a cloud that
    is one point. Under a trace, those give NaN.
    """
    allowed = ["both", "mean"]
    if isinstance(measure, Measure):
        allowed += ["covariance"]
    else:
        measure = checks.float_array("measure", measure)
    if isinstance(measure, PointCloud):
        allowed += ["atoms"]
    if where not in allowed:
        raise ValueError(f"where must be one of {allowed} for this measure; got {where!r}")
    batch = measure.batch_shape if isinstance(measure, Measure) else measure.shape[:-1]
    dtype = jax.tree.leaves(measure)[0].dtype
    radius = jnp.asarray(radius, dtype)
    if radius.shape not in ((), batch):
        raise ValueError(f"radius must be a scalar or of shape {batch}; got {radius.shape}")
    checks.finite("radius", radius)
    checks.nonnegative("radius", radius)
    found = _perturb(key, measure, jnp.broadcast_to(radius, batch), where)
    first = jax.tree.leaves(found)[0]
    wanted = {
        "atoms": "at most half the distance between two atoms",
        "covariance": "0 for a cloud that is one point",
    }.get(where)
    if wanted and checks.is_concrete(first) and bool(jnp.isnan(first).any()):
        raise ValueError(f"radius must be {wanted} with where={where!r}; got {radius}")
    return found


@partial(jax.jit, static_argnums=3)
@full_precision
def _perturb(key: Array, measure: AnyMeasure, radius: Array, where: str) -> AnyMeasure:
    for_mean, for_shape = jax.random.split(key)
    if not isinstance(measure, Measure):
        return measure + radius[..., None] * _directions(for_mean, measure.shape, measure.dtype)
    if isinstance(measure, GaussianMixture):
        each = jnp.broadcast_to(radius[..., None], measure.weights.shape)
        moved = _perturb(key, measure.components, each, where)
        return with_leaves(measure, measure.weights, moved.mean, moved.factor)
    if isinstance(measure, PointCloud) and where == "atoms":
        return _move_atoms(for_shape, measure, radius)
    share = {"mean": (1.0, 0.0), "covariance": (0.0, 1.0), "both": (0.5, 0.5)}[where]
    by_mean, by_shape = (math.sqrt(s) * radius for s in share)
    if isinstance(measure, PointCloud) and where == "both":
        # One point has no shape to change.
        point = _variance(measure) == 0
        by_mean, by_shape = jnp.where(point, radius, by_mean), jnp.where(point, 0, by_shape)
    measure = measure if where == "mean" else _reshape(for_shape, measure, by_shape)
    if where == "covariance":
        return measure
    shift = by_mean[..., None] * _directions(for_mean, measure.mean.shape, measure.dtype)
    if isinstance(measure, PointCloud):
        return with_leaves(measure, measure.points + shift[..., None, :], measure.weights)
    mean, *shape = jax.tree.leaves(measure)
    return with_leaves(measure, mean + shift, *shape)


def _reshape(key: Array, measure: Measure, radius: Float[Array, " *batch"]) -> Measure:
    """The image under x ↦ x + S(x − m), at distance `radius`."""
    if isinstance(measure, DiagonalGaussian):
        change = radius[..., None] * _directions(key, measure.scale.shape, measure.dtype)
        change = jnp.where(measure.scale + change < 0, -change, change)
        return with_leaves(measure, measure.mean, measure.scale + change)
    for_basis, for_values, for_point = jax.random.split(key, 3)
    batch, dim, dtype = measure.batch_shape, measure.dim, measure.dtype
    basis = _orthogonal(for_basis, (*batch, dim), dtype)
    values = jax.random.normal(for_values, (*batch, dim), dtype)
    if isinstance(measure, PointCloud):
        centred = measure.points - measure.mean[..., None, :]
        spread = (jnp.sqrt(measure.weights)[..., None] * centred).mT
    else:
        assert isinstance(measure, Gaussian)
        spread = measure.factor
    size = jnp.sqrt(squared_norm(values[..., None] * (basis.mT @ spread)))
    values = values * (radius / jnp.where(size > 0, size, 1))[..., None]
    values = jnp.where(values < -1, -values, values)
    if isinstance(measure, PointCloud):
        moved = measure.points + ((centred @ basis) * values[..., None, :]) @ basis.mT
        impossible = (size == 0) & (radius > 0)
        moved = jnp.where(impossible[..., None, None], jnp.nan, moved)
        return with_leaves(measure, moved, measure.weights)
    moved = spread + basis @ (values[..., None] * (basis.mT @ spread))
    flat = (*batch, dim * spread.shape[-1])
    point = radius[..., None, None] * _directions(for_point, flat, dtype).reshape(spread.shape)
    return with_leaves(measure, measure.mean, jnp.where((size > 0)[..., None, None], moved, point))


def _move_atoms(key: Array, cloud: PointCloud, radius: Float[Array, " *batch"]) -> PointCloud:
    on = cloud.weights > 0
    gaps = cloud.points[..., :, None, :] - cloud.points[..., None, :, :]
    pairs = on[..., :, None] & on[..., None, :]
    pairs &= jnp.broadcast_to(~jnp.eye(cloud.num_atoms, dtype=bool), pairs.shape)
    separation = jnp.where(pairs, jnp.sqrt(jnp.vecdot(gaps, gaps)), jnp.inf).min((-1, -2))
    length = jnp.where(radius <= separation / 2, radius, jnp.nan)[..., None, None]
    shift = length * _directions(key, cloud.points.shape, cloud.dtype)
    return with_leaves(cloud, cloud.points + shift, cloud.weights)


def _variance(cloud: PointCloud) -> Float[Array, " *batch"]:
    centred = cloud.points - cloud.mean[..., None, :]
    return jnp.vecdot(cloud.weights, jnp.vecdot(centred, centred))


def _orthogonal(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Orthogonal matrices (…, d, d), uniform: `jax.random.orthogonal`, but safe among threads."""
    normal = jax.random.normal(key, (*shape, shape[-1]), dtype)
    basis, triangle = qr(normal)
    result: Array = basis * jnp.sign(jnp.diagonal(triangle, axis1=-2, axis2=-1))[..., None, :]
    return result


def _directions(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Unit vectors (…, d), uniform."""
    normal = jax.random.normal(key, shape, dtype)
    result: Array = normal / jnp.linalg.norm(normal, axis=-1, keepdims=True)
    return result


def _float_dtype(dtype: DTypeLike | None) -> jnp.dtype:
    dtype = jnp.zeros(()).dtype if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating dtype; got {dtype}")
    return dtype
