"""What an accelerator makes of jdam: throughput, share of its peak, memory and accuracy.

    python benchmarks/accelerator.py [--quick]

prints the device and a Markdown table; after eight minutes it begins no more rows. Rows are steps
of all queries at once, in float32. Beside Gaussians stands the SVD of as many matrices of that size
(the rate of some of them), beside diagonal ones their two matrix products, beside clouds vmapped
ott-jax. *Peak* is that of a product of two large matrices on the same device, at JAX's highest
precision. *Error* is the relative error of D, between a pattern and a query 1 % apart against
float64 on the host; of clouds, 0.1 apart, against a solver of tolerance 1e-6. `--quick` does little
of everything, to see that it runs.
"""

import argparse
import time
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from timing import Timed, timed

import jdam

BUDGET = 480.0  # seconds for all
HEAD = "| memory | N | Q | contender | pairs/s | of peak | memory, MiB | compile, s | error |"
GAUSSIANS = [  # d, N, Q
    (2, 100_000, 1024),
    (4, 100_000, 256),
    (8, 100_000, 16),
    (16, 100_000, 4),
    (32, 20_000, 2),
    (64, 4_000, 1),
    (128, 1_000, 1),
]
SVDS = 2**22  # numbers of the matrices that are decomposed for comparison
EVERY = (None, 0, None)


measure = partial(timed, at_most=10)


def peak(size: int) -> float:
    """Floating-point operations a second in a matrix product."""
    matrix = jnp.ones((size, size), jnp.float32)
    found = measure(partial(jnp.matmul, precision="highest"), matrix, matrix)
    return 2 * size**3 / found.seconds


class Table:
    def __init__(self, quick: bool):
        self.start, self.quick = time.perf_counter(), quick
        self.peak = peak(512 if quick else 8192)
        print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, float32;", end=" ")
        print(f"matrix product {self.peak / 1e12:.3g} Tflop/s\n\n{HEAD}")
        print("|" + "---|" * (HEAD.count("|") - 1), flush=True)

    @property
    def spent(self) -> bool:
        """Whether to leave out the rest."""
        return time.perf_counter() - self.start > BUDGET

    def row(
        self,
        kind: str,
        sizes: tuple[int, int],
        contender: str,
        found: Timed,
        *,
        pairs: int,
        flops: float | None = None,
        error: float | None = None,
    ) -> None:
        rate = pairs / found.seconds
        share = "" if flops is None else f"{100 * rate * flops / self.peak:.2g} %"
        wrong = "" if error is None else f"{error:.0e}"
        sized = " | ".join(map(str, sizes))
        print(
            f"| {kind} | {sized} | {contender} | {rate:.3g} | {share} | {found.temporary:.0f} "
            f"| {found.compile:.1f} | {wrong} |",
            flush=True,
        )


def factors(rng: np.random.Generator, num: int, d: int) -> np.ndarray:
    return (rng.normal(size=(num, d, d)) / np.sqrt(d)).astype(np.float32)


def gaussian_error(memory: jdam.Memory, d: int, rng: np.random.Generator) -> float:
    """Of the divergence of the first pattern and its image under I + S, |S| about 1 %."""
    first = np.asarray(memory.patterns.factor[0], float)
    change = rng.normal(size=(d, d)) / np.sqrt(d)
    second = ((np.eye(d) + 0.005 * (change + change.T)) @ first).astype(np.float32)
    left, _, right = np.linalg.svd(first.T @ second)
    truth = np.sum((second.astype(float) - first @ left @ right) ** 2)
    query = jdam.Gaussian(memory.patterns.mean[0], second)
    return abs(float(jdam.divergences(jdam.store(memory[:2]), query)[0]) / truth - 1)


