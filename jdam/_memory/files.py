"""A memory in a file in the format of safetensors: a header and arrays, and no code."""

import dataclasses
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jdam._core.batching import batch_size
from jdam._core.compile import float_dtype, working_dtype
from jdam._core.mesh import on_host
from jdam._memory.cells import Cells
from jdam._memory.encoding import OWN, decode, encode, name_of
from jdam._memory.memory import Memory, check_memory
from jdam._memory.prepared import in_dtype, prepare
from jdam._memory.sharding import layout_of

#: The format in the header, and its version; newer versions are refused.
FORMAT, VERSION = "jdam", 1
#: Arrays with a row for each slot.
ROWS = ("patterns", "prepared", "fingerprint", "log_prior", "values")
#: Number of bytes that the checksum reads at once.
PIECE = 2**26
#: Limit of safetensors for the length of a header, in bytes.
LONGEST_HEADER = 100_000_000


def save(path: str | os.PathLike[str], memory: Memory) -> None:
    """Write a memory to one file, from which `jdam.load` restores it bit for bit.

    The format is that of safetensors: a header in JSON, then the arrays. The prepared arrays are
    among them, so that nothing is computed again, and there is a checksum. A file of this name is
    replaced atomically, after all is written. Arrays of a CPU are written without a copy. A sharded
    memory is written whole and can be loaded onto other devices; if these belong to several
    processes, all of them have to call this function, and the first one writes.

    **Arguments:**

    - `path`: the file.
    - `memory`: the memory.

    **Raises:** `ValueError` for a memory whose patterns changed since `indexed`; `TypeError` for
    what is no memory, for a geometry with static fields other than None, bools, numbers, strings,
    and tuples, lists or dicts of them, and for values in containers other than tuples and dicts;
    `OSError` as `open`.
    """
    check_memory(memory)
    if memory.cells is not None and memory.layout is None and bool(_was_changed(memory)):
        raise ValueError(
            "memory must have the patterns that were indexed; they were changed since: "
            "memory.indexed() again"
        )
    path = Path(os.path.realpath(path))
    arrays: dict[str, Any] = {}
    length = batch_size(memory.patterns) if memory.layout is None else len(memory)
    description = {
        "patterns": encode(memory.patterns, "patterns", arrays),
        "geometry": encode(memory.geometry, "geometry", arrays),
        "values": encode(memory.values, "values", arrays),
    }
    others = {
        "log_prior": memory.log_prior,
        "fingerprint": memory.fingerprint,
        "size": memory.size,
        "units": memory.magnitudes(),
        "prepared": jax.tree.leaves(memory.prepared),
        "cells": None if memory.layout is not None else jax.tree.leaves(memory.cells),
    }
    description |= {name: encode(value, name, arrays) for name, value in others.items()}
    host_arrays = {name: on_host(x) for name, x in arrays.items()}
    for name in host_arrays:
        if name.split(".")[0] in ROWS:  # the last parts of a sharded memory are padded
            host_arrays[name] = host_arrays[name][:length]
    text = json.dumps({"places": length, **description}, sort_keys=True)
    parts = ((name, x.shape, [x]) for name, x in sorted(host_arrays.items()))
    header = {"format": FORMAT, "version": str(VERSION), "memory": text}
    header["checksum"] = _checksum(text, parts)
    shared = memory.layout is not None and jax.process_count() > 1
    if not shared or jax.process_index() == 0:
        _write(path, host_arrays, header)
    if shared:
        multihost_utils.sync_global_devices("jdam.save")


@jax.jit
def _was_changed(memory: Memory) -> Array:
    """Return whether the patterns are others than those that were indexed."""
    cells = memory.validated().cells
    assert cells is not None
    return jnp.isnan(cells.radii).any()


