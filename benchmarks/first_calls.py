"""Cost of first calls: CPU seconds to trace, compile and run, and instructions of optimized HLO.

    python benchmarks/first_calls.py [--repeat N]

prints a Markdown table. Each row is the median of N processes of its own, after imports and a first
small program. Gaussians are compared with the plainest program that does the same, and clouds with
a vmapped Sinkhorn of ott-jax, which computes OT_ε of 20 pairs, and its gradient.
"""

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdam

BATCH = (None, 0, None)


def gaussians() -> tuple[Any, ...]:
    """Return 20 Gaussians of d = 8 as arrays and as a memory, and queries near to them."""
    rng = np.random.default_rng(0)
    centres = 2 * rng.normal(size=(20, 1, 8))
    samples = (centres + rng.normal(size=(20, 40, 8))).astype("float32")
    memory = jdam.store(jdam.Gaussian.from_samples(samples))
    return memory, jdam.Gaussian.from_samples(samples[:, :20]), jnp.float32(1)


def plain_recall(memory: jdam.Memory, query: jdam.Gaussian, beta: jax.Array) -> tuple[Any, ...]:
    """Return mean, factor and number of steps of a recall, without what jdam adds to it."""
    means, factors = memory.patterns.mean, memory.patterns.factor

    def step(mean: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
        left, _, right = jnp.linalg.svd(factors.mT @ factor[None], full_matrices=False)
        aligned = factors @ (left @ right)
        gaps = jnp.sum((factor[None] - aligned) ** 2, (1, 2))
        shifts = jnp.sum((mean[None] - means) ** 2, 1)
        weights = jax.nn.softmax(-beta * (gaps + shifts))
        return weights @ means, jnp.tensordot(weights, aligned, 1)

    def going(state: tuple[Any, ...]) -> jax.Array:
        _, _, residual, steps = state
        return (residual > 1e-5) & (steps < 50)

    def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
        mean, factor, _, steps = state
        next_mean, next_factor = step(mean, factor)
        change = jnp.sum((next_mean - mean) ** 2) + jnp.sum((next_factor - factor) ** 2)
        return next_mean, next_factor, jnp.sqrt(change), steps + 1

    start = query.mean, query.factor, jnp.float32(jnp.inf), jnp.int32(0)
    mean, factor, _, steps = jax.lax.while_loop(going, body, start)
    return mean, factor, steps


def clouds() -> tuple[Any, ...]:
    """Return a memory of 20 clouds of 32 atoms in the plane, cues near to them, and a β at which
    each has a fixed point of its own, about that of `jdam.suggest_beta`."""
    points, moved = _points()
    return jdam.store(jdam.PointCloud(points), jdam.Sinkhorn(0.1)), jdam.PointCloud(moved), 50.0


def _points() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(20, 32, 2)).astype("float32")
    return points, (points + 0.05 * rng.normal(size=points.shape)).astype("float32")


def by_ott() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return OT_ε by ott-jax of two batches of clouds, and these."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ott-jax imports packages that announce their end
        from ott.geometry.pointcloud import PointCloud
        from ott.problems.linear.linear_problem import LinearProblem
        from ott.solvers.linear.sinkhorn import Sinkhorn

    def cost(x: jax.Array, y: jax.Array) -> jax.Array:
        solver = Sinkhorn(threshold=1e-4, max_iterations=2000)
        result: jax.Array = solver(LinearProblem(PointCloud(x, y, epsilon=0.2))).reg_ot_cost
        return result

    return jax.vmap(cost), _points()


