"""Every error the package raises, grouped by who must act.

    DeltaMemError
    ├── ConfigError            operator: a flag, a file or a combination is wrong; the server does not start
    │   └── AdapterError       operator: the adapter folder is not what the model or this version needs
    ├── SessionError           client: the request is wrong (HTTP 4xx)
    │   └── PreconditionFailed client: the session is not at the version that If-Match names (HTTP 412)
    ├── CapacityError          retry: right request, wrong moment (HTTP 409 or 503 with Retry-After)
    └── StoreError             storage: the durable store did not do what was asked
        ├── StaleVersion       another writer moved the session on; nothing was written
        │   └── LeaseLost      another server may write the session now; nothing was written
        ├── VersionNotKept     the version asked for is not among the kept ones (HTTP 404); nothing was written
        ├── QuotaExceeded      the tenant has no room left (HTTP 429); nothing was written
        ├── CorruptRecord      stored bytes failed verification; nothing was restored
        └── StoreUnavailable   the store cannot be reached, is full or read-only; nothing was written

Each message carries the name, the offending value and the remedy.
"""


class DeltaMemError(Exception):
    """Base of all errors raised by deltamem_vllm."""


class ConfigError(DeltaMemError):
    """The operator must act: a flag, file or combination of settings is wrong."""


class AdapterError(ConfigError):
    """The operator must act: the adapter folder cannot serve this model."""


class SessionError(DeltaMemError):
    """The client must act.

    Args:
        message: what was wrong, the value and the remedy.
        status: HTTP status, 400 to 499.
        parameter: the header or body field at fault.
    """

    def __init__(self, message: str, *, status: int = 400, parameter: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.parameter = parameter


class PreconditionFailed(SessionError):
    """The session has moved on since the client read it; nothing was changed.

    Args:
        version: the session's present one; 0 where it does not exist.
    """

    def __init__(self, message: str, *, version: int) -> None:
        super().__init__(message, status=412, parameter="If-Match")
        self.version = version


class CapacityError(DeltaMemError):
    """The client may retry after ``retry_after`` seconds; nothing was changed."""

    def __init__(self, message: str, *, status: int = 503, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


class StoreError(DeltaMemError):
    """The durable store did not do what was asked of it."""


class StaleVersion(StoreError):
    """Compare-and-set failed: another writer moved the session on, or it was deleted."""


class LeaseLost(StaleVersion):
    """Another server holds a live lease on the session: this writer's turn is over, whatever it compared with."""


class VersionNotKept(StoreError):
    """A session or version that is not in the store was to be returned to."""

    status = 404


class QuotaExceeded(StoreError):
    """The tenant's quota of sessions or bytes leaves no room for this write."""

    status = 429


class CorruptRecord(StoreError):
    """Stored bytes failed verification (checksum, format, shape, non-finite values)."""


class StoreUnavailable(StoreError):
    """The store cannot be reached, is full or read-only."""
