"""A memory in files that are mapped, not read: `jdam.open`."""

import json
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from jax import Array
from jaxtyping import Float, PyTree

from jdam._core.batching import batch_size, power_of_two
from jdam._core.compile import float_dtype
from jdam._measures.base import AnyMeasure, describe
from jdam._memory.cells import Cells, joined
from jdam._memory.encoding import OWN, name_of
from jdam._memory.files import ROWS, fields_of, read_header, whole_array
from jdam._memory.memory import Memory
from jdam.geometry import Geometry

#: Types of safetensors.
DTYPES = {
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
    "BOOL": np.bool_,
}


class Rows:
    """The rows of several arrays, one array after another, which are read when they are indexed."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = arrays
        self.starts = np.cumsum([0, *map(len, arrays)])
        self.shape: tuple[int, ...] = (int(self.starts[-1]), *arrays[0].shape[1:])
        self.dtype, self.ndim = arrays[0].dtype, arrays[0].ndim

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Return the rows at an integer, a slice, or an array of integers or of booleans."""
        num = len(self)
        if isinstance(index, tuple):
            raise IndexError(f"rows of several files take one index; got {len(index)}")
        index = np.asarray(range(num)[index] if isinstance(index, int | slice) else index)
        index = np.flatnonzero(index) if index.dtype == bool else index
        if index.size and not -num <= index.min() <= index.max() < num:
            raise IndexError(f"index {index} is out of range for {num} rows")
        index = index % num
        owner = np.searchsorted(self.starts, index, side="right") - 1
        rows = np.empty((*index.shape, *self.shape[1:]), self.dtype)
        for i in np.unique(owner):
            here = owner == i
            rows[here] = self.arrays[i][index[here] - self.starts[i]]
        return rows

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


@dataclass(frozen=True)
class MappedMemory:
    """N measures in files, of which `recall_batch`, `nearest` and `pairwise` read what they need.

    `len(memory)` is N and `memory[i]` pattern i. `memory.values` are arrays of the files, read when
    indexed. Everything else needs `jdam.load`.
    """

    paths: tuple[Path, ...]
    geometry: Geometry
    cells: Cells  # in memory
    patterns: AnyMeasure  # of arrays that are mapped, as the next ones
    prepared: PyTree
    fingerprint: PyTree
    log_prior: Any
    values: PyTree
    units: PyTree
    num: int

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: Any) -> AnyMeasure:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), self.patterns)

    def __repr__(self) -> str:
        kind = describe(jax.tree.map(lambda leaf: leaf[:1], self.patterns))
        paths = ", ".join(repr(str(path)) for path in self.paths)
        return f"MappedMemory({self.num} × {kind}, {self.geometry}, {paths})"

    @property
    def cell_log_prior(self) -> Float[Array, " C"]:
        """log Σ π over the patterns of each cell."""
        prior = None if self.log_prior is None else jnp.asarray(self.log_prior)
        return self.cells.log_prior(prior)

    def rows(self, index: np.ndarray) -> Memory:
        """Return a memory of the patterns at `index`, in slots whose number is a power of two: few
        shapes are few programs to compile. Free slots are copies whose prior is 0."""
        slots = power_of_two(len(index))
        padded = np.concatenate([index, np.full(slots - len(index), index[-1], index.dtype)])
        read = partial(jax.tree.map, lambda leaf: jnp.asarray(leaf[padded]))
        dtype = float_dtype(self.patterns)
        prior = np.zeros(slots, dtype) if self.log_prior is None else self.log_prior[padded]
        prior = np.where(np.arange(slots) < len(index), prior, -np.inf).astype(dtype)
        return Memory(
            read(self.patterns),
            self.geometry,
            jnp.asarray(prior),
            read(self.prepared),
            read(self.fingerprint),
            units=self.units,
        )