def single(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Return the function, and the arguments with the first query alone."""
    memory, queries, beta = args
    return function, (memory, queries[0], jnp.float32(beta))


def batch(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Return the function of a batch of queries, and the arguments."""
    memory, queries, beta = args
    return jax.vmap(function, BATCH), (memory, queries, jnp.float32(beta))


def certified(*args: Any) -> jdam.Recall:
    return jdam.recall(*args, search=jdam.Certified())


def anderson(*args: Any) -> jdam.Recall:
    return jdam.recall(*args, acceleration=jdam.Anderson())


def gradient(*args: Any) -> Any:
    """Return the derivative of the energy of a recall in the query."""
    return jax.grad(lambda query: jdam.recall(args[0], query, args[2]).energy)(args[1])


def ott_gradient() -> tuple[Any, tuple[Any, ...]]:
    """Return the gradient of the sum of `by_ott`, and its arguments."""
    cost, args = by_ott()
    return jax.grad(lambda x, y: cost(x, y).sum()), args


#: The program of each row and its arguments, and the row with which it is compared.
ROWS: dict[str, tuple[Callable[[], tuple[Any, tuple[Any, ...]]], str | None]] = {
    "Gaussians: the plainest program": (lambda: single(plain_recall, gaussians()), None),
    "`recall`": (lambda: single(jdam.recall, gaussians()), "Gaussians: the plainest program"),
    "Gaussians: the plainest, vmapped": (lambda: batch(plain_recall, gaussians()), None),
    "`recall`, vmapped": (
        lambda: batch(jdam.recall, gaussians()),
        "Gaussians: the plainest, vmapped",
    ),
    "`suggest_beta`": (lambda: (jdam.suggest_beta, gaussians()[:1]), "`recall`"),
    "Clouds: ott-jax, vmapped": (by_ott, None),
    "Clouds: `energy`": (lambda: single(jdam.energy, clouds()), "Clouds: ott-jax, vmapped"),
    "Clouds: `step`": (lambda: single(jdam.step, clouds()), "Clouds: ott-jax, vmapped"),
    "Clouds: `recall`": (lambda: single(jdam.recall, clouds()), "Clouds: ott-jax, vmapped"),
    "Clouds: `recall`, vmapped": (
        lambda: batch(jdam.recall, clouds()),
        "Clouds: ott-jax, vmapped",
    ),
    "Clouds: `Certified()`, vmapped": (
        lambda: batch(certified, clouds()),
        "Clouds: ott-jax, vmapped",
    ),
    "Clouds: `Anderson()`, vmapped": (
        lambda: batch(anderson, clouds()),
        "Clouds: ott-jax, vmapped",
    ),
    "Clouds: gradient of ott-jax": (ott_gradient, None),
    "Clouds: gradient of `recall`": (
        lambda: single(gradient, clouds()),
        "Clouds: gradient of ott-jax",
    ),
}


def measure(name: str) -> tuple[float, int]:
    """Return the CPU seconds of the first call of a row, and the instructions of its optimized HLO.

    `suggest_beta` reads values, so that it is no single program: it has 0.
    """
    function, args = ROWS[name][0]()
    jax.block_until_ready(args)
    start = time.process_time()
    compiled = None
    if function is not jdam.suggest_beta:
        compiled = function = jax.jit(function).lower(*args).compile()
    jax.block_until_ready(function(*args))
    seconds = time.process_time() - start
    text = "" if compiled is None else compiled.as_text()
    return seconds, sum(" = " in line for line in text.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of first calls, as a Markdown table.")
    parser.add_argument("--repeat", type=int, default=3, help="processes of each row (default 3)")
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(*measure(options.row))
        return
    print("| first call | CPU, s | × | HLO instructions |")
    print("|---|---|---|---|")
    seconds: dict[str, float] = {}
    for name, (_, unit) in ROWS.items():
        command = [sys.executable, __file__, "--row", name]
        runs = [
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            for _ in range(options.repeat)
        ]
        seconds[name] = statistics.median(float(run[0]) for run in runs)
        ratio = "" if unit is None else f"{seconds[name] / seconds[unit]:.1f}"
        lines = "" if runs[0][1] == "0" else runs[0][1]
        print(f"| {name} | {seconds[name]:.2f} | {ratio} | {lines} |", flush=True)


if __name__ == "__main__":
    main()
