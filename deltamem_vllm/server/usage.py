"""What history elision left out, said in a response's ``usage``: ``{"…": …, "deltamem_elided_tokens": 1234}``.

vLLM counts the tokens that it was given; those that it was not are added here, to whole responses and to the events of
streams that have a usage.
"""

import json
from typing import Any

FIELD = "deltamem_elided_tokens"


def with_elided(body: bytes, elided: int) -> bytes:
    """A JSON response with the field in its usage; unchanged where it has none or is no JSON object."""
    try:
        answer = json.loads(body)
    except ValueError:
        return body
    return json.dumps(answer, ensure_ascii=False).encode() if _add(answer, elided) else body


def with_elided_events(part: bytes, elided: int) -> bytes:
    """A part of a stream, in which each event with a usage has the field; vLLM sends whole events."""
    if b'"usage"' not in part:
        return part
    lines = part.split(b"\n")
    for number, line in enumerate(lines):
        if line.startswith(b"data: {") and b'"usage"' in line:
            lines[number] = b"data: " + with_elided(line[6:], elided)
    return b"\n".join(lines)


def _add(answer: Any, elided: int) -> bool:
    """Whether there was a usage to add it to: at the top, or in the response that an event of the Responses API, or
    the message that one of the Messages API carries."""
    if not isinstance(answer, dict):
        return False
    found = False
    for place in (answer, answer.get("response"), answer.get("message")):
        usage = place.get("usage") if isinstance(place, dict) else None
        if isinstance(usage, dict):
            usage[FIELD], found = elided, True
    return found
