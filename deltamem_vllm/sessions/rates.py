"""How many requests of a tenant may write per minute: a token bucket per tenant."""

import math
import time
from collections.abc import Callable

from deltamem_vllm.errors import CapacityError


class Rates:
    """The buckets of one server. They live in the session service of its first engine, which every API process asks.

    A bucket holds a minute's worth at most and is full at first.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # what is in it, and when that was

    def spend(self, tenant: str, per_minute: int) -> None:
        """Take one write out of the tenant's bucket.

        Raises:
            CapacityError: 429; the bucket is empty.
        """
        now = self._clock()
        held, at = self._buckets.get(tenant, (float(per_minute), now))
        held = min(float(per_minute), held + (now - at) * per_minute / 60)
        if held < 1:
            self._buckets[tenant] = held, now
            raise CapacityError(
                f"the tenant's quota of {per_minute} writing requests per minute is used up: retry later, or have the "
                "operator raise commits_per_minute",
                status=429,
                retry_after=math.ceil((1 - held) * 60 / per_minute),
            )
        self._buckets[tenant] = held - 1, now
