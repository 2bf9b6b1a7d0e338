"""Result of a recall, and its status."""

import enum

import equinox as eqx
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jdam._core import checks
from jdam._energy.separation import is_mixture
from jdam._measures.base import AnyMeasure
from jdam.geometry import Pose


class Status(enum.IntEnum):
    """Outcome of a recall; `message` explains it and gives a remedy.

    `CONVERGED` and `MIXTURE` are results; the others are warnings about the result. Inside
    `jax.jit` a status is an int32, and `jdam.Status(code)` has its name and message. If several
    apply, the status is the last of them in this list. `Recall.mixture` does not depend on the
    status.
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
        """Explanation of the status, and a remedy."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "a fixed point, residual ≤ tol, at which one pattern has more than half of "
    "the weight",
    Status.MIXTURE: "a fixed point, residual ≤ tol, that averages several patterns: the result of "
    "denoising; raise beta to recall a single pattern",
    Status.MAX_STEPS: "residual > tol after max_steps: raise max_steps, beta or tol",
    Status.STALLED: "residual > tol, and no step lowers the energy by more than its rounding: "
    "raise tol, or compute in float64; where an inner solver is involved, lower its tol",
    Status.SOLVER: "an inner solver missed its tolerance: raise its max_iterations, tol or epsilon",
    Status.UNCERTIFIED: "the search cannot bound the Gibbs mass that it neglects: raise its "
    "max_candidates, or beta",
    Status.NONFINITE: "NaN or infinity in the query, the memory or a result; beta or step_size "
    "≤ 0; tol < 0; or an invalid memory: overfilled, or with patterns replaced without being "
    "prepared again",
    Status.OUT_OF_REACH: "no pattern within reach of an Epanechnikov separation: lower beta",
}


# The messages are also part of the docstring, for `help`.
Status.__doc__ = "\n".join(
    [f"{Status.__doc__}", *(f"    {status.name}: {status.message}." for status in Status)]
)


class Trace(eqx.Module):
    """Energy, residual and measure after each step; after convergence the last entry is repeated.

    energy:   (T,), E of the measure, a squared distance.
    residual: (T,), a distance.
    measure:  (T, …).
    """

    energy: Float[Array, "*T"]
    residual: Float[Array, "*T"]
    measure: AnyMeasure


class Recall(eqx.Module):
    """The result of `jdam.recall`.

    measure:   the last measure, of the query's type.
    nearest:   index of the heaviest pattern.
    weight:    its Gibbs weight.
    divergence: D(measure, that pattern), a squared distance.
    inliers:   (n,), of clouds with ρ: the transported fraction of each atom of the measure in the
               transport to that pattern, e^(−f/ρ) under `Sinkhorn`, e^(−s/(ρ+ε)) under `Chamfer`.
               Near 1 for atoms that belong to the pattern, near 0 for strays; None for other
               geometries.
    pose:      the `jdam.Pose` that maps that pattern onto the measure, under `Aligned`; else None.
    energy:    E(measure), a squared distance.
    residual:  length of a full step, a distance (W₂ for `Bures`).
    num_steps: number of steps taken.
    status:    a `jdam.Status`.
    neglected: bound on the Gibbs mass that the search neglected, over all steps.
    trace:     a `Trace` of all steps, with `save_trace`; else None.
    mixture:   whether no pattern has more than half of the weight, whatever the status.

    All numbers belong to `measure`, not to the step before. In half precision they belong to the
    measure before it was rounded, because the computation is in float32.
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
        """True if no pattern has more than half of the weight."""
        return is_mixture(self.weight)

    def __repr__(self) -> str:
        concrete = isinstance(self.status, Array | np.ndarray) and checks.is_concrete(self.status)
        if not concrete:
            return super().__repr__()
        codes, counts = np.unique(np.asarray(self.status), return_counts=True)
        names = [Status(int(code)).name for code in codes]
        if self.status.ndim == 0:
            if self.mixture and self.weight > 0 and Status.MIXTURE.name not in names:
                names = [f"{names[0]}, {Status.MIXTURE.name}"]
            return (
                f"Recall({names[0]} after {self.num_steps} steps: nearest={self.nearest}, "
                f"weight={self.weight:.4g}, energy={self.energy:.4g}, residual={self.residual:.1e})"
            )
        listing = ", ".join(f"{count} {name}" for name, count in zip(names, counts, strict=True))
        return f"Recall(batch of {self.status.shape}: {listing})"
