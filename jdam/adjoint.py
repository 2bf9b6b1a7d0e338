"""How recall loops, and with that how it is differentiated."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class Unrolled:
    """Differentiate through the steps that were taken, in forward or reverse mode.

    Reverse mode keeps one measure a step and recomputes the rest; its result is the exact
    derivative of what `recall` returned, converged or not.
    """

    def loop(
        self,
        advance: Callable[[Any, Any], Any],
        pending: Callable[[Any], Array],
        observe: Callable[[Any], Any],
        state: Any,
        args: Any,
        length: int,
    ) -> tuple[Any, Any]:
        """`state ← advance(state, args)` up to `length` times, while `pending(state)`;
        returns the last state and `observe(state)` after each time, stacked."""

        def body(state: Any, _: None) -> tuple[Any, Any]:
            state = _advance_if(advance, pending(state), state, args)
            return state, observe(state)

        return jax.lax.scan(body, state, None, length)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _advance_if(advance: Callable, pending: Array, state: Any, args: Any) -> Any:
    # A loop of at most one turn: unlike `lax.cond`, under vmap it is skipped, not computed
    # and dropped, once no query of the batch is pending.
    def turn(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        return jnp.zeros_like(carry[0]), advance(carry[1], args)

    return jax.lax.while_loop(lambda carry: carry[0], turn, (pending, state))[1]


@_advance_if.defjvp
def _advance_if_jvp(advance: Callable, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    # A while loop has no reverse mode; what it computes has.
    def select(pending: Array, state: Any, args: Any) -> Any:
        new = jax.checkpoint(advance)(state, args)
        return jax.tree.map(lambda x, y: jnp.where(pending, x, y), new, state)

    return jax.jvp(select, primals, tangents)
