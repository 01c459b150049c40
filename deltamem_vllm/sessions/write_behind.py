"""How far clients may be told of versions ahead of the store."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WriteBehind:
    """What a kill may take of the versions that clients were told of before the store had them.

    Attributes:
        seconds: while a version has waited for this long, no commit is told ahead of the store.
        versions: as many may wait, all sessions together.
        growth: versions up to this number always wait for the store: they add to what is stored, so that a quota
            may refuse them.
    """

    seconds: float = 1.0
    versions: int = 1024
    growth: int = 0
