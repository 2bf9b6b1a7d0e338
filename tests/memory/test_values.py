"""Values go with the patterns through every change of a memory."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jdam
from tests.cases import alike, close
from tests.helpers import gaussians, vectors
from tests.memory.test_files import same

CAPACITY = 8


def values_of(rng, num, first=0):
    return {
        "label": np.arange(first, first + num, dtype=np.int32),
        "known": np.arange(first, first + num) % 2 == 0,
        "place": rng.normal(size=(num, 2)),
    }


def rows(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def joined(*trees):
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *trees)


@pytest.fixture
def problem(rng):
    """Five patterns and their values, and two more of each."""
    return (
        (vectors(rng, 5, 2), values_of(rng, 5)),
        (vectors(rng, 2, 2), values_of(rng, 2, 5)),
    )


def test_numbers_keep_their_dtype(rng, problem):
    (patterns, values), _ = problem
    memory = jdam.store(patterns, values=values)
    same(memory.values, values)
    assert repr(memory).endswith("float64, values)")
    found = jdam.recall(memory, patterns[3], 50.0)
    assert memory.values["label"][found.nearest] == 3
    assert jdam.store(patterns).values is None
    assert jdam.store(patterns, values=[4, 3, 2, 1, 0]).values.tolist() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("capacity", [None, CAPACITY])
def test_changes(rng, problem, capacity):
    (patterns, values), (more, others) = problem
    memory = jdam.store(patterns, values=values, capacity=capacity)
    size = capacity or 7
    grown = memory.append(more, values=others)
    assert jax.tree.leaves(grown.values)[0].shape[0] == size
    same(rows(grown.values, slice(7)), joined(values, others))
    one_by_one = memory.append(more[0], values=rows(others, 0)).append(more[1:], values=rows(others, slice(1, 2)))  # fmt: skip
    same(rows(one_by_one.values, slice(7)), joined(values, others))
    kept = grown.remove([0, 5])
    same(rows(kept.values, slice(5)), joined(rows(values, slice(1, 5)), rows(others, slice(1, 2))))
    changed = memory.replace([4, 0], more, values=others)
    same(rows(changed.values, 4), rows(others, 0))
    same(rows(changed.values, slice(1, 4)), rows(values, slice(1, 4)))
    same(memory.replace([4, 0], more).values, memory.values)
    same(rows(memory.reserve(20).values, slice(5)), values)
    assert memory.append([]) is memory


def test_inside_jit(problem):
    (patterns, values), (more, others) = problem
    memory = jdam.store(patterns, values=values, capacity=CAPACITY)

    @jax.jit
    def run(memory, more, others):
        def turn(memory, new):
            pattern, values = new
            return memory.append(pattern, values=values).replace(0, pattern, values=values), None

        return jax.lax.scan(turn, memory, (more, others))[0].remove(jnp.array([1]))

    found = run(memory, more, others)
    wanted = joined(rows(others, slice(1, 2)), rows(values, slice(2, 5)), others)
    assert len(found) == 6
    same(rows(found.values, slice(6)), wanted)


@pytest.mark.parametrize("capacity", [None, CAPACITY])
def test_files(problem, tmp_path, capacity):
    (patterns, values), (more, others) = problem
    memory = jdam.store(patterns, values=(values, values["place"]), capacity=capacity)
    jdam.save(tmp_path / "memory", memory)
    loaded = jdam.load(tmp_path / "memory")
    same(loaded, memory)
    added = (others, others["place"])
    same(loaded.append(more, values=added), memory.append(more, values=added))


def test_files_of_before_there_were_values(problem, tmp_path):
    (patterns, _), _ = problem
    memory = jdam.store(patterns)
    jdam.save(tmp_path / "memory", memory)
    with safetensors.safe_open(tmp_path / "memory", "numpy") as file:
        description = json.loads(file.metadata()["memory"])
    assert description["values"] is None
    del description["values"]
    arrays = safetensors.numpy.load_file(tmp_path / "memory")
    text = json.dumps(description, sort_keys=True)
    held = ((name, x.shape, [x]) for name, x in sorted(arrays.items()))
    header = {"format": "jdam", "version": "1", "memory": text}
    header["checksum"] = jdam._memory.files._checksum(text, held)
    (tmp_path / "old").write_bytes(safetensors.numpy.save(arrays, header))
    same(jdam.load(tmp_path / "old"), memory)


@pytest.mark.full
def test_shards(problem, tmp_path):
    (patterns, values), _ = problem
    memory = jdam.store(patterns, values=values)
    mesh = jax.make_mesh((1,), ("patterns",))
    sharded = jdam.shard(memory, mesh, "patterns")
    same(sharded.values, memory.values)
    jdam.save(tmp_path / "memory", sharded)
    same(jdam.load(tmp_path / "memory"), memory)
    same(jdam.load(tmp_path / "memory", mesh=mesh, axis="patterns").values, memory.values)
    own = jdam.store(patterns, values=values["place"])
    found = jdam.attend(jdam.shard(own, mesh, "patterns"), patterns[0], 0.3)
    close(found, jdam.attend(own, patterns[0], 0.3), rtol=1e-12)


def test_parameters(problem):
    (patterns, values), _ = problem
    memory = jdam.store(patterns, values=values)
    params, rebuild = jdam.parametrize(memory)
    same(rebuild(params), memory)
    slope = jax.grad(lambda params: jdam.energy(rebuild(params), patterns[0], 2.0))(params)
    assert np.isfinite(slope["patterns"]).all()


@pytest.mark.full
def test_derivatives_of_a_recall_see_no_values(rng):
    """Integers and booleans have no tangents."""
    patterns = gaussians(rng, 4, 2)
    plain = jdam.store(patterns)
    labelled = jdam.store(patterns, values=values_of(rng, 4))
    recall = partial(jdam.recall, max_steps=5)

    def ended(query, memory):
        return recall(memory, query, 3.0).measure.mean.sum()

    for search in (jdam.Exhaustive(), jdam.Certified(2)):
        found, wanted = (recall(m, patterns[0], 3.0, search=search) for m in (labelled, plain))
        same(found, wanted)
    slope = jax.jit(jax.grad(ended))
    same(slope(patterns[1], labelled), slope(patterns[1], plain))


def test_attend_reads_the_memorys_own(rng, problem):
    (patterns, values), _ = problem
    place, hot = values["place"], np.eye(5)
    memory = jdam.store(patterns, values={"place": place, "hot": hot}, capacity=CAPACITY)
    found = jdam.attend(memory, patterns[1], 0.7)
    close(found["place"], jdam.attend(memory, patterns[1], 0.7, place), rtol=1e-14)
    close(found["hot"], jdam.gibbs_weights(memory, patterns[1], 0.7)[:5], rtol=1e-12)
    measures = gaussians(rng, 5, 3)
    wanted = jdam.attend(memory, patterns[1], 0.7, measures)
    for capacity in (None, CAPACITY):
        held = jdam.store(patterns, values=measures, capacity=capacity)
        alike(jdam.attend(held, patterns[1], 0.7), wanted, rtol=1e-12)
    labelled = jdam.store(patterns, values=values)
    cure = r"look labels up by memory.values\[result.nearest\]"
    message = rf"values\['known'\] must have a floating dtype; got bool: {cure}"
    with pytest.raises(TypeError, match=message):
        jdam.attend(labelled, patterns[1], 0.7)
    with pytest.raises(
        TypeError, match="values must be given for a memory that was stored without"
    ):
        jdam.attend(jdam.store(patterns), patterns[1], 0.7)


def test_what_does_not_fit(problem):
    (patterns, values), (more, others) = problem
    for bad, error, message in (
        (
            np.arange(4),
            ValueError,
            r"values must have shape \(N, …\), .* N = 5 patterns; got \(4,\)",
        ),
        ({"a": {"b": 1.0}}, ValueError, r"values\['a'\]\['b'\] must have shape .*; got \(\)"),
        ((), ValueError, r"values must be an array \(N, …\), or a pytree of them; got \(\)"),
        (
            ["cat"] * 5,
            TypeError,
            "values must hold numbers or booleans; got dtype <U3: number labels",
        ),
        (
            [[1], [1, 2]],
            TypeError,
            "values must be an array; got a list of arrays of different shapes",
        ),
    ):
        with pytest.raises(error, match=message):
            jdam.store(patterns, values=bad)
    memory = jdam.store(patterns, values=values, capacity=CAPACITY)
    short = others | {"place": others["place"][:, :1]}
    for bad, error, message in (
        (None, ValueError, "values must be given, one for each of patterns: the memory has values"),
        (others["label"], TypeError, "values must be a pytree like the memory's, PyTreeDef.*; got"),
        (
            rows(others, slice(1)),
            ValueError,
            r"values\['known'\] must have shape \(2,\); got \(1,\)",
        ),
        (short, ValueError, r"values\['place'\] must have shape \(2, 2\); got \(2, 1\)"),
        (
            others | {"label": others["label"].astype("f4")},
            TypeError,
            r"values\['label'\] must have the dtype of the memory's, int32; got float32: convert it",
        ),
    ):
        with pytest.raises(error, match=message):
            memory.append(more, values=bad)
        if bad is not None:
            with pytest.raises(error, match=message):
                memory.replace([0, 1], more, values=bad)
    for change in (jdam.store(patterns).append, partial(jdam.store(patterns).replace, [0, 1])):
        with pytest.raises(ValueError, match="values must be None: the memory has none"):
            change(more, values=others)
    with jax.enable_x64(False), pytest.raises(ValueError, match="within the range of int32"):
        jdam.store(patterns.astype("f4"), values=np.arange(5) + 2**40)


def test_integers_inside_jit_in_single_precision(rng):
    with jax.enable_x64(False):
        patterns = rng.normal(size=(3, 2)).astype(np.float32)
        memory = jdam.store(patterns, values=np.arange(3), capacity=4)
        grown = jax.jit(lambda memory, new: memory.append(new, values=7))(memory, patterns[0])
        assert np.asarray(grown.values).tolist() == [0, 1, 2, 7]
        with pytest.raises(ValueError, match="values must be within the range of int32"):
            jax.jit(lambda memory, new: memory.append(new, values=2**40))(memory, patterns[0])
