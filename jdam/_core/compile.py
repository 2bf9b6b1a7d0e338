"""The decorator with which jdam's functions are compiled.

It sets full precision for matrix products on every platform, computes in float32 at least, and runs
functions of a sharded memory on the shards.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jdam._core.batching import in_batches
from jdam._core.loops import varying
from jdam._core.mesh import is_whole, on_parts

P = ParamSpec("P")
R = TypeVar("R")


def compiled(
    *,
    static: tuple[str, ...] = (),
    rounded: bool = True,
    batch_size: Callable[..., int | None] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator like `jax.jit` for functions whose first argument sets the dtype.

    Floating arguments of lower precision than float32 are computed with in float32. If `rounded`,
    the result is cast back to the dtype of the first argument. If the first argument is a memory on
    a mesh of devices, the function runs on each shard.

    **Arguments:**

    - `static`: names of the static keyword arguments.
    - `rounded`: whether to cast the result back.
    - `batch_size`: a function of the first and the static arguments that returns how many elements
      of a batch are computed at a time under `jax.vmap`, None for all. If `batch_size` is None, the
      function is batched as JAX does it."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.partial(jax.jit, static_argnames=static)
        @functools.wraps(function)
        def run(first: Any, *args: Any, **kwargs: Any) -> PyTree:
            def body(first: Any, *args: Any) -> PyTree:
                first = first.validated() if hasattr(first, "validated") else first
                return cast(Any, function)(first, *args, **kwargs)

            dtype, call = float_dtype(first), body
            inside = working_dtype(dtype)
            values = varying((first, *args))
            if inside != dtype:
                values = cast_floats(values, inside)
            if batch_size is not None:
                call = functools.partial(in_batches, body, batch_size(first, **kwargs))
            result = on_parts(call, *values) if is_whole(first) else call(*values)
            return cast_floats(result, dtype) if rounded and inside != dtype else result

        @functools.wraps(function)
        def in_one_context(*args: Any, **kwargs: Any) -> PyTree:
            # Rules of a `custom_vmap` are traced with a mesh set, possibly an empty one. Setting it
            # here too gives both the same cache key, so that nothing is traced twice.
            mesh = jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh())
            with mesh, jax.default_matmul_precision("highest"):
                return run(*args, **kwargs)

        return cast(Callable[P, R], in_one_context)

    return decorate


def float_dtype(tree: PyTree) -> jnp.dtype:
    """Return the dtype of the first floating array in `tree`."""
    dtypes = (leaf.dtype for leaf in jax.tree.leaves(tree))
    first: jnp.dtype = next(dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating))
    return first


def working_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return the dtype to compute in: float32 for half precision, which has no decompositions and
    loses too many digits in sums."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


def cast_floats(tree: PyTree, dtype: jnp.dtype) -> PyTree:
    """Return the tree with its floating arrays in this dtype."""

    def cast(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)
