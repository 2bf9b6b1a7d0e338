"""How recall loops, and with that how it is differentiated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array

from jdam._batching import advance_where


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
        *,
        length: int,
        at_once: int,
    ) -> tuple[Any, Any]:
        """`state ← advance(state, args)` up to `length` times, while `pending(state)`;
        returns the last state and `observe(state)` after each time, stacked. Of a vmapped
        batch, `at_once` states advance together."""

        def body(state: Any, _: None) -> tuple[Any, Any]:
            state = advance_where(advance, at_once, pending(state), state, args)
            return state, observe(state)

        return jax.lax.scan(body, state, None, length)
