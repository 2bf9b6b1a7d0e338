"""Truncated conjugate gradients: the least value of a quadratic model within a radius."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from jdam._core.linalg import safe_sqrt
from jdam._core.loops import while_loop

#: By how much to reduce the slope of the model.
ENOUGH = 0.1


class Quadratic(NamedTuple):
    """⟨g, s⟩ + ½⟨s, H s⟩, where lengths are |s|² = Σ mⱼ sⱼ²."""

    slope: Float[Array, " z"]  # g
    curvature: Callable[[Array], Array]  # s ↦ H s
    masses: Float[Array, " z"]  # m ≥ 0; where it is 0 nothing moves


class Minimum(NamedTuple):
    """Where the model was found least."""

    step: Float[Array, " z"]
    decrease: Float[Array, ""]  # of the model
    length: Float[Array, ""]


class _Iterate(NamedTuple):
    found: Minimum
    slope: Float[Array, " z"]  # of the model at the step
    direction: Float[Array, " z"]
    squares: Float[Array, ""]  # |slope|², in the dual of the norm
    along: Float[Array, ""]  # ⟨step, direction⟩
    speed: Float[Array, ""]  # |direction|²
    products: Int[Array, ""]
    ended: Bool[Array, ""]


def minimise(model: Quadratic, radius: Float[Array, ""], most: int) -> Minimum:
    """The least value in Krylov spaces of at most `most` dimensions, down to a tenth of the slope,
    or where conjugate gradients leave the radius, as they do along a negative curvature
    (Steihaug, SIAM J. Numer. Anal. 20, 1983; norms by the recurrences of Conn, Gould and Toint,
    Trust-Region Methods, 2000, 7.5)."""
    inverse = jnp.where(model.masses > 0, 1 / jnp.where(model.masses > 0, model.masses, 1), 0)
    raised = inverse * model.slope
    squares = jnp.vdot(model.slope, raised)
    zero = jnp.zeros_like(radius)
    start = _Iterate(
        found=Minimum(jnp.zeros_like(model.slope), zero, zero),
        slope=model.slope,
        direction=-raised,
        squares=squares,
        along=zero,
        speed=squares,
        products=jnp.array(0, jnp.int32),
        ended=~((squares > 0) & (radius > 0)),
    )
    goal = ENOUGH**2 * squares

    def unfinished(at: _Iterate) -> Array:
        return ~at.ended & (at.squares > goal) & (at.products < most)

    def turn(at: _Iterate) -> _Iterate:
        image = model.curvature(at.direction)
        bend = jnp.vdot(at.direction, image)
        convex = bend > 0
        inside = at.squares / jnp.where(convex, bend, 1)
        room = jnp.maximum(radius**2 - at.found.length**2, 0)
        # To the boundary: |step + t·direction| = radius.
        edge = room / (at.along + safe_sqrt(at.along**2 + at.speed * room))
        ended = ~convex | (inside >= edge)
        t = jnp.where(ended, edge, inside)
        length = safe_sqrt(at.found.length**2 + t * (2 * at.along + t * at.speed))
        decrease = at.found.decrease + t * (at.squares - t * bend / 2)
        slope = at.slope + t * image
        raised = inverse * slope
        squares = jnp.vdot(slope, raised)
        following = squares / at.squares
        return _Iterate(
            found=Minimum(at.found.step + t * at.direction, decrease, length),
            slope=slope,
            direction=following * at.direction - raised,
            squares=squares,
            along=following * (at.along + t * at.speed),
            speed=squares + following**2 * at.speed,
            products=at.products + 1,
            ended=ended,
        )

    return while_loop(unfinished, turn, start, model.slope, model.masses, radius).found
