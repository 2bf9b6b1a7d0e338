"""Memories whose patterns are sharded over a mesh, and the collectives between shards.

A function of a sharded memory runs once on each device, on its shard of the patterns
(`jax.shard_map`), so that loops without communication end independently. The collectives below
combine the shards' results; they are the identity for a memory without layout.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, PyTree

EXPLICIT = AxisType.Explicit


@dataclass(frozen=True)
class Layout:
    """A sharding of patterns 0 … length−1, padded to equal parts, along one axis of a mesh."""

    mesh: Mesh
    axis: str
    length: int
    inside: bool = False  # whether this is one shard, inside `jax.shard_map`

    @property
    def parts(self) -> int:
        """The number of shards."""
        result: int = self.mesh.shape[self.axis]
        return result

    @property
    def missing(self) -> int:
        """Number of rows that pad the last parts."""
        return -self.length % self.parts

    def put(self, shape: tuple[int, ...], spec: PartitionSpec, read: Callable[..., Any]) -> Array:
        """Return an array on the mesh; `read(index)` returns the part of a device."""
        return jax.make_array_from_callback(shape, NamedSharding(self.mesh, spec), read)

    def rows(self, array: Any, *, fill: float | None = None) -> Array:
        """Return `array` in parts, padded with `fill` or copies of the last row.

        `array` may be anything that is indexed by slices; each device reads its own rows only.
        """
        length = self.length
        rest = array.shape if hasattr(array, "shape") else array.get_shape()  # of safetensors
        shape = (length + self.missing, *rest[1:])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            rows = array[min(start, length - 1) : min(stop, length)][: stop - start]
            last = rows[-1:] if fill is None else np.full_like(rows[-1:], fill)
            num_stored = max(0, min(stop, length) - start)
            return np.concatenate([rows[:num_stored], *[last] * (stop - start - num_stored)])

        return self.put(shape, PartitionSpec(self.axis), part)

    def prior(self, log_prior: Any, dtype: jnp.dtype) -> Array | None:
        """Return the prior in parts, −inf for the padding; None if there is neither a prior
        nor padding.
        """
        if log_prior is None and not self.missing:
            return None
        log_prior = np.zeros(self.length, dtype) if log_prior is None else log_prior
        return self.rows(log_prior, fill=-np.inf)

    def everywhere(self, tree: PyTree) -> PyTree:
        """Return the tree with every array on every device."""

        def put(leaf: Any) -> Array:
            whole = np.asarray(leaf)
            return self.put(whole.shape, PartitionSpec(), lambda index: whole[index])

        return jax.tree.map(put, tree)


def on_parts(function: Callable[..., Any], memory: PyTree, *args: Any) -> PyTree:
    """Call `function(memory, *args)` on each device, with its shard of the memory; the result must
    be the same on all devices.

    **Raises:** `ValueError` inside of another `jax.shard_map`."""
    layout = memory.layout
    if any(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(args)):
        raise ValueError(
            "a sharded memory cannot be used inside jax.shard_map: call jax.vmap of the function, "
            "with the queries placed along another axis of the mesh"
        )

    def on_shard(memory: PyTree, *args: Any) -> PyTree:
        return function(replace(memory, layout=replace(layout, inside=True)), *args)

    replicated, sharded = PartitionSpec(), PartitionSpec(layout.axis)
    specs = eqx.tree_at(
        lambda tree: (tree.geometry, tree.units),
        jax.tree.map(lambda _: sharded, memory),
        jax.tree.map(lambda _: replicated, (memory.geometry, memory.units)),
    )
    mesh, axes = layout.mesh, set(layout.mesh.axis_names)
    if mesh_in_use := _mesh_in_use(layout, args):
        # Queries may be sharded along other axes of this mesh, and stay so.
        mesh, axes = mesh_in_use, {layout.axis}
        if dict(zip(mesh.axis_names, mesh.axis_types, strict=True))[layout.axis] is EXPLICIT:
            places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
            memory = jax.tree.map(jax.reshard, memory, places)
    mapped = jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(specs, *(replicated for _ in args)),
        out_specs=replicated,
        axis_names=axes,
        check_vma=False,
    )
    return mapped(memory, *args)


def _mesh_in_use(layout: Layout, args: PyTree) -> PyTree:
    """Return the mesh of `jax.set_mesh` or `jax.shard_map`, or one with `Explicit` axes in the
    arguments' types, if its shape is that of the layout's mesh; else None."""
    context = jax.sharding.get_abstract_mesh()
    argument_meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(args)]
    explicit = [mesh for mesh in argument_meshes if not mesh.empty and mesh.are_all_axes_explicit]
    meshes = [mesh for mesh in (context, *explicit) if not mesh.empty]
    return next((mesh for mesh in meshes if mesh.shape == layout.mesh.shape), None)


def on_local_shards(
    function: Callable[..., Any], batched: PyTree, args: tuple[PyTree, ...]
) -> PyTree:
    """Call `function(*args)`; if the leading axis of the `batched` leaves is sharded along
    `Explicit` axes of a mesh, call it on each device for the local rows."""
    marks, leaves = jax.tree.leaves(batched), jax.tree.leaves(args)
    rows = [jax.typeof(leaf) for leaf, mark in zip(leaves, marks, strict=True) if mark]
    shardings = [row.sharding for row in rows if row.sharding.spec and row.sharding.spec[0]]
    if not shardings:
        return function(*args)
    mesh, axes = shardings[0].mesh, shardings[0].spec[0]
    specs = jax.tree.map(lambda mark: PartitionSpec(axes) if mark else PartitionSpec(), batched)
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    args = jax.tree.map(jax.reshard, args, places)
    names = {axes} if isinstance(axes, str) else set(axes)
    local = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=specs,
        out_specs=PartitionSpec(axes),
        axis_names=names,
        check_vma=False,
    )
    return local(*args)


def on_host(leaf: Any) -> np.ndarray:
    """Return the values of an array, gathered from all processes if need be."""
    if isinstance(leaf, Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf, order="C")


def in_one_piece(array: Array) -> Array:
    """Return the array on one device of each process."""
    sharded = not isinstance(array, jax.core.Tracer) and len(array.devices()) > 1
    whole: Array = jax.device_put(on_host(array)) if sharded else array
    return whole


def is_whole(memory: PyTree) -> bool:
    """Return whether the memory is sharded, and seen from outside of `jax.shard_map`."""
    layout = getattr(memory, "layout", None)
    return layout is not None and not layout.inside


def psum(tree: PyTree, layout: Layout | None) -> PyTree:
    """Sum over shards."""
    return tree if layout is None else jax.lax.psum(tree, layout.axis)


def of_one_part(tree: PyTree, chosen: Array, layout: Layout | None) -> PyTree:
    """Return the tree of the one shard for which `chosen` holds."""
    if layout is None:
        return tree
    return psum(jax.tree.map(lambda leaf: jnp.where(chosen, leaf, 0), tree), layout)


def pmin(x: Array, layout: Layout | None) -> Array:
    """Return the minimum over shards, without derivative."""
    x = jax.lax.stop_gradient(x)
    return x if layout is None else jax.lax.pmin(x, layout.axis)


def first_index(size: int, layout: Layout | None) -> Int[Array, ""] | int:
    """Return the index in the memory of the shard's first pattern."""
    return 0 if layout is None else jax.lax.axis_index(layout.axis).astype(jnp.int32) * size


def all_parts(tree: PyTree, layout: Layout) -> PyTree:
    """Gather the trees of all shards; leaves lead with (P,)."""
    index = jax.lax.axis_index(layout.axis)

    def own(leaf: Array) -> Array:
        return jnp.zeros((layout.parts, *leaf.shape), leaf.dtype).at[index].set(leaf)

    # `psum` sums all leaves in one communication.
    return psum(jax.tree.map(own, tree), layout)


def all_rows(x: Array | None, layout: Layout | None) -> PyTree:
    """Gather the rows of all shards in order, (N,), without padding."""
    if layout is None or x is None:
        return x
    return jax.lax.all_gather(x, layout.axis, tiled=True)[: layout.length]


def local_rows(x: Array, size: int, layout: Layout | None) -> Array:
    """Return the shard's part of rows (N,), with 0 for padding."""
    if layout is None:
        return x
    x = jnp.pad(x, (0, layout.parts * size - layout.length))
    return jax.lax.dynamic_slice(x, (first_index(size, layout),), (size,))
