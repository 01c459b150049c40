"""Which state lies in which slot of the device's session pool. Decided by the scheduler, carried out by workers.

The pool is a cache of states by content: a slot is found by the digest of the state in it, and a state that is in no
slot is sent along with the request that needs it. So a pool far smaller than the number of sessions only costs
copies; no request ever waits for a slot.
"""

from collections import OrderedDict


class SlotTable:
    """Slots, least recently used first.

    Args:
        slots: size of the pool.
    """

    def __init__(self, slots: int) -> None:
        self._free = list(range(slots - 1, -1, -1))
        self._by_digest: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_digest)

    def find(self, digest: str) -> int | None:
        """The slot that holds a state; becomes the most recently used."""
        slot = self._by_digest.get(digest)
        if slot is not None:
            self._by_digest.move_to_end(digest)
        return slot

    def take(self, name: str) -> int:
        """A slot for a state about to be written there, under a digest or a name to be renamed later.

        Takes the least recently used one when none is free; its old content is overwritten.
        """
        if (old := self._by_digest.pop(name, None)) is not None:
            slot = old
        elif self._free:
            slot = self._free.pop()
        else:
            _, slot = self._by_digest.popitem(last=False)
        self._by_digest[name] = slot
        return slot

    def rename(self, name: str, digest: str) -> None:
        """A state written under a provisional name turned out to have this digest."""
        slot = self._by_digest.pop(name, None)
        if slot is None:  # evicted meanwhile
            return
        if digest in self._by_digest:  # the same state is there already
            self._free.append(slot)
        else:
            self._by_digest[digest] = slot

    def drop(self, name: str) -> int | None:
        """Free a state's slot; returns it so that it can be zeroed, or None if the state had none."""
        slot = self._by_digest.pop(name, None)
        if slot is not None:
            self._free.append(slot)
        return slot
