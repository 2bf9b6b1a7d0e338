"""Point clouds with means far apart."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from jdam._core import checks
from jdam._core.derivatives import full_precision
from jdam._measures.point_cloud import PointCloud
from jdam.random._uniform import checked_dtype

#: How often to try to place an atom at its distance from the others.
TRIES = 1000


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
    dtype = checked_dtype(dtype)
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
