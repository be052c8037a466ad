"""Charts of a report as inline SVG. Colours are the CSS variables of the page."""

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _WIDE = 640, 960
_LABEL = 76
_CHARACTER = 8
"""About as wide as one of a system's name: a longer name takes room from the chart."""
_RIGHT = 56


def dots(
    means: Mapping[str, float], intervals: Mapping[str, Sequence[float]], colours: Mapping[str, str]
) -> str:
    """One row a system: its mean as a dot, its interval as a bar; the axis begins at 0."""
    row, top = 34, 8
    height = top + row * len(means) + 26
    limit = _round_up(max(high for _, high in intervals.values()))
    label = max(_LABEL, 10 + _CHARACTER * max(map(len, means)))
    span = _WIDTH - label - _RIGHT

    def x(value: float) -> float:
        return label + span * value / limit

    drawn = []
    for tick in _ticks(limit):
        drawn.append(_line(x(tick), top, x(tick), height - 22, "grid"))
        drawn.append(_text(x(tick), height - 6, f"{tick:g}", "tick", "middle"))
    for number, (system, mean) in enumerate(means.items()):
        y = top + row * (number + 0.5)
        low, high = intervals[system]
        colour = colours[system]
        drawn.append(_text(label - 10, y + 5, system, "name", "end"))
        drawn.append(
            f'<rect x="{x(low):.1f}" y="{y - 5:.1f}" width="{max(x(high) - x(low), 1):.1f}" '
            f'height="10" rx="5" fill="{colour}" opacity=".28"/>'
        )
        drawn.append(f'<circle cx="{x(mean):.1f}" cy="{y:.1f}" r="6" fill="{colour}"/>')
        drawn.append(_text(x(high) + 9, y + 5, f"{mean:.3f}", "value", "start"))
    return _svg(_WIDTH, height, drawn, f"means and 95 % intervals of {', '.join(means)}")


def waterfall(changes: Sequence[float]) -> str:
    """The change of every query, sorted: what fell on the left, what rose on the right."""
    height, left, bottom = 200, 56, 24
    limit = _round_up(max(0.05, *(abs(change) for change in changes)))
    middle, half = (height - bottom) / 2, (height - bottom) / 2 - 8
    width = (_WIDE - left - 4) / len(changes)
    drawn = []
    for tick in (-limit, 0.0, limit):
        y = middle - half * tick / limit
        drawn.append(_line(left, y, _WIDE, y, "axis" if tick == 0 else "grid"))
        drawn.append(_text(left - 8, y + 4, f"{tick:+g}" if tick else "0", "tick", "end"))
    for number, change in enumerate(changes):
        size = abs(change) / limit * half
        y = middle - size if change > 0 else middle
        colour = "var(--good)" if change > 0 else "var(--bad)"
        drawn.append(
            f'<rect x="{left + width * number:.2f}" y="{y:.1f}" height="{size:.1f}" '
            f'width="{max(width * 0.86, 0.6):.2f}" fill="{colour}"/>'
        )
    drawn.append(_text(left, height - 4, "queries that lost", "tick", "start"))
    drawn.append(_text(_WIDE - 4, height - 4, "queries that gained", "tick", "end"))
    return _svg(_WIDE, height, drawn, "change of nDCG@10 of every query, sorted")


def curve(points: Sequence[tuple[float, float]]) -> str:
    """(step, loss): a thin line through means of at most 400 runs of steps, a bold one of 40."""
    lines = ((_means(points, 400), 1, 0.4), (_means(points, 40), 2.5, 1))
    return _by_step(points, lines, None, "training loss by step")


def scores(points: Sequence[tuple[float, float]]) -> str:
    """(step, score): a line through all of them, and a dot at the first of the best."""
    best = max(points, key=lambda point: (point[1], -point[0]))
    return _by_step(points, ((points, 2.5, 1),), best, "dev score by step")


def _by_step(
    points: Sequence[tuple[float, float]],
    lines: Sequence[tuple[Sequence[tuple[float, float]], float, float]],
    marked: tuple[float, float] | None,
    label: str,
) -> str:
    """Lines, each with its width and opacity, over the steps of `points`."""
    height, left, bottom = 220, 56, 24
    values = [value for _, value in lines[0][0]]
    low, high = min(values), max(values)
    spread = (high - low) or 1.0
    first, last = points[0][0], points[-1][0]

    def x(step: float) -> float:
        return left + (_WIDE - left - 8) * (step - first) / ((last - first) or 1.0)

    def y(value: float) -> float:
        return 10 + (height - bottom - 20) * (high - value) / spread

    drawn = []
    for tick in (low, (low + high) / 2, high):
        drawn.append(_line(left, y(tick), _WIDE, y(tick), "grid"))
        drawn.append(_text(left - 8, y(tick) + 4, f"{tick:.3g}", "tick", "end"))
    for line, width, opacity in lines:
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line)
        drawn.append(
            f'<polyline points="{path}" fill="none" stroke="var(--s2)" '
            f'stroke-width="{width}" opacity="{opacity}"/>'
        )
    if marked is not None:
        step, value = marked
        drawn.append(f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="6" fill="var(--s2)"/>')
        # Towards the middle of the chart, where there is room.
        side, gap = ("start", 10) if step < (first + last) / 2 else ("end", -10)
        said = f"{value:.3f} at step {step:g}"
        drawn.append(_text(x(step) + gap, y(value) + 20, said, "value", side))
    drawn.append(_text(left, height - 4, f"step {first:g}", "tick", "start"))
    drawn.append(_text(_WIDE - 4, height - 4, f"step {last:g}", "tick", "end"))
    return _svg(_WIDE, height, drawn, label)


def _means(points: Sequence[tuple[float, float]], runs: int) -> list[tuple[float, float]]:
    size = -(-len(points) // runs)
    pieces = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(step for step, _ in piece) / len(piece), sum(loss for _, loss in piece) / len(piece))
        for piece in pieces
    ]


def _svg(width: float, height: float, drawn: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
        f"{''.join(drawn)}</svg>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, style: str, anchor: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{style}" {place}>{escape(text)}</text>'


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten, no more than 1 (all measures end there)."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    steps = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
    return min(1.0, next(step * power for step in steps if step * power >= value * (1 - 1e-9)))


def _ticks(limit: float) -> list[float]:
    return [round(limit * step / 4, 6) for step in range(5)]
