"""What first calls cost: lines and loops of programs, and seconds to trace and to compile them.

    python benchmarks/first_calls.py

prints a Markdown table, beside a vmapped Sinkhorn of ott-jax and its gradient, in one process.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdam

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ott-jax imports packages that announce their end
    from ott.geometry.pointcloud import PointCloud
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

EVERY = (None, 0, None)


def row(name: str, function: Callable[..., Any], *args: Any, unit: float | None = None) -> float:
    """Prints a row of the table, with the time as a multiple of a unit; the time."""
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*args)
    tracing = time.perf_counter() - start
    text = lowered.compile().as_text()
    total = time.perf_counter() - start
    lines, loops = len(text.splitlines()), text.count(" while(")
    ratio = "" if unit is None else f"{total / unit:.1f}"
    print(f"| {name} | {lines} | {loops} | {tracing:.1f} | {total - tracing:.1f} | {ratio} |")
    return total


def cost(x: jax.Array, y: jax.Array) -> jax.Array:
    """OT_ε by ott-jax."""
    solver = Sinkhorn(threshold=1e-4, max_iterations=2000)
    found: jax.Array = solver(LinearProblem(PointCloud(x, y, epsilon=0.2))).reg_ot_cost
    return found


def energy(memory: jdam.Memory, query: jdam.PointCloud, beta: jax.Array) -> jax.Array:
    return jdam.recall(memory, query, beta).energy


def main() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(20, 32, 2)).astype("float32")
    moved = (points + 0.05 * rng.normal(size=points.shape)).astype("float32")
    memory = jax.block_until_ready(jdam.store(jdam.PointCloud(points), jdam.Sinkhorn(0.1)))
    queries, beta = jdam.PointCloud(moved), jnp.float32(20)
    total = lambda x, y: jax.vmap(cost)(x, y).sum()  # noqa: E731
    certified = lambda *args: jdam.recall(*args, search=jdam.Certified())  # noqa: E731
    accelerated = lambda *args: jdam.recall(*args, acceleration=jdam.Anderson())  # noqa: E731
    jax.jit(jnp.sin).lower(points).compile()
    print("| 20 clouds, n = 32, d = 2 | lines of HLO | loops | trace, s | compile, s | × |")
    print("|---|---|---|---|---|---|")
    unit = row("ott-jax, vmapped", jax.vmap(cost), moved, points)
    slope = row("its gradient", jax.grad(total), moved, points)
    row("`jdam.energy`", jdam.energy, memory, queries[0], beta, unit=unit)
    row("`jdam.recall`", jdam.recall, memory, queries[0], beta, unit=unit)
    row("vmapped", jax.vmap(jdam.recall, EVERY), memory, queries, beta, unit=unit)
    row("with `Certified()`", jax.vmap(certified, EVERY), memory, queries, beta, unit=unit)
    row("with `Anderson()`", jax.vmap(accelerated, EVERY), memory, queries, beta, unit=unit)
    row(
        "its gradient (× that of ott-jax)",
        jax.grad(energy, 1),
        memory,
        queries[0],
        beta,
        unit=slope,
    )


if __name__ == "__main__":
    main()
