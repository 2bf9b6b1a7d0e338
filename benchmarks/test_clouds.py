"""Point clouds: one step of every query against every pattern, beside ott-jax, vmapped, where all
pairs wait for the slowest, and pair by pair, POT in a loop and geomloss, all to one tolerance; then
what gradients and recalls cost. Clouds are standard normal, ε = d/10, the tolerance is the L1 error
of the marginals. Errors are of S_ε, relative to OT_ε, the worst of a few pairs, against float64."""

import math
import time
import warnings

import jax
import numpy as np
import ot
import pytest

import jdam

# queries, patterns, atoms of each, dimension, tolerance
SETTINGS = [
    (64, 16, 64, 8, 1e-3),
    (64, 16, 32, 3, 1e-4),
    (16, 64, 128, 3, 1e-3),
    (64, 16, 64, 8, 1e-5),
]
FEW = 4  # queries and patterns of which the errors are
LOOPED = 64  # pairs that POT and geomloss treat
ITERATIONS = 2000


def clouds(rng, queries, num, atoms, d):
    x = rng.normal(size=(queries, atoms, d)).astype(np.float32)
    return x, rng.normal(size=(num, atoms, d)).astype(np.float32)


def compiled(function, *args):
    """The compiled function, and its memory."""
    function = jax.jit(function).lower(*args).compile()
    return function, {"temporary": function.memory_analysis().temp_size_in_bytes / 2**20}


def repetitions(function, *args):
    """What a call returns, and how often it can be timed in ten seconds."""
    start = time.perf_counter()
    found = jax.block_until_ready(function(*args))
    return found, int(np.clip(10 / (time.perf_counter() - start), 3, 15))


def every_pair(function):
    return jax.vmap(jax.vmap(function, (None, 0)), (0, None))


def one_by_one(function):
    """No pair waits for a slower one."""
    return lambda x, y: jax.lax.map(lambda p: jax.lax.map(lambda q: function(p, q), y), x)


def debiased(cost, x, y):
    """S_ε and OT_ε of every pair, of a function of stacks of clouds one to one."""
    left, right = np.repeat(np.arange(len(x)), len(y)), np.tile(np.arange(len(y)), len(x))
    crossed = np.asarray(cost(x[left], y[right]), float).reshape(len(x), len(y))
    own, other = np.asarray(cost(x, x), float), np.asarray(cost(y, y), float)
    return crossed - own[:, None] / 2 - other[None] / 2, crossed


def reference(x, y, epsilon):
    """OT_ε of clouds one to one in float64, by plain scaling and Newton's method in turn."""
    x, y = x.astype(float), y.astype(float)
    kernel = np.exp(-((x[:, :, None] - y[:, None]) ** 2).sum(-1) / (2 * epsilon))
    n, m = kernel.shape[1:]
    v = np.ones((len(x), m, 1))
    for turn in range(1000):
        u = 1 / (kernel @ v / m)
        plan = u * kernel * np.swapaxes(v, 1, 2) / (n * m)  # its rows are exact
        columns = plan.sum(1)[..., None]
        if np.abs(columns - 1 / m).sum(1).max() < 1e-12:
            return epsilon * (np.log(u).mean((1, 2)) + np.log(v).mean((1, 2)))
        if turn % 20 < 19:
            v = v / (m * columns)
        else:
            hessian = columns * np.eye(m) - n * np.swapaxes(plan, 1, 2) @ plan
            step = np.linalg.solve(hessian + 1 / m**2, 1 / m - columns)  # constants are free
            v = v * np.exp(np.clip(step, -2, 2))
    raise AssertionError("the reference did not converge")


def relative_error(divergence, x, y, epsilon):
    """Of S_ε between every two of a few clouds."""
    truth, cost = debiased(lambda x, y: reference(x, y, epsilon), x[:FEW], y[:FEW])
    return np.max(np.abs(divergence(x[:FEW], y[:FEW]) - truth) / cost)


def with_ott(epsilon, tol, lse_mode):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ott.geometry.pointcloud import PointCloud
        from ott.problems.linear.linear_problem import LinearProblem
        from ott.solvers.linear.sinkhorn import Sinkhorn
    solver = Sinkhorn(threshold=tol, max_iterations=ITERATIONS, lse_mode=lse_mode)

    def solve(x, y):
        """Its cost is |x−y|²: twice ours, at twice our ε."""
        found = solver(LinearProblem(PointCloud(x, y, epsilon=2 * epsilon)))
        return found.reg_ot_cost / 2, found.f, found.g, found.converged

    return solve


def with_pot(x, y, epsilon, tol):
    """OT_ε from its potentials, and whether it converged. Its own tolerance is of the L2 error."""
    m = len(y)
    weights, costs = np.full(m, 1 / m, x.dtype), ot.dist(x, y) / 2
    limit = {"stopThr": tol / math.sqrt(m), "numItermax": ITERATIONS, "warn": False}
    _, log = ot.bregman.sinkhorn_stabilized(weights, weights, costs, epsilon, log=True, **limit)
    f, g = (log[name].astype(float) + epsilon * math.log(m) for name in ("alpha", "beta"))
    density = np.exp((f[:, None] + g - costs) / epsilon)
    return f.mean() + g.mean() - epsilon * (density.mean() - 1), log["err"][-1] <= limit["stopThr"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("queries", "num", "atoms", "d", "tol"), SETTINGS)
