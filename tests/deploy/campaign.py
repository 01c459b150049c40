"""Provokes alerts one cause after the other, and sees them fire and cease."""

import time
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tests.deploy.causes import Cause
from tests.deploy.live import Live
from tests.deploy.prometheus import Prometheus


@dataclass
class Campaign:
    """What was seen so far.

    Attributes:
        prometheus: that is asked.
        patience: seconds for an alert to cease in, from when all causes are gone: an hour's window, compressed, and
            half of it.
        fired: seconds from the beginning of an alert's cause until it fired.
        ceased: seconds from the end of its cause until it did not fire any more.
        wrong: what was not as it should be; a text that names the alert and its expression's values.
    """

    prometheus: Prometheus
    patience: float = 90.0
    fired: dict[str, float] = field(default_factory=dict)
    ceased: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    _ending: dict[str, float] = field(default_factory=dict)  # those that fire while their cause is gone, since when

    def provoke(self, live: Live, causes: Mapping[str, Cause]) -> None:
        """Let each cause begin while its alerts do not fire, and end once they do; the server must recover."""
        for name, cause in causes.items():
            try:
                self._provoke(live, name, cause)
                live.recover()
            except Exception:  # the others are worth a look all the same
                self.wrong.append(f"{name}: {traceback.format_exc()}")

    def settle(self) -> None:
        """Wait until all of them have ceased, and say what was wrong.

        Raises:
            AssertionError: anything was.
        """
        begun = time.monotonic()
        while self._ending:
            time.sleep(0.1)
            self._look()
            for alert, since in list(self._ending.items()):
                if time.monotonic() > max(begun, since) + self.patience:  # later causes may have gone on with it
                    del self._ending[alert]
                    self._complain(f"fires {self.patience:.0f} s after its cause was gone", alert, self.patience)
        assert not self.wrong, "\n".join(self.wrong)

    def _provoke(self, live: Live, name: str, cause: Cause) -> None:
        end = time.monotonic() + self.patience
        while (early := self._look() & set(cause.alerts)) and time.monotonic() < end:
            time.sleep(0.1)  # another cause has made it fire
        for alert in sorted(early):
            self._complain(f"fired before its cause, {name}", alert, self.patience)
        missing = set(cause.alerts) - early
        begun = time.monotonic()
        with cause.begin(live) as again, ThreadPoolExecutor(1) as pool:
            doing = pool.submit(again)
            while missing and time.monotonic() < begun + cause.seconds:
                time.sleep(0.1)
                for alert in missing & self._look():
                    self.fired[alert] = time.monotonic() - begun
                    missing.remove(alert)
                if doing.done():
                    doing.result()
                    doing = pool.submit(again)
            doing.result()
        for alert in sorted(missing):
            seconds = time.monotonic() - begun
            self._complain(f"did not fire within {seconds:.0f} s of its cause, {name}", alert, seconds)
        self._ending |= {alert: time.monotonic() for alert in set(cause.alerts) - early - missing}

    def _look(self) -> set[str]:
        firing = self.prometheus.firing()
        for alert in set(self._ending) - firing:
            self.ceased[alert] = time.monotonic() - self._ending.pop(alert)
        return firing

    def _complain(self, what: str, alert: str, seconds: float) -> None:
        self.wrong.append(f"{alert} {what}. {self.prometheus.explain(alert, seconds)}")

    def __str__(self) -> str:
        lines = [f"{alert}: fired after {seconds:.1f} s, " for alert, seconds in self.fired.items()]
        ends = [f"ceased after {self.ceased[a]:.1f} s" if a in self.ceased else "still fires" for a in self.fired]
        return "\n".join(line + end for line, end in zip(lines, ends, strict=True))
