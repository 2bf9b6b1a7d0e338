"""What a recall returns, and how it says how it ended."""

import enum

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jdam._core import checks
from jdam._measures.base import AnyMeasure
from jdam.geometry import Pose


class Status(enum.IntEnum):
    """How a recall ended: its `message` says what that means and what to do.

    `CONVERGED` and `MIXTURE` are results; the others say what a result lacks. Inside `jax.jit` a
    status is its number, int32, and `jdam.Status(code)` has name and message. Of several that apply
    the last one listed counts. Whether a recall ended between patterns can be
    read from `Recall.mixture` in any case.
    """

    CONVERGED = 0
    MIXTURE = 1
    MAX_STEPS = 2
    STALLED = 7
    SOLVER = 3
    UNCERTIFIED = 4
    NONFINITE = 5
    OUT_OF_REACH = 6

    @property
    def message(self) -> str:
        """What it means, and what to do."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "a fixed point, residual ≤ tol, at which one pattern has more than half of "
    "the weight",
    Status.MIXTURE: "a fixed point, residual ≤ tol, that averages several patterns, as is wanted "
    "of several that share a class: raise beta if a single one is to be recalled",
    Status.MAX_STEPS: "residual > tol after max_steps: raise max_steps, beta or tol",
    Status.STALLED: "residual > tol, and no step lowers the energy by more than its rounding: "
    "raise tol, or compute in float64; where an inner solver is involved, lower its tol",
    Status.SOLVER: "an inner solver missed its tolerance: raise its max_iterations, tol or epsilon",
    Status.UNCERTIFIED: "the search cannot bound what it left out: raise its max_candidates, or "
    "beta",
    Status.NONFINITE: "NaN or infinity in the query, the memory or on the way; beta or step_size "
    "≤ 0, tol < 0; or a memory that was overfilled, or changed behind its back",
    Status.OUT_OF_REACH: "no pattern within reach of an Epanechnikov separation: lower beta",
}


# So that `help` has them, and they are written once.
Status.__doc__ = "\n".join(
    [f"{Status.__doc__}", *(f"    {status.name}: {status.message}." for status in Status)]
)


class Trace(eqx.Module):
    """What recall saw after each step; after convergence entries repeat the last.

    energy:   (T,), E of the measure, a squared distance.
    residual: (T,), a distance.
    measure:  (T, …).
    """

    energy: Float[Array, "*T"]
    residual: Float[Array, "*T"]
    measure: AnyMeasure


class Recall(eqx.Module):
    """The result of `jdam.recall`.

    measure:   what was recalled, of the query's type.
    nearest:   index of the heaviest pattern.
    weight:    its Gibbs weight.
    divergence: D(measure, that pattern), a squared distance: how far from it recall ended.
    inliers:   (n,), of clouds with ρ: e^(−f/ρ) of each atom of the measure against that pattern
               under `Sinkhorn`, e^(−s/(ρ+ε)) under `Chamfer`, the share of its mass that finds a
               partner there. Near 1 for atoms that belong to the pattern, near 0 for strays; None
               for other geometries.
    pose:      the `jdam.Pose` that lays that pattern on the measure, under `Aligned`; else None.
    energy:    E(measure), a squared distance.
    residual:  how far a full step would go, a distance (W₂ for `Bures`).
    num_steps: steps taken.
    status:    a `jdam.Status`.
    neglected: bound on the Gibbs mass left out by the search, over all steps.
    trace:     a `Trace` of all steps, if it was asked for.
    mixture:   whether no pattern has more than half of the weight, whatever the status.

    All numbers belong to `measure`, not to a step before it; in half precision to the measure
    before it was rounded, for the work is done in float32.
    """

    measure: AnyMeasure
    nearest: Int[Array, ""]
    weight: Float[Array, ""]
    divergence: Float[Array, ""]
    energy: Float[Array, ""]
    residual: Float[Array, ""]
    num_steps: Int[Array, ""]
    status: Int[Array, ""]
    neglected: Float[Array, ""]
    inliers: Float[Array, " n"] | None = None
    pose: Pose | None = None
    trace: Trace | None = None

    @property
    def mixture(self) -> Bool[Array, ""]:
        """Whether no pattern has more than half of the weight."""
        return is_mixture(self.weight)

    def __repr__(self) -> str:
        held = isinstance(self.status, Array | np.ndarray) and checks.is_concrete(self.status)
        if not held:
            return super().__repr__()
        codes, counts = np.unique(np.asarray(self.status), return_counts=True)
        names = [Status(int(code)).name for code in codes]
        if self.status.ndim == 0:
            if self.mixture and Status.MIXTURE.name not in names:
                names = [f"{names[0]}, {Status.MIXTURE.name}"]
            return (
                f"Recall({names[0]} after {self.num_steps} steps: nearest={self.nearest}, "
                f"weight={self.weight:.4g}, energy={self.energy:.4g}, residual={self.residual:.1e})"
            )
        listed = ", ".join(f"{count} {name}" for name, count in zip(names, counts, strict=True))
        return f"Recall(batch of {self.status.shape}: {listed})"


def is_mixture(weight: Float[Array, "*batch"]) -> Bool[Array, "*batch"]:
    """Whether the heaviest pattern has no more than half of the weight, up to rounding."""
    result: Array = weight <= 0.5 + float(jnp.finfo(weight.dtype).eps) ** 0.5
    return result
