"""How many steps recalls take, plain and accelerated, and how long.

    python benchmarks/steps.py

prints a Markdown table. Energies and measures are in float64; *higher* is the most by which an
accelerated recall ends above the plain one, relative to the size of energies or to β⁻¹.
"""

import jax
import jax.numpy as jnp
import numpy as np
from timing import timed

import jdam

EVERY = (None, 0, None)


def row(
    name: str, memory: jdam.Memory, queries: object, beta: float, *, tol: float, most: int
) -> None:
    plain = None
    faster = jdam.TrustRegion() if "clouds" in name else jdam.Anderson()
    for acceleration in (None, faster):

        def run(
            memory: jdam.Memory,
            queries: object,
            beta: jax.Array,
            acceleration: jdam.Acceleration | None = acceleration,
        ) -> object:
            recall = lambda *args: jdam.recall(  # noqa: E731
                *args, tol=tol, max_steps=most, acceleration=acceleration
            )
            return jax.vmap(recall, EVERY)(memory, queries, beta)

        found = timed(run, memory, queries, jnp.asarray(beta), rounds=3, at_most=30)
        steps = np.asarray(found.result.num_steps)
        ended = (np.asarray(found.result.residual) <= tol).mean()
        plain = plain or found
        rise = float((found.result.energy - plain.result.energy).max())
        label = "plain" if acceleration is None else f"`{acceleration}`"
        print(
            f"| {name} | {label} | {np.median(steps):.0f} | {steps.max()} | {100 * ended:.0f} % | "
            f"{found.seconds / plain.seconds:.2f} | {rise:.0e} | {found.compile:.0f} |"
        )


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    print("| recall | | steps, median | most | ended | time, × plain | higher | compile, s |")
    print("|---|---|---|---|---|---|---|---|")
    means = rng.normal(size=(50, 1, 8))
    patterns = jdam.Gaussian.from_samples(means + rng.normal(size=(50, 30, 8)))
    memory = jdam.store(patterns)
    queries = jdam.Gaussian(patterns.mean + 0.1 * rng.normal(size=(50, 8)), patterns.factor)
    for share in (0.2, 0.3, 0.5):
        beta = share * float(jdam.suggest_beta(memory))
        name = f"Gaussians, d = 8, {share} of the suggested β"
        row(name, memory, queries, beta, tol=1e-9, most=400)
    points = rng.normal(size=(6, 1, 2)) + rng.normal(size=(6, 16, 2)) @ (
        0.6 * rng.normal(size=(6, 2, 2))
    )
    cues = jdam.PointCloud(points + 0.2 * rng.normal(size=points.shape))
    for kappa in (0.0, 0.5):
        for epsilon in (0.1, 0.3):
            geometry = jdam.Sinkhorn(epsilon, hellinger_scale=kappa, tol=1e-10)
            memory = jdam.store(jdam.PointCloud(points), geometry)
            name = f"clouds, n = 16, ε = {epsilon}, κ = {kappa}"
            row(name, memory, cues, 50.0, tol=1e-6, most=2000)


if __name__ == "__main__":
    main()
