"""What recall costs as memories grow: time, memory, compilation, and what is certified.

    python benchmarks/scale.py [--largest N] [--only clusters|disk] [--data DIR] [--out scale.svg]

prints a Markdown table and draws cost against N. With `--data` it also recalls real data from
`words_ctx_gauss.npz` (Gaussian words) and `modelnet_clouds.npz` (shapes) in that folder.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import ot
from timing import timed

import jdam

STEPS = 5
HEAD = "| memory | N | Q | contender | ms a query | compile, s | temporary, MiB | certified |"


@dataclass
class Row:
    kind: str
    num: int
    queries: int
    contender: str
    milliseconds: float  # a query
    compile: float | None = None
    temporary: float | None = None  # MiB
    certified: float | None = None  # share of the queries

    def __str__(self) -> str:
        compiling = "" if self.compile is None else f"{self.compile:.1f}"
        temporary = "" if self.temporary is None else f"{self.temporary:.0f}"
        certified = "" if self.certified is None else f"{100 * self.certified:.0f} %"
        return (
            f"| {self.kind} | {self.num} | {self.queries} | {self.contender} "
            f"| {self.milliseconds:.3g} | {compiling} | {temporary} | {certified} |"
        )


def measure(kind: str, num: int, contender: str, function: Any, *args: Any, rounds: int) -> Row:
    """Median of warmed-up, blocked calls; `args[1]` are the queries."""
    queries = jax.tree.leaves(args[1])[0].shape[0]
    found = timed(function, *args, rounds=rounds)
    certified = None
    if isinstance(found.result, jdam.Recall):
        certified = float((np.asarray(found.result.status) != jdam.Status.UNCERTIFIED).mean())
    milliseconds = 1e3 * found.seconds / queries
    return Row(
        kind, num, queries, contender, milliseconds, found.compile, found.temporary, certified
    )


def recalls(search: Any) -> Any:
    return jax.vmap(partial(jdam.recall, max_steps=STEPS, search=search), (None, 0, None))


def compare(
    kind: str, memory: jdam.Memory, queries: Any, beta: float, searches: dict[Any, int], rounds: int
) -> Iterator[Row]:
    """Recall by each search, of the first so many queries."""
    for search, few in searches.items():
        asked = jax.tree.map(lambda leaf, few=few: leaf[:few], queries)
        name = f"`{type(search).__name__}`"
        yield measure(kind, len(memory), name, recalls(search), memory, asked, beta, rounds=rounds)


def two_products(stored: Any, queries: Any) -> Any:
    return (queries @ stored.T) @ stored


def diagonal(rng: np.random.Generator, num: int) -> Iterator[Row]:
    """Beside the recall that takes all its steps, the two matrix products of each of its looks.
    At β = 0.05 it does, while at β = 1 a query is at its pattern after one."""
    dim, kind = 64, "diagonal, d = 64"
    slow, fast = f"{kind}, β = 0.05", f"{kind}, β = 1"
    mean = rng.normal(size=(num, dim)).astype("f4")
    scale = rng.uniform(0.5, 1.5, (num, dim)).astype("f4")
    memory = jdam.store(jdam.DiagonalGaussian(mean, scale))
    queries = jax.tree.map(lambda leaf: leaf[:1024] + np.float32(0.1), memory.patterns)
    stored = jnp.concatenate([memory.patterns.mean, memory.patterns.scale], -1)
    asked = jnp.concatenate([queries.mean, queries.scale], -1)
    row = measure(slow, num, "two matrix products, × 6", two_products, stored, asked, rounds=1)
    row.milliseconds *= STEPS + 1
    yield row
    yield from compare(slow, memory, queries, 0.05, {jdam.Exhaustive(): 1024}, rounds=1)
    searches = {jdam.Certified(): 1024, jdam.Exhaustive(): 1024}
    yield from compare(fast, memory, queries, 1.0, searches, rounds=1)


def full(rng: np.random.Generator, num: int) -> Iterator[Row]:
    dim, kind = 32, "full, d = 32"
    mean = rng.standard_normal((num, dim), np.float32)
    factor = rng.standard_normal((num, dim, dim), np.float32)  # 4 GB of a million
    factor *= np.float32(dim**-0.5)
    patterns = jax.block_until_ready(jdam.Gaussian(mean, factor))
    noise = np.float32(0.1) * rng.standard_normal((1000, dim), np.float32)
    queries = jdam.Gaussian(mean[:1000] + noise, factor[:1000].copy())
    del factor
    start = time.perf_counter()
    memory = jax.block_until_ready(jdam.store(patterns))
    yield Row(kind, num, 1, "`jdam.store`, once", 1e3 * (time.perf_counter() - start))
    del patterns
    searches: dict[Any, int] = {jdam.Certified(): 1000}
    if num <= 10_000:
        searches[jdam.Exhaustive()] = 4
    yield from compare(kind, memory, queries, 1.0, searches, rounds=1)
    covariance = np.asarray(memory.patterns[:20].covariance)
    start = time.perf_counter()
    for other in covariance:
        ot.gaussian.bures_wasserstein_distance(mean[0], mean[0], covariance[0], other)
    seconds = (time.perf_counter() - start) / len(covariance)
    yield Row(kind, num, 1, "POT's distances of a query", 1e3 * seconds * num)


def products_and_top_k(stored: Any, queries: Any) -> Any:
    """The nearest vectors (mean, standard deviations), by one matrix product."""
    squares = jnp.vecdot(stored, stored)[None] - 2 * queries @ stored.T
    return jax.lax.top_k(-squares, 16)


def clustered(rng: np.random.Generator, num: int, dim: int = 16) -> tuple[Any, Any]:
    """Means and factors in clusters of 500."""
    centres = 8 * rng.standard_normal((max(1, num // 500), dim), np.float32)
    mean = centres[rng.integers(len(centres), size=num)]
    mean += rng.standard_normal((num, dim), np.float32)
    factor = rng.standard_normal((num, dim, dim), np.float32)
    factor *= np.float32(dim**-0.5)
    return mean, factor


def near(rng: np.random.Generator, mean: Any, factor: Any, chosen: Any) -> jdam.Gaussian:
    """Queries near to the chosen patterns."""
    noise = np.float32(0.1) * rng.standard_normal((len(chosen), mean.shape[1]), np.float32)
    return jdam.Gaussian(mean[chosen] + noise, factor[chosen])


def clusters(rng: np.random.Generator, num: int) -> Iterator[Row]:
    """Gaussians in clusters of 500, by certified recall with cells and without, beside one matrix
    product with top-k, the inverted file of faiss and the graph of pynndescent on the same vectors,
    which prove nothing."""
    kind, count = "clusters, d = 16", 256
    mean, factor = clustered(rng, num)
    queries = near(rng, mean, factor, rng.integers(num, size=count))
    memory = jax.block_until_ready(jdam.store(jdam.Gaussian(mean, factor)))
    stored = memory.geometry.embed(memory.patterns, memory.prepared)[0]
    asked = memory.geometry.embed(queries)[0]
    name = "one matrix product, top 16"
    yield measure(kind, num, name, products_and_top_k, stored, asked, rounds=3)
    yield from inverted_file(kind, np.asarray(stored), np.asarray(asked))
    if num <= 10**5:  # a larger graph takes minutes
        yield from graph(kind, np.asarray(stored), np.asarray(asked))
    start = time.perf_counter()
    indexed = jax.block_until_ready(memory.indexed())
    yield Row(kind, num, 1, "`Memory.indexed`, once", 1e3 * (time.perf_counter() - start))
    search = recalls(jdam.Certified())
    for name, each in (("`Certified`", memory), ("`Certified`, cells", indexed)):
        yield measure(kind, num, name, search, each, queries, 1.0, rounds=3)


def inverted_file(kind: str, stored: np.ndarray, asked: np.ndarray) -> Iterator[Row]:
    """The 16 nearest vectors in 8 of 4√N lists."""
    try:
        import faiss
    except ImportError:
        return
    lists = round(4 * len(stored) ** 0.5)
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(stored.shape[1]), stored.shape[1], lists)
    start = time.perf_counter()
    index.train(stored)
    index.add(stored)
    building = 1e3 * (time.perf_counter() - start)
    yield Row(kind, len(stored), 1, "faiss, inverted file, once", building)
    index.nprobe = 8
    milliseconds = a_query(index.search, asked)
    yield Row(kind, len(stored), len(asked), "faiss, inverted file, top 16", milliseconds)


def graph(kind: str, stored: np.ndarray, asked: np.ndarray) -> Iterator[Row]:
    """The 16 nearest vectors by a graph of neighbours."""
    try:
        import pynndescent
    except ImportError:
        return
    start = time.perf_counter()
    index = pynndescent.NNDescent(stored, random_state=0)
    index.prepare()
    building = 1e3 * (time.perf_counter() - start)
    yield Row(kind, len(stored), 1, "pynndescent, once", building)
    milliseconds = a_query(index.query, asked)
    yield Row(kind, len(stored), len(asked), "pynndescent, top 16", milliseconds)


def a_query(search: Any, asked: np.ndarray) -> float:
    """Milliseconds a query of the 16 nearest vectors, the median of three warm calls."""
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        search(asked, 16)
        seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds[1:])) / len(asked)


class Counting(jdam.MappedMemory):
    """A memory in files that knows how many patterns were read at most at a time."""

    most = 0

    def rows(self, index: np.ndarray) -> jdam.Memory:
        Counting.most = max(Counting.most, len(index))
        return super().rows(index)


def disk(rng: np.random.Generator, num: int) -> Iterator[Row]:
    """Gaussians in clusters of 500, written in parts and searched in their files: of 64 queries
    first with the files on disk, then with what they need in the system's cache."""
    kind, count, size = "clusters in files, d = 16", 64, min(num, 500_000)
    chosen, queries, paths = rng.permutation(num)[: 2 * count], [], []
    order = np.argsort(chosen)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        for first in range(0, num, size):
            mean, factor = clustered(rng, min(size, num - first))
            own = chosen[order][(chosen[order] >= first) & (chosen[order] < first + size)] - first
            queries.append(near(rng, mean, factor, own))
            paths.append(Path(folder) / f"{first}.safetensors")
            jdam.save(paths[-1], jdam.store(jdam.Gaussian(mean, factor)).indexed())
            forget(paths[-1])
            del mean, factor
        seconds = time.perf_counter() - start
        yield Row(kind, num, 1, "`store`, `indexed` and `save` of the parts, once", 1e3 * seconds)
        asked = jax.tree.map(lambda *leaves: np.concatenate(leaves)[np.argsort(order)], *queries)
        others = jax.tree.map(lambda leaf: leaf[count:], asked)  # compile, and read other cells
        asked = jax.tree.map(lambda leaf: leaf[:count], asked)
        memory = Counting(**vars(jdam.open(paths)))
        for name, search in (("nearest", nearest_of_each), ("recall_batch", recall_of_all)):
            search(memory, others)
            for path in paths:
                forget(path)
            Counting.most = 0
            for where in ("disk", "cache"):
                start = time.perf_counter()
                found, certified = search(memory, asked)
                milliseconds = 1e3 * (time.perf_counter() - start) / count
                if (found != chosen[:count]).any():
                    raise AssertionError("not all queries found their patterns")
                read = f"{100 * Counting.most / num:.2g} % read at a time"
                row = f"`{name}` from {where}, {read}"
                yield Row(kind, num, count, row, milliseconds, certified=certified)


