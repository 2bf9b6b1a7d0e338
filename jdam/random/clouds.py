"""Random point clouds with separated means."""

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

#: Number of rejection samples for each atom.
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
    """Draw point clouds with separated means (SampAlgo of arXiv:2603.20656).

    The means are mᵢ = (a/√d)sᵢ with sᵢ uniform on {−1, 1}ᵈ and a = R − 2r − b. The atoms are
    yᵢⱼ = mᵢ + zᵢⱼ − z̄ᵢ, where zᵢⱼ are uniform in the ball of radius r with distances of at least
    `min_separation`, and z̄ᵢ is their weighted mean. The weights are uniform on the part of the
    simplex where all weights are at least `min_weight`. Hence the mean of a cloud is mᵢ, its atoms
    are in the ball of radius R − b about 0, and N ≤ √(2δ) exp(η²d/4) means have
    distances ≥ a√(2(1−η)) with probability ≥ 1 − δ (Theorem 1 and Lemmas 15, 16 there).

    **Arguments:**

    - `key`: a `jax.random` key.
    - `num`, `num_atoms`, `dim`: N, n and d, all ≥ 1.
    - `radius`, `shape_radius`, `margin`: the distances R, r and b ≥ 0, R > 2r + b.
    - `min_weight`: the smallest weight allowed, in [0, 1/n].
    - `min_separation`: the smallest distance allowed between atoms of a cloud, ≥ 0.
    - `dtype`: a floating dtype; JAX's default one if None.

    **Returns:** a `PointCloud` of batch shape (N,) with n atoms each.

    **Raises:** `TypeError` or `ValueError` for arguments outside these types and ranges;
    `ValueError` if 1000 draws give no place for an atom at `min_separation` from the others. Under
    a trace such atoms are NaN.
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
    """Return the points (N, n, d) and weights (N, n) of `separated_clouds`."""
    mean_key, weight_key, shape_key = jax.random.split(key, 3)
    min_weight = settings["min_weight"]
    dtype = min_weight.dtype
    # Normalised exponential variables are uniform on the simplex.
    free = jax.random.exponential(weight_key, (num, num_atoms), dtype)
    weights = min_weight + (1 - num_atoms * min_weight) * free / free.sum(-1, keepdims=True)
    length = settings["radius"] - 2 * settings["shape_radius"] - settings["margin"]
    means = length / math.sqrt(dim) * jax.random.rademacher(mean_key, (num, dim), dtype)
    keys = jax.random.split(shape_key, num)
    draw_shape = partial(_separated_atoms, num_atoms=num_atoms, dim=dim)
    shapes = jax.vmap(draw_shape, (0, None, None))(
        keys, settings["shape_radius"], settings["min_separation"]
    )
    shapes = shapes - jnp.vecmat(weights, shapes)[:, None]
    return means[:, None] + shapes, weights


def _separated_atoms(
    key: Array, radius: Array, separation: Array, *, num_atoms: int, dim: int
) -> Float[Array, "n d"]:
    """Draw atoms uniform in a ball by rejection sampling: each is drawn until its distance from the
    atoms before it is at least `separation`, and is NaN after `TRIES` draws without success.
    """

    def add_atom(atoms: Array, item: tuple[Array, Array]) -> tuple[Array, None]:
        number, key = item

        def cond_fun(carry: tuple[Any, ...]) -> Array:
            tries, _, fits = carry
            result: Array = ~fits & (tries < TRIES)
            return result

        def body_fun(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            tries, _, _ = carry
            atom = radius * jax.random.ball(jax.random.fold_in(key, tries), dim, dtype=atoms.dtype)
            gap = atom[None] - atoms
            near = jnp.vecdot(gap, gap) < separation**2
            return tries + 1, atom, ~(near & (jnp.arange(num_atoms) < number)).any()

        start = (jnp.array(0), jnp.full(dim, jnp.nan, atoms.dtype), jnp.array(False))
        _, atom, fits = jax.lax.while_loop(cond_fun, body_fun, start)
        return atoms.at[number].set(jnp.where(fits, atom, jnp.nan)), None

    items = (jnp.arange(num_atoms), jax.random.split(key, num_atoms))
    return jax.lax.scan(add_atom, jnp.zeros((num_atoms, dim), radius.dtype), items)[0]
