"""A memory as a pytree of unconstrained parameters, for optimizers and models of any library."""

import dataclasses
import functools
import hashlib
import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, PyTree

from jdam._core import checks
from jdam._core.compile import working_dtype
from jdam._measures.base import AnyMeasure, Measure, constrained, unconstrained
from jdam._memory.memory import Memory, check_memory
from jdam._memory.prepared import prepare
from jdam.geometry import Geometry

PATTERNS, PRIOR = "patterns", "prior"
#: β is a parameter of `jdam.fit` and `jdam.nn`, but not of the memory, so `parametrize` rejects it.
BETA = "beta"


def parametrize(
    memory: Memory, learn: tuple[str, ...] = (PATTERNS,)
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Memory]]:
    """Return unconstrained parameters of a memory, and the function that builds the memory from
    them.

        params, rebuild = jdam.parametrize(memory)
        loss = lambda params: jdam.energy(rebuild(params), query, beta)   # jit, grad, vmap, optax

    `rebuild(params)` is pure and differentiable, and computes all prepared arrays of the memory
    anew. It contains the constant parts of the memory: the arrays that are not in `params`, atoms
    of weight 0, patterns of prior 0, and free slots. Two such functions are equal if these
    constants are equal, so that models which contain them as static fields have the same structure.

    **Arguments:**

    - `memory`: a memory that is not sharded.
    - `learn`: a tuple of names of parameters:
      "patterns" for the coordinates of `Measure.unconstrained`, as means and factors, standard
      deviations (of either sign), points and logarithms of weights, or vectors;
      "prior" for log πᵢ;
      and names of arrays of the geometry, where those of "epsilon", "rho", "hellinger_scale" and
      "feature_scale" are represented by their logarithms.

    **Returns:**

    - `params`: a dictionary {name: array}, where "patterns" of a `Measure` is a dictionary of
      arrays. The dtype is at least float32.
    - `rebuild`: the function `params` ↦ memory.

    **Raises:** `TypeError` for arguments of other types; `ValueError` for a sharded memory, for
    other names, for arrays that the geometry does not have, and for κ = 0 or λ = 0, which have no
    logarithm.
    """
    check_memory(memory)
    if memory.layout is not None:
        raise ValueError("memory must not be sharded: learn it before jdam.shard")
    check_learn(learn)
    possible = (PATTERNS, PRIOR, *_arrays(memory.geometry))
    for name in learn:
        if name not in possible:
            raise ValueError(f"learn must be a tuple of some of {possible}; got {name!r}")
    params: dict[str, Any] = {}
    for name in learn:
        if name == PATTERNS:
            params[name] = _as_fields(unconstrained(memory.patterns))
        elif name == PRIOR:
            prior = memory.log_weights
            params[name] = jnp.where(prior == -jnp.inf, 0, prior)
        else:
            params[name] = _logarithm_of(memory.geometry, name)
    inside = working_dtype(memory.dtype)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, inside), params)

    return params, Rebuild(_not_learned(memory, params), tuple(learn))


class Rebuild:
    """The function `params` ↦ memory that `parametrize` returns.

    Two instances are equal if their `learn` and the constants in their memories are equal. As
    static fields of models they therefore give models one structure: the models can be averaged and
    stacked, and share one compiled program. A traced array is equal to itself only."""

    def __init__(self, memory: Memory, learn: tuple[str, ...]):
        self.memory, self.learn = memory, learn

    def __call__(self, params: dict[str, Any]) -> Memory:
        if set(params) != set(self.learn):
            raise ValueError(f"params must have the names {self.learn}; got {tuple(params)}")
        rebuilt = _with_params(self.memory, params)
        if not _changes_prepared(params):
            return rebuilt
        prepared, fingerprint = prepare(rebuilt.patterns, rebuilt.geometry)
        return dataclasses.replace(rebuilt, prepared=prepared, fingerprint=fingerprint)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rebuild):
            return NotImplemented
        return self is other or self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __reduce__(self) -> tuple[Any, ...]:
        # `_identity` is not pickled, since structures of pytrees cannot be.
        return Rebuild, (self.memory, self.learn)

    @functools.cached_property
    def _identity(self) -> tuple[PyTree, ...]:
        """The key of equality and hash. It is cached, since `jax.jit` hashes at each call."""
        leaves, structure = jax.tree.flatten(self.memory)
        return frozenset(self.learn), structure, *map(_digest, leaves)

    def __repr__(self) -> str:
        return f"Rebuild({self.memory}, learn={self.learn})"


