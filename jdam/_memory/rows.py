"""Rows of several arrays as those of one."""

from collections.abc import Sequence
from typing import Any

import numpy as np


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
