"""A memory over many devices and hosts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdam._core.mesh import Layout
from jdam._memory.memory import Memory


def shard(memory: Memory, mesh: Mesh, axis: str) -> Memory:
    """The same memory with its patterns in equal parts along one axis of a mesh of devices.

    Every function of a memory takes it and gives the same results: each device compares its own
    patterns, and what they learned is put together by a log-sum-exp over the axis, at a cost in
    communication of one pull an evaluation, which does not depend on N. (Separations other than
    `LogSumExp` need all divergences on every device, N numbers.) With `Certified` each device
    has `num_candidates` of its own.

    Batches of queries can be spread over another axis of the mesh, by JAX's own means:

        mesh = jax.make_mesh((4, 2), ("patterns", "queries"))
        memory = jdam.shard(memory, mesh, "patterns")
        recall = jax.vmap(jdam.recall, (None, 0, None), spmd_axis_name="queries")

    Under `jax.distributed` every process calls this with the same memory and a mesh of all
    devices, and every process keeps the parts of its own devices.

    **Arguments:** a `memory`, the `mesh` and the name of one `axis` of it. N need not be a
    multiple of the axis' length: parts are filled up with patterns that are switched off.

    **Returns:** a memory that is fixed and has no room to grow: `append` and `remove` before. It
    cannot be learned.

    **Raises:** `TypeError` for arguments of other kinds, `ValueError` if the mesh has no such axis
    or the memory is sharded already.
    """
    if not isinstance(memory, Memory):
        raise TypeError(f"memory must be a jdam.Memory; got {type(memory).__name__}")
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh; got {type(mesh).__name__}")
    if axis not in mesh.axis_names:
        raise ValueError(f"axis must be one of the mesh's {mesh.axis_names}; got {axis!r}")
    if memory.layout is not None:
        raise ValueError(f"memory must not be sharded already; got {memory}")
    # Of axes of type Auto: of Explicit ones derivatives would need `jax.set_mesh`.
    mesh = Mesh(mesh.devices, mesh.axis_names)
    length = len(memory)
    if memory.size is not None:  # free places stay behind
        memory = memory.reserve(length)
    missing = -length % mesh.shape[axis]
    rows = NamedSharding(mesh, PartitionSpec(axis))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def fill(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        return np.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1), mode="edge")

    def place(tree: Any, sharding: NamedSharding) -> Any:
        # As each process has all of it, it can serve whichever devices are its own.
        def put(leaf: Any) -> Array:
            leaf = np.asarray(leaf)
            return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

        return jax.tree.map(put, tree)

    prior = memory.log_prior
    if missing and prior is None:
        prior = jnp.zeros(length, memory.dtype)
    if prior is not None:
        prior = jnp.pad(prior, (0, missing), constant_values=-jnp.inf)
    held = (memory.patterns, memory.prepared, memory.fingerprint)
    patterns, prepared, marks = jax.tree.map(fill, held)
    return Memory(
        place(patterns, rows),
        place(memory.geometry, everywhere),
        place(prior, rows),
        place(prepared, rows),
        place(marks, rows),
        Layout(mesh, axis, length),
        place(memory.units_of_patterns(), everywhere),
    )
