"""Encryption of records at rest: AES-256-GCM, with everything that says whose record it is authenticated.

Format 6 of a record (see ``codec`` for the frame, its bounds and its checksum):

    head       as in format 5, format number 6
    metadata   as in format 5, readable: tenant, session, version, incarnation, request id, …
    middle     key id, NUL, nonce (12 random bytes)
    sealed     AES-GCM of the body of format 5: window, attributes and payload; with its tag of 16 bytes

The associated data are all bytes before ``sealed``. So sealed bytes that are moved under another session, another
version, another key id or another format do not open. Formats 2 and 4 are read, never written: 4 has another checksum,
2 came before attributes and seals window length u32 | window | payload. A row put back as it was before is what
``verify`` looks for.

Keys come from a :class:`KeyRing`: the first one writes, all of them read. To rotate: put a new key in front,
restart the servers, run ``reencrypt``, remove the old key. One key should seal at most 2**32 records, the usual
bound for random nonces: rotate well before. Once a store has a key, unencrypted records are refused, unless
``accept_plain`` is set for the time until ``reencrypt`` has sealed what was there.

What is not hidden: ids, versions, times and sizes.
"""

import base64
import binascii
import logging
import os
import re
import secrets
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from deltamem_vllm.errors import ConfigError, CorruptRecord
from deltamem_vllm.store import codec
from deltamem_vllm.store.protocol import Record, SessionKey

logger = logging.getLogger("vllm.deltamem")

FORMAT = 6
FIRST_FORMAT = 2
KEY_BYTES = 32
_NONCE_BYTES = 12
_TAG_BYTES = 16
_WINDOW = struct.Struct("<I")
_KEY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


def new_key() -> str:
    """A fresh key as it stands in a key file: 32 random bytes in base64."""
    return base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()


@dataclass(frozen=True, slots=True, repr=False)
class KeyRing:
    """Encryption keys by id; the first one writes.

    Attributes:
        keys: (id, 32 bytes), at least one.

    Raises:
        ConfigError: no key, an id twice, an id or key of the wrong form.
    """

    keys: tuple[tuple[str, bytes], ...]

    def __post_init__(self) -> None:
        if not self.keys:
            raise ConfigError("the key ring is empty: it needs a line 'id base64-of-32-bytes'")
        for name, key in self.keys:
            if not _KEY_ID.fullmatch(name):
                raise ConfigError("a key id has 1 to 64 letters, digits, '.', '_' or '-', and begins with no sign")
            if len(key) != KEY_BYTES:
                raise ConfigError(f"key {name!r} has {len(key)} bytes; it must have {KEY_BYTES}")
        names = [name for name, _ in self.keys]
        if len(set(names)) != len(names):
            raise ConfigError(f"key ids must differ: {', '.join(names)}")

    def __repr__(self) -> str:
        return f"KeyRing({', '.join(name for name, _ in self.keys)})"

    @classmethod
    def parse(cls, text: str, source: str) -> "KeyRing":
        """A key ring from lines ``id base64``; ``#`` starts a comment line, commas also separate.

        Args:
            source: where the text came from, for messages. The text itself is never shown.

        Raises:
            ConfigError: another form.
        """
        keys = []
        lines = [line.strip() for line in text.replace(",", "\n").splitlines()]
        for line in lines:
            if not line or line.startswith("#"):
                continue
            name, separator, encoded = line.partition(" ")
            try:
                if not separator:  # it may be a key without a name: never shown
                    raise ValueError
                keys.append((name, base64.b64decode(encoded.strip(), validate=True)))
            except (binascii.Error, ValueError):
                raise ConfigError(f"{source}: each line must be 'id base64-of-32-bytes'") from None
        try:
            return cls(tuple(keys))
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "KeyRing":
        """A key ring from a file, for example a mounted secret.

        Raises:
            ConfigError: it cannot be read, others may write to it, or it has another form.
        """
        source = f"key file {os.fspath(path)}"
        try:
            mode = Path(path).stat().st_mode
            text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ConfigError(f"{source} cannot be read: {why}") from None
        if mode & stat.S_IWOTH:
            raise ConfigError(f"{source} can be written by anyone: chmod 600 it, and make new keys")
        if mode & stat.S_IROTH:
            logger.warning("%s can be read by anyone on this machine: chmod 600 it", source)
        return cls.parse(text, source)

    @classmethod
    def from_env(cls, name: str) -> "KeyRing":
        """A key ring from an environment variable.

        Raises:
            ConfigError: it is not set, or has another form.
        """
        text = os.environ.get(name)
        if not text:
            raise ConfigError(f"environment variable {name} is not set; it must hold 'id base64-of-32-bytes'")
        return cls.parse(text, f"environment variable {name}")


