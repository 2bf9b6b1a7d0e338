"""A memory in a file comes back to the last bit, or with an error that says why not."""

import json
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from jaxtyping import Array, Float

import jdam
from tests.cases import KINDS, every_kind_in_full, problem
from tests.helpers import clouds, gaussians, near, vectors
from tests.outside import Cramer, Histogram, SlicedWasserstein, histograms


def same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@every_kind_in_full
def test_to_the_last_bit(rng, kind, tmp_path):
    memory, query = problem(rng, kind)
    memory = jdam.store(memory.patterns, memory.geometry, log_prior=rng.normal(size=7))
    jdam.save(tmp_path / "memory", memory)
    loaded = jdam.load(tmp_path / "memory", classes=(SlicedWasserstein, Histogram, Cramer))
    same(loaded, memory)
    assert repr(loaded) == repr(memory)
    recall = jax.jit(lambda memory, query: jdam.recall(memory, query, 2.0, max_steps=2))
    same(recall(loaded, query), recall(memory, query))
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
def test_every_dtype(rng, dtype, tmp_path):
    patterns = jax.tree.map(lambda leaf: leaf.astype(dtype), gaussians(rng, 3, 2))
    memory = jdam.store(patterns)
    jdam.save(tmp_path / "memory", memory)
    same(jdam.load(tmp_path / "memory"), memory)


def test_room_to_grow_and_settings(rng, tmp_path):
    geometry = jdam.Sinkhorn(0.3, rho=1.5, hellinger_scale=0.1, tol=1e-7, max_iterations=77)
    memory = jdam.store(clouds(rng, 3, 2), geometry, capacity=5).append(clouds(rng, 1, 2))
    jdam.save(tmp_path / "memory", memory)
    loaded = jdam.load(str(tmp_path / "memory"))
    same(loaded, memory)
    assert (len(loaded), loaded.capacity, loaded.geometry.max_iterations) == (4, 5, 77)
    same(loaded.append(memory[0]), memory.append(memory[0]))


def test_float64_is_not_rounded_silently(rng, tmp_path):
    jdam.save(tmp_path / "memory", jdam.store(gaussians(rng, 3, 2)))
    with jax.enable_x64(False), pytest.raises(ValueError, match="is float64, .*jax_enable_x64"):
        jdam.load(tmp_path / "memory")


def check_damage(path, data, message):
    """That loading these bytes fails, and says why and of which file."""
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"^{path} .*{message}"):
        jdam.load(path)


def flipped(where):
    def flip(data):
        i = where(len(data))
        return data[:i] + bytes([data[i] ^ 16]) + data[i + 1 :]

    return flip


def newer(data):
    return data.replace(b'"version":"1"', b'"version":"9"')


@pytest.mark.parametrize("kind", ["gaussian", "clouds", "euclidean", "diagonal"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-3], "is cut off: it has .* bytes, and should have"),
        (lambda data: data[:40], "is cut off: it has 40 bytes, its header alone"),
        (lambda data: data[:5], "it is empty or cut off"),
        (lambda data: b"", "it is empty or cut off"),
        (lambda data: data + b"x", "is damaged: it has"),
        (flipped(lambda n: n - 9), "is damaged: its checksum is not that of its contents"),
        (flipped(lambda n: 2 * n // 3), "is damaged"),
        (lambda data: data.replace(b"patterns", b"qatterns"), "is damaged"),
        (lambda data: data[:8] + b"{" * 20 + data[28:], "is damaged: its header cannot be read"),
        (newer, "was written by a newer jdam, in version 9 of the format"),
        (lambda data: b"PK\x03\x04" + data, "it is no safetensors file"),
    ],
)
def test_damage(rng, kind, change, message, tmp_path):
    make, geometry = KINDS[kind]
    jdam.save(tmp_path / "memory", jdam.store(make(rng, 3, 2), geometry))
    check_damage(tmp_path / "memory", change((tmp_path / "memory").read_bytes()), message)


def test_no_flipped_bit_goes_unnoticed(rng, tmp_path):
    path = tmp_path / "memory"
    jdam.save(path, jdam.store(gaussians(rng, 3, 2), log_prior=np.zeros(3)))
    whole = path.read_bytes()
    for i in range(0, len(whole), 7):
        check_damage(path, flipped(lambda n, i=i: i)(whole), "")