def check_learn(learn: object) -> None:
    """Raise `ValueError` unless `learn` is a tuple of names, or a list, that is not empty."""
    is_names = isinstance(learn, tuple | list) and all(isinstance(name, str) for name in learn)
    if not is_names or not learn:
        raise ValueError(f"learn must be a tuple of names, as ('patterns',); got {learn!r}")


def without_beta(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names without "beta", which are those of `parametrize`."""
    return tuple(name for name in names if name != BETA)


def _not_learned(memory: Memory, params: dict[str, Any]) -> Memory:
    """Return the memory with zeros for the parameters, and without the arrays prepared from
    them.
    """
    with jax.ensure_compile_time_eval():
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    with checks.kept_concrete(memory):
        constant = _with_params(memory, zeros)
    if _changes_prepared(params):
        constant = dataclasses.replace(constant, prepared=None, fingerprint=None)
    return constant


def _changes_prepared(params: dict[str, Any]) -> bool:
    """Return whether the prepared arrays of a memory may depend on any of the parameters."""
    return bool(set(params) - {PRIOR})


def _with_params(memory: Memory, params: dict[str, Any]) -> Memory:
    """Return the memory with these parameters and its previous prepared arrays."""
    patterns, prior, geometry = memory.patterns, memory.log_prior, memory.geometry
    if PATTERNS in params:
        measures = constrained(patterns, _with_fields(unconstrained(patterns), params[PATTERNS]))
        patterns = jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), measures, patterns)
    if PRIOR in params:
        off = memory.log_weights == -jnp.inf
        prior = jnp.where(off, -jnp.inf, params[PRIOR]).astype(memory.dtype)
    for name in params:
        if name not in (PATTERNS, PRIOR):
            old = getattr(geometry, name)
            value = jnp.exp(params[name]) if name in geometry.positive else params[name]
            geometry = eqx.tree_at(operator.attrgetter(name), geometry, value.astype(old.dtype))
    return dataclasses.replace(
        memory, patterns=patterns, geometry=geometry, log_prior=prior, cells=None
    )


def _digest(leaf: Any) -> Any:
    """Return a key that is equal for equal arrays: shape, dtype and hash of the values. For traced
    arrays, and arrays that are partly on other hosts, it is the identity of the object.
    """
    if not checks.is_concrete(leaf) or not getattr(leaf, "is_fully_addressable", True):
        return id(leaf)
    array = np.ascontiguousarray(leaf)
    content = hashlib.blake2b(array.reshape(-1).view(np.uint8).data).digest()
    return array.shape, array.dtype, content


def _arrays(geometry: Geometry) -> tuple[str, ...]:
    """Return the names of the floating arrays of a geometry."""
    names = (field.name for field in dataclasses.fields(geometry))
    return tuple(name for name in names if eqx.is_inexact_array(getattr(geometry, name)))


def _logarithm_of(geometry: Geometry, name: str) -> Float[Array, "..."]:
    """Return the logarithm of an array of a geometry if it is one of `Geometry.positive`, else the
    array.
    """
    value: Array = getattr(geometry, name)
    if name not in geometry.positive:
        return value
    if checks.is_concrete(value) and not (value > 0).all():
        raise ValueError(f"{name} must be > 0 to be learned; got {float(value.min()):g}")
    return jnp.log(value)


def _as_fields(measure: AnyMeasure) -> PyTree:
    """Return the floating arrays {name: array} of a `Measure` without its `constants`; vectors and
    other pytrees are returned as they are.
    """
    if not isinstance(measure, Measure):
        return measure
    names = [x.name for x in dataclasses.fields(measure) if x.name not in measure.constants]
    fields = {name: getattr(measure, name) for name in names}
    return {name: value for name, value in fields.items() if eqx.is_inexact_array(value)}


def _with_fields(measure: AnyMeasure, fields: PyTree) -> AnyMeasure:
    """Return the measure with the arrays of `_as_fields`, which are not checked."""
    if not isinstance(measure, Measure):
        return fields
    names = list(fields)
    return eqx.tree_at(lambda m: [getattr(m, n) for n in names], measure, [*fields.values()])
