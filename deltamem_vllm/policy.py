"""Write policies: the roles of a conversation whose messages are written to the memory."""

ROLES = ("system", "user", "assistant", "tool")
Policy = frozenset[str]
ALL: Policy = frozenset(ROLES)


def parse_policy(text: str) -> Policy:
    """Roles by name, separated by commas; ``all`` and ``none`` stand for themselves.

    Raises:
        ValueError: names the roles.
    """
    names = [name.strip().lower() for name in text.split(",")]
    if names == ["all"]:
        return ALL
    if names == ["none"]:
        return frozenset()
    if not set(names) <= ALL:
        raise ValueError(f"{text[:64]!r} is none of all, none, or some of {', '.join(ROLES)} separated by commas")
    return frozenset(names)