def test_other_files(rng, tmp_path):
    path = tmp_path / "other"
    safetensors.numpy.save_file({"x": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="no memory that jdam.save wrote, but another safetensors"):
        jdam.load(path)
    np.savez(tmp_path / "arrays.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="no memory that jdam.save wrote"):
        jdam.load(tmp_path / "arrays.npz")
    with pytest.raises(FileNotFoundError):
        jdam.load(tmp_path / "nothing")
    with pytest.raises(TypeError, match="memory must be a jdam.Memory; got Gaussian"):
        jdam.save(path, gaussians(rng, 2, 2))
    with pytest.raises(TypeError, match="mesh and axis go together"):
        jdam.load(path, axis="patterns")


def test_a_file_that_cannot_be_written_leaves_the_old_one(rng, tmp_path, monkeypatch):
    memory = jdam.store(gaussians(rng, 3, 2))
    path = tmp_path / "memory"
    jdam.save(path, memory)

    def fail(file):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        jdam.save(path, memory.append(memory[0]))
    same(jdam.load(path), memory)
    assert [p.name for p in tmp_path.iterdir()] == ["memory"]


def test_a_full_disk_leaves_the_old_file(rng, tmp_path, monkeypatch):
    memory = jdam.store(gaussians(rng, 3, 2))
    path = tmp_path / "memory"
    jdam.save(path, memory)

    def fail(*args):
        raise safetensors.SafetensorError("no space left")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="memory cannot be written: no space left"):
        jdam.save(path, memory)
    same(jdam.load(path), memory)
    assert [p.name for p in tmp_path.iterdir()] == ["memory"]


def test_arrays_are_written_without_a_copy(rng, tmp_path, monkeypatch):
    memory, written = jdam.store(gaussians(rng, 3, 2)), {}
    save_file = safetensors.numpy.save_file

    def keep(arrays, path, header):
        written.update(arrays)
        save_file(arrays, path, header)

    monkeypatch.setattr(safetensors.numpy, "save_file", keep)
    jdam.save(tmp_path / "memory", memory)
    if jax.default_backend() == "cpu":
        factor = np.asarray(memory.patterns.factor)
        assert np.shares_memory(written["patterns.factor"], factor)


def test_permissions_links_and_missing_folders(rng, tmp_path):
    memory, path = jdam.store(gaussians(rng, 3, 2)), tmp_path / "memory"
    with pytest.raises(FileNotFoundError):
        jdam.save(tmp_path / "missing" / "memory", memory)
    jdam.save(path, memory)
    (tmp_path / "other").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode  # by umask
    path.chmod(0o640)
    (tmp_path / "link").symlink_to(path)
    jdam.save(tmp_path / "link", memory)
    assert path.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "link").is_symlink()


def test_classes_of_others_are_named_and_not_imported(rng, tmp_path):
    path = tmp_path / "memory"
    jdam.save(path, jdam.store(histograms(rng, 3, 2), Cramer()))
    with pytest.raises(ValueError, match="classes must hold tests.outside:Cramer.*classes=.Cramer"):
        jdam.load(path)
    with pytest.raises(ValueError, match="classes must hold tests.outside:Histogram"):
        jdam.load(path, classes=(Cramer,))
    assert isinstance(jdam.load(path, classes=(Cramer, Histogram)).geometry, Cramer)
    with pytest.raises(ValueError, match="classes must hold tests.outside:Histogram"):
        jdam.load(path, classes=Cramer)


class Odd(jdam.Geometry):
    """With fields of other kinds."""

    scales: tuple[Float[Array, ""], dict[str, Float[Array, " k"]]]
    names: tuple[str, ...] = eqx.field(static=True)
    other: object = eqx.field(static=True, default=None)

    def check(self, name, measure, batch_ndim):
        return jnp.asarray(measure)

    def compare(self, view, patterns):
        gaps = patterns.measures - view[None]
        return jdam.Comparison(self.scales[0] * jnp.vecdot(gaps, gaps), patterns.measures)


def test_fields_of_other_geometries(rng, tmp_path):
    scales = (jnp.asarray(2.0), {"x": jnp.ones(3)})
    memory = jdam.store(vectors(rng, 3, 2), Odd(scales, ("a", "b")))
    jdam.save(tmp_path / "memory", memory)
    loaded = jdam.load(tmp_path / "memory", classes=(Odd,))
    same(loaded, memory)
    query = near(rng, memory[0], 0.1)
    assert jdam.energy(loaded, query, 2.0) == jdam.energy(memory, query, 2.0)
    for other in (object(), jdam.Status.SOLVER, jdam.BatchSizes(1, 2, 3)):
        with pytest.raises(TypeError, match="geometry.other must be an array, None, .*; got"):
            jdam.save(tmp_path / "memory", jdam.store(memory[:], Odd(scales, ("a",), other)))


def test_the_header_is_for_everybody(rng, tmp_path):
    path = tmp_path / "memory"
    jdam.save(path, jdam.store(gaussians(rng, 3, 2), jdam.EntropicBures(0.3)))
    with safetensors.safe_open(path, "numpy") as file:
        header = file.metadata()
        np.testing.assert_array_equal(file.get_tensor("geometry.epsilon"), 0.3)
    assert (header["format"], header["version"]) == ("jdam", "1")
    assert json.loads(header["memory"])["geometry"]["class"] == "jdam.EntropicBures"
