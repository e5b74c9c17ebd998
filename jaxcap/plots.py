"""Charts as HTML: inline SVG for curves and bars, text beside it, so that a chart fits any width and needs no script.

The SVG is a unit square stretched over its place (0–100 both ways, strokes keep their width); labels are HTML, placed
in per cent, and so keep their size on a phone.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

MOST_POINTS = 600  # of a curve; more would only make the page heavy
TAIL = 0.005  # share of a histogram's things that its last bars may stand for

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """`points` (x, y) in rising x; a y that is not finite leaves a gap."""

    label: str
    points: Sequence[Point]
    kind: Literal["line", "faint", "dots"] = "line"


def chart(title: str, curves: Sequence[Curve], *, x_range: Point, x_label: str = "",
          marks: Sequence[tuple[float, str]] = (), from_zero: bool = False, shown: float = 1.0) -> str:
    """One chart as an HTML `<figure>`.

    Args:
      x_range: where the x axis begins and ends.
      marks: (x, name) of each stretch that begins there; drawn as upright lines with the name beside them.
      from_zero: start the y axis at 0.
      shown: share of the values that the y axis has to reach, so that a few spikes do not flatten all the rest.
    """
    curves = [curve for curve in curves if any(math.isfinite(y) for _, y in curve.points)]
    if not curves:
        return _empty(title)
    left, right = _widened(*x_range)
    ys = sorted(y for curve in curves for _, y in curve.points if math.isfinite(y))
    bottom, top = _widened(0 if from_zero else ys[0], ys[min(math.ceil(shown * len(ys)), len(ys)) - 1])
    top += 0.06 * (top - bottom)
    bottom -= 0 if from_zero else 0.06 * (top - bottom)

    def across(x):
        return 100 * (x - left) / (right - left)

    def up(y):
        return 100 * (top - y) / (top - bottom)

    y_ticks = [(up(y), text) for y, text in ticks(bottom, top, 4)]
    x_ticks = [(across(x), text) for x, text in ticks(left, right, 5)]
    marks = [(across(x), name) for x, name in marks]
    lines = "".join(f'<path class="grid" d="M0 {y:.2f}H100"/>' for y, _ in y_ticks)
    lines += "".join(f'<path class="mark" d="M{x:.2f} 0V100"/>' for x, _ in marks if x > 0)
    cut = ' class="cut"' if shown < 1 else ""  # what is higher does not reach over the title
    order = {"faint": 0, "line": 1, "dots": 2}
    numbered = sorted(enumerate(curves), key=lambda item: order[item[1].kind])
    lines += "".join(_paths(curve, across, up, f"{curve.kind} c{number % 4}") for number, curve in numbered)
    labels = _labels(x_ticks, y_ticks)
    ends = [x for x, _ in marks[1:]] + [100.0]
    labels += "".join(f'<span class="phase" style="left:{x:.2f}%;max-width:{end - x:.2f}%">{escape(name)}</span>'
                      for (x, name), end in zip(marks, ends))
    keys = [(curve.label, f"{curve.kind} c{number % 4}") for number, curve in enumerate(curves) if curve.label]
    return _figure(title, keys, _spoken(title, curves), lines, labels, x_label, cut)


def histogram(title: str, counts: Mapping[str, Mapping[int, int]], unit: str) -> str:
    """Whole numbers that were counted, as an HTML `<figure>` of bars: for each label the share of its things with each number.

    The last bars also stand for all larger numbers, where these are rare (`TAIL`).
    """
    counts = {label: {n: times for n, times in one.items() if times} for label, one in counts.items()}
    counts = {label: one for label, one in counts.items() if one}
    if not counts:
        return _empty(title)
    first, last = min(map(min, counts.values())), max(map(_within, counts.values()))
    longer = last < max(map(max, counts.values()))
    names = [*map(str, range(first, last)), f"{last}+" if longer else str(last)]
    shares = {}
    for label, one in counts.items():
        total = sum(one.values())
        row = [one.get(n, 0) / total for n in range(first, last)]
        shares[label] = [*row, sum(times for n, times in one.items() if n >= last) / total]
    top = 1.06 * max(map(max, shares.values()))
    wide = 100 / len(names)
    thick = 0.8 * wide / len(shares)
    y_ticks = [(100 - 100 * y / top, f"{100 * y:g}%") for y, _ in ticks(0, top, 4)]
    bars = "".join(f'<path class="grid" d="M0 {y:.2f}H100"/>' for y, _ in y_ticks)
    for number, (label, row) in enumerate(shares.items()):
        for place, (name, share) in enumerate(zip(names, row)):
            left, high = (place + 0.1) * wide + number * thick, 100 * share / top
            bars += (f'<rect class="c{number % 4}" x="{left:.2f}" y="{100 - high:.2f}" width="{thick:.2f}" height="{high:.2f}">'
                     f"<title>{escape(label)}, {name} {escape(unit)}: {share:.1%}</title></rect>") if share else ""
    every = next(step for size in itertools.count() for step in (10**size, 2 * 10**size, 5 * 10**size) if len(names) <= 8 * step)
    x_ticks = [((place + 0.5) * wide, name) for place, name in enumerate(names)
               if name == f"{last}+" or (first + place) % every == 0 and not (longer and 2 * (last - first - place) < every)]
    spoken = "; ".join(f"{label}: {sum(one.values())}, from {min(one)} to {max(one)} {unit}, mean {mean(one):.1f}, most often "
                       f"{max(one, key=lambda n: (one[n], -n))}" for label, one in counts.items())
    keys = [(label, f"c{number % 4}") for number, label in enumerate(counts)]
    return _figure(title, keys, f"{title}. {spoken}.", bars, _labels(x_ticks, y_ticks), unit)


def _within(counts: Mapping[int, int]) -> int:
    """The least number that all but `TAIL` of the things do not exceed."""
    totals = itertools.accumulate(counts[n] for n in sorted(counts))
    return next(n for n, total in zip(sorted(counts), totals) if total >= (1 - TAIL) * sum(counts.values()))


def mean(counts: Mapping[int, int]) -> float:
    """Of whole numbers that were counted."""
    return sum(n * times for n, times in counts.items()) / sum(counts.values())


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` points that look the same: of every stretch its first, lowest and highest value."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) * 3 // most)
    kept = []
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        finite = [i for i in stretch if math.isfinite(points[i][1])]
        chosen = {start}
        if finite:
            chosen |= {min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(chosen)]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def ticks(low: float, high: float, about: int) -> list[tuple[float, str]]:
    """Round numbers from `low` to `high`, about so many, each with its text."""
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = size * min((1, 2, 5, 10), key=lambda factor: abs(factor * size - rough))
    first = math.ceil(low / step - 1e-9)
    values = [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
    return [(value, _text(value, step, max(abs(low), abs(high)))) for value in values]


def _labels(x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]]) -> str:
    return ("".join(f'<span class="y" style="top:{y:.2f}%">{text}</span>' for y, text in y_ticks)
            + "".join(f'<span class="x" style="left:{x:.2f}%">{text}</span>' for x, text in x_ticks))


def _figure(title: str, keys: Sequence[tuple[str, str]], spoken: str, drawn: str, labels: str, axis: str, cut: str = "") -> str:
    named = "".join(f'<span class="key {classes}">{escape(label)}</span>' for label, classes in keys)
    return (f'<figure class="chart"><figcaption>{escape(title)}<span class="keys">{named}</span></figcaption>'
            f'<div class="plot" role="img" aria-label="{escape(spoken)}">'
            f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true"{cut}>{drawn}</svg>{labels}</div>'
            f'<p class="axis">{escape(axis)}</p></figure>')


def _empty(title: str) -> str:
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption><p class="none">no values</p></figure>'


def _text(value: float, step: float, largest: float) -> str:
    for least, unit, name in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if largest >= least:
            return f"{value / unit:g}{name}" if value else "0"
    if step < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}" if value else "0"
    decimals = next(n for n in range(7) if math.isclose(round(step, n), step, rel_tol=1e-6))
    return f"{value:.{decimals}f}"


def _paths(curve: Curve, across, up, classes: str) -> str:
    points = [(f"{across(x):.2f} {up(y):.2f}" if math.isfinite(y) else "", y) for x, y in thin(curve.points)]
    strokes = [[place for place, _ in run] for inside, run in itertools.groupby(points, lambda p: bool(p[0])) if inside]
    # a line of no length with round ends is a dot, which stays round however the square is stretched
    data = "".join("M" + "L".join(stroke) + ("h0" if len(stroke) == 1 else "") for stroke in strokes)
    line = f'<path class="{classes}" d="{data}"/>'
    if curve.kind == "dots" or sum(map(len, strokes)) == 1:
        name = escape(curve.label)
        line += "".join(f'<path class="{classes} dot" d="M{place}h0"><title>{name} {y:.4g}</title></path>'
                        for place, y in points if place)
    return line


def _spoken(title: str, curves: Sequence[Curve]) -> str:
    """The chart in words, for people who cannot see it."""
    said = []
    for curve in curves:
        ys = [y for _, y in curve.points if math.isfinite(y)]
        gaps = len(curve.points) - len(ys)
        said.append(f"{curve.label or title}: from {ys[0]:.4g} to {ys[-1]:.4g}, lowest {min(ys):.4g}, "
                    f"highest {max(ys):.4g}" + (f", {gaps} not a number" if gaps else ""))
    return f"{title}. {'; '.join(said)}."


def _widened(low: float, high: float) -> tuple[float, float]:
    """An interval that has a width, whatever the values were."""
    if high > low:
        return low, high
    margin = abs(low) / 2 or 1.0
    return low - margin, low + margin
