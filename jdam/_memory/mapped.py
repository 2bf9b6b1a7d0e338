"""A memory in a file that is mapped, not read: `jdam.open`."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
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
from jaxtyping import Float

from jdam._core.batching import batch_size, power_of_two
from jdam._core.compile import float_dtype, working_dtype
from jdam._measures.base import AnyMeasure, describe
from jdam._memory.cells import Cells
from jdam._memory.encoding import OWN, decode, name_of
from jdam._memory.files import read_header, whole_array
from jdam._memory.memory import Memory
from jdam._memory.prepared import in_dtype, prepare
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


@dataclass(frozen=True)
class MappedMemory:
    """N measures in a file, of which `recall_batch`, `nearest` and `pairwise` read what they need.

    `len(memory)` is N and `memory[i]` pattern i. `memory.values` are arrays of the file, read when
    indexed. Everything else needs `jdam.load`.
    """

    path: Path
    geometry: Geometry
    cells: Cells  # in memory
    patterns: AnyMeasure  # of arrays that are mapped, as the next ones
    prepared: Any
    fingerprint: Any
    log_prior: Any
    values: Any
    units: Any
    num: int

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: Any) -> AnyMeasure:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf[index]), self.patterns)

    def __repr__(self) -> str:
        kind = describe(jax.tree.map(lambda leaf: leaf[:1], self.patterns))
        return f"MappedMemory({self.num} × {kind}, {self.geometry}, {str(self.path)!r})"

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
    path: str | os.PathLike[str], *, classes: tuple[type[eqx.Module], ...] = ()
) -> MappedMemory:
    """Return the memory that `jdam.save` wrote, without reading its patterns.

    `recall_batch`, `nearest` and `pairwise` read the cells that a query needs, so that a memory may
    be larger than the machine's. Results and certificates are those of the memory itself.

    **Arguments:**

    - `path`: the file of a memory with cells, `jdam.save(path, memory.indexed())`.
    - `classes`: as in `jdam.load`.

    **Raises:** as `jdam.load`, but the checksum of the patterns is not computed; `ValueError` for a
    file without cells.
    """
    path, classes = Path(path), (classes if isinstance(classes, tuple | list) else (classes,))
    description, _ = read_header(path)
    if not description.get("cells") or not description["cells"].get("list"):
        raise ValueError(
            f"{path} has no cells, without which all patterns would be read: "
            "jdam.save(path, jdam.load(path).indexed())"
        )
    known: dict[str, type] = {name_of(kind): kind for kind in OWN + tuple(classes)}
    with safetensors.safe_open(path, "numpy") as file:
        read = partial(whole_array, file)
        geometry = decode(description["geometry"], read, known)
        cells = Cells(*decode(description["cells"], read, known))
        units = decode(description["units"], read, known)
        size = decode(description["size"], read, known)
    mapped = _mapped_arrays(path)
    names = ("patterns", "log_prior", "prepared", "fingerprint", "values")
    arrays = {name: decode(description.get(name), mapped, known) for name in names}
    patterns = arrays["patterns"]
    geometry = in_dtype(geometry, working_dtype(float_dtype(patterns)))
    some = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), patterns)
    expected, _ = jax.eval_shape(prepare, some, geometry)
    return MappedMemory(
        path=path,
        geometry=geometry,
        cells=cells,
        patterns=patterns,
        prepared=jax.tree.unflatten(jax.tree.structure(expected), arrays["prepared"]),
        fingerprint=arrays["fingerprint"],
        log_prior=arrays["log_prior"],
        values=arrays["values"],
        units=units,
        num=batch_size(patterns) if size is None else int(size),
    )


def _mapped_arrays(path: Path) -> Callable[[str], np.ndarray]:
    """Return a function that maps the array of a name."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))

    def array(name: str) -> np.ndarray:
        entry = header[name]
        first, last = entry["data_offsets"]
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        if first == last:
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, "r", 8 + length + first, shape)

    return array
