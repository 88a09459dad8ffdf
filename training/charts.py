"""Charts as inline SVG: they take the page's colours, fit a phone, and say in words what they show.

The page's style sheet colours `.line0` to `.line3`, `.bar` and `.rule`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, log10
from types import MappingProxyType

from markupsafe import Markup

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 350, 24, 178
_MOST_DOTS = 30


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis: its title, and what its ends stand for."""

    title: str
    low: float
    high: float

    def ticks(self) -> list[float]:
        """Round numbers, at most six."""
        span = self.high - self.low
        power = 10 ** floor(log10(span / 5))
        step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 5)
        first = -int(-self.low // step)
        return [round(number * step, 10) for number in range(first, floor(self.high / step + 1e-9) + 1)]


def scale(title: str, values: Sequence[float]) -> Scale:
    """An axis on which zero and all values find room."""
    low, high = min(0.0, *values), max(0.0, *values)
    return Scale(title, low, high if high > low else 1.0)


def chart(
    title: str,
    x: Scale,
    y: Scale,
    *,
    lines: Mapping[str, Points] = MappingProxyType({}),
    bars: Sequence[tuple[float, float, float]] = (),
    rule: tuple[float, float, float, float] | None = None,
    joined: bool = True,
) -> Markup:
    """One chart as a `<figure>`.

    lines: at most four, by name; unless `joined`, their points alone. bars: (from, to, height). rule: a thin line from
    (x, y) to (x, y) to compare with.
    """

    def left(value: float) -> float:
        return round(_LEFT + (value - x.low) / (x.high - x.low) * (_RIGHT - _LEFT), 1)

    def top(value: float) -> float:
        return round(_BOTTOM - (value - y.low) / (y.high - y.low) * (_BOTTOM - _TOP), 1)

    parts = [Markup('<path class="axis" d="M{},{}V{}H{}"/>').format(_LEFT, _TOP, _BOTTOM, _RIGHT)]
    for tick in x.ticks():
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="middle">{:g}</text>').format(left(tick), _BOTTOM + 14, tick)
        )
    for tick in y.ticks():
        parts.append(Markup('<path class="grid" d="M{},{}H{}"/>').format(_LEFT, top(tick), _RIGHT))
        parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{:g}</text>').format(_LEFT - 5, top(tick) + 4, tick))
    for start, end, height in bars:
        sides = (left(start), _BOTTOM, top(height), left(end), _BOTTOM)
        parts.append(Markup('<path class="bar" d="M{},{}V{}H{}V{}Z"/>').format(*sides))
    if rule:
        ends = (left(rule[0]), top(rule[1]), left(rule[2]), top(rule[3]))
        parts.append(Markup('<path class="rule" d="M{},{}L{},{}"/>').format(*ends))
    for number, (name, points) in enumerate(lines.items()):
        places = [(left(one), top(other)) for one, other in points]
        corners = " ".join(f"{across},{down}" for across, down in places)
        if joined:
            parts.append(Markup('<polyline class="line{}" points="{}"/>').format(number, corners))
        if len(places) <= _MOST_DOTS or not joined:
            dots = Markup("").join(Markup('<circle r="2.5" cx="{}" cy="{}"/>').format(*spot) for spot in places)
            parts.append(Markup('<g class="dot{}">{}</g>').format(number, dots))
        key = _LEFT + number * (_RIGHT - _LEFT) // len(lines)
        parts.append(Markup('<path class="line{}" d="M{},10h14"/>').format(number, key))
        parts.append(Markup('<text x="{}" y="14">{}</text>').format(key + 18, name))
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format((_LEFT + _RIGHT) // 2, _HEIGHT - 6, x.title)
    )
    return Markup(
        '<figure><svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg><figcaption>{}</figcaption></figure>'
    ).format(_WIDTH, _HEIGHT, _words(title, x, y, lines, bars), Markup("").join(parts), title)


def _words(
    title: str, x: Scale, y: Scale, lines: Mapping[str, Points], bars: Sequence[tuple[float, float, float]]
) -> str:
    """What a chart shows, for those who hear it."""
    said = [f"{title}: {y.title} against {x.title}"]
    for name, points in lines.items():
        if points:
            (first, begin), (last, end) = points[0], points[-1]
            said.append(f"{name} {begin:.3g} at {first:.3g} and {end:.3g} at {last:.3g}")
    if bars:
        start, end, height = max(bars, key=lambda bar: bar[2])
        said.append(f"highest {height:.3g} from {start:.3g} to {end:.3g}")
    return "; ".join(said)
