"""A run as a picture, in plain SVG."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _TOP, _SPACE = 640, 300, 50, 30, 50
_MEAN = 5  # steps that the line is the mean of


def plot(rows: list[dict[str, Any]], title: str) -> str:
    """Return the reward over the seconds as SVG: a dot for each step, and their running mean.

    Args:
        rows: those of `Loop.step`.
        title: a sentence.
    """
    seen = [(row["seconds"], row["reward"]) for row in rows if "reward" in row]
    last = max(seconds for seconds, _ in seen)

    def at(seconds: float, reward: float) -> str:
        x = _LEFT + (_WIDTH - _LEFT - 20) * seconds / last
        return f"{x:.1f},{_TOP + (_HEIGHT - _TOP - _SPACE) * (1 - reward):.1f}"

    def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'

    bottom = _HEIGHT - _SPACE
    parts = [text(_WIDTH / 2, 18, title)]
    for reward in (0.0, 0.25, 0.5, 0.75, 1.0):
        start, end = at(0, reward).split(",")[1], at(last, reward)
        parts.append(f'<path d="M{_LEFT},{start} L{end}" stroke="#ddd"/>')
        parts.append(text(_LEFT - 6, float(start) + 4, f"{reward:g}", "end"))
    for part in range(5):
        seconds = last * part / 4
        parts.append(text(float(at(seconds, 0).split(",")[0]), bottom + 18, f"{seconds:.0f} s"))
    means = []
    for index, (seconds, _) in enumerate(seen):
        some = [reward for _, reward in seen[max(0, index - _MEAN + 1) : index + 1]]
        means.append(at(seconds, sum(some) / len(some)))
    parts += [f'<circle cx="{x}" cy="{y}" r="2" fill="#9bb"/>' for x, y in (at(*each).split(",") for each in seen)]
    parts.append(f'<polyline points="{" ".join(means)}" fill="none" stroke="#06c" stroke-width="2"/>')
    for before, row in pairwise(rows):
        if row["lost"] and not before["lost"]:
            x = at(row["seconds"], 0).split(",")[0]
            parts.append(f'<path d="M{x},{_TOP} V{bottom}" stroke="#c30" stroke-dasharray="4"/>')
            parts.append(text(float(x), bottom + 36, "a worker is lost"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )
