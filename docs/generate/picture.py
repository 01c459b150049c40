"""The drawn life of one request (docs/assets/life-of-a-request.svg), from the list of its steps.

The picture brings its own background in light and in dark, so that it is legible on any page.
"""

from dataclasses import dataclass
from html import escape

LANES = ("client", "API process", "session service", "scheduler", "worker", "store")
"""Who takes part, from left to right. Session service and scheduler are threads of the engine-core process."""


@dataclass(frozen=True)
class Step:
    """One arrow from lane to lane, or, where both are the same, one box on it. ``number`` is that of the text."""

    number: str
    start: str
    end: str
    text: str
    answer: bool = False


STEPS = (
    Step("1", "client", "API process", "POST, X-Session-ID"),
    Step("2", "API process", "API process", "tenant, policy, facts"),
    Step("3", "API process", "session service", "admit tokens"),
    Step("4", "session service", "store", "lease; the record, if it is not in host memory"),
    Step("4", "session service", "API process", "ticket and salt", answer=True),
    Step("5", "API process", "scheduler", "the request, with ticket and salt"),
    Step("6", "scheduler", "worker", "seed"),
    Step("7", "worker", "worker", "slot → first page"),
    Step("8", "worker", "worker", "layers read and write"),
    Step("8", "worker", "client", "tokens, all but the end of the answer", answer=True),
    Step("9", "scheduler", "worker", "commit"),
    Step("9", "worker", "session service", "state after the last fed token", answer=True),
    Step("10", "session service", "store", "compare and swap, one durable transaction"),
    Step("11", "session service", "API process", "outcome", answer=True),
    Step("11", "API process", "client", "end, version", answer=True),
)

_LEFT, _GAP, _TOP, _ROW, _BOX = 72, 152, 84, 46, 170
_STYLE = """
    .paper { fill: #ffffff; stroke: #d0d7de } .lane { stroke: #c4cbd3; stroke-dasharray: 2 5 }
    .head, .own { fill: #eef2f7; stroke: #8c98a6 } .engine { fill: none; stroke: #8c98a6; stroke-dasharray: 6 4 }
    text { fill: #1f2933; font: 14.5px system-ui, sans-serif } .small { font-size: 13.5px }
    .way { stroke: #2f5fb3 } .back { stroke: #2e7d4f; stroke-dasharray: 5 4 } .dot { fill: #2f5fb3 }
    .dot.b { fill: #2e7d4f } .tip { fill: #2f5fb3 } .tip.b { fill: #2e7d4f }
    .number { fill: #ffffff; font-weight: 600; font-size: 12px }
    .halo { stroke: #ffffff; stroke-width: 5px; paint-order: stroke }
    @media (prefers-color-scheme: dark) {
      .paper { fill: #1b2129; stroke: #39434f } .lane { stroke: #46515e } .head, .own { fill: #29323d; stroke: #6b7886 }
      .engine { stroke: #6b7886 } text { fill: #e3e8ee } .halo { stroke: #1b2129 }
      .way { stroke: #7fa8f0 } .back { stroke: #6fc694 } .dot, .tip { fill: #7fa8f0 } .dot.b, .tip.b { fill: #6fc694 }
      .number { fill: #12161b }
    }
"""


def svg() -> str:
    """The picture."""
    width, height = 2 * _LEFT + _GAP * (len(LANES) - 1), _TOP + _ROW * len(STEPS) + 24
    engine = (_x("session service") - 65, _x("scheduler") + 65)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="t d">',
        '<title id="t">The life of one request</title>',
        f'<desc id="d">{escape("; ".join(f"{s.number}: {s.start} to {s.end}: {s.text}" for s in STEPS))}</desc>',
        f"<style>{_STYLE}</style>",
        f'<rect class="paper" x="1" y="1" width="{width - 2}" height="{height - 2}" rx="10"/>',
        f'<rect class="engine" x="{engine[0]}" y="10" width="{engine[1] - engine[0]}" height="{height - 20}" rx="8"/>',
        f'<text class="small" x="{sum(engine) / 2}" y="26" text-anchor="middle">engine-core process</text>',
    ]
    for lane in LANES:
        x = _x(lane)
        parts.append(f'<line class="lane" x1="{x}" y1="66" x2="{x}" y2="{height - 16}"/>')
        parts.append(f'<rect class="head" x="{x - 61}" y="36" width="122" height="30" rx="6"/>')
        parts.append(f'<text x="{x}" y="56" text-anchor="middle">{escape(lane)}</text>')
    for row, step in enumerate(STEPS):
        parts += _own(step, row) if step.start == step.end else _arrow(step, row)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _x(lane: str) -> int:
    return _LEFT + _GAP * LANES.index(lane)


def _arrow(step: Step, row: int) -> list[str]:
    y, start, end = _TOP + _ROW * row + 26, _x(step.start), _x(step.end)
    way = 1 if end > start else -1
    tip = f"{end},{y} {end - 9 * way},{y - 5} {end - 9 * way},{y + 5}"
    kind, more = ("back", " b") if step.answer else ("way", "")
    return [
        f'<line class="{kind}" x1="{start}" y1="{y}" x2="{end - 8 * way}" y2="{y}" stroke-width="2"/>',
        f'<polygon class="tip{more}" points="{tip}"/>',
        *_number(step, start + 12 * way, y, more),
        f'<text class="small halo" x="{(start + end) / 2 + 6 * way}" y="{y - 11}" text-anchor="middle">'
        f"{escape(step.text)}</text>",
    ]


def _own(step: Step, row: int) -> list[str]:
    y, x = _TOP + _ROW * row, _x(step.start)
    return [
        f'<rect class="own" x="{x - _BOX / 2}" y="{y + 4}" width="{_BOX}" height="30" rx="6"/>',
        *_number(step, x - _BOX / 2, y + 19, ""),
        f'<text class="small" x="{x + 5}" y="{y + 23}" text-anchor="middle">{escape(step.text)}</text>',
    ]


def _number(step: Step, x: float, y: float, more: str) -> list[str]:
    return [
        f'<circle class="dot{more}" cx="{x}" cy="{y}" r="10"/>',
        f'<text class="number" x="{x}" y="{y + 4}" text-anchor="middle">{step.number}</text>',
    ]
