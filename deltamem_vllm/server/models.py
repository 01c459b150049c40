"""Bodies of the session API, as OpenAPI shows them."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from deltamem_vllm.policy import parse_policy

ID = r"^[A-Za-z0-9._:-]{1,128}$"
SessionID = Annotated[str, Field(pattern=ID, examples=["alice:2026"])]
Metadata = Annotated[
    dict[
        Annotated[str, Field(min_length=1, max_length=64)],
        Annotated[str, Field(max_length=512)],
    ],
    Field(max_length=16, description="The client's own, up to 16 pairs.", examples=[{"user": "alice"}]),
]
TTL = Annotated[
    float | None,
    Field(
        gt=0,
        le=1e9,
        allow_inf_nan=False,
        description="Seconds after its last change after which the session is gone; the server's --deltamem-ttl, if "
        "any, holds beside it.",
        examples=[86400],
    ),
]


def _policy(text: str | None) -> str | None:
    if text is not None:
        parse_policy(text)
    return text


_ROLE = "(system|user|assistant|tool)"
Write = Annotated[
    str | None,
    Field(
        pattern=rf"^(all|none|{_ROLE}(,{_ROLE}){{0,7}})$",
        description="Roles that are written, as in X-DeltaMem-Write, where a request has no such header.",
        examples=["system,user"],
    ),
    AfterValidator(_policy),
]


def _whole(number: Any) -> Any:
    """JSON has one kind of number: 7.0 is the integer 7."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


