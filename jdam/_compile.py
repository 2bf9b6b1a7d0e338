"""How jdam's functions are compiled: matrix products in full precision on every platform, and
in at least float32 inside, whatever the dtype outside."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def compiled(
    *, static: tuple[str, ...] = (), rounded: bool = True
) -> Callable[[Callable], Callable]:
    """`jax.jit` for a function of arrays whose first argument sets the dtype of the result,
    which unless `rounded` stays the one worked in."""

    def decorate(function: Callable) -> Callable:
        @functools.partial(jax.jit, static_argnames=static)
        @functools.wraps(function)
        def run(first: Any, *args: Any, **kwargs: Any) -> Any:
            dtype = float_dtype(first)
            inside = working_dtype(dtype)
            with jax.default_matmul_precision("highest"):
                if inside == dtype:
                    return function(first, *args, **kwargs)
                result = function(*_cast((first, *args), inside), **kwargs)
                return _cast(result, dtype) if rounded else result

        return run

    return decorate


def float_dtype(tree: Any) -> jnp.dtype:
    """The dtype of the measures or arrays in `tree`."""
    return jax.tree.leaves(tree)[0].dtype


def working_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype computed in: halves have neither decompositions nor digits to sum with."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


def _cast(tree: Any, dtype: jnp.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)
