"""Going through a whole store: every tenant, every session, every kept version."""

from collections.abc import Iterator

from deltamem_vllm.errors import CorruptRecord
from deltamem_vllm.store.protocol import SessionInfo, SessionKey, StateStore, Usage

PAGE = 500


def tenants_of(store: StateStore) -> Iterator[str]:
    """Every tenant that has sessions, in order."""
    after: str | None = None
    while page := store.tenants(after, PAGE):
        yield from page
        after = page[-1]


def sessions_of(store: StateStore, tenant: str, after: str | None = None) -> Iterator[SessionInfo]:
    """Every session of a tenant, in order, from the one behind ``after``."""
    while page := store.list(tenant, after, PAGE):
        yield from page
        after = page[-1].key.session


def check_session(store: StateStore, key: SessionKey) -> tuple[int, list[str]]:
    """Read and verify all kept versions of a session.

    Returns:
        how many there are, and what is wrong with them.
    """
    versions, damages = 0, []
    for info in store.history(key, 1000):
        try:
            versions += store.get_version(key, info.version) is not None  # else it was trimmed or deleted meanwhile
        except CorruptRecord as error:
            versions += 1
            damages.append(f"tenant {key.tenant!r}, version {info.version}: {error}")
    try:
        store.get(key)
    except CorruptRecord as error:  # the row that names the newest version, where all versions are right
        if not damages:
            damages.append(f"tenant {key.tenant!r}: {error}")
    return versions, damages


def check_usage(store: StateStore, tenant: str, tries: int = 3) -> list[str]:
    """Compare what is counted for a tenant with what is there; counted again while commits come between."""
    for _ in range(tries):
        counted = store.usage(tenant)
        keys = [info.key for info in sessions_of(store, tenant)]
        there = Usage(len(keys), sum(info.bytes for key in keys for info in store.history(key, 1000)))
        if there == counted:
            return []
    return [
        f"tenant {tenant!r}: {counted.sessions} sessions and {counted.bytes} bytes are counted, {there.sessions} and "
        f"{there.bytes} are there; its quota is checked against the former"
    ]
