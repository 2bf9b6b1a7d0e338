"""Soft c-transforms: what a potential on one cloud says of the atoms of another."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from jdam._core.batching import in_batches
from jdam._core.derivatives import full_precision, jvp
from jdam._entropic.cost import Cost
from jdam._entropic.problem import LARGE, Pair, pair_batch_size, soft_minimum


class CTransform(NamedTuple):
    """What a potential on the atoms x of one cloud says of atoms y of another."""

    potential: Float[Array, " m"]  # g = s f^{c,ε}
    gradient: Float[Array, "m d"]  # Σⱼ Pⱼₖ ∇c(yₖ, xⱼ) / Σⱼ Pⱼₖ
    spent: Float[Array, " m"]  # Σⱼ PⱼₖCⱼₖ / Σⱼ Pⱼₖ
    density: Any  # (m, n), Pⱼₖ/aⱼ / Σⱼ Pⱼₖ; None where dropped


def c_transform(cost: Cost, f: Float[Array, " n"], pair: Pair) -> CTransform:
    """The damped soft c-transform g = s f^{c,ε}, and the plan of f and g, all of whose mass at yₖ
    is bₖ e^(−g/ρ) whatever f is."""
    x, a, y, _, marginals = pair
    epsilon = marginals.epsilon
    costs = marginals.payable(cost.scaled(y, x, epsilon))
    logits = (jnp.where(a > 0, f, 0) / epsilon)[None] - costs
    level = soft_minimum(logits, a[None])  # f^{c,ε}/ε
    density = jnp.exp(jnp.minimum(level[:, None] + logits, LARGE))
    plan = density * a[None]
    return CTransform(
        potential=marginals.tau * epsilon * level,
        gradient=cost.gradient(plan, y, x),
        spent=epsilon * (plan * costs).sum(1),
        density=density,
    )


def c_transform_change(
    cost: Cost, found: CTransform, df: Float[Array, " n"], pair: Pair
) -> tuple[Float[Array, " m"], Float[Array, "m d"]]:
    """How potential and gradient of a response, with its density, follow a change of f:

        dg = −s P̃ df    and    dP̃ = P̃ (df − P̃ df)/ε,

    P̃ being the plan with rows of mass 1."""
    plan = found.density * pair.a[None]
    mean = plan @ df
    dplan = plan * (df[None] - mean[:, None]) / pair.marginals.epsilon
    _, dgradient = jax.jvp(partial(cost.gradient, x=pair.y, y=pair.x), (plan,), (dplan,))
    return -pair.marginals.tau * mean, dgradient


class Columns(NamedTuple):
    """The plan of g and the response f to it, which is right in its rows."""

    response: CTransform
    found: Float[Array, " m"]  # what its columns sum to
    wanted: Float[Array, " m"]  # what they should: b e^(−g/ρ)

    @property
    def marginal_error(self) -> Float[Array, ""]:
        """The L1 error of the columns."""
        return jnp.abs(self.found - self.wanted).sum()


def columns_of(cost: Cost, g: Float[Array, " m"], pair: Pair) -> Columns:
    """The columns of the plan of g: as wanted if g is the solution."""
    response, marginals = c_transform(cost, g, pair.turned()), pair.marginals
    rows = pair.a * marginals.transported_fraction(response.potential)
    wanted = pair.b * marginals.transported_fraction(jnp.where(pair.b > 0, g, 0))
    return Columns(response, pair.b * (rows @ response.density), wanted)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def c_transform_in_batches(cost: Cost, f: Float[Array, " n"], pair: Pair) -> CTransform:
    """`c_transform` without the density; of a vmapped batch, a few pairs at a time."""
    pairs = pair_batch_size(pair.a.size * len(pair.y))
    return in_batches(partial(_c_transform_without_density, cost), pairs, f, pair, flat=True)


def _c_transform_without_density(cost: Cost, f: Array, pair: Pair) -> CTransform:
    return c_transform(cost, f, pair)._replace(density=None)


@partial(c_transform_in_batches.defjvp, symbolic_zeros=True)
@full_precision
def _c_transform_in_batches_jvp(
    cost: Cost, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> Any:
    return jvp(partial(_c_transform_without_density, cost), primals, tangents)
