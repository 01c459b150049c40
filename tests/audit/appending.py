"""A process that appends audit entries until it is killed: ``python -m tests.audit.appending PATH``.

Prints the number of each entry once the log says that it is durable.
"""

import itertools
import sys
from pathlib import Path

from deltamem_vllm.audit.log import AuditLog
from deltamem_vllm.store.protocol import SessionKey

if __name__ == "__main__":
    log = AuditLog(Path(sys.argv[1]), bytes(32), segment_bytes=20_000)
    for number in itertools.count(1):
        log.append("commit", SessionKey("t", "s"), number, f"request-{number}").result()
        print(number, flush=True)
