"""Profiles that `jax.profiler.trace` writes: what ran where, and for how long.

A profile is a protocol buffer, an XSpace (xplane.proto of OpenXLA's profiler). jax's own reader ends the process at
some (jax 0.12: an abort while it lists an event's statistics), so protobuf's parser reads them, by those fields of the
messages that are used.
"""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# Of each message its fields: number and type, a list where there are several. Names are bytes: nobody promises UTF-8.
MESSAGES: dict[str, dict[str, tuple[int, Any]]] = {
    "XSpace": {"planes": (1, ["XPlane"])},
    "XPlane": {
        "name": (2, bytes),
        "lines": (3, ["XLine"]),
        "events": (4, ["EventEntry"]),
        "statistics": (5, ["StatisticEntry"]),
    },
    "XLine": {"name": (2, bytes), "events": (4, ["XEvent"])},
    "XEvent": {"id": (1, int), "duration_ps": (3, int), "statistics": (4, ["XStat"])},
    "XStat": {"id": (1, int), "text": (5, bytes), "name_of": (7, int)},
    "EventEntry": {"id": (1, int), "value": (2, "XEventMetadata")},
    "XEventMetadata": {"name": (2, bytes)},
    "StatisticEntry": {"id": (1, int), "value": (2, "XStatMetadata")},
    "XStatMetadata": {"name": (2, bytes)},
}


class Event(NamedTuple):
    """Something that ran on a line (a stream, a thread) of a plane (a device, the host), and its seconds.

    op: the instruction of a compiled program that it belongs to, if the profile tells.
    """

    plane: str
    line: str
    name: str
    op: str | None
    seconds: float


def events(folder: Path) -> Iterator[Event]:
    """Yields all events of the profile that was written into a folder."""
    (file,) = folder.rglob("*.xplane.pb")
    for plane in space_type().FromString(file.read_bytes()).planes:
        names, statistics = names_by_id(plane.events), names_by_id(plane.statistics)
        for line in plane.lines:
            for event in line.events:
                op = None
                for statistic in event.statistics:
                    if statistics.get(statistic.id) == "hlo_op":
                        op = text(statistic.text) or statistics.get(statistic.name_of)
                yield Event(text(plane.name), text(line.name), names.get(event.id, ""), op, 1e-12 * event.duration_ps)


def names_by_id(entries: Iterable[Any]) -> dict[int, str]:
    """Returns the names in a table of a plane by their ids."""
    return {entry.id: text(entry.value.name) for entry in entries}


def text(name: bytes) -> str:
    """Decodes a name; bytes that are no UTF-8 become question marks."""
    return name.decode(errors="replace")


@functools.cache
def space_type() -> Any:
    """Makes the class of XSpace from the table above."""
    file = descriptor_pb2.FileDescriptorProto(name="xplane", package="turbojax")
    for message, fields in MESSAGES.items():
        declared = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            repeated = isinstance(kind, list)
            (kind,) = kind if repeated else (kind,)
            field = declared.field.add(name=name, number=number)
            field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            field.type = {int: field.TYPE_INT64, bytes: field.TYPE_BYTES}.get(kind, field.TYPE_MESSAGE)
            if field.type == field.TYPE_MESSAGE:
                field.type_name = f".turbojax.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("turbojax.XSpace"))
