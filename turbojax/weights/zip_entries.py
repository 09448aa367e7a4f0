"""Where the entries of a zip file lie, for files that PyTorch wrote: uncompressed, one after another, nothing between.

A zip file says most things twice, before each entry and in the directory at its end. `zipfile` goes by the directory
and looks for an entry's bytes behind whatever lengths stand before it, so that one wrong bit there shifts all values.
Here both must agree, and an entry must end where the next one begins.
"""

import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from turbojax.errors import CheckpointError, quoted

# The records of PKWARE's APPNOTE.TXT, 4.3.6 to 4.3.16.
LOCAL = struct.Struct("<4s5H3L2H")
DESCRIPTORS = {16: struct.Struct("<4sLLL"), 24: struct.Struct("<4sLQQ")}  # by length: a crc and sizes behind an entry
CENTRAL = struct.Struct("<4s6H3L5H2L")
END64, LOCATOR64, END = struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL"), struct.Struct("<4s4H2LH")
ENCRYPTED, DESCRIBED = 1, 8  # bits of an entry's flags
ZIP64_FIELD = 1  # kind of an extra field that has the sizes which 32 bits cannot hold
MANY = 0xFFFFFFFF  # stands for them
MAX_ENTRIES = 2**16

AGAIN = "download it again"


class Stored(NamedTuple):
    """An entry's bytes in the file. crc: their CRC-32; 0 where PyTorch was asked not to compute it."""

    start: int
    size: int
    crc: int

    def check(self, data: np.ndarray) -> bool:
        """Returns True if the bytes have their CRC-32; reads them all."""
        found, step = 0, 2**24
        for at in range(self.start, self.start + self.size, step):
            found = zlib.crc32(data[at : min(at + step, self.start + self.size)].data, found)
        return self.crc in (0, found)


class _Listed(NamedTuple):
    """An entry as the directory lists it."""

    name: str
    offset: int
    flags: int
    method: int
    crc: int
    size: int


def read_entries(where: Path, data: np.ndarray) -> dict[str, Stored]:
    """Returns the entries of the zip file `where` by name, in the order of the file. data: its bytes, uint8.

    Raises CheckpointError if it is compressed, or not whole in every header; struct.error where it is cut off.
    """
    directory, count, start = _directory(where, data)
    listed = sorted(_listed(where, directory, count), key=lambda entry: entry.offset)
    if len({entry.name for entry in listed}) != len(listed):
        raise CheckpointError(f"{where} holds several entries of one name; {AGAIN}")
    if any(entry.method or entry.flags & ENCRYPTED for entry in listed):
        raise CheckpointError(
            f"{where} is a compressed zip or a TorchScript program, not a plain tensor file; "
            "write its state_dict with torch.save"
        )
    if listed[0].offset:
        raise _damaged(where, listed[0].name, "is the first and does not begin where the file does")
    following = [*(entry.offset for entry in listed[1:]), start]
    return {entry.name: _stored(where, data, entry, end) for entry, end in zip(listed, following, strict=True)}


def _damaged(where: Path, name: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where} is damaged: the zip entry {quoted(name)} {what}; {AGAIN}")


def _directory(where: Path, data: np.ndarray) -> tuple[bytes, int, int]:
    """The bytes of the directory at the file's end, its number of entries, and where it starts."""
    end = len(data) - END.size
    sign, *_, count, size, start, comment = END.unpack(data[max(end, 0) :].tobytes())
    if sign != b"PK\x05\x06" or comment:
        raise CheckpointError(f"{where} is damaged or cut off: it does not end as a zip file does; {AGAIN}")
    if end >= LOCATOR64.size and data[end - LOCATOR64.size :][:4].tobytes() == b"PK\x06\x07":
        _, _, at, _ = LOCATOR64.unpack_from(data.data, end - LOCATOR64.size)
        short, end = (count, size, start), end - LOCATOR64.size - END64.size
        sign, *_, count, size, start = END64.unpack_from(data.data, end)
        most = (0xFFFF, MANY, MANY)
        agree = all(a in (b, m) for a, b, m in zip(short, (count, size, start), most, strict=True))
        if sign != b"PK\x06\x06" or at != end or not agree:
            raise CheckpointError(f"{where} is damaged: its zip directory contradicts itself; {AGAIN}")
    if start + size != end or not 1 <= count <= MAX_ENTRIES:
        raise CheckpointError(f"{where} is damaged: its zip directory is not where it should be; {AGAIN}")
    return data[start:end].tobytes(), count, start


def _listed(where: Path, directory: bytes, count: int) -> list[_Listed]:
    entries, at = [], 0
    for _ in range(count):
        fields = CENTRAL.unpack_from(directory, at)
        sign, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment, *_, offset = fields
        name_end = at + CENTRAL.size + name_length
        extra = directory[name_end : name_end + extra_length]
        name = directory[at + CENTRAL.size : name_end].decode()
        long = iter(_zip64(extra))
        size, packed, offset = (next(long, -1) if field == MANY else field for field in (size, packed, offset))
        if sign != b"PK\x01\x02" or (packed != size and not method) or min(size, offset) < 0:
            raise _damaged(where, name, "is not listed as it should be")
        entries.append(_Listed(name, offset, flags, method, crc, size))
        at = name_end + extra_length + comment
    if at != len(directory):
        raise CheckpointError(f"{where} is damaged: its zip directory lists more than it counts; {AGAIN}")
    return entries


def _zip64(extra: bytes) -> tuple[int, ...]:
    """The numbers of 64 bits in an entry's extra fields."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == ZIP64_FIELD and at + 4 + length <= len(extra):
            return struct.unpack_from(f"<{length // 8}Q", extra, at + 4)
        at += 4 + length
    return ()


def _stored(where: Path, data: np.ndarray, entry: _Listed, following: int) -> Stored:
    """Checks an entry's own header against the directory; returns its bytes. following: where the next one begins."""
    fields = LOCAL.unpack_from(data.data, entry.offset)
    sign, _, flags, method, _, _, crc, packed, size, name_length, extra_length = fields
    name_at = entry.offset + LOCAL.size
    start = name_at + name_length + extra_length
    name = data[name_at : name_at + name_length].tobytes()
    if (sign, flags, method, name) != (b"PK\x03\x04", entry.flags, entry.method, entry.name.encode()):
        raise _damaged(where, entry.name, "has a header that the zip's directory contradicts")
    if size == packed == MANY:
        size, packed = (*_zip64(data[start - extra_length : start].tobytes()), -1, -1)[:2]
    known, end = (entry.crc, entry.size, entry.size), start + entry.size
    if (crc, packed, size) != known and not (flags & DESCRIBED and not (crc or max(packed, size, 0))):
        raise _damaged(where, entry.name, "has sizes that the zip's directory contradicts")
    if flags & DESCRIBED:
        descriptor = DESCRIPTORS.get(following - end)
        if descriptor is None or descriptor.unpack_from(data.data, end) != (b"PK\x07\x08", *known):
            raise _damaged(where, entry.name, "does not end where the next one begins")
    elif end != following:
        raise _damaged(where, entry.name, "does not end where the next one begins")
    return Stored(start, entry.size, entry.crc)
