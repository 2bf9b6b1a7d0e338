"""How jdam's functions are compiled: matrix products in full precision on every platform, and
in at least float32 inside, whatever the dtype outside."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp

from jdam._core.derivatives import full_precision
from jdam._core.loops import varying
from jdam._core.mesh import is_whole, on_parts

P = ParamSpec("P")
R = TypeVar("R")


def compiled(
    *, static: tuple[str, ...] = (), rounded: bool = True
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`jax.jit` for a function of arrays whose first argument sets the dtype of the result,
    which unless `rounded` stays the one worked in. If it is a memory on a mesh of devices, the
    function runs on the parts."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        whole = cast(Callable[..., Any], function)

        @functools.partial(jax.jit, static_argnames=static)
        @functools.wraps(whole)
        @full_precision
        def run(first: Any, *args: Any, **kwargs: Any) -> Any:
            dtype = float_dtype(first)
            inside = working_dtype(dtype)

            first, args = varying((first, args))

            def call(first: Any, *args: Any) -> Any:
                return whole(_validated(first), *args, **kwargs)

            run_on = functools.partial(on_parts, call) if is_whole(first) else call
            if inside == dtype:
                return run_on(first, *args)
            result = run_on(*_cast((first, *args), inside))
            return _cast(result, dtype) if rounded else result

        @functools.wraps(whole)
        def in_one_context(*args: Any, **kwargs: Any) -> Any:
            # Rules of a `custom_vmap` are traced with a mesh set, if only an empty one. Were it not
            # set outside of them too, all that was traced before would be traced once more.
            with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh()):
                return run(*args, **kwargs)

        return cast(Callable[P, R], in_one_context)

    return decorate


def _validated(first: Any) -> Any:
    """Of a memory, what may be used."""
    return first.validated() if hasattr(first, "validated") else first


def float_dtype(tree: Any) -> jnp.dtype:
    """The dtype of the first array of floats in `tree`."""
    dtypes = (leaf.dtype for leaf in jax.tree.leaves(tree))
    found: jnp.dtype = next(dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating))
    return found


def working_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype computed in: halves have neither decompositions nor digits to sum with."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


def _cast(tree: Any, dtype: jnp.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)
