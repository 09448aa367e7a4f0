"""What is finished of work that may be stopped and run again."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbojax.errors import UserError
from turbojax.files import whole_file


def fingerprint(settings: Mapping[str, Any]) -> str:
    """The same 16 letters for the same settings."""
    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:16]


class Records:
    """Finished pieces by their key, a line of JSON each: {"key": KEY, "files": [PATH, ...], ...}.

    Paths are relative to the file's folder. The file is replaced as a whole by each piece, so that it is never torn.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            lines = path.read_text().splitlines() if path.exists() else []
            self._records = {record["key"]: record for record in map(json.loads, lines)}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path} is no record of finished work; move it away, or name another output") from error

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of a piece whose files are all there."""
        record = self._records.get(key)
        return record if record and all((self.path.parent / file).is_file() for file in record["files"]) else None

    def drop(self, name: str, value: Any) -> None:
        """Forgets the pieces whose field `name` has this value: their files are about to be replaced."""
        kept = {key: record for key, record in self._records.items() if record.get(name) != value}
        if len(kept) < len(self._records):
            self._records = kept
            write_lines(self.path, list(kept.values()))

    def add(self, record: dict[str, Any]) -> None:
        """Adds a piece that is finished, in the place of an older one with its key."""
        self._records[record["key"]] = record
        write_lines(self.path, list(self._records.values()))


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes a line of JSON a record."""
    with whole_file(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
