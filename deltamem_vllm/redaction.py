"""Keeps session ids out of every log line of a server's processes, vLLM's and uvicorn's own included.

With request logging on, vLLM writes whole request bodies and sampling parameters to its log, and uvicorn writes paths;
both can hold a session id. Filters on loggers would miss the next handler, so this sits where records are made: it
chains to the log record factory, as vLLM does.

Replaced are: the ids of the request that is being served (where known); whatever stands for ``session_id`` in a dump
of a request; what follows ``/v1/sessions/`` in a path, and its query; and what our errors quote after ``session``.
"""

import logging
import re
import traceback
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote

_QUOTED = r"""(?P<quote>["'])(?P<id>(?:\\.|(?!(?P=quote)).)*)(?P=quote)"""
_FIELD = re.compile(r"""(?P<before>\bsession_id\\?["']?\s*[:=]\s*)""" + _QUOTED, re.DOTALL)
_SAID = re.compile(r"(?P<before>\bsession(?: id)? )" + _QUOTED, re.DOTALL)
_PATH = re.compile(r"""(?P<before>/v1/sessions/)(?P<id>[^/?\s"']+)""")
_QUERY = re.compile(r"""(/v1/sessions[^\s?"']*\?)[^\s"']+""")
_ESCAPED = re.compile(r"""(?P<before>\bsession_id\\+["']\s*:\s*\\+["'])(?P<id>[^"'\\]*)""")

UNNAMED = "…"

Label = Callable[[str], str]
"""From a session id to what the log calls it."""
Context = Callable[[], tuple[Label | None, Iterable[str]]]
"""How the request that is being served labels ids (None: it is not known whose), and the ids it is known to name."""


def redact(text: str, label: Label | None = None, ids: Iterable[str] = ()) -> str:
    """A text without session ids.

    Args:
        label: what stands for an id; None: ``…``.
        ids: ids to look for as words anywhere.
    """
    named = label or (lambda _: UNNAMED)

    def replace(match: "re.Match[str]") -> str:
        group = match.groupdict()
        quote = group.get("quote", "")
        if not group["id"] or group["id"].endswith(UNNAMED):  # nothing, or a label already
            return match[0]
        return f"{group['before']}{quote}{named(unquote(group['id']))}{quote}"

    if "session" in text:
        for pattern in (_FIELD, _ESCAPED, _SAID, _PATH):
            text = pattern.sub(replace, text)
        text = _QUERY.sub(rf"\g<1>{UNNAMED}", text)
    for each in ids:
        if each in text:
            text = re.sub(rf"(?<![A-Za-z0-9_-]){re.escape(each)}(?![A-Za-z0-9_-])", named(each), text)
    return text


def _nowhere() -> tuple[Label | None, Iterable[str]]:
    return None, ()


class _RedactingFactory:
    """Makes log records without ids."""

    def __init__(self, inner: Callable[..., logging.LogRecord], context: Context) -> None:
        self._inner = inner
        self.context = context

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._inner(*args, **kwargs)
        try:
            self._clean(record)
        except Exception:  # a log line must never end a request, and one that was not looked at must not be written
            record.msg, record.args = "[a log line that could not be redacted]", ()
            record.exc_info = record.exc_text = None
        return record

    def _clean(self, record: logging.LogRecord) -> None:
        label, ids = self.context()
        if record.name == "uvicorn.access" and isinstance(record.args, tuple):  # its formatter wants the parts
            record.args = tuple(redact(a, label, ids) if isinstance(a, str) else a for a in record.args)
        else:
            said = record.getMessage()
            cleaned = redact(said, label, ids)
            if cleaned != said:
                record.msg, record.args = cleaned, ()
        if record.exc_info and record.exc_info[1] is not None:
            text = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
            cleaned = redact(text, label, ids)
            if cleaned != text:
                record.exc_text = cleaned  # formatters take it in place of what they would make of exc_info


def install(context: Context | None = None) -> None:
    """Redact whatever this process logs from now on; a second call only changes the context, if it gives one."""
    factory = logging.getLogRecordFactory()
    if not isinstance(factory, _RedactingFactory):
        logging.setLogRecordFactory(_RedactingFactory(factory, context or _nowhere))
    elif context is not None:
        factory.context = context