def _write(path: Path, arrays: dict[str, np.ndarray], header: dict[str, str]) -> None:
    """Write the arrays and the header to a temporary file, and rename it to `path`."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.touch()
        mode = (path if path.exists() else temporary).stat().st_mode
        safetensors.numpy.save_file(arrays, temporary, header)  # copies nothing
        temporary.chmod(stat.S_IMODE(mode))  # the file is another one now
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    axis: str | None = None,
    classes: tuple[type[eqx.Module], ...] = (),
) -> Memory:
    """Return the memory that `jdam.save` wrote.

    **Arguments:**

    - `path`: the file.
    - `mesh`, `axis`: return `jdam.shard(memory, mesh, axis)`; every device reads its own part of
      the file, and the whole is never in memory.
    - `classes`: geometries and measures that are not jdam's, for memories that have them. A file
      has only names of classes, and nothing is imported or run because of a file.

    **Raises:** `ValueError`, with the reason, for a file that is damaged, cut off, written by a
    newer jdam, or no memory; for classes that are missing in `classes`; for float64 unless
    `jax_enable_x64` is set; for a mesh without such an axis. `OSError` as `open`.
    """
    path, classes = Path(path), (classes if isinstance(classes, tuple | list) else (classes,))
    if (mesh is None) != (axis is None):
        raise TypeError(f"mesh and axis go together; got mesh={mesh} and axis={axis!r}")
    description, checksum = read_header(path)
    known: dict[str, type] = {name_of(kind): kind for kind in OWN + tuple(classes)}
    try:
        with safetensors.safe_open(path, "numpy") as file:
            _check_contents(path, file, checksum)
            if mesh is None or axis is None:
                return _read(file, description, known)
            return _read_parts(file, description, known, mesh, axis)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_header(path: Path) -> tuple[dict[str, Any], tuple[str, str]]:
    """Return the description of the memory, and the pair of its text and the checksum."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        if start[8:] != b"{" or length > LONGEST_HEADER:
            cut = "it is empty or cut off" if size < 9 else "it is no safetensors file"
            raise ValueError(f"{path} is no memory that jdam.save wrote: {cut}")
        raw = start[8:] + file.read(length - 1)
    if len(raw) < length:
        raise ValueError(f"{path} is cut off: it has {size} bytes, its header alone {8 + length}")
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        end = 8 + length + max(array["data_offsets"][1] for array in header.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: its header cannot be read") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no memory that jdam.save wrote, but another safetensors file")
    if size != end:
        what = "cut off" if size < end else "damaged"
        raise ValueError(f"{path} is {what}: it has {size} bytes, and should have {end}")
    try:
        version = int(metadata["version"])
        text, checksum = metadata["memory"], metadata["checksum"]
        description = json.loads(text) if version <= VERSION else {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: its header cannot be read") from error
    if version != VERSION:
        raise ValueError(
            f"{path} was written by a newer jdam, in version {version} of the format; this one "
            f"reads version {VERSION}: update jdam"
        )
    return description, (text, checksum)


def _check_contents(path: Path, file: Any, checksum: tuple[str, str]) -> None:
    """Raise `ValueError` unless the checksum is that of the contents."""

    def pieces(name: str) -> Iterator[np.ndarray]:
        part = file.get_slice(name)
        shape = part.get_shape()
        if not shape:
            yield file.get_tensor(name)
            return
        numbers = max(1, int(np.prod(shape[1:])))
        rows = max(1, PIECE // (8 * numbers))
        for first in range(0, shape[0], rows):
            yield part[first : min(first + rows, shape[0])]

    text, expected = checksum
    names = sorted(file.keys())
    parts = ((name, file.get_slice(name).get_shape(), pieces(name)) for name in names)
    if _checksum(text, parts) != expected:
        raise ValueError(f"{path} is damaged: its checksum is not that of its contents")


def _checksum(text: str, parts: Any) -> str:
    """Return the checksum of the description and of (name, shape, pieces of the values) of all
    arrays.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name, shape, pieces in parts:
        digest.update(json.dumps([name, shape]).encode())
        for i, piece in enumerate(pieces):
            digest.update(piece.dtype.name.encode() if i == 0 else b"")
            digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _read(file: Any, description: dict[str, Any], classes: dict[str, type]) -> Memory:
    """Return the memory on one device."""
    fields = fields_of(description, partial(whole_array, file), classes)
    return _checked(Memory(**fields | {"units": None}))


def _read_parts(
    file: Any, description: dict[str, Any], classes: dict[str, type], mesh: Mesh, axis: str
) -> Memory:
    """Return the memory in equal parts along an axis of a mesh, without its free slots and its
    cells."""
    size = decode(description["size"], partial(whole_array, file), classes)
    layout = layout_of(mesh, axis, description["places"] if size is None else int(size))

    def array(name: str) -> Array:
        if name.split(".")[0] not in ROWS:
            everywhere: Array = layout.everywhere(whole_array(file, name))
            return everywhere
        _check_dtype(name, file.get_slice(name)[:1])
        return layout.rows(file.get_slice(name), fill=-np.inf if name == "log_prior" else None)

    fields = fields_of(description | {"size": None, "cells": None}, array, classes)
    memory = _checked(Memory(**fields, layout=layout))
    prior = memory.log_prior
    prior = layout.prior(None, memory.dtype) if prior is None else prior
    return dataclasses.replace(memory, log_prior=prior)


def _checked(memory: Memory) -> Memory:
    """Return the memory with patterns as its geometry checks them."""
    patterns = memory.geometry.check("patterns", memory.patterns, 1)
    return dataclasses.replace(memory, patterns=patterns)


def fields_of(
    description: dict[str, Any], array: Callable[[str], Any], classes: dict[str, type]
) -> dict[str, Any]:
    """Return the fields of the memory; `array` reads arrays by name.

    **Raises:** `ValueError` for a geometry that would prepare other arrays than those of the file.
    """
    names = ("geometry", *ROWS, "size", "units", "cells")
    # Older files have no values and no cells.
    fields = {name: decode(description.get(name), array, classes) for name in names}
    dtype = working_dtype(float_dtype(fields["patterns"]))
    geometry = fields["geometry"] = in_dtype(fields["geometry"], dtype)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        (fields["patterns"], fields["prepared"]),
    )
    expected, _ = jax.eval_shape(prepare, shapes[0], geometry)
    if jax.tree.leaves(expected) != shapes[1]:
        raise ValueError(
            f"what was prepared is not what {geometry} prepares now: store the patterns again"
        )
    fields["prepared"] = jax.tree.unflatten(jax.tree.structure(expected), fields["prepared"])
    fields["cells"] = Cells(*fields["cells"]) if fields["cells"] else None
    return fields


def whole_array(file: Any, name: str) -> Array:
    """Return the array of this name; raise `ValueError` if JAX would change its dtype."""
    value = file.get_tensor(name)
    _check_dtype(name, value)
    array: Array = jax.device_put(value)
    return array


def _check_dtype(name: str, value: np.ndarray) -> None:
    if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
        raise ValueError(
            f"{name} is {value.dtype}, for which to be loaded JAX needs "
            "jax.config.update('jax_enable_x64', True)"
        )
