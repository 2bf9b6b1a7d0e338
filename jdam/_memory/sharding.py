"""A memory in equal parts on the devices of a mesh, of one or several hosts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import PyTree

from jdam._core.mesh import Layout
from jdam._memory.memory import Memory, check_memory


def shard(memory: Memory, mesh: Mesh, axis: str) -> Memory:
    """Return the memory with its patterns in equal parts along one axis of a mesh of devices.

    Every function of a memory accepts it and returns the same results. Each device compares its own
    patterns; the sums are merged by a log-sum-exp over the axis, which communicates one pull for
    each evaluation, whatever N. (Separations other than `LogSumExp` need all divergences on every
    device, N numbers.) With `Certified` each device has `num_candidates` of its own.

    Batches of queries can be spread over another axis of the mesh, and results stay there:

        mesh = jax.make_mesh((4, 2), ("patterns", "queries"))
        memory = jdam.shard(memory, mesh, "patterns")
        queries = jax.device_put(queries, NamedSharding(mesh, PartitionSpec("queries")))
        result = jax.vmap(jdam.recall, (None, 0, None))(memory, queries, beta)

    (On a mesh whose axes are of type `Auto`, `jax.vmap` needs `spmd_axis_name="queries"` for this.)

    Under `jax.distributed` every process calls this function with the same memory and a mesh of all
    devices, and keeps the parts of its own devices.

    **Arguments:**

    - `memory`: N patterns. N need not be a multiple of the length of the axis: the last parts are
      padded with patterns whose prior is 0.
    - `mesh`: a mesh of devices.
    - `axis`: the name of one of its axes.

    **Returns:** a memory that has no capacity for more patterns: `append` and `remove` before. It
    cannot be learned.

    **Raises:** `TypeError` for arguments of other kinds, `ValueError` if the mesh has no such axis
    or the memory is sharded already.
    """
    check_memory(memory)
    if memory.layout is not None:
        raise ValueError(f"memory must not be sharded already; got {memory}")
    parts = parts_of(mesh, axis, len(memory))
    # Each process has the whole memory, from which it serves its own devices.
    rows = (memory.patterns, memory.prepared, memory.fingerprint, memory.values)
    rows = jax.tree.map(lambda leaf: parts.rows(np.asarray(leaf)), rows)
    patterns, prepared, fingerprints, values = rows
    log_prior = None if memory.log_prior is None else np.asarray(memory.log_prior)
    prior = parts.prior(log_prior, memory.dtype)
    geometry, units = parts.everywhere((memory.geometry, memory.magnitudes()))
    sharded = Memory(
        patterns, geometry, prior, prepared, fingerprints, parts.layout, units, values=values
    )
    return sharded if memory.cells is None else sharded.indexed(len(memory.cells.members))


class Parts(NamedTuple):
    """Distribution of rows over the devices of a layout."""

    layout: Layout

    @property
    def missing(self) -> int:
        """Number of rows that pad the last parts."""
        return -self.layout.length % self.layout.parts

    def rows(self, array: Any, *, fill: float | None = None) -> Array:
        """Return `array` in parts, padded with `fill` or copies of the last row.

        `array` may be anything that is indexed by slices; each device reads its own rows only.
        """
        length, axis = self.layout.length, self.layout.axis
        shape = (length + self.missing, *_shape(array)[1:])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            rows = array[min(start, length - 1) : min(stop, length)][: stop - start]
            last = rows[-1:] if fill is None else np.full_like(rows[-1:], fill)
            num_stored = max(0, min(stop, length) - start)
            return np.concatenate([rows[:num_stored], *[last] * (stop - start - num_stored)])

        return self.layout.put(shape, PartitionSpec(axis), part)

    def prior(self, log_prior: Any, dtype: jnp.dtype) -> Array | None:
        """Return the prior in parts, −inf for the padding; None if there is neither a prior
        nor padding.
        """
        if log_prior is None and not self.missing:
            return None
        log_prior = np.zeros(self.layout.length, dtype) if log_prior is None else log_prior
        return self.rows(log_prior, fill=-np.inf)

    def everywhere(self, tree: PyTree) -> PyTree:
        """Return the tree with every array on every device."""

        def put(leaf: Any) -> Array:
            whole = np.asarray(leaf)
            return self.layout.put(whole.shape, PartitionSpec(), lambda index: whole[index])

        return jax.tree.map(put, tree)


def parts_of(mesh: Mesh, axis: str, length: int) -> Parts:
    """Return the distribution of `length` patterns along an axis of a mesh.

    **Raises:** `TypeError` for what is no mesh, `ValueError` if the mesh has no such axis.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh; got {type(mesh).__name__}")
    if axis not in mesh.axis_names:
        raise ValueError(f"axis must be one of the mesh's {mesh.axis_names}; got {axis!r}")
    # The axes are of type Auto: with Explicit ones derivatives would need `jax.set_mesh`.
    return Parts(Layout(Mesh(mesh.devices, mesh.axis_names), axis, length))


def _shape(array: Any) -> tuple[int, ...]:
    return tuple(array.shape if hasattr(array, "shape") else array.get_shape())
