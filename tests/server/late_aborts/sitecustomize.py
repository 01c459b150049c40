"""A server whose engine hears late of what is to be aborted, as on a busy machine: see `tests.server.late`."""

from tests.server.late import aborts_come_late

aborts_come_late()
