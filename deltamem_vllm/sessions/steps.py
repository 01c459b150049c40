"""What the scheduler tells the workers in one engine step about sessions, and what they answer."""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from deltamem_vllm.sessions.quality import SampleOfMemory
from deltamem_vllm.sessions.slots import Place


@dataclass
class Seed:
    """A request starts (or starts again): what lies before its first token.

    Attributes:
        request: its id.
        block: its first block, in the block manager's numbering.
        limit: positions at or past it are read only; -1 memory off.
        write_base: False where the block came from the prefix cache, base and all.
        place: pool slot with the base state; None for the empty memory.
        fill: bytes of all layers' states ([layers, H, r, r] fp32) to put there first; None if they are there, in the
            generation that ``place`` says.
    """

    request: str
    block: int
    limit: int
    write_base: bool
    place: Place | None = None
    fill: bytes | None = None


@dataclass
class Mark:
    """Which tokens of a block are read and not written.

    Attributes:
        request: whose block it is now.
        block: in the block manager's numbering.
        bits: one bit per token of the block, the first token's lowest; None: all are written.
    """

    request: str
    block: int
    bits: bytes | None


@dataclass
class Commit:
    """A request ended: take the state after ``count`` tokens of ``block`` to ``place``, and send it back."""

    request: str
    block: int
    count: int
    place: Place


@dataclass
class Step(KVConnectorMetadata):
    """One step's orders, carried out in this order: commits, zeroing, seeds, marks."""

    commits: list[Commit] = field(default_factory=list)
    zero: list[Place] = field(default_factory=list)
    seeds: list[Seed] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    release: list[str] = field(default_factory=list)  # held requests whose blocks may be freed without a commit

    @property
    def empty(self) -> bool:
        """Whether nothing is ordered, as in most steps."""
        return not (self.commits or self.zero or self.seeds or self.marks or self.release)


@dataclass
class Answer(KVConnectorWorkerMetadata):
    """What came of one step's orders, by request.

    Attributes:
        states: states taken: per pipeline stage the adapter layers it holds and their bytes.
        errors: why an order was not followed.
        stale: requests whose order named a slot of another generation; each has an error too.
        sample: what was seen of the memory by the way.
        hook_errors: exceptions in this worker's hooks that no request was told of.
    """

    states: dict[str, list[tuple[tuple[int, ...], bytes]]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    stale: set[str] = field(default_factory=set)
    sample: SampleOfMemory = field(default_factory=SampleOfMemory)
    hook_errors: int = 0

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "Answer":
        assert isinstance(other, Answer)
        for request, parts in other.states.items():
            self.states.setdefault(request, []).extend(parts)
        self.errors.update(other.errors)
        self.stale |= other.stale
        self.sample.update(other.sample)
        self.hook_errors += other.hook_errors
        return self
