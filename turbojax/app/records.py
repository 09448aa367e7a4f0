"""Records of finished pieces of work that may be stopped and run again."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turbojax.files import whole_file
from turbojax.json_reader import Anything, Array, FileName, Nullable, Object, Schema, String, read_json_lines

FIELDS: Mapping[str, Schema] = {"key": String(64), "files": Array(FileName(folders=True), 1)}


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Returns 16 letters that are the same for the same settings."""
    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:16]


class Records:
    """Finished pieces by their key, a line of JSON each: {"key": KEY, "files": [PATH, ...], ...}.

    Paths are relative to the file's folder. The file is replaced as a whole by each piece, so that it is never torn.
    Records have a checksum of their files: a piece whose files have been changed or replaced is not finished.
    """

    def __init__(self, path: Path, fields: Mapping[str, Schema] | None = None):
        """fields: those that a record has besides, where they are read; what else it has is kept."""
        self.path = path
        schema = Object({**FIELDS, **(fields or {})}, {"sha256": Nullable(String(64))}, others=Anything())
        suggestion = "it is no record of finished work: move it away, or name another output"
        lines = read_json_lines(path, schema, suggestion=suggestion) if path.exists() else ()
        self._records = {record["key"]: record for record in lines}

    def get(self, key: str) -> dict[str, Any] | None:
        """Returns the record of a piece whose files are all there as they were made; None for others."""
        record = self._records.get(key)
        made = record and self._checksum(record["files"])
        return record if record and made and made == record.get("sha256") else None

    def add(self, record: dict[str, Any]) -> None:
        """Adds a piece that is finished, in the place of an older one with its key."""
        self._records[record["key"]] = record | {"sha256": self._checksum(record["files"])}
        write_lines(self.path, list(self._records.values()))

    def _checksum(self, files: Sequence[str]) -> str | None:
        """Returns the SHA-256 of all files, None where one is not there."""
        digest = hashlib.sha256()
        try:
            for name in files:
                with (self.path.parent / name).open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError:
            return None
        return digest.hexdigest()


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes a line of JSON a record."""
    with whole_file(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