Version = Annotated[
    int,
    Field(ge=1, le=2**53, description="A version that the server keeps.", examples=[1]),
    BeforeValidator(_whole),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SessionCreate(_Body):
    """A session to be created, with an empty memory."""

    id: SessionID | None = Field(default=None, description="Made by the server if absent.")
    metadata: Metadata = {}
    ttl: TTL = None
    write: Write = None


class SessionUpdate(_Body):
    """What is to be replaced; what is absent stays."""

    metadata: Metadata = {}
    ttl: TTL = None
    write: Write = None


class SessionFork(_Body):
    """Where a copy is to go, and of what."""

    id: SessionID | None = Field(default=None, description="Of the copy; made by the server if absent.")
    version: Version | None = None


class SessionRollback(_Body):
    """Where to go back to."""

    version: Version


class LayerState(BaseModel):
    """Statistics of one layer's memory."""

    layer: int = Field(description="From 0, in the order of the wrapped layers.")
    norm: float = Field(description="Frobenius norm.")
    max: float = Field(description="Largest absolute entry.")


class SessionInfo(BaseModel):
    """A session as the API shows it."""

    id: str = Field(description="The session's id.", examples=["alice:2026"])
    object: Literal["session"] = "session"
    version: int = Field(description="Counts the session's commits; also its ETag.", examples=[7])
    created_at: float = Field(description="Unix seconds.")
    updated_at: float = Field(description="Unix seconds of the last commit.")
    tokens: int = Field(description="Tokens written to its memory.")
    windows: int = Field(description="Windows opened so far.")
    window_tokens: int = Field(description="Tokens of the present window.")
    state_bytes: int = Field(description="Size of its memory.")
    adapter: str = Field(description="Fingerprint of the adapter that wrote it.")
    durable: bool = Field(description="False while the store does not have the latest version.")
    lost: int = Field(
        default=0, description="Versions told `pending` or `degraded` that the store refused, since the server started."
    )
    busy: bool = Field(description="A request is writing to it right now.")
    metadata: dict[str, str] = Field(default={}, description="The client's own.")
    ttl: float | None = Field(default=None, description="Its own time to live, seconds.")
    write: str | None = Field(default=None, description="Its own write policy.")
    facts: int = Field(default=0, description="Pinned facts.")
    forked_from: str | None = Field(default=None, description="`id@version` that it was copied from.")
    state: list[LayerState] = Field(default=[], description="Its memory, layer by layer.")


class LayerMemory(LayerState):
    """One layer's memory."""

    change: float = Field(description="Norm of what the present window has changed.")
    values: list[list[list[float]]] | None = Field(
        default=None, description="Heads of rows (value) of columns (key), to 6 digits; null: not in this answer."
    )


class SessionMemory(BaseModel):
    """The memory of one version of a session."""

    id: str
    object: Literal["session.state"] = "session.state"
    version: int
    updated_at: float = Field(description="Unix seconds of this version.")
    tokens: int = Field(description="Tokens written to it.")
    heads: int = Field(description="Memories per layer.")
    rank: int = Field(description="Rows and columns of each.")
    norm: float = Field(description="Frobenius norm of all layers together.")
    layers: list[LayerMemory]
    next: int | None = Field(default=None, description="Send it as `first` for the values of further layers.")


class SessionRow(BaseModel):
    """A session, or one version of it, as the store lists it."""

    id: str
    object: Literal["session.summary", "session.version"] = "session.summary"
    version: int
    created_at: float = Field(description="Unix seconds.")
    updated_at: float = Field(description="Unix seconds of this version.")
    tokens: int = Field(description="Tokens written to its memory.")
    windows: int = Field(description="Windows opened.")
    bytes: int = Field(description="Size in the store.")


class SessionList(BaseModel):
    """A page of sessions in the order of their ids."""

    object: Literal["list"] = "list"
    data: list[SessionRow]
    first_id: str | None = None
    last_id: str | None = Field(default=None, description="Send it as `after` for the next page.")
    has_more: bool = False


class Erased(BaseModel):
    """What was erased where."""

    store_versions: int = Field(description="Versions in the store.")
    unsaved_versions: int = Field(description="Versions that waited for the store.")
    host_memory: bool = Field(description="Its memory was held in the server's.")
    device: Literal["zeroing ordered"] = Field(
        default="zeroing ordered", description="Its slots are zeroed by the engine's next step, which was ordered."
    )
    prefix_cache: Literal["unreachable"] = Field(
        default="unreachable", description="No request can use its cached blocks any more; they are overwritten by use."
    )


class SessionDeleted(BaseModel):
    """Receipt of a deletion."""

    id: str
    object: Literal["session.deleted"] = "session.deleted"
    deleted: bool = True
    erased: Erased


class ErrorInfo(BaseModel):
    """What went wrong and what to do."""

    message: str
    type: str
    param: str | None = None
    code: int


class ErrorBody(BaseModel):
    """An error in OpenAI's format."""

    error: ErrorInfo = Field(
        examples=[
            {
                "message": "session 'alice:2026' not found",
                "type": "NotFoundError",
                "param": "session_id",
                "code": 404,
            }
        ]
    )


class Fact(BaseModel):
    """A pinned fact."""

    id: str = Field(description="Names it within the session.", examples=["fact-0a1b2c3d4e5f6071"])
    object: str = "session.fact"
    text: str = Field(description="Kept word for word.", examples=["My name is Clara."])
    source: str = Field(description="Where it came from, in the client's words; `message` for a flagged message.")
    created_at: float = Field(description="Unix seconds.")
    expires_at: float | None = Field(description="Unix seconds; null: it stays.")


class Facts(BaseModel):
    """The facts of a session, oldest first."""

    object: str = "list"
    data: list[Fact]
    version: int = Field(description="The session's version.")


class NewFact(_Body):
    """A fact to pin. One whose text is pinned already keeps its id, and takes the new source and ttl."""

    text: str = Field(description="1 to 2,000 characters.")
    source: str = Field(default="", description="Up to 200 characters.")
    ttl: float | None = Field(default=None, description="Seconds that it stays; null: for good.")


class FactPinned(Fact):
    """A fact that is pinned."""

    version: int = Field(description="The session's version with it.")


class FactDeleted(BaseModel):
    """Receipt of a deletion."""

    id: str
    object: str = "session.fact.deleted"
    deleted: bool = True
    version: int = Field(description="The session's first version without it.")
    erased_at_version: int = Field(
        description="With this version no kept older version holds it any more; deleting the session erases at once."
    )