def nearest_of_each(memory: Any, queries: jdam.Gaussian) -> tuple[np.ndarray, float]:
    rows = [jdam.nearest(memory, queries[i])[0] for i in range(len(queries))]
    return np.concatenate(rows), 1.0


def recall_of_all(memory: Any, queries: jdam.Gaussian) -> tuple[np.ndarray, float]:
    found = jdam.recall_batch(memory, queries, 1.0, max_steps=STEPS)
    certified = np.asarray(found.status) != jdam.Status.UNCERTIFIED
    return np.asarray(found.nearest), float(certified.mean())


def forget(path: Path) -> None:
    """Ask the system to drop the file from its cache."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def clouds(rng: np.random.Generator, num: int, beta: float) -> Iterator[Row]:
    """β is in units of the inverse of a cloud's variance."""
    atoms, dim, kind = 32, 8, f"clouds, n = 32, d = 8, β·trace = {beta:g}"
    points = rng.normal(size=(num, 1, dim)) + 0.5 * rng.normal(size=(num, atoms, dim))
    trace = dim / 4
    geometry = jdam.Sinkhorn(0.1 * trace, tol=1e-3)
    memory = jdam.store(jdam.PointCloud(points.astype("f4")), geometry)
    noise = 0.1 * rng.normal(size=(64, atoms, dim))
    queries = jdam.PointCloud((points[:64] + noise).astype("f4"))
    searches = {jdam.Certified(): 64, jdam.Exhaustive(): 4}
    yield from compare(kind, memory, queries, beta / trace, searches, rounds=1)