def open(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    classes: tuple[type[eqx.Module], ...] = (),
) -> MappedMemory:
    """Return the memory that `jdam.save` wrote, without reading its patterns.

    `recall_batch`, `nearest` and `pairwise` read the cells that a query needs, so that a memory may
    be larger than the machine's. Results and certificates are those of the memory itself.

    Several files are one memory, of the patterns of the first file, then of the second, and so on.
    Thus patterns that do not fit in memory together can be saved in parts, each with its cells.
    Patterns that are near to each other should be in the same part. If only some files have a
    prior, that of the others is log 1 = 0.

    **Arguments:**

    - `path`: the file of a memory with cells, `jdam.save(path, memory.indexed())`, or a list of
      such files.
    - `classes`: as in `jdam.load`.

    **Raises:** as `jdam.load`, but the checksum of the patterns is not computed; `ValueError` for a
    file without cells, for no file, and for files whose memories differ in their geometry or in
    the shapes or dtypes of their patterns and values.
    """
    classes = classes if isinstance(classes, tuple | list) else (classes,)
    paths = [path] if isinstance(path, str | os.PathLike) else path
    parts = [_one_file(Path(path), classes) for path in paths]
    if not parts:
        raise ValueError("path must be a file or a list of files; got none")
    return parts[0] if len(parts) == 1 else _joined(parts)


def _one_file(path: Path, classes: tuple[type[eqx.Module], ...]) -> MappedMemory:
    """Return the memory in one file."""
    description, _ = read_header(path)
    if not description.get("cells") or not description["cells"].get("list"):
        raise ValueError(
            f"{path} has no cells, without which all patterns would be read: "
            "jdam.save(path, jdam.load(path).indexed())"
        )
    known: dict[str, type] = {name_of(kind): kind for kind in OWN + tuple(classes)}
    mapped = _mapped_arrays(path)
    with safetensors.safe_open(path, "numpy") as file:

        def array(name: str) -> Any:
            return mapped(name) if name.split(".")[0] in ROWS else whole_array(file, name)

        fields = fields_of(description, array, known)
    size = fields.pop("size")
    num = batch_size(fields["patterns"]) if size is None else int(size)
    rows = {name: fields[name] for name in ROWS}  # free slots are left out
    return MappedMemory((path,), num=num, **fields | jax.tree.map(lambda leaf: leaf[:num], rows))


def _joined(parts: Sequence[MappedMemory]) -> MappedMemory:
    """Return the memory of the patterns of all parts."""
    if any(part.log_prior is not None for part in parts):
        parts = [replace(part, log_prior=_prior(part)) for part in parts]
    first, kind = parts[0], _kind(parts[0])
    for part in parts[1:]:
        if _kind(part) != kind:
            raise ValueError(
                "files must hold memories of one geometry, of the same shapes and dtypes; "
                f"got {first} and {part}"
            )
    lengths = np.array([len(part) for part in parts])
    starts = np.cumsum(lengths) - lengths
    shares = lengths / lengths.sum()
    norms, tolerances = np.transpose([part.units for part in parts])
    units = np.sqrt(shares @ norms**2), shares @ tolerances
    cells = [
        replace(cells, members=jnp.where(cells.members >= 0, cells.members + int(start), -1))
        for cells, start in zip((part.cells for part in parts), starts, strict=True)
    ]
    rows = {
        name: jax.tree.map(lambda *leaves: Rows(leaves), *(getattr(part, name) for part in parts))
        for name in ROWS
    }
    return MappedMemory(
        tuple(path for part in parts for path in part.paths),
        first.geometry,
        jax.tree.map(jnp.asarray, joined(cells)),
        units=tuple(jnp.asarray(unit, norms.dtype) for unit in units),
        num=int(lengths.sum()),
        **rows,
    )


def _prior(memory: MappedMemory) -> np.ndarray:
    """Return the prior of the patterns, of which each is 0 unless there is one."""
    prior: np.ndarray = memory.log_prior
    return np.zeros(len(memory), float_dtype(memory.patterns)) if prior is None else prior


def _kind(memory: MappedMemory) -> Any:
    """Return what has to be equal for memories to be joined."""
    rows = {name: getattr(memory, name) for name in ROWS}
    arrays = [(leaf.shape[1:], leaf.dtype) for leaf in jax.tree.leaves(rows)]
    parameters = [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(memory.geometry)]
    return jax.tree.structure((memory.geometry, rows)), arrays, parameters


def _mapped_arrays(path: Path) -> Callable[[str], np.ndarray]:
    """Return a function that maps the array of a name."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)  # rows of a cell are far apart: nothing is read ahead

    def array(name: str) -> np.ndarray:
        entry = header[name]
        dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"])
        first, last = entry["data_offsets"]
        numbers = np.frombuffer(mapped, dtype, (last - first) // dtype.itemsize, 8 + length + first)
        return numbers.reshape(shape)

    return array
