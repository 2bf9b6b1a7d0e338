"""Soft c-transforms: the optimal potential on one cloud for a given potential on the other."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PyTree

from jdam._core.batching import in_batches
from jdam._core.derivatives import full_precision, jvp
from jdam._entropic.cost import Cost
from jdam._entropic.problem import LARGE, Pair, pair_batch_size, soft_minimum


class CTransform(NamedTuple):
    """Soft c-transform of a potential f on atoms x, at atoms y."""

    potential: Float[Array, " m"]  # g = s f^{c,ε}
    gradient: Float[Array, "m d"]  # Σⱼ Pⱼₖ ∇c(yₖ, xⱼ) / Σⱼ Pⱼₖ
    spent: Float[Array, " m"]  # mean cost Σⱼ PⱼₖCⱼₖ / Σⱼ Pⱼₖ
    density: PyTree  # (m, n), Pⱼₖ/aⱼ / Σⱼ Pⱼₖ; None where dropped


def c_transform(cost: Cost, f: Float[Array, " n"], pair: Pair) -> CTransform:
    """Compute the damped soft c-transform g = s f^{c,ε}, and the plan of f and g, whose mass at yₖ
    is bₖ e^(−g/ρ) for any f."""
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
    cost: Cost, transform: CTransform, df: Float[Array, " n"], pair: Pair
) -> tuple[Float[Array, " m"], Float[Array, "m d"]]:
    """Compute the derivatives of potential and gradient of a c-transform, with its density, along
    df.

        dg = −s P̃ df    and    dP̃ = P̃ (df − P̃ df)/ε,

    where P̃ is the plan with rows normalised to mass 1."""
    plan = transform.density * pair.a[None]
    mean = plan @ df
    dplan = plan * (df[None] - mean[:, None]) / pair.marginals.epsilon
    _, dgradient = jax.jvp(partial(cost.gradient, x=pair.y, y=pair.x), (plan,), (dplan,))
    return -pair.marginals.tau * mean, dgradient


def columns_of(
    cost: Cost, g: Float[Array, " m"], pair: Pair
) -> tuple[CTransform, Float[Array, " m"], Float[Array, " m"]]:
    """Compute the c-transform f of g, the column sums of their plan, whose row sums are exact, and
    the targets b e^(−g/ρ) of the column sums, which they meet if g is optimal."""
    response, marginals = c_transform(cost, g, pair.turned()), pair.marginals
    rows = pair.a * marginals.transported_fraction(response.potential)
    targets = pair.b * marginals.transported_fraction(jnp.where(pair.b > 0, g, 0))
    return response, pair.b * (rows @ response.density), targets


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def c_transform_in_batches(cost: Cost, f: Float[Array, " n"], pair: Pair) -> CTransform:
    """Compute `c_transform` without the density, under `jax.vmap` a few pairs at a time."""
    pairs = pair_batch_size(pair.a.size * len(pair.y))
    return in_batches(partial(_c_transform_without_density, cost), pairs, f, pair, flat=True)


def _c_transform_without_density(cost: Cost, f: Array, pair: Pair) -> CTransform:
    return c_transform(cost, f, pair)._replace(density=None)


@partial(c_transform_in_batches.defjvp, symbolic_zeros=True)
@full_precision
def _c_transform_in_batches_jvp(
    cost: Cost, primals: tuple[PyTree, ...], tangents: tuple[PyTree, ...]
) -> PyTree:
    return jvp(partial(_c_transform_without_density, cost), primals, tangents)
