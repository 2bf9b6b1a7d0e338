import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdam
from jdam import theory
from jdam._core import lapack as _lapack
from tests.helpers import gaussians

pytestmark = pytest.mark.full

decompositions = {
    "svd": (_lapack.svd, lambda a: np.linalg.svd(a, full_matrices=False)),
    "full svd": (_lapack.full_svd, np.linalg.svd),
    "singular values": (_lapack.singular_values, lambda a: np.linalg.svd(a, compute_uv=False)),
    "eigh": (lambda a: _lapack.eigh(a @ a.mT), lambda a: np.linalg.eigh(a @ a.mT)),
    "cholesky": (
        lambda a: _lapack.cholesky(a @ a.mT),
        lambda a: np.linalg.cholesky(a @ a.mT),
    ),
    "eigenvalues": (
        lambda a: _lapack.eigenvalues(a @ a.mT),
        lambda a: np.linalg.eigvalsh(a @ a.mT),
    ),
    "qr": (_lapack.qr, np.linalg.qr),
    "triangle": (_lapack.triangle, lambda a: np.linalg.qr(a, mode="r")),
    "solve": (
        lambda a: _lapack.solve_lower(jnp.tril(a[..., : a.shape[-2]]), a),
        lambda a: np.linalg.solve(np.tril(a[..., : a.shape[-2]]), a),
    ),
}


@pytest.mark.parametrize("shape", [(3, 4), (7, 3, 5, 5), (90, 9, 11)], ids=str)
@pytest.mark.parametrize("name", decompositions)
def test_against_numpy(rng, name, shape):
    """Of stacks and under `jax.vmap`, in one piece or in several."""
    run, expected = decompositions[name]
    matrices = rng.normal(size=shape)
    for vmapped in range(len(shape) - 1):
        found = run
        for _ in range(vmapped):
            found = jax.vmap(found)
        found = jax.jit(found)(jnp.asarray(matrices))
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected(matrices)), strict=True):
            signs = np.ndim(x) == len(shape)  # of vectors
            x, y = (np.abs(x), np.abs(y)) if signs else (x, y)
            np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-9)


def largest_pieces(function, *args):
    """Of every LAPACK call in a compiled program, its matrices and the shape of one."""
    text = jax.jit(function).lower(*args).compile().as_text()
    pieces = re.findall(r"= \(?f\d\d\[([\d,]+)\][^\n]*custom_call_target=\"lapack_(\w+)\"", text)
    assert text.count('custom_call_target="lapack_') == len(pieces)
    shapes = [(name, tuple(map(int, shape.split(",")))) for shape, name in pieces]
    return [(name, math.prod(shape[:-2]), shape[-2:]) for name, shape in shapes]


@pytest.mark.skipif(not _lapack.WAITS, reason="this jaxlib's LAPACK calls do not wait")
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="LAPACK is for CPUs")
@pytest.mark.parametrize(
    "name", ["step", "recall", "gradient", "certified", "theory", "samples", "random"]
)
def test_no_call_is_split_among_threads(rng, name):
    """Two that are, at a time, wait for ever where there are two threads."""
    patterns = gaussians(rng, 70, 16)
    memory, queries = jdam.store(patterns), gaussians(rng, 5, 16)
    run = {
        "step": lambda q: jdam.step(memory, jax.tree.map(lambda leaf: leaf[0], q), 1.0),
        "recall": jax.vmap(lambda q: jdam.recall(memory, q, 1.0)),
        "gradient": jax.vmap(jax.grad(lambda q: jdam.step(memory, q, 1.0).factor.sum())),
        "certified": jax.vmap(lambda q: jdam.recall(memory, q, 1.0, search=jdam.Certified())),
        "theory": lambda q: theory.minimum_beta(jdam.store(q), 0.1),
        "samples": lambda q: jax.grad(lambda x: jdam.Gaussian.from_samples(x).factor.sum())(
            jnp.concatenate([q.factor, q.factor + 1], axis=1)
        ),
        "random": lambda q: jdam.random.wasserstein_sphere(
            jax.random.key(0), 500, 16, commuting=False
        ),
    }[name]
    pieces = largest_pieces(run, patterns if name in ("theory", "samples") else queries)
    work = {"gesdd": 2e4, "syevd": 4e4, "potrf": 6e5, "trsm": 2e5, "geqrf": 1.5e5, "orgqr": 1.5e5}
    assert pieces
    for call, many, (rows, columns) in pieces:
        limit = next(value for key, value in work.items() if key in call)
        assert many == 1 or many * rows * columns * min(rows, columns) <= limit, (call, many)


def test_threads_do_not_wait_for_each_other():
    """Several that sample, store and recall at once all end: in a process of its own, which can be
    given up."""
    program = """
import threading, jax, jdam
def work(k):
    for _ in range(2):
        patterns = jdam.random.wasserstein_sphere(jax.random.key(k), 300, 12, commuting=False)
        samples = patterns.factor + patterns.mean[..., None]
        patterns = jdam.Gaussian.from_samples(samples)
        queries = jdam.random.perturb(jax.random.key(k), patterns, 0.1)
        jdam.theory.separations(jdam.store(patterns[:30]))
        recall = jax.vmap(jdam.recall, (None, 0, None))
        jax.block_until_ready(recall(jdam.store(patterns[:30]), queries[:30], 2.0))
threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=300)
