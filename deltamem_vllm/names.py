"""Keyed names: what stands for a tenant's session outside the API process, the session service and the store.

Session ids are chosen by clients and may say who somebody is. Into vLLM's engine, its KV events and every log goes an
HMAC of them instead. The key is one secret per server (`deltamem_vllm.config.Settings.secret`), so that a name tells
nothing to whoever does not have it, and cannot be made by a client.
"""

import hmac

MIN_SECRET_BYTES = 32
LABEL_DIGITS = 12


def mac(secret: bytes, *parts: str) -> str:
    """HMAC-SHA-256 of a list of texts, 32 hex digits; no two lists run into each other."""
    message = b""
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass")
        message += len(raw).to_bytes(8, "little") + raw
    return hmac.digest(secret, message, "sha256").hex()[:32]


class Names:
    """Names under one secret.

    Args:
        secret: at least 32 bytes, the same in all processes of a server.

    Raises:
        ValueError: a shorter secret.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) < MIN_SECRET_BYTES:
            raise ValueError(f"a secret of {len(secret)} bytes: it needs {MIN_SECRET_BYTES} or more")
        self._secret = secret

    def session(self, tenant: str, session: str) -> str:
        """What the engine and KV events call a session: 32 hex digits."""
        return mac(self._secret, "session", tenant, session)

    def label(self, tenant: str, session: str) -> str:
        """What logs call it: the beginning of `session`."""
        return f"{self.session(tenant, session)[:LABEL_DIGITS]}…"

    def salt(self, kind: str, *parts: str) -> str:
        """A prefix-cache salt that no client can name."""
        return f"deltamem-{mac(self._secret, 'salt', kind, *parts)}"

    def spread(self, tenant: str, session: str, over: int) -> int:
        """A number below ``over``, always the same for a session."""
        return int(mac(self._secret, "spread", tenant, session), 16) % over
