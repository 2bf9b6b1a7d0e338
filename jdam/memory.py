"""The memory: patterns, their geometry and their prior, immutable."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jdam import _checks
from jdam.geometry import Bures, Euclidean, Geometry
from jdam.geometry.protocol import AnyMeasure, batch_size
from jdam.measures import DiagonalGaussian, Gaussian, Measure


class Memory(eqx.Module):
    """N stored measures X₁…X_N, as `jdam.store` makes it: a frozen pytree.

    `len(memory)` is N, `memory[i]` the i-th pattern, `memory[1:3]` a batch of patterns;
    `append` and `remove` return new memories.
    """

    patterns: AnyMeasure
    geometry: Geometry
    log_prior: Float[Array, " N"] | None = None

    def __len__(self) -> int:
        return batch_size(self.patterns)

    def __getitem__(self, index: Any) -> AnyMeasure:
        _checks.index(index, len(self), "a memory")
        return jax.tree.map(lambda leaf: leaf[index], self.patterns)

    @property
    def dtype(self) -> jnp.dtype:
        return jax.tree.leaves(self.patterns)[0].dtype

    def append(self, patterns: AnyMeasure, *, log_prior: ArrayLike | None = None) -> "Memory":
        """A memory with `patterns`, a batch (M,) or a single measure, added at the end.

        Factors of different rank are padded with zeros. Where only one side has a
        `log_prior`, the other's is log 1 = 0.
        """
        try:
            patterns = self.geometry.check("patterns", patterns, 1)
        except ValueError:
            patterns = self.geometry.check("patterns", patterns, 0)
            patterns = jax.tree.map(lambda leaf: leaf[None], patterns)
        added = store(patterns, self.geometry, log_prior=log_prior)
        check_against(self, "patterns", added[0])
        first, second = self.patterns, added.patterns
        second = self.geometry.match(second, first)
        first = self.geometry.match(first, second)
        joined = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), first, second)
        if self.log_prior is None and log_prior is None:
            return Memory(joined, self.geometry)
        prior = jnp.concatenate([_prior_or_zero(self), _prior_or_zero(added)])
        return Memory(joined, self.geometry, prior)

    def remove(self, indices: int | ArrayLike) -> "Memory":
        """A memory without the patterns at `indices`, an int or integers (M,)."""
        drop = np.asarray(indices)
        if drop.size == 0:
            return self
        if not np.issubdtype(drop.dtype, np.integer) or drop.ndim > 1:
            raise TypeError(f"indices must be an int or a list of ints; got {indices!r}")
        if not (-len(self) <= drop.min() and drop.max() < len(self)):
            raise IndexError(
                f"indices must be in [−N, N), N = {len(self)}; got {drop.min()} to {drop.max()}"
            )
        keep = np.delete(np.arange(len(self)), drop)
        if keep.size == 0:
            raise ValueError("indices must leave at least one pattern; got all of them")
        kept = jax.tree.map(lambda leaf: leaf[keep], self)
        return store(kept.patterns, kept.geometry, log_prior=kept.log_prior)

    def __repr__(self) -> str:
        patterns = self.patterns
        if not all(isinstance(leaf, Array | np.ndarray) for leaf in jax.tree.leaves(self)):
            return super().__repr__()  # the shape of a memory, holding something else
        if isinstance(patterns, Gaussian):
            kind = f"Gaussian(dim={patterns.dim}, rank={patterns.rank})"
        elif isinstance(patterns, Measure):
            kind = f"{type(patterns).__name__}(dim={patterns.dim})"
        else:
            kind = f"vectors(dim={patterns.shape[-1]})"
        prior = "" if self.log_prior is None else ", log_prior"
        return f"Memory({len(self)} × {kind}, {self.geometry}, {self.dtype.name}{prior})"


def store(
    patterns: AnyMeasure,
    geometry: Geometry | None = None,
    *,
    log_prior: ArrayLike | None = None,
) -> Memory:
    """A memory of `patterns`, a batch (N,) of measures.

    **Arguments:** `patterns`: a `Gaussian` or `DiagonalGaussian` with one batch axis, or an
    array (N, d). `geometry`: `Bures()` for the former and `Euclidean()` for the latter if
    None. `log_prior` (N,): log πᵢ of the energy −β⁻¹ log Σ πᵢ exp(−βDᵢ), up to a constant;
    πᵢ = 1 if None, and −inf switches a pattern off.

    **Raises:** `TypeError` for patterns that are not this geometry's or not floats;
    `ValueError` for an empty memory, wrong shapes and, where values are concrete, NaN or
    infinity.
    """
    if geometry is None:
        geometry = Bures() if isinstance(patterns, Gaussian | DiagonalGaussian) else Euclidean()
    if not isinstance(geometry, Geometry):
        raise TypeError(f"geometry must be a jdam geometry, such as jdam.Bures(); got {geometry!r}")
    patterns = geometry.check("patterns", patterns, 1)
    if batch_size(patterns) == 0:
        raise ValueError("patterns must hold at least one measure; got 0")
    for leaf in jax.tree.leaves(patterns):
        _checks.finite("patterns", leaf)
    memory = Memory(patterns, geometry)
    return memory if log_prior is None else Memory(patterns, geometry, _prior(memory, log_prior))


def _prior(memory: Memory, log_prior: ArrayLike) -> Float[Array, " N"]:
    prior = _checks.float_array("log_prior", log_prior)
    _checks.same_dtype(patterns=jax.tree.leaves(memory.patterns)[0], log_prior=prior)
    if prior.shape != (len(memory),):
        raise ValueError(f"log_prior must have shape (N,) = ({len(memory)},); got {prior.shape}")
    if _checks.is_concrete(prior):
        values = np.asarray(prior)
        if np.isnan(values).any() or (values == np.inf).any():
            raise ValueError("log_prior must be finite or −inf; got NaN or +inf")
        if (values == -np.inf).all():
            raise ValueError("log_prior must leave a pattern on; got −inf for all of them")
    return prior


def _prior_or_zero(memory: Memory) -> Float[Array, " N"]:
    return jnp.zeros(len(memory), memory.dtype) if memory.log_prior is None else memory.log_prior


def check_against(memory: Memory, name: str, measure: AnyMeasure) -> None:
    """Raise unless the single measure has the memory's type, dtype and dimension."""
    wanted, got = jax.tree.leaves(memory.patterns)[0], jax.tree.leaves(measure)[0]
    if type(measure) is not type(memory.patterns) and isinstance(measure, Measure):
        raise TypeError(
            f"{name} must be a {type(memory.patterns).__name__} like the memory's patterns; "
            f"got {type(measure).__name__}"
        )
    if got.dtype != wanted.dtype:
        raise TypeError(
            f"{name} must have the memory's dtype {wanted.dtype}; got {got.dtype}: convert one"
        )
    if got.shape[-1] != wanted.shape[-1]:
        raise ValueError(
            f"{name} must have the memory's dimension d = {wanted.shape[-1]}; got {got.shape[-1]}"
        )
