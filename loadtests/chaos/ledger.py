"""What clients were told, and whether the store bears it out.

Clients write into a `Ledger` while a campaign runs; afterwards `check` compares it with every version that is stored.
It knows nothing of servers and stores: a `Version` says which turn's memory it holds, which `cluster.stored` finds out.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["lost", "fork", "applied twice", "unknown memory"]


@dataclass(frozen=True, slots=True)
class Told:
    """An answer: this turn of this session became this version.

    Attributes:
        status: ``committed``, or ``degraded`` or ``pending``: kept by the server until the store takes it.
        sent, at: when its request was sent, for the last time, and when it was told; monotonic seconds.
    """

    session: str
    turn: int
    version: int
    status: str
    server: int
    sent: float
    at: float


@dataclass(frozen=True, slots=True)
class Version:
    """A stored version.

    Attributes:
        turn: the turn after which an undisturbed session has this memory; None: after none.
    """

    number: int
    incarnation: str
    request: str
    turn: int | None


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that clients were told and that is not so, or that nobody sent."""

    kind: Kind
    session: str
    text: str


@dataclass
class Ledger:
    """What clients were told.

    Attributes:
        told: by session, in the order in which its client was told.
        unknown: by session and turn, requests whose outcome nobody was told: the connection broke, or a server in
            its death answered 5xx. The client sent the same request again.
        other: every other answer, by kind (``409``, ``503``, ``refused connection``, …): nothing was written.
    """

    told: dict[str, list[Told]] = field(default_factory=lambda: defaultdict(list))
    unknown: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    other: Counter[str] = field(default_factory=Counter)

    @property
    def acknowledged(self) -> int:
        """Versions that clients were told of."""
        return sum(map(len, self.told.values()))

    def of(self, *statuses: str) -> int:
        """Those with one of these statuses."""
        return sum(told.status in statuses for each in self.told.values() for told in each)

    def rows(self) -> list[dict[str, Any]]:
        """Every entry as plain values, to be kept with a campaign's results."""
        return [{name: getattr(told, name) for name in Told.__slots__} for each in self.told.values() for told in each]


def check(ledger: Ledger, stored: Mapping[str, Sequence[Version]]) -> list[Problem]:
    """Everything that is wrong with what is stored, given that the store kept every version.

    * lost: a version that a client was told of is not there, or holds another turn's memory;
    * fork: a version was told twice, versions are missing in between, or a session began more than once;
    * applied twice: a turn has more versions than it had requests that may have written, or a request has two;
    * unknown memory: a version holds what no turn leaves: something was written twice, left out, or mixed up.
    """
    problems = []
    for session in sorted(ledger.told.keys() | ledger.unknown.keys() | stored.keys()):
        there = sorted(stored.get(session, ()), key=lambda version: version.number)
        found = _of_session(ledger.told.get(session, []), ledger.unknown.get(session, Counter()), there)
        problems += [Problem(kind, session, text) for kind, text in found]
    return problems


def _of_session(told: list[Told], unknown: Counter[int], there: list[Version]) -> list[tuple[Kind, str]]:
    found: list[tuple[Kind, str]] = []
    by_number = {version.number: version for version in there}
    for each in told:
        version = by_number.get(each.version)
        if version is None:
            found.append(
                ("lost", f"version {each.version} (turn {each.turn}) was told as {each.status}, and is not there")
            )
        elif version.turn != each.turn and version.turn is not None:
            found.append(
                ("lost", f"version {each.version} was told for turn {each.turn}, and holds turn {version.turn}")
            )
    for number, count in Counter(each.version for each in told).items():
        if count > 1:
            found.append(("fork", f"version {number} was told {count} times"))
    if [version.number for version in there] != list(range(1, len(there) + 1)):
        found.append(("fork", f"versions are not consecutive: {[version.number for version in there]}"))
    if len(incarnations := {version.incarnation for version in there}) > 1:
        found.append(("fork", f"the session began {len(incarnations)} times"))
    for request, count in Counter(version.request for version in there).items():
        if count > 1:
            found.append(("applied twice", f"request {request} is stored as {count} versions"))
    sent = Counter(each.turn for each in told) + unknown
    for turn, count in Counter(version.turn for version in there).items():
        if turn is None:
            numbers = [version.number for version in there if version.turn is None]
            found.append(("unknown memory", f"versions {numbers} hold what no turn leaves"))
        elif count > sent[turn]:
            found.append(("applied twice", f"turn {turn} has {count} versions of {sent[turn]} request(s)"))
    turns = [version.turn for version in there if version.turn is not None]
    if turns != sorted(turns):
        found.append(("fork", f"turns are not in their order: {turns}"))
    return found
