"""Draw the chart of docs/choosing.md: `python docs/draw_choice.py`.

The chart is a column of questions, 400 units wide, so that its text can be read on a phone. Its colours follow the
page's light or dark scheme.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

PICTURE = Path(__file__).parent / "pictures" / "choosing.svg"
# Each question with the answer that a yes leads to; a no leads to the next question.
QUESTIONS = (
    ("Small batches,|or a noisy loss?", "Adam or SGD|by torch.optim"),
    ("A sum of squares, up to|a few thousand residuals|or parameters?", "LevenbergMarquardt|equations, curve fits"),
    ("A neural network?", "HessianFree|any size that fits"),
    ("At most a few hundred|parameters?", "DampedNewton|the whole matrix"),
    ("Saddles, curved valleys,|bad scales?", "TrustRegionNewton|or CubicNewton"),
)
OTHERWISE = "NewtonCG|smooth losses, nothing to tune"
WIDTH, LEFT, RIGHT = 400, 184, 174  # of the picture, a question and an answer
MARGIN, LINE, GAP = 6, 17, 26  # around the picture, between lines of text, and between rows

STYLE = """
text { font: 14px system-ui, sans-serif; text-anchor: middle; fill: #1c2733; }
.name { font-size: 13.5px; font-weight: 600; }
.small { font-size: 12px; }
.page { fill: #ffffff; }
.question { fill: #eef3f8; stroke: #7d93a8; }
.answer { fill: #dff0e4; stroke: #5a9a6e; }
.arrow { stroke: #5b6b7a; stroke-width: 1.5; fill: none; }
.head { fill: #5b6b7a; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6ebf0; }
  .page { fill: #131416; }
  .question { fill: #232c36; stroke: #6d8297; }
  .answer { fill: #1d3827; stroke: #5a9a6e; }
  .arrow { stroke: #a7b4c0; }
  .head { fill: #a7b4c0; }
}
"""


def box(kind: str, text: str, left: float, top: float, width: float, height: float) -> str:
    """Return a box around lines of text, of which an answer's first is the name of an optimizer."""
    lines = text.split("|")
    first = top + height / 2 - LINE * (len(lines) - 1) / 2 + 5
    drawn = f'<rect class="{kind}" x="{left}" y="{top}" width="{width}" height="{height}" rx="8"/>\n'
    for number, line in enumerate(lines):
        style = "" if kind == "question" else ' class="name"' if number == 0 else ' class="small"'
        drawn += f'<text{style} x="{left + width / 2}" y="{first + LINE * number}">{escape(line)}</text>\n'
    return drawn


def arrow(word: str, x: float, y: float, right: float, down: float) -> str:
    """Return an arrow to the right or down, with a word beside it."""
    end_x, end_y = x + right, y + down
    head = (
        f"{end_x},{end_y} {end_x - 7},{end_y - 4} {end_x - 7},{end_y + 4}"
        if right
        else f"{end_x},{end_y} {end_x - 4},{end_y - 7} {end_x + 4},{end_y - 7}"
    )
    place = (x + right / 2 - 3, y - 6) if right else (x + 14, y + down / 2 + 3)
    return (
        f'<path class="arrow" d="M{x} {y} L{end_x} {end_y}"/>\n<polygon class="head" points="{head}"/>\n'
        f'<text class="small" x="{place[0]}" y="{place[1]}">{word}</text>\n'
    )


def chart() -> str:
    """Return the chart as the text of an SVG file."""
    body, top = "", float(MARGIN)
    for question, answer in QUESTIONS:
        height = 22 + LINE * max(question.count("|") + 1, answer.count("|") + 1)
        body += box("question", question, MARGIN, top, LEFT, height)
        body += box("answer", answer, WIDTH - MARGIN - RIGHT, top, RIGHT, height)
        body += arrow("yes", MARGIN + LEFT, top + height / 2, WIDTH - 2 * MARGIN - LEFT - RIGHT, 0)
        body += arrow("no", MARGIN + LEFT / 2, top + height, 0, GAP)
        top += height + GAP
    height = 22 + LINE * 2
    body += box("answer", OTHERWISE, MARGIN, top, LEFT + 30, height)
    whole = top + height + MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {whole:g}" width="{WIDTH}" height="{whole:g}">\n'
        f'<style>{STYLE}</style>\n<rect class="page" width="{WIDTH}" height="{whole:g}"/>\n{body}</svg>\n'
    )


def main() -> None:
    """Write the picture."""
    PICTURE.write_text(chart())


if __name__ == "__main__":
    main()
