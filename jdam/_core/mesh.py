"""Patterns in equal parts on the devices of a mesh, and what the parts tell each other.

A function of a memory that is laid out on a mesh runs once on each device, on its part of the
patterns (`jax.shard_map`), so that loops without communication end alone. What it learns there is
put together by the functions below, which do nothing for a memory in one piece.
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
from jaxtyping import Int

EXPLICIT = AxisType.Explicit


@dataclass(frozen=True)
class Layout:
    """Patterns 0 … length−1, filled up to equal parts, along one axis of a mesh."""

    mesh: Mesh
    axis: str
    length: int
    inside: bool = False  # does one device see this, its part alone?

    @property
    def parts(self) -> int:
        result: int = self.mesh.shape[self.axis]
        return result


def on_parts(function: Callable[..., Any], memory: Any, *args: Any) -> Any:
    """`function(memory, *args)` on every device; its result must be the same on all."""
    layout = memory.layout
    if any(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(args)):
        raise ValueError(
            "a sharded memory cannot be used inside jax.shard_map: call jax.vmap of the function, "
            "with the queries placed along another axis of the mesh"
        )

    def on_one(memory: Any, *args: Any) -> Any:
        return function(replace(memory, layout=replace(layout, inside=True)), *args)

    everywhere, parts = PartitionSpec(), PartitionSpec(layout.axis)
    specs = eqx.tree_at(
        lambda held: (held.geometry, held.units),
        jax.tree.map(lambda _: parts, memory),
        jax.tree.map(lambda _: everywhere, (memory.geometry, memory.units)),
    )
    mesh, axes = layout.mesh, set(layout.mesh.axis_names)
    if typed := _mesh_in_use(layout, args):
        # Queries may be spread over its other axes, along which they stay where they are.
        mesh, axes = typed, {layout.axis}
        if dict(zip(mesh.axis_names, mesh.axis_types, strict=True))[layout.axis] is EXPLICIT:
            places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
            memory = jax.tree.map(jax.reshard, memory, places)
    spread = jax.shard_map(
        on_one,
        mesh=mesh,
        in_specs=(specs, *(everywhere for _ in args)),
        out_specs=everywhere,
        axis_names=axes,
        check_vma=False,
    )
    return spread(memory, *args)


def _mesh_in_use(layout: Layout, args: Any) -> Any:
    """The mesh of `jax.set_mesh` or `jax.shard_map`, or one with `Explicit` axes that is part of
    the arguments' types."""
    context = jax.sharding.get_abstract_mesh()
    typed = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(args)]
    explicit = [mesh for mesh in typed if not mesh.empty and mesh.are_all_axes_explicit]
    meshes = [mesh for mesh in (context, *explicit) if not mesh.empty]
    return next((mesh for mesh in meshes if mesh.shape == layout.mesh.shape), None)


def on_local_shards(function: Callable[..., Any], batched: Any, args: tuple[Any, ...]) -> Any:
    """`function(*args)` of leaves of which some are `batched`, on each device for the rows that
    are there: where the batch is spread over axes of a mesh that are `Explicit` in its type."""
    marks, leaves = jax.tree.leaves(batched), jax.tree.leaves(args)
    rows = [jax.typeof(leaf) for leaf, mark in zip(leaves, marks, strict=True) if mark]
    spread = [row.sharding for row in rows if row.sharding.spec and row.sharding.spec[0]]
    if not spread:
        return function(*args)
    mesh, axes = spread[0].mesh, spread[0].spec[0]
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
    """The values of an array that may be spread over the devices of several processes."""
    if isinstance(leaf, Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf, order="C")


def in_one_piece(array: Array) -> Array:
    """The array on one device of each process."""
    spread = not isinstance(array, jax.core.Tracer) and len(array.devices()) > 1
    whole: Array = jax.device_put(on_host(array)) if spread else array
    return whole


def is_whole(memory: Any) -> bool:
    """Whether a memory is laid out on a mesh, and seen as a whole."""
    layout = getattr(memory, "layout", None)
    return layout is not None and not layout.inside


def psum(tree: Any, layout: Layout | None) -> Any:
    """The sum over parts."""
    return tree if layout is None else jax.lax.psum(tree, layout.axis)


def of_one_part(tree: Any, chosen: Array, layout: Layout | None) -> Any:
    """What the one part that is chosen has."""
    if layout is None:
        return tree
    return psum(jax.tree.map(lambda leaf: jnp.where(chosen, leaf, 0), tree), layout)


def pmin(x: Array, layout: Layout | None) -> Array:
    """The least over parts, without derivative."""
    x = jax.lax.stop_gradient(x)
    return x if layout is None else jax.lax.pmin(x, layout.axis)


def first_index(size: int, layout: Layout | None) -> Int[Array, ""] | int:
    """The index in the memory of the first of a part's patterns."""
    return 0 if layout is None else jax.lax.axis_index(layout.axis).astype(jnp.int32) * size


def all_rows(x: Array | None, layout: Layout | None) -> Any:
    """The rows of all parts in order, (N,), without the filling."""
    if layout is None or x is None:
        return x
    return jax.lax.all_gather(x, layout.axis, tiled=True)[: layout.length]


def local_rows(x: Array, size: int, layout: Layout | None) -> Array:
    """Of rows (N,), those of this part; 0 for its filling."""
    if layout is None:
        return x
    x = jnp.pad(x, (0, layout.parts * size - layout.length))
    return jax.lax.dynamic_slice(x, (first_index(size, layout),), (size,))
