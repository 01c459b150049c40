"""No session id reaches a log line, whoever writes it."""

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from deltamem_vllm import redaction
from deltamem_vllm.names import Names
from deltamem_vllm.redaction import redact

ID = "canary-7f3a:x.y_z"
NAMES = Names(bytes(32))
SHOWN = NAMES.label("t", ID)

LINES = {
    "body": json.dumps({"model": "m", "session_id": ID}),
    "tight body": f'{{"session_id":"{ID}"}}',
    "body in a body": json.dumps({"input": json.dumps({"session_id": ID})}),
    "parameters": f"SamplingParams(n=1, extra_args={{'session_id': '{ID}', 'x': 1}})",
    "call": f"generate(session_id='{ID}')",
    "path": f"GET /v1/sessions/{ID} HTTP/1.1",
    "deeper path": f"/v1/sessions/{ID}/fork?x=1",
    "query": f"/v1/sessions?after={ID}&limit=5",
    "our error": f"StaleVersion: session '{ID}' is at version 3",
    "our other error": f"invalid session id '{ID}': use 1 to 128",
}


@pytest.mark.parametrize("line", LINES)
def test_ids_are_found_by_their_place(line: str) -> None:
    for label in (None, lambda each: NAMES.label("t", each)):
        cleaned = redact(LINES[line], label)
        assert ID not in cleaned
        if line != "query":
            assert (SHOWN if label else "…") in cleaned
    assert redact(LINES[line].replace("session", "thing")) == LINES[line].replace("session", "thing")


def test_ids_that_are_known_are_found_anywhere() -> None:
    assert redact(f"lost {ID}.", ids={ID}) == "lost …."
    assert redact(f"({ID},{ID}x)", ids={ID}) == f"(…,{ID}x)"
    assert redact("the session ended, as sessions do", ids={"s"}) == "the session ended, as sessions do"


def test_other_text_is_left_alone() -> None:
    for line in ("session_id: None", '"session_id": null', "POST /v1/sessions HTTP/1.1", "a session\nended", "x=''"):
        assert redact(line) == line


@pytest.fixture
def written() -> Iterator[list[str]]:
    """What is logged while redaction is on, as a handler formats it."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    before, handler = logging.getLogRecordFactory(), Keep()
    redaction.install(lambda: (lambda each: NAMES.label("t", each), {ID}))
    redaction.install()  # as a second part of ours in the same process does
    loggers = [logging.getLogger(name) for name in ("some.library", "uvicorn.access")]
    for each in loggers:
        each.addHandler(handler)
        each.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        logging.setLogRecordFactory(before)
        for each in loggers:
            each.removeHandler(handler)


def test_every_logger_is_covered(written: list[str]) -> None:
    log = logging.getLogger("some.library")
    log.info("plain %s and %d", "text", 5)
    log.debug("asked for %s", ID)
    log.info("params: %s", {"session_id": "another"})
    try:
        try:
            raise KeyError(ID)
        except KeyError as e:
            raise ValueError(f"session {ID!r} failed") from e
    except ValueError:
        log.exception("it failed")
    assert written[:2] == ["plain text and 5", f"asked for {SHOWN}"]
    assert "another" not in written[2]
    assert "Traceback" in written[3]
    assert "KeyError" in written[3]
    assert ID not in "".join(written)


def test_access_lines_keep_their_parts(written: list[str]) -> None:
    """uvicorn's formatter takes a record's arguments apart."""
    from uvicorn.logging import AccessFormatter

    handler = next(h for h in logging.getLogger("uvicorn.access").handlers if type(h).__name__ == "Keep")
    handler.setFormatter(AccessFormatter('%(client_addr)s - "%(request_line)s" %(status_code)s', use_colors=False))
    logging.getLogger("uvicorn.access").info(
        '%s - "%s %s HTTP/%s" %d', "1.2.3.4:5", "GET", f"/v1/sessions/{ID}", "1.1", 404
    )
    assert written == [f'1.2.3.4:5 - "GET /v1/sessions/{SHOWN} HTTP/1.1" 404 Not Found']


def test_a_line_that_cannot_be_looked_at_is_not_written(written: list[str]) -> None:
    class Bad:
        def __str__(self) -> str:
            raise RuntimeError(ID)

    logging.getLogger("some.library").info("it is %s", Bad())
    assert written == ["[a log line that could not be redacted]"]
    assert sys.exc_info() == (None, None, None)


def test_names_depend_on_the_secret_and_on_every_part() -> None:
    makers: list[Any] = [NAMES.session, NAMES.label, lambda t, s: NAMES.salt("none", t, s)]
    for make in makers:
        others = {make("t", "s"), make("t", "s2"), make("t2", "s"), make("ts", ""), make("", "ts")}
        assert len(others) == 5
        assert make("t", "s") == make("t", "s")
    assert Names(bytes(31) + b"x").session("t", "s") != NAMES.session("t", "s")
    assert NAMES.salt("off", "t", "") != NAMES.salt("none", "t", "")
    assert "t" * 20 not in NAMES.session("t" * 20, "s")
    with pytest.raises(ValueError, match="31 bytes"):
        Names(bytes(31))