def real(rng: np.random.Generator, folder: Path) -> Iterator[Row]:
    words = np.load(folder / "words_ctx_gauss.npz")
    patterns = jdam.Gaussian.from_covariance(words["mean"].astype("f4"), words["cov"].astype("f4"))
    chosen = rng.choice(len(words["mean"]), 100, replace=False)
    noise = 0.05 * rng.normal(size=(100, patterns.dim)).astype("f4")
    queries = jdam.Gaussian(patterns.mean[chosen] + noise, patterns.factor[chosen])
    for beta in (50.0, 100.0, 200.0):
        searches = {jdam.Certified(): 100, jdam.Exhaustive(): 10}
        memory = jdam.store(patterns)
        yield from compare(f"words, d = 16, β = {beta:g}", memory, queries, beta, searches, 1)
    shapes = np.load(folder / "modelnet_clouds.npz")["points"][:, ::16].astype("f4")
    memory = jdam.store(jdam.PointCloud(shapes), jdam.Sinkhorn(0.01, tol=1e-3))
    noise = 0.02 * rng.normal(size=(64, *shapes.shape[1:])).astype("f4")
    queries = jdam.PointCloud(shapes[:64] + noise)
    for beta in (100.0, 1000.0):
        searches = {jdam.Certified(): 64, jdam.Exhaustive(): 8}
        yield from compare(
            f"shapes, n = 64, d = 3, β = {beta:g}", memory, queries, beta, searches, 1
        )


