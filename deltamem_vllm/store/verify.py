"""What a store checks of a row that it has read, beside what the codec checks of a record.

* Row and record must be the same version of the same life: a record of the same session that was put back
  into a newer row is refused.
* **Version floor**: a session that this process has seen at version n is not accepted below n in the same
  life, even if row and record agree. This is what a rollback of the file, or of one row, under a running
  server looks like. It does not outlast the process, and a session that was deleted and created again has
  another life.
"""

import threading
from collections import OrderedDict

from deltamem_vllm.errors import CorruptRecord
from deltamem_vllm.store.codec import MAX_RECORD_BYTES, RecordCodec
from deltamem_vllm.store.protocol import Record, SessionInfo, SessionKey

MAX_FLOORS = 65_536
"""Sessions whose floor is remembered, the latest used; about 300 bytes each."""

Row = tuple[int, str, str]
"""(version, incarnation, request_id)."""


class Verifier:
    """Turns rows into records for one store.

    Args:
        codec: how records are stored.
        where: the store's name for messages, without a password.
    """

    def __init__(self, codec: RecordCodec, where: str) -> None:
        self.codec = codec
        self.where = where
        self._floors: OrderedDict[SessionKey, tuple[str, int]] = OrderedDict()
        self._lock = threading.Lock()

    def floor(self, key: SessionKey) -> tuple[str, int] | None:
        """(incarnation, version) below which nothing is accepted. Take it *before* reading the row: a
        commit may come in between."""
        return self._floors.get(key)  # one look-up, which needs no lock

    def seen(self, key: SessionKey, incarnation: str, version: int) -> None:
        """This version was stored or read."""
        floors = self._floors
        with self._lock:
            last = floors.pop(key, None)
            if last is not None and last[0] == incarnation and last[1] > version:
                version = last[1]
            floors[key] = (incarnation, version)
            if len(floors) > MAX_FLOORS:
                floors.popitem(last=False)

    def forget(self, key: SessionKey) -> None:
        """The session was deleted."""
        with self._lock:
            self._floors.pop(key, None)

    def newest(self, key: SessionKey, row: Row, blob: bytes | None, floor: tuple[str, int] | None) -> Record:
        """The record of a session's newest row.

        Args:
            row: what the row says.
            blob: the stored bytes; None: missing or too long.
            floor: what :meth:`floor` said before the row was read.

        Raises:
            CorruptRecord: with the store's name and the session.
        """
        record = self.version(key, row, blob)
        if floor is not None and floor[0] == record.incarnation and record.version < floor[1]:
            raise CorruptRecord(
                f"session {key.session!r} in {self.where}: version {record.version} is stored, this process has seen"
                f" version {floor[1]}: the store was rolled back. If you restored a backup, restart the server"
            )
        self.seen(key, record.incarnation, record.version)
        return record

    def version(self, key: SessionKey, row: Row, blob: bytes | None) -> Record:
        """The record of any kept row; arguments and errors as :meth:`newest`."""
        try:
            if blob is None or len(blob) > MAX_RECORD_BYTES:
                raise CorruptRecord(f"the record is missing, or over the limit of {MAX_RECORD_BYTES} bytes")
            record = self.codec.decode(blob, key=key)
            if (record.version, record.incarnation, record.request_id) != row:
                raise CorruptRecord("row and record are of different versions")
        except CorruptRecord as error:
            raise CorruptRecord(f"session {key.session!r} in {self.where}: {error}") from error
        return record

    def sealed_again(self, key: SessionKey, row: Row, blob: bytes) -> bytes | None:
        """The record in the present format, sealed with the newest key; None if it is already.

        Raises:
            CorruptRecord: as :meth:`newest`.
        """
        return None if self.codec.current(blob) else self.codec.encode(self.version(key, row, blob))


def info_of(record: Record, size: int) -> SessionInfo:
    """A record's listing entry."""
    return SessionInfo(
        key=record.key,
        version=record.version,
        incarnation=record.incarnation,
        created_at=float(record.created_at),
        updated_at=float(record.updated_at),
        tokens=int(record.tokens),
        windows=int(record.windows),
        bytes=size,
    )