class SealedCodec:
    """A ``RecordCodec`` that encrypts.

    Args:
        ring: the keys.
        accept_plain: also read unencrypted records. For the migration of a store only: whoever can write to the
            store can then replace a record by one of their own.
    """

    def __init__(self, ring: KeyRing, *, accept_plain: bool = False) -> None:
        self._writer = ring.keys[0][0]
        self._ciphers = {name: AESGCM(key) for name, key in ring.keys}
        self._accept_plain = accept_plain

    def encode(self, record: Record) -> bytes:
        """A record's bytes, different each time.

        Raises:
            CorruptRecord: the record is not valid; the message names the field.
        """
        metadata, pieces = codec.parts_of(record)
        body = b"".join(pieces)
        middle = self._writer.encode() + b"\0" + secrets.token_bytes(_NONCE_BYTES)
        bound = _associated(FORMAT, metadata, middle, len(body) + _TAG_BYTES)
        sealed = self._ciphers[self._writer].encrypt(middle[-_NONCE_BYTES:], body, bound)
        return codec.pack(FORMAT, metadata, middle, sealed)

    def decode(self, data: bytes, *, key: SessionKey | None = None) -> Record:
        """The inverse; arguments as ``codec.decode``.

        Raises:
            CorruptRecord: damaged, tampered with, of another session, sealed with a key that the ring lacks, or
                not encrypted.
        """
        form = codec.format_of(data)
        if form in codec.PLAIN_FORMATS:
            if not self._accept_plain:
                raise CorruptRecord(
                    "the record is not encrypted, and the store has a key. If it was written before there was one,"
                    " run reencrypt with accept_plain once"
                )
            return codec.decode(data, key=key)
        form = form if form in codec.SEALED_FORMATS else FORMAT
        metadata, middle, sealed = codec.unpack(data, form)
        name = _key_id(middle)
        cipher = self._ciphers.get(name)
        if cipher is None:
            raise CorruptRecord(f"sealed with key {name!r}; the key ring has {', '.join(self._ciphers)}")
        try:
            bound = _associated(form, metadata, middle, len(sealed))
            body = cipher.decrypt(middle[-_NONCE_BYTES:], sealed, bound)
        except InvalidTag:
            raise CorruptRecord(
                f"does not open with key {name!r}: the record was tampered with or moved, or the key of that name"
                " is another one"
            ) from None
        window, attributes, payload = _split_first(body) if form == FIRST_FORMAT else codec.split(body)
        return codec.record_of(metadata, window, attributes, payload, key)

    def current(self, data: bytes) -> bool:
        """Whether the record is of the present format and sealed with the key that writes. Trusts nothing: a wrong
        answer costs one verified rewrite."""
        if codec.format_of(data) != FORMAT:
            return False
        try:
            return _key_id(codec.unpack(data, FORMAT)[1]) == self._writer
        except CorruptRecord:
            return False


def _split_first(body: bytes) -> tuple[bytes, bytes, bytes]:
    """Window, no attributes, and payload of what format 2 seals."""
    if len(body) < _WINDOW.size or _WINDOW.unpack_from(body)[0] > len(body) - _WINDOW.size:
        raise CorruptRecord("the sealed window is longer than the record")
    end = _WINDOW.size + _WINDOW.unpack_from(body)[0]
    return body[_WINDOW.size : end], b"", body[end:]


def _associated(form: int, metadata: bytes, middle: bytes, sealed_bytes: int) -> bytes:
    """What the seal vouches for beside what it hides: every byte before the sealed ones."""
    return codec.header(form, metadata, len(middle), sealed_bytes) + middle


def _key_id(middle: bytes) -> str:
    name, separator, nonce = middle[:-_NONCE_BYTES], middle[-_NONCE_BYTES - 1 : -_NONCE_BYTES], middle[-_NONCE_BYTES:]
    text = name[:-1].decode("ascii", "replace")
    if separator != b"\0" or len(nonce) != _NONCE_BYTES or not _KEY_ID.fullmatch(text):
        raise CorruptRecord("the record names no key")
    return text