def draw(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    left_out = ("words", "shapes", "clusters in files")
    kinds = [k for k in dict.fromkeys(row.kind for row in rows) if not k.startswith(left_out)]
    if not kinds:
        return
    colours = {
        "`Certified`": "#0072b2",
        "`Exhaustive`": "#d55e00",
        "`Certified`, cells": "#009e73",
        "faiss, inverted file, top 16": "#cc79a7",
        "pynndescent, top 16": "#e69f00",
    }
    size = 4 * len(kinds), 4.4
    figure, axes = plt.subplots(1, len(kinds), figsize=size, squeeze=False, layout="constrained")
    for axis, kind in zip(axes[0], kinds, strict=True):
        own = [row for row in rows if row.kind == kind and "once" not in row.contender]
        for name in dict.fromkeys(row.contender for row in own):
            line = [(row.num, row.milliseconds) for row in own if row.contender == name]
            axis.loglog(*zip(*line, strict=True), "o-", label=name.replace("`", ""),
                        color=colours.get(name, "#888888"))  # fmt: skip
        axis.set(title=kind, xlabel="N", ylabel="ms a query")
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        axis.grid(alpha=0.3)
    figure.savefig(path)
    plt.close(figure)


def _name(plan: Any) -> str:
    return str(getattr(plan, "func", plan).__name__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--largest", type=int, default=1_000_000, help="the largest N")
    parser.add_argument("--only", help="the memories whose names begin with this")
    parser.add_argument("--data", type=Path, help="a folder of real data")
    parser.add_argument("--out", type=Path, default=Path("scale.svg"), help="where to draw")
    arguments = parser.parse_args()
    plans = [(diagonal, 10**4), (diagonal, 10**6), *((full, 10**k) for k in range(4, 7))]
    plans += [(partial(clouds, beta=b), num) for b in (20, 100) for num in (1024, 10_000)]
    plans += [(clusters, num) for num in (10**4, 10**5, 2 * 10**5, 10**6)]
    plans += [(disk, 10**6), (disk, 10**7)]
    if arguments.only:
        plans = [plan for plan in plans if _name(plan[0]).startswith(arguments.only)]
    print(HEAD + "\n" + "|---" * 8 + "|", flush=True)
    rows = []
    for plan, num in plans:
        if num <= arguments.largest:
            for row in plan(np.random.default_rng(0), num):
                print(row, flush=True)
                rows.append(row)
    if arguments.data:
        for row in real(np.random.default_rng(0), arguments.data):
            print(row, flush=True)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    print(f"\nAt most {resident:.1f} GiB were resident.")
    draw(rows, arguments.out)


if __name__ == "__main__":
    main()
