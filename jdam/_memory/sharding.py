"""A memory in equal parts on the devices of a mesh, of one or several hosts."""

import jax
import numpy as np
from jax.sharding import Mesh

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
    layout = layout_of(mesh, axis, len(memory))
    # Each process has the whole memory, from which it serves its own devices.
    rows = (memory.patterns, memory.prepared, memory.fingerprint, memory.values)
    rows = jax.tree.map(lambda leaf: layout.rows(np.asarray(leaf)), rows)
    patterns, prepared, fingerprints, values = rows
    log_prior = None if memory.log_prior is None else np.asarray(memory.log_prior)
    prior = layout.prior(log_prior, memory.dtype)
    geometry, units = layout.everywhere((memory.geometry, memory.magnitudes()))
    sharded = Memory(
        patterns, geometry, prior, prepared, fingerprints, layout, units, values=values
    )
    return sharded if memory.cells is None else sharded.indexed(len(memory.cells.members))


def layout_of(mesh: Mesh, axis: str, length: int) -> Layout:
    """Return the layout of `length` patterns along an axis of a mesh.

    **Raises:** `TypeError` for what is no mesh, `ValueError` if the mesh has no such axis.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh; got {type(mesh).__name__}")
    if axis not in mesh.axis_names:
        raise ValueError(f"axis must be one of the mesh's {mesh.axis_names}; got {axis!r}")
    # The axes are of type Auto: with Explicit ones derivatives would need `jax.set_mesh`.
    return Layout(Mesh(mesh.devices, mesh.axis_names), axis, length)
