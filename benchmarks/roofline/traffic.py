"""Work, and how memory moves it: 32-byte sectors of warps' requests, counted from addresses in NumPy."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

SECTOR = 32
"""Bytes that L2 moves at least."""

VECTOR = 16
"""Bytes of the longest access of a thread."""

LANES = 32


@dataclass(frozen=True)
class Work:
    """Counts of one launch or of several; sums are made with ``+``.

    Attributes:
        matrix: multiply-adds in matrix instructions, padding included.
        scalar: multiply-adds one by one, those of masked elements included.
        loaded, stored: bytes of the sectors that L2 sends and receives.
        read, written: distinct bytes of memory.
    """

    matrix: int = 0
    scalar: int = 0
    loaded: int = 0
    stored: int = 0
    read: int = 0
    written: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


class Arguments(dict):
    """Arguments by name, as attributes; tensors on the CPU as arrays where :meth:`table` asks."""

    __getattr__ = dict.__getitem__

    def table(self, name: str, row: int | None = None) -> np.ndarray:
        values = self[name].numpy()
        return values if row is None else values.reshape(-1, row)

    def size(self, *names: str) -> int:
        """Bytes of tensors."""
        return sum(self[name].numel() * self[name].element_size() for name in names)


def sectors_of(start, length):
    """Sectors that runs of ``length`` bytes from byte ``start`` on touch; none where the length is zero."""
    return np.where(np.asarray(length) > 0, (start + length - 1) // SECTOR - start // SECTOR + 1, 0)


def request_sectors(start: np.ndarray, length: int, valid: np.ndarray, rows: int) -> int:
    """Sectors of requests that take ``rows`` runs of ``length`` bytes each: what two runs share counts once.

    ``start`` are bytes; ``valid`` says which runs are moved at all.
    """
    start = np.sort(np.where(valid, start, -1).reshape(-1, rows), axis=1)
    last = np.where(start < 0, -1, (start + length - 1) // SECTOR)
    before = np.concatenate([np.full_like(last[:, :1], -1), last[:, :-1]], axis=1)
    return int((last - np.maximum(start // SECTOR - 1, before)).sum(where=start >= 0))


def one_by_one(start: np.ndarray, valid: np.ndarray, channels: np.ndarray, item: int) -> int:
    """Bytes of the sectors of requests that take 32 neighbouring positions of one channel each."""
    residues, times = np.unique(channels * item % SECTOR, return_counts=True)
    each = [request_sectors(start * item + residue, item, valid, LANES) for residue in residues]
    return SECTOR * int(np.dot(each, times))


def distinct(sectors: np.ndarray) -> int:
    """Bytes of distinct sectors."""
    if not sectors.size:
        return 0
    first = sectors.min()
    marks = np.zeros(int(sectors.max() - first) + 1, bool)
    marks[sectors - first] = True
    return SECTOR * int(np.count_nonzero(marks))


def touched_sectors(start: np.ndarray, length: int) -> np.ndarray:
    """Sectors of runs of ``length`` bytes, with repetitions."""
    at = np.minimum(np.arange(0, length + SECTOR - 1, SECTOR), length - 1)
    return ((start.reshape(-1, 1) + at) // SECTOR).ravel()


def by_block(address: np.ndarray, block: np.ndarray) -> int:
    """Bytes of the distinct sectors that each block of elements touches."""
    return SECTOR * np.unique(block << 40 | address // SECTOR).size
