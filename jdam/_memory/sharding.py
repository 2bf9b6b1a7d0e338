"""A memory over many devices and hosts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdam._core.mesh import Layout
from jdam._memory.memory import Memory, check_memory


def shard(memory: Memory, mesh: Mesh, axis: str) -> Memory:
    """The same memory with its patterns in equal parts along one axis of a mesh of devices.

    Every function of a memory takes it and gives the same results: each device compares its own
    patterns, and what they learned is put together by a log-sum-exp over the axis, at a cost in
    communication of one pull an evaluation, which does not depend on N. (Separations other than
    `LogSumExp` need all divergences on every device, N numbers.) With `Certified` each device
    has `num_candidates` of its own.

    Batches of queries can be spread over another axis of the mesh, and results stay there:

        mesh = jax.make_mesh((4, 2), ("patterns", "queries"))
        memory = jdam.shard(memory, mesh, "patterns")
        queries = jax.device_put(queries, NamedSharding(mesh, PartitionSpec("queries")))
        found = jax.vmap(jdam.recall, (None, 0, None))(memory, queries, beta)

    (On a mesh whose axes are of type `Auto`, `spmd_axis_name="queries"` says so to `jax.vmap`.)

    Under `jax.distributed` every process calls this with the same memory and a mesh of all
    devices, and every process keeps the parts of its own devices.

    **Arguments:** a `memory`, the `mesh` and the name of one `axis` of it. N need not be a
    multiple of the axis' length: parts are filled up with patterns that are switched off.

    **Returns:** a memory that is fixed and has no room to grow: `append` and `remove` before. It
    cannot be learned.

    **Raises:** `TypeError` for arguments of other kinds, `ValueError` if the mesh has no such axis
    or the memory is sharded already.
    """
    check_memory(memory)
    if memory.layout is not None:
        raise ValueError(f"memory must not be sharded already; got {memory}")
    parts = parts_of(mesh, axis, len(memory))
    # As each process has all of it, it can serve whichever devices are its own.
    rows = (memory.patterns, memory.prepared, memory.fingerprint, memory.values)
    rows = jax.tree.map(lambda leaf: parts.rows(np.asarray(leaf)), rows)
    patterns, prepared, marks, values = rows
    held = None if memory.log_prior is None else np.asarray(memory.log_prior)
    prior = parts.prior(held, memory.dtype)
    geometry, units = parts.everywhere((memory.geometry, memory.magnitudes()))
    return Memory(patterns, geometry, prior, prepared, marks, parts.layout, units, values=values)


class Parts(NamedTuple):
    """Where the rows of a memory go."""

    layout: Layout

    @property
    def missing(self) -> int:
        """How many rows fill up the last parts."""
        return -self.layout.length % self.layout.parts

    def rows(self, held: Any, *, fill: float | None = None) -> Array:
        """Rows, an array or what is indexed by slices as one, in parts, each read for its own
        device alone; filled up with `fill` or copies of the last row."""
        length, axis = self.layout.length, self.layout.axis
        shape = (length + self.missing, *_shape(held)[1:])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            rows = held[min(start, length - 1) : min(stop, length)][: stop - start]
            last = rows[-1:] if fill is None else np.full_like(rows[-1:], fill)
            there = max(0, min(stop, length) - start)
            return np.concatenate([rows[:there], *[last] * (stop - start - there)])

        return self._put(shape, PartitionSpec(axis), part)

    def prior(self, held: Any, dtype: jnp.dtype) -> Array | None:
        """The prior in parts, by which what fills them up is switched off; None if there is
        neither."""
        if held is None and not self.missing:
            return None
        held = np.zeros(self.layout.length, dtype) if held is None else held
        return self.rows(held, fill=-np.inf)

    def everywhere(self, tree: Any) -> Any:
        """The same on every device."""

        def put(leaf: Any) -> Array:
            whole = np.asarray(leaf)
            return self._put(whole.shape, PartitionSpec(), lambda index: whole[index])

        return jax.tree.map(put, tree)

    def _put(self, shape: tuple[int, ...], spec: PartitionSpec, read: Any) -> Array:
        return jax.make_array_from_callback(shape, NamedSharding(self.layout.mesh, spec), read)


def parts_of(mesh: Mesh, axis: str, length: int) -> Parts:
    """The parts of so many patterns along an axis of a mesh.

    **Raises:** `TypeError` or `ValueError` for what is none."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh; got {type(mesh).__name__}")
    if axis not in mesh.axis_names:
        raise ValueError(f"axis must be one of the mesh's {mesh.axis_names}; got {axis!r}")
    # Of axes of type Auto: of Explicit ones derivatives would need `jax.set_mesh`.
    return Parts(Layout(Mesh(mesh.devices, mesh.axis_names), axis, length))


def _shape(held: Any) -> tuple[int, ...]:
    return tuple(held.shape if hasattr(held, "shape") else held.get_shape())
