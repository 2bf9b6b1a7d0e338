"""A memory as arrays without constraints, for optimizers and models of any kind."""

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
from jaxtyping import Float

from jdam._core import checks
from jdam._core.compile import working_dtype
from jdam._measures.base import AnyMeasure, Measure, constrained, unconstrained
from jdam._memory.memory import Memory, check_memory
from jdam._memory.prepared import prepare
from jdam.geometry import Geometry

PATTERNS, PRIOR = "patterns", "prior"
#: Learned beside a memory, of which it is no part.
BETA = "beta"


def parametrize(
    memory: Memory, learn: tuple[str, ...] = (PATTERNS,)
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Memory]]:
    """A memory as parameters that may take any values, and the way back.

        params, rebuild = jdam.parametrize(memory)
        loss = lambda params: jdam.energy(rebuild(params), query, beta)   # jit, grad, vmap, optax

    `rebuild(params)` is pure and differentiable, and prepares what it returns anew, so that nothing
    of it is stale. It keeps what is not learned: other parts of the memory, atoms of weight 0,
    patterns that the prior switches off, and room to grow. Two that keep the same numbers are
    equal, as copies are, so that as a static part of models they make no difference.

    **Arguments:** a `memory` in one piece; `learn`, some of

    - "patterns": factors of Gaussians and means, standard deviations (of either sign), points and
      logarithms of weights of clouds, vectors; as `Measure.unconstrained` has them;
    - "prior": log πᵢ;
    - arrays of the geometry by name, of "epsilon", "rho", "hellinger_scale" and "feature_scale" the
      logarithms.

    **Returns:** `params`, a dictionary by these names of arrays, or of dictionaries of arrays for
    measures of several, in at least float32; and `rebuild`.

    **Raises:** `TypeError` for other kinds of arguments, `ValueError` for a sharded memory, for
    names that are not of these or that the geometry has no value for, and for κ = 0 or λ = 0, which
    have no logarithm.
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
    """Params ↦ memory, for the names that are learned.

    It is equal to others that hold the same numbers, be they copies or made of another memory, so
    that models with them are of one structure: they can be averaged and stacked, and one compiled
    program serves all. Arrays that are traced are equal only to themselves."""

    def __init__(self, memory: Memory, learn: tuple[str, ...]):
        self.memory, self.learn = memory, learn

    def __call__(self, params: dict[str, Any]) -> Memory:
        if set(params) != set(self.learn):
            raise ValueError(f"params must have the names {self.learn}; got {tuple(params)}")
        return _rebuilt(self.memory, params)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rebuild):
            return NotImplemented
        return self is other or self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __reduce__(self) -> tuple[Any, ...]:
        # What identifies it is computed anew: structures of pytrees cannot be pickled.
        return Rebuild, (self.memory, self.learn)

    @functools.cached_property
    def _identity(self) -> tuple[Any, ...]:
        """What two that are equal have in common: read once, since `jax.jit` asks at each call."""
        leaves, structure = jax.tree.flatten(self.memory)
        return frozenset(self.learn), structure, *map(_digest, leaves)

    def __repr__(self) -> str:
        return f"Rebuild({self.memory}, learn={self.learn})"


def check_learn(learn: object) -> None:
    """Raise unless it is a tuple of names."""
    named = isinstance(learn, tuple | list) and all(isinstance(name, str) for name in learn)
    if not named or not learn:
        raise ValueError(f"learn must be a tuple of names, as ('patterns',); got {learn!r}")


def but_beta(names: tuple[str, ...]) -> tuple[str, ...]:
    """What of the names `parametrize` knows."""
    return tuple(name for name in names if name != BETA)


def _not_learned(memory: Memory, params: dict[str, Any]) -> Memory:
    """The memory with zeros for what is learned, and nothing prepared of it: only what stays."""
    with jax.ensure_compile_time_eval():
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    with checks.kept_concrete(memory):
        blank = _moved(memory, zeros)
    if _is_stale(params):
        blank = dataclasses.replace(blank, prepared=None, fingerprint=None)
    return blank


def _rebuilt(memory: Memory, params: dict[str, Any]) -> Memory:
    moved = _moved(memory, params)
    if _is_stale(params):
        prepared, fingerprint = prepare(moved.patterns, moved.geometry)
        moved = dataclasses.replace(moved, prepared=prepared, fingerprint=fingerprint)
    return moved


def _is_stale(params: dict[str, Any]) -> bool:
    """Whether what is prepared depends on what is learned."""
    return bool(set(params) - {PRIOR})


def _moved(memory: Memory, params: dict[str, Any]) -> Memory:
    """The memory with these params, and what was prepared as it is."""
    patterns, prior, geometry = memory.patterns, memory.log_prior, memory.geometry
    if PATTERNS in params:
        moved = constrained(patterns, _with_fields(unconstrained(patterns), params[PATTERNS]))
        patterns = jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), moved, patterns)
    if PRIOR in params:
        off = memory.log_weights == -jnp.inf
        prior = jnp.where(off, -jnp.inf, params[PRIOR]).astype(memory.dtype)
    for name in params:
        if name not in (PATTERNS, PRIOR):
            old = getattr(geometry, name)
            value = jnp.exp(params[name]) if name in geometry.positive else params[name]
            geometry = eqx.tree_at(operator.attrgetter(name), geometry, value.astype(old.dtype))
    return dataclasses.replace(memory, patterns=patterns, geometry=geometry, log_prior=prior)


def _digest(leaf: Any) -> Any:
    """What tells an array from others of other numbers: of traced ones, and those of which others
    have a part, which it is."""
    if not checks.is_concrete(leaf) or not getattr(leaf, "is_fully_addressable", True):
        return id(leaf)
    array = np.ascontiguousarray(leaf)
    content = hashlib.blake2b(array.reshape(-1).view(np.uint8).data).digest()
    return array.shape, array.dtype, content


def _arrays(geometry: Geometry) -> tuple[str, ...]:
    """The names of the geometry's arrays of floats."""
    names = (field.name for field in dataclasses.fields(geometry))
    return tuple(name for name in names if eqx.is_inexact_array(getattr(geometry, name)))


def _logarithm_of(geometry: Geometry, name: str) -> Float[Array, "..."]:
    value: Array = getattr(geometry, name)
    if name not in geometry.positive:
        return value
    if checks.is_concrete(value) and not (value > 0).all():
        raise ValueError(f"{name} must be > 0 to be learned; got {float(value.min()):g}")
    return jnp.log(value)


def _as_fields(measure: AnyMeasure) -> Any:
    """The arrays of a measure by name but for its constants; those of anything else as they are."""
    if not isinstance(measure, Measure):
        return measure
    names = [x.name for x in dataclasses.fields(measure) if x.name not in measure.constants]
    fields = {name: getattr(measure, name) for name in names}
    return {name: value for name, value in fields.items() if eqx.is_inexact_array(value)}


def _with_fields(measure: AnyMeasure, fields: Any) -> AnyMeasure:
    """The measure with these arrays, unchecked."""
    if not isinstance(measure, Measure):
        return fields
    names = list(fields)
    return eqx.tree_at(lambda m: [getattr(m, n) for n in names], measure, [*fields.values()])
