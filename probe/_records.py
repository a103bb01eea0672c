"""TensorBoard's record format: each event framed by its length and two masked CRC-32C checksums.

The format (TensorFlow's "TFRecord"), little-endian: uint64 length, uint32 masked CRC of the length, the bytes, uint32
masked CRC of the bytes. TensorBoard's own checksum is a Python loop over the bytes; this module takes a C one where the
package ``google-crc32c`` or ``crc32c`` is installed, and computes in NumPy otherwise.
"""

from __future__ import annotations

import functools
import importlib
import struct
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed
_SHORT = 400  # bytes: up to here a loop over the bytes is faster than NumPy's many small calls


def record(data: bytes) -> bytes:
    """`data` framed as one record of an event file."""
    checksum = _checksum()
    header = struct.pack("<Q", len(data))
    masks = struct.pack("<I", _mask(checksum(header))), struct.pack("<I", _mask(checksum(data)))
    return b"".join((header, masks[0], data, masks[1]))


def _mask(crc: int) -> int:
    """Rotate and add a constant: checksums of data that itself holds checksums stay strong."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def _checksum() -> Callable[[bytes], int]:
    """The fastest CRC-32C there is here."""
    for package, function in (("google_crc32c", "value"), ("crc32c", "crc32c")):
        try:
            found: Callable[[bytes], int] = getattr(importlib.import_module(package), function)
        except (ImportError, AttributeError):
            continue
        return found
    return crc32c


def crc32c(data: bytes) -> int:
    """CRC-32C of `data` without a C extension.

    Without its initial and final inversions a CRC is linear over GF(2): appending n zero bytes is a fixed linear map
    Z_n of the 32-bit state, and crc(a + b) = Z_len(b)(crc(a)) ^ crc(b). So 32-bit words are joined pairwise, all pairs
    at once, then pairs of pairs, in log2(n) rounds; Z of each round is the square of the one before.
    """
    if len(data) <= _SHORT:
        table = _byte_table()
        crc = 0xFFFFFFFF
        for byte in data:
            crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
        return crc ^ 0xFFFFFFFF
    padded = np.zeros(-(-len(data) // 4) * 4, np.uint8)  # leading zeros leave the state at zero
    padded[-len(data) :] = np.frombuffer(data, np.uint8)
    padded[-len(data) :][:4] ^= 0xFF  # the initial inversion
    words = padded.view("<u4").astype(np.uint32)
    rounds = 0
    while len(words) > 1:
        if len(words) % 2:
            words = np.concatenate([np.zeros(1, np.uint32), words])
        words = _append_zeros(words[0::2], rounds) ^ words[1::2]
        rounds += 1
    return int(_append_zeros(words, 0)[0]) ^ 0xFFFFFFFF


def _append_zeros(states: NDArray[np.uint32], rounds: int) -> NDArray[np.uint32]:
    """The states after 4 · 2**rounds zero bytes."""
    low, high = _zeros_tables(rounds)
    moved: NDArray[np.uint32] = low[states & 0xFFFF] ^ high[states >> 16]
    return moved


@functools.cache
def _zeros_tables(rounds: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Z of 4 · 2**rounds bytes, tabulated for the lower and the upper half of the state."""
    columns = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32), dtype=np.uint32)
    if rounds:
        columns = _append_zeros(_append_zeros(columns, rounds - 1), rounds - 1)
    else:
        table = np.array(_byte_table(), np.uint32)
        for _ in range(4):
            columns = table[columns & 0xFF] ^ (columns >> 8)
    halves = []
    for half in (columns[:16], columns[16:]):
        values = np.zeros(1, np.uint32)
        for column in half:
            values = np.concatenate([values, values ^ column])
        halves.append(values)
    return halves[0], halves[1]


@functools.cache
def _byte_table() -> tuple[int, ...]:
    """The state after one byte, for each value of that byte."""
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (_POLYNOMIAL if crc & 1 else 0)
        table.append(crc)
    return tuple(table)