def gaussians(table: Table, rng: np.random.Generator) -> None:
    for d, num, many in GAUSSIANS:
        if table.spent:
            return
        num = num // 100 if table.quick else num
        memory = jdam.store(
            jdam.Gaussian(rng.normal(size=(num, d)).astype("f4"), factors(rng, num, d))
        )
        queries = memory.patterns[:many]
        found = measure(jax.vmap(jdam.step, EVERY), memory, queries, jnp.float32(1))
        kind, sizes = f"Gaussians, d = {d}", (num, many)
        error = gaussian_error(memory, d, rng)
        # MᵀL and MR: what a step cannot do without.
        flops = 4.0 * d**3
        table.row(kind, sizes, "`jdam.step`", found, pairs=num * many, flops=flops, error=error)
        some = max(1, min(num * many, SVDS // d**2 // (100 if table.quick else 1)))
        matrices = jnp.asarray(factors(rng, some, d))
        found = measure(partial(jnp.linalg.svd, full_matrices=False), matrices, rounds=2)
        table.row(kind, (some, 1), "`jnp.linalg.svd`", found, pairs=some)


def diagonal(table: Table, rng: np.random.Generator) -> None:
    d, num, many = 64, 10_000 if table.quick else 1_000_000, 1024
    mean, scale = rng.normal(size=(num, d)), rng.uniform(0.5, 1.5, (num, d))
    memory = jdam.store(jdam.DiagonalGaussian(mean.astype("f4"), scale.astype("f4")))
    queries, sizes = memory.patterns[:many], (num, many)
    found = measure(jax.vmap(jdam.step, EVERY), memory, queries, jnp.float32(0.05))
    row = partial(table.row, "diagonal, d = 64", sizes, pairs=num * many, flops=8.0 * d)
    row("`jdam.step`", found)
    stacked = jnp.concatenate([memory.patterns.mean, memory.patterns.scale], axis=1)

    def products(x: jax.Array, y: jax.Array) -> jax.Array:
        blocks = y.reshape(-1, num // 100, 2 * d)
        return jax.lax.map(lambda block: (x @ block.T) @ block, blocks).sum(0)

    row("two matrix products", measure(products, stacked[:many], stacked))


def clouds(table: Table, rng: np.random.Generator) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ott.geometry import pointcloud
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import sinkhorn
    num, many, atoms, d, epsilon = (8 if table.quick else 256), 4 if table.quick else 64, 64, 8, 0.8
    points = rng.normal(size=(num, atoms, d)).astype(np.float32)
    near = (points[:many] + 0.1 * rng.normal(size=(many, atoms, d))).astype(np.float32)
    memory = jdam.store(jdam.PointCloud(points), jdam.Sinkhorn(epsilon, tol=1e-3))
    queries = jdam.PointCloud(near)
    exact = jdam.Sinkhorn(epsilon, tol=1e-6)
    kind, sizes = f"clouds of {atoms}, d = {d}, ε = d/10", (num, many)
    found = measure(jax.vmap(jdam.step, EVERY), memory, queries, jnp.float32(1))
    few = jdam.store(jdam.PointCloud(points[:2]), exact)
    ours, truth = (
        float(jdam.divergences(m, queries[0])[0])
        for m in (jdam.store(memory[:2], memory.geometry), few)
    )
    error = abs(ours / truth - 1)
    table.row(kind, sizes, "`jdam.step`", found, pairs=num * many, error=error)
    solver = sinkhorn.Sinkhorn(threshold=1e-3, max_iterations=2000)

    def one(x: jax.Array, y: jax.Array) -> jax.Array:
        geometry = pointcloud.PointCloud(x, y, epsilon=2 * epsilon)
        return solver(linear_problem.LinearProblem(geometry)).reg_ot_cost

    pairs = jax.vmap(jax.vmap(one, (None, 0)), (0, None))
    found = measure(pairs, jnp.asarray(near), jnp.asarray(points), rounds=2)
    table.row(kind, sizes, "ott-jax Sinkhorn, vmapped", found, pairs=num * many)


def mixtures(table: Table, rng: np.random.Generator) -> None:
    num, many, components, d = (20 if table.quick else 2000), 4 if table.quick else 16, 4, 4
    weights = rng.dirichlet(np.ones(components), num).astype(np.float32)
    means = 3 * rng.normal(size=(num, components, d)).astype(np.float32)
    every = factors(rng, num * components, d).reshape(num, components, d, d)
    memory = jdam.store(jdam.GaussianMixture(weights, means, every))
    found = measure(jax.vmap(jdam.step, EVERY), memory, memory.patterns[:many], jnp.float32(1))
    kind = f"mixtures of {components}, d = {d}"
    table.row(kind, (num, many), "`jdam.step`", found, pairs=num * many)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/accelerator.py")
    parser.add_argument("--quick", action="store_true", help="little of everything")
    table = Table(parser.parse_args().quick)
    for rows in (gaussians, diagonal, clouds, mixtures):
        if not table.spent:
            rows(table, np.random.default_rng(0))


if __name__ == "__main__":
    main()
