"""Layers for Equinox models. (For models of other libraries see `jdam.parametrize`.)"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jdam._core import checks
from jdam._core.compile import working_dtype
from jdam._energy.choosing import suggest_beta
from jdam._energy.energy import inverse_temperature
from jdam._energy.separation import LogSumExp, Separation
from jdam._energy.separation import check as check_separation
from jdam._learning.parametrize import BETA, Rebuild, check_learn, parametrize, without_beta
from jdam._measures.base import AnyMeasure
from jdam._memory.memory import Memory
from jdam._recall.attention import attend


class MeasureAttention(eqx.Module):
    """Attention from a measure to learned measures: Σ wᵢ(ξ) valuesᵢ, with Gibbs weights w.

        layer = jdam.nn.MeasureAttention(memory, 10, key=key)
        jax.vmap(layer)(queries)                  # (Q, 10)

    The keys are the patterns of the memory, of any kind, in the unconstrained coordinates of
    `jdam.parametrize`, so that measures remain measures under any optimizer. All arrays of the
    module are parameters, as usual in Equinox: `keys`, `values` and, if β is learned, `log_beta`.
    All else is static, and equal if its numbers are equal, so that a layer, its copies and layers
    of the same construction can be averaged, stacked (`jax.tree.map`, `eqx.filter_vmap` of the
    constructor) and called by one compiled program.

    **Arguments:**

    - `memory`: the initial keys and their geometry.
    - `values`: the number of outputs, whose initial values are drawn from N(0, 1/N), or an array
      (N, …) of initial values.
    - `beta`: a number > 0, the initial value if β is learned; `jdam.suggest_beta(memory)` if None.
    - `learn`: a tuple of names: those of `parametrize`, and "beta".
    - `separation`: as in `jdam.attend`.
    - `key`: a `jax.random` key, for a number of outputs as `values`.

    **Raises:** as `parametrize`; `TypeError` or `ValueError` for other values or β; `ValueError`
    inside `jax.jit` or `jax.vmap` if arrays that are not learned are traced.
    """

    keys: dict[str, Any]
    values: Float[Array, "N ..."]
    log_beta: Float[Array, ""] | None
    given_beta: float | None = eqx.field(static=True)
    rebuild: Callable[[dict[str, Any]], Memory] = eqx.field(static=True)
    separation: Separation = eqx.field(static=True)

    def __init__(
        self,
        memory: Memory,
        values: int | ArrayLike,
        *,
        beta: ArrayLike | None = None,
        learn: tuple[str, ...] = ("patterns", BETA),
        separation: Separation = LogSumExp(),
        key: Array | None = None,
    ):
        if learn:
            check_learn(learn)
        names = without_beta(learn)
        rebuild: Any
        self.keys, rebuild = parametrize(memory, names) if names else ({}, Rebuild(memory, ()))
        if not checks.is_concrete(*jax.tree.leaves(rebuild.memory)):
            raise ValueError(
                "memory must be known outside of jax.jit and jax.vmap but for what is learned (of "
                "clouds and mixtures that are points and means, and which weights are 0 must be "
                "known): make layers one by one and stack them by jax.tree.map; or use jdam.attend"
            )
        self.rebuild = rebuild
        dtype = working_dtype(memory.dtype)
        if isinstance(values, int):
            if key is None:
                raise TypeError("key must be given to draw values; or values as an array")
            shape = (memory.capacity, checks.positive_int("values", values))
            drawn = jax.random.normal(key, shape, dtype) / math.sqrt(memory.capacity)
            self.values = drawn.astype(memory.dtype)
        else:
            self.values = checks.float_array(
                "values", values, cure="for labels pass a one-hot array"
            )
            if self.values.shape[:1] != (memory.capacity,):
                expected = f"(N, …), N = {memory.capacity}"
                raise ValueError(f"values must have shape {expected}; got {self.values.shape}")
        with checks.kept_concrete((memory, beta)):
            beta = suggest_beta(memory) if beta is None else inverse_temperature(memory, beta)
            beta = beta.astype(dtype)
        if BETA not in learn and not checks.is_concrete(beta):
            raise ValueError(
                "beta must be known outside of jax.jit and jax.vmap unless it is learned; got a "
                "traced one, or a traced memory to suggest it"
            )
        self.log_beta = jnp.log(beta) if BETA in learn else None
        self.given_beta = None if BETA in learn else float(beta)
        check_separation(separation)
        self.separation = separation

    @property
    def memory(self) -> Memory:
        """The memory with the current keys."""
        return self.rebuild(self.keys)

    @property
    def beta(self) -> Float[Array, ""]:
        """The current β."""
        if self.log_beta is not None:
            return jnp.exp(self.log_beta)
        return jnp.asarray(self.given_beta, working_dtype(self.values.dtype))

    def __call__(
        self, query: AnyMeasure, *, beta: ArrayLike | None = None, key: Array | None = None
    ) -> Float[Array, "..."]:
        """The output Σ wᵢ(ξ) valuesᵢ for one query.

        **Arguments:**

        - `query`: a measure of the type of the keys. Use `jax.vmap` for batches.
        - `beta`: an inverse temperature in place of that of the layer, if not None.
        - `key`: not used; layers of Equinox take one.

        **Returns:** an array of the shape of one row of `values`.
        """
        beta = self.beta if beta is None else beta
        output: Array = attend(self.memory, query, beta, self.values, separation=self.separation)
        return output
