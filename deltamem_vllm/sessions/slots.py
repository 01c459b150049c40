"""Which state lies in which slot of the device's session pool, and whose it is. Decided by the scheduler, carried out
by workers.

The pool is a cache of states by content: a slot is found by the digest of the state in it, and a state that is in no
slot is sent along with the request that needs it. So a pool far smaller than the number of sessions only costs
copies; no request ever waits for a slot.

Several owners may share a slot, because equal states have equal digests. A slot is freed, and must be zeroed, when its
last owner goes. What a slot was given out for is told by its generation, which rises with every change of content and
is never used for two slots: an order that carries another one is refused by the worker, so that a mistake can never
show a foreign state.

A state that very many sessions have, because they begin with the same words, stays in use, is never evicted and would
collect owners for as long as the server lives. So of each state only the latest owners are known. Should all of these
go before an older one does, it costs that one a copy.
"""

from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

MAX_OWNERS = 64
"""Owners of one state that are known."""
Owner = Hashable
"""A session's key, or a request's id where a deleted session's request still needs a state."""


class Place(NamedTuple):
    """A slot as it was given out: ``slot`` from 0; ``generation`` from 1, higher than all before it."""

    slot: int
    generation: int


class SlotTable:
    """Slots, least recently used first.

    Args:
        slots: size of the pool.

    Attributes:
        size: the same.
        evictions: states that made room for others.
    """

    def __init__(self, slots: int) -> None:
        self.size, self.evictions = slots, 0
        self._free = list(range(slots - 1, -1, -1))
        self._generations = [0] * slots
        self._changes = 0
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._owners: dict[str, dict[Owner, None]] = {}  # the latest one last
        self._names: dict[Owner, set[str]] = {}

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def owners(self) -> int:
        """How many own a state that is in a slot, of each state up to `MAX_OWNERS`."""
        return len(self._names)

    def find(self, digest: str, owner: Owner) -> Place | None:
        """Where a state lies; it becomes the most recently used, and ``owner`` one of its owners."""
        slot = self._slots.get(digest)
        if slot is None:
            return None
        self._slots.move_to_end(digest)
        self._own(digest, owner)
        return Place(slot, self._generations[slot])

    def take(self, name: str, owner: Owner) -> Place:
        """A slot for a state about to be written there, under a digest or a name to be renamed later.

        Takes the least recently used one when none is free; the write that the caller orders replaces all of it.
        """
        if (old := self._slots.pop(name, None)) is not None:
            slot = old
        elif self._free:
            slot = self._free.pop()
        else:
            slot = self._forget(next(iter(self._slots)))
            self.evictions += 1
        self._slots[name] = slot
        self._own(name, owner)
        return self._changed(slot)

    def rename(self, name: str, digest: str) -> Place | None:
        """A state written under a provisional name turned out to have this digest.

        Returns:
            a slot to be zeroed, where the state was in another one already; its owners now share that one.
        """
        if name not in self._slots:  # evicted, or freed with its owner, meanwhile
            return None
        owners = list(self._owners[name])
        if digest in self._slots:
            freed = self.drop(name)
            for owner in owners:
                self._own(digest, owner)
            return freed
        slot = self._forget(name)
        self._slots[digest] = slot
        for owner in owners:
            self._own(digest, owner)
        return None

    def drop(self, name: str) -> Place | None:
        """Free a state's slot, whoever owns it; returns it to be zeroed, or None if the state had none."""
        if name not in self._slots:
            return None
        slot = self._forget(name)
        self._free.append(slot)
        return self._changed(slot)

    def release(self, owner: Owner) -> list[Place]:
        """An owner goes: returns the slots that nobody owns any more, to be zeroed."""
        freed = []
        for name in self._names.pop(owner, ()):
            del self._owners[name][owner]
            if not self._owners[name] and (place := self.drop(name)) is not None:
                freed.append(place)
        return freed

    def _own(self, name: str, owner: Owner) -> None:
        owners = self._owners.setdefault(name, {})
        owners.pop(owner, None)
        owners[owner] = None
        self._names.setdefault(owner, set()).add(name)
        if len(owners) > MAX_OWNERS:
            first = next(iter(owners))
            del owners[first]
            self._disown(name, first)

    def _forget(self, name: str) -> int:
        """Take a name out, with its owners; returns its slot."""
        for owner in self._owners.pop(name):
            self._disown(name, owner)
        return self._slots.pop(name)

    def _disown(self, name: str, owner: Owner) -> None:
        if (names := self._names.get(owner)) is not None:
            names.discard(name)
            if not names:
                del self._names[owner]

    def _changed(self, slot: int) -> Place:
        self._changes += 1
        self._generations[slot] = self._changes
        return Place(slot, self._changes)
