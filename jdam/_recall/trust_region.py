"""Truncated conjugate gradients: the minimum of a quadratic model in a trust region."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jdam._core.linalg import safe_sqrt
from jdam._core.loops import while_loop

#: The slope of the model at which the iteration ends, relative to that at 0.
ENOUGH = 0.1


class Quadratic(NamedTuple):
    """The model ⟨g, s⟩ + ½⟨s, H s⟩ in the norm |s|² = Σ mⱼ sⱼ²."""

    slope: Float[Array, " z"]  # g
    curvature: Callable[[Array], Array]  # s ↦ H s
    masses: Float[Array, " z"]  # m ≥ 0; coordinates with m = 0 do not move


class Minimum(NamedTuple):
    """The minimiser of the model, as far as it was computed."""

    step: Float[Array, " z"]
    decrease: Float[Array, ""]  # of the model
    length: Float[Array, ""]


class _Iterate(NamedTuple):
    """State of the conjugate gradients."""

    minimum: Minimum
    slope: Float[Array, " z"]  # of the model at the step
    direction: Float[Array, " z"]
    squares: Float[Array, ""]  # |slope|², in the dual of the norm
    along: Float[Array, ""]  # ⟨step, direction⟩
    speed: Float[Array, ""]  # |direction|²
    products: Int[Array, ""]
    ended: Bool[Array, ""]


def minimise(model: Quadratic, radius: Float[Array, ""], most: int) -> Minimum:
    """Return the minimiser of the model in a Krylov space of at most `most` dimensions.

    The iteration ends when the slope has fallen to a tenth, or when it leaves the radius, as it
    does along a direction of negative curvature (Steihaug, SIAM J. Numer. Anal. 20, 1983; norms by
    the recurrences of Conn, Gould and Toint, Trust-Region Methods, 2000, 7.5).
    """
    inverse = jnp.where(model.masses > 0, 1 / jnp.where(model.masses > 0, model.masses, 1), 0)
    raised = inverse * model.slope
    squares = jnp.vdot(model.slope, raised)
    zero = jnp.zeros_like(radius)
    start = _Iterate(
        minimum=Minimum(jnp.zeros_like(model.slope), zero, zero),
        slope=model.slope,
        direction=-raised,
        squares=squares,
        along=zero,
        speed=squares,
        products=jnp.array(0, jnp.int32),
        ended=~((squares > 0) & (radius > 0)),
    )
    goal = ENOUGH**2 * squares

    def cond_fun(state: _Iterate) -> Array:
        return ~state.ended & (state.squares > goal) & (state.products < most)

    def body_fun(state: _Iterate) -> _Iterate:
        image = model.curvature(state.direction)
        curvature = jnp.vdot(state.direction, image)
        convex = curvature > 0
        newton = state.squares / jnp.where(convex, curvature, 1)
        gap = jnp.maximum(radius**2 - state.minimum.length**2, 0)
        # To the boundary: |step + t·direction| = radius.
        edge = gap / (state.along + safe_sqrt(state.along**2 + state.speed * gap))
        ended = ~convex | (newton >= edge)
        t = jnp.where(ended, edge, newton)
        length = safe_sqrt(state.minimum.length**2 + t * (2 * state.along + t * state.speed))
        decrease = state.minimum.decrease + t * (state.squares - t * curvature / 2)
        slope = state.slope + t * image
        raised = inverse * slope
        squares = jnp.vdot(slope, raised)
        ratio = squares / state.squares
        return _Iterate(
            minimum=Minimum(state.minimum.step + t * state.direction, decrease, length),
            slope=slope,
            direction=ratio * state.direction - raised,
            squares=squares,
            along=ratio * (state.along + t * state.speed),
            speed=squares + ratio**2 * state.speed,
            products=state.products + 1,
            ended=ended,
        )

    return while_loop(cond_fun, body_fun, start, model.slope, model.masses, radius).minimum