@pytest.mark.parametrize(
    "contender",
    ["step", "ott", "ott map", "ott map kernel", "pot float32", "pot float64", "geomloss"],
)
def test_every_pair(measure, rng, contender, queries, num, atoms, d, tol):
    epsilon, pairs = d / 10, queries * num
    x, y = clouds(rng, queries, num, atoms, d)
    row = f"Q = {queries}, N = {num}, n = {atoms}, d = {d}, to {tol:.0e}"
    note, few = "", [(x[i % queries], y[i // queries]) for i in range(LOOPED)]
    if contender == "step":
        memory = jdam.store(jdam.PointCloud(y), jdam.Sinkhorn(epsilon, tol=tol))
        query = jdam.PointCloud(x)
        function, known = compiled(jax.vmap(jdam.step, (None, 0, None)), memory, query, 1.0)

        def divergence(x, y):
            memory = jdam.store(jdam.PointCloud(y), jdam.Sinkhorn(epsilon, tol=tol))
            query = jdam.PointCloud(x)
            return np.asarray(jax.vmap(jdam.divergences, (None, 0))(memory, query), float)

        arguments, name = (memory, query, 1.0), "`jdam.step`"
        _, rounds = repetitions(function, *arguments)
    elif contender.startswith("ott"):
        solve = with_ott(epsilon, tol, "kernel" not in contender)
        function = one_by_one(solve) if "map" in contender else every_pair(solve)
        function, known = compiled(function, x, y)
        found, rounds = repetitions(function, x, y)
        name = ", `jax.lax.map`" if "map" in contender else ", vmapped"
        name += ", `lse_mode=False`" if "kernel" in contender else ""
        name, note = f"ott-jax{name}", missed(found[3])
        one_to_one = jax.jit(jax.vmap(solve))

        def divergence(x, y):
            return debiased(lambda x, y: one_to_one(x, y)[0], x, y)[0]

        arguments = x, y
    elif contender.startswith("pot"):
        dtype = np.dtype(contender.removeprefix("pot "))

        def solve(x, y):
            return with_pot(x.astype(dtype), y.astype(dtype), epsilon, tol)

        def function():
            return [solve(*pair) for pair in few]

        def divergence(x, y):
            return debiased(
                lambda x, y: [solve(*pair)[0] for pair in zip(x, y, strict=True)], x, y
            )[0]

        found, _ = repetitions(function)
        done = np.array([converged for _, converged in found])
        name, note = f"POT, stabilised, {dtype}", missed(done)
        pairs, arguments, rounds, known = LOOPED, (), 3, {}
    else:
        torch, geomloss = pytest.importorskip("torch"), pytest.importorskip("geomloss")
        settings = {"p": 2, "blur": math.sqrt(epsilon), "scaling": 0.99, "backend": "tensorized"}
        loss = geomloss.SamplesLoss("sinkhorn", **settings)

        def divergence(x, y):
            left, right = np.divmod(np.arange(len(x) * len(y)), len(y))
            found = loss(torch.from_numpy(x[left]), torch.from_numpy(y[right]))
            return found.double().numpy().reshape(len(x), len(y))

        stacked = [torch.from_numpy(np.stack(side)) for side in zip(*few, strict=True)]

        def function():
            return loss(*stacked).numpy()

        name = "geomloss, S_ε, `scaling=.99`"
        pairs, arguments, rounds, known = LOOPED, (), 3, {}
    known["error"] = relative_error(divergence, x, y, epsilon)
    settings = {"pairs": pairs, "rounds": rounds, "note": note}
    measure("A cloud", row, name, function, *arguments, warmup=1, **settings, **known)


def missed(converged):
    """What to say of those that stopped at the most iterations."""
    return "" if np.all(converged) else f" ({np.mean(~np.asarray(converged)):.0%} missed)"


@pytest.mark.parametrize("queries", [1, 16])
@pytest.mark.parametrize("contender", ["energy", "grad", "step", "recall"])
def test_derivatives_and_recalls(measure, rng, contender, queries):
    """The gradient beside the energy, and ten steps in a row, which start from each other's
    potentials, beside one."""
    num, atoms, d = 32, 64, 8
    x, y = clouds(rng, queries, num, atoms, d)
    memory = jdam.store(jdam.PointCloud(y), jdam.Sinkhorn(d / 10))
    query, pairs = jdam.PointCloud(x), queries * num
    if contender == "energy":
        function, name = jdam.energy, "`jdam.energy`"
    elif contender == "grad":

        def function(memory, query, beta):
            return jax.grad(jdam.energy, 1)(memory, query, beta)

        name = "its gradient"
    elif contender == "step":
        function, name = jdam.step, "`jdam.step`"
    else:

        def function(memory, query, beta):
            return jdam.recall(memory, query, beta, max_steps=10, tol=1e-30)

    arguments = memory, query, 1.0
    if queries == 1:
        arguments = memory, jax.tree.map(lambda leaf: leaf[0], query), 1.0
        function, _ = compiled(function, *arguments)
    else:
        function, _ = compiled(jax.vmap(function, (None, 0, None)), *arguments)
    if contender == "recall":
        steps = np.mean(function(*arguments).num_steps)
        name, pairs = "each of ten steps of a recall", pairs * steps
    row = f"Q = {queries}, N = {num}, n = {atoms}, d = {d}, to 1e-5"
    measure("Steps of clouds in a row", row, name, function, *arguments, pairs=pairs, rounds=15)
