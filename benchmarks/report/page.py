"""A self-contained HTML file of sections with text, code, tables and pictures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.command import text_table
from benchmarks.environment import environment

ACCENT, MUTED, INK = "#c2410c", "#b8b4ad", "#292524"

matplotlib.rcParams.update(
    {
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": INK,
        "ytick.color": INK,
        "svg.fonttype": "path",
    }
)

_STYLE = """
body { max-width: 54rem; margin: 0 auto; padding: 3rem 1.5rem; color: #292524; background: #fdfcfa;
       font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.02em; }
h2 { font-size: 1.45rem; margin: 3.2rem 0 .4rem; padding-top: 1.6rem; border-top: 2px solid #c2410c; }
h3 { font-size: 1.08rem; margin: 2.2rem 0 .3rem; }
p { margin: .5rem 0 1rem; }
pre { background: #f3f0ea; border-radius: 6px; padding: .9rem 1.1rem; overflow-x: auto; }
code, pre { font-size: .86rem; line-height: 1.5;
            font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 1.1rem .35rem 0; text-align: right; border-bottom: 1px solid #e7e3db; }
th { font-weight: 600; border-bottom-color: #b8b4ad; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.2rem 0; }
figure img { width: 100%; height: auto; }
figcaption, footer { color: #78716c; font-size: .86rem; }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid #e7e3db; }
"""


@dataclass
class Section:
    """A heading and its content, built from the functions below."""

    title: str
    pieces: list[str]


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def text(content: str) -> str:
    return f"<p>{escape(content)}</p>"


def code(content: str) -> str:
    return f"<pre>{escape(content)}</pre>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Print the rows, and return them for the page."""
    print(text_table(head, rows))
    columns = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{columns}</tr>{body}</table>"


def claims(name: str) -> dict[str, Any] | None:
    """Return the results of an earlier run of benchmarks/claims, if there are any."""
    path = Path(f"benchmarks/results/claims_{name}.json")
    return json.loads(path.read_text()) if path.exists() else None


def picture(figure: Figure, caption: str) -> str:
    """Return the figure as inline SVG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True)
    source = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img alt="{escape(caption)}" src="data:image/svg+xml;base64,{source}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def image_grid(
    size: tuple[float, float],
    lines: Sequence[tuple[str, Any, dict[str, Any]]],
    *,
    gap: tuple[float, float] = (0.06, 0.08),
    frame: bool = True,
) -> tuple[Figure, Any]:
    """Draw lines of images, each given as name, images and options of `imshow`. Return the figure and its axes."""
    figure = Figure(figsize=size)
    grid: Any = figure.subplots(
        len(lines), len(lines[0][1]), squeeze=False, gridspec_kw=dict(zip(("wspace", "hspace"), gap, strict=True))
    )
    for row, (name, images, options) in zip(grid, lines, strict=True):
        for axes, image in zip(row, images, strict=True):
            axes.imshow(image, **options)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(frame)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
    return figure, grid


def bars(axes: Axes, title: str, values: dict[str, float], digits: int, ours: str) -> None:
    """Draw a bar for each name, in the accent colour if it contains `ours`."""
    names = [*values][::-1]  # From the bottom to the top.
    colors = [ACCENT if ours in name else MUTED for name in names]
    drawn = axes.barh(names, [values[name] for name in names], color=colors, height=0.68)
    axes.bar_label(drawn, fmt=f"{{:.{digits}f}}", padding=4, fontsize=9)
    axes.margins(x=0.14)
    axes.tick_params(left=False)
    axes.set_title(title)


def write(path: Path, sections: Sequence[Section]) -> None:
    """Return the page: all sections, and the machine's description."""
    body = "".join(f"<section><h2>{escape(s.title)}</h2>{''.join(s.pieces)}</section>" for s in sections)
    facts = environment()
    made = (
        f"{facts['date']}: torch {facts['torch']}, Python {facts['python']}, {facts['cpu']}, {facts['cores']} cores. "
    )
    made += "; ".join(facts["paper_layers"]) + "."
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>paper_layers</title><style>{_STYLE}</style></head><body>
<h1>paper_layers</h1>
<p>Ideas from papers as drop-in PyTorch layers. Unless it says otherwise, what this page shows was computed by the
run that wrote it.</p>
{body}<footer>{escape(made)}</footer></body></html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
