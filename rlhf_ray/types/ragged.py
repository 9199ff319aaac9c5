"""Rows of different lengths in flat arrays, and what consists of such rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
Message = dict[str, str]
"""One turn of a conversation: `{"role": ..., "content": ...}`."""
Metrics = dict[str, float]
"""Names of METRICS as in the documentation (`policy/loss`, `kl/mean`, ...) -> value."""

CACHED = 1 << 16
"""Values that are compared at a time."""


@dataclass(frozen=True)
class Ragged:
    """B rows of different lengths in one flat array.

    Fields:
        values: [sum of lengths]
        offsets: [B + 1] int64, `offsets[0] == 0`; row i is `values[offsets[i]:offsets[i + 1]]`.
    """

    values: Array
    offsets: NDArray[np.int64]

    @classmethod
    def from_rows(cls, rows: Iterable[Sequence[float] | Array], dtype: type[np.generic]) -> Self:
        arrays = [np.asarray(row, dtype=dtype) for row in rows]
        values = np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype)
        return cls(values.astype(dtype, copy=False), offsets_of([len(row) for row in arrays]))

    @classmethod
    def from_lengths(cls, values: Array, lengths: Sequence[int] | NDArray[np.int64]) -> Self:
        offsets = offsets_of(lengths)
        if offsets[-1] != len(values):
            raise ValueError(f"lengths sum to {offsets[-1]}, but there are {len(values)} values")
        return cls(values, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Array:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[Array]:
        return iter(self._slices(np.arange(len(self))))

    def __reduce__(self) -> tuple[object, ...]:
        """Values that are all the same (versions, masks, rewards of turns mostly are) travel as one."""
        if _is_constant(self.values):
            return _rebuilt_constant, (type(self), self.values[:1].copy(), self.offsets)
        return type(self), (self.values, self.offsets)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def row_ids(self) -> NDArray[np.int64]:
        """[sum of lengths] the row that each value belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def masked(self, keep: NDArray[np.bool_]) -> Ragged:
        """The values [sum of lengths] where `keep` is True; rows become shorter, perhaps empty."""
        kept = np.bincount(self.row_ids[keep], minlength=len(self))
        return Ragged.from_lengths(self.values[keep], kept)

    def with_values(self, values: Array) -> Ragged:
        """The same rows with other values of the same total length."""
        return Ragged.from_lengths(values, self.lengths)

    def filled(self, value: np.generic) -> Ragged:
        """The same rows with one value everywhere, which takes the room of one; read-only."""
        return Ragged(np.broadcast_to(value, self.values.shape), self.offsets)

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> Ragged:
        rows = np.asarray(rows, dtype=np.int64)
        return self._put_together(self._slices(rows), self.lengths[rows])

    def _slices(self, rows: NDArray[np.int64]) -> list[Array]:
        # Plain numbers: as indices they are several times as fast as numpy's own.
        starts, ends = self.offsets[rows].tolist(), self.offsets[rows + 1].tolist()
        return [self.values[start:end] for start, end in zip(starts, ends, strict=True)]

    def _put_together(self, slices: list[Array], lengths: NDArray[np.int64]) -> Ragged:
        values = np.concatenate([self.values[:0], *slices], dtype=self.values.dtype)
        return Ragged.from_lengths(values, lengths)

    @staticmethod
    def concat(parts: Sequence[Ragged]) -> Ragged:
        lengths = np.concatenate([part.lengths for part in parts])
        return Ragged.from_lengths(np.concatenate([part.values for part in parts]), lengths)

    @staticmethod
    def join(left: Ragged, right: Ragged) -> Ragged:
        """Row by row, left followed by right (a prompt and its response)."""
        slices = [row for pair in zip(left, right, strict=True) for row in pair]
        return left._put_together(slices, left.lengths + right.lengths)


def _is_constant(values: Array) -> bool:
    """Whether all are the same, to the last bit."""
    if not len(values) or values.strides == (0,):
        return len(values) > 0
    bits = np.ascontiguousarray(values).view(f"u{values.itemsize}")
    blocks = (bits[start : start + CACHED] for start in range(0, len(bits), CACHED))
    return all((block == bits[0]).all() for block in blocks)


def _rebuilt_constant(kind: type[Ragged], value: Array, offsets: NDArray[np.int64]) -> Ragged:
    return kind(np.broadcast_to(value, (int(offsets[-1]),)), offsets)


def offsets_of(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int64)


class Rows:
    """Mixin for frozen dataclasses with one entry a row in every field: a `Ragged`, an array or a tuple."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))  # type: ignore[arg-type]

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> Self:
        """The given rows, in the given order."""
        columns = {f.name: _select(getattr(self, f.name), rows) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **columns)  # type: ignore[type-var]

    @classmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        return cls(**{name: _concat([getattr(part, name) for part in parts]) for name in names})


def _select(column: Ragged | Array | tuple[object, ...], rows: Sequence[int] | NDArray[np.int64]) -> object:
    if isinstance(column, tuple):
        return tuple(column[int(row)] for row in rows)
    if isinstance(column, Ragged):
        return column.select(rows)
    return column[np.asarray(rows, dtype=np.int64)]


def _concat(columns: Sequence[Ragged] | Sequence[Array] | Sequence[tuple[object, ...]]) -> object:
    if isinstance(columns[0], Ragged):
        return Ragged.concat(columns)  # type: ignore[arg-type]
    if isinstance(columns[0], tuple):
        return tuple(entry for column in columns for entry in column)
    return np.concatenate(columns)  # type: ignore[arg-type]
