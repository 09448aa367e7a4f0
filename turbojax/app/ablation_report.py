"""Report on a grid of videos: tables, a plot and a page of frames."""

import csv
import html
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from turbojax.app.records import write_lines
from turbojax.errors import UserError
from turbojax.files import whole_file

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 2em; color: #222 }}
.plot {{ max-width: 100%; width: 900px }}
.grid {{ display: grid; grid-template-columns: repeat({columns}, minmax(16em, 1fr)); gap: 1.5em; overflow-x: auto }}
figure {{ margin: 0 }}
.frames {{ display: grid; grid-template-columns: 1fr 1fr; gap: 2px }}
.frames img {{ width: 100%; display: block }}
figcaption {{ padding-top: .4em; line-height: 1.5 }}
</style>
<h1>{title}</h1>
<p>{prompt}</p>
<p>{explanation}</p>
<img class="plot" src="plot.png" alt="Difference and seconds over the settings">
<div class="grid">
{figures}
</div>
</html>
"""
FIGURE = """<figure><a class="frames" href="{video}">{images}</a>
<figcaption><b>{label}</b><br>{difference}{seconds:.3g} s of diffusion</figcaption></figure>"""


class Row(NamedTuple):
    """A cell's result. psnr: dB, None for a reference, infinite for equal frames; seconds by stage; paths of files."""

    cell: Mapping[str, Any]
    psnr: float | None
    seconds: Mapping[str, float]
    video: str
    frames: Sequence[str]

    @property
    def flat(self) -> dict[str, Any]:
        """Returns the row as a table has it."""
        seconds = {f"{name}_seconds": value for name, value in self.seconds.items()}
        equal = self.psnr is not None and math.isinf(self.psnr)  # JSON has no infinity
        return {**self.cell, "psnr": "inf" if equal else self.psnr, **seconds, "video": self.video}


def require_matplotlib() -> Any:
    """Returns matplotlib's Figure class, which needs no display; raises UserError where there is none."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise UserError(f"the plot needs {missing.name}; pip install 'turbojax[ablate]'") from missing
    return Figure


def write_report(
    folder: Path, config: ConfigDict, grid: Mapping[str, Sequence[Any]], rows: Sequence[Row], reference: Mapping
) -> Path:
    """Writes results.jsonl, results.csv, plot.png and index.html; returns the last, whose paths are relative."""
    flat = [row.flat for row in rows]
    write_lines(folder / "results.jsonl", flat)
    names = list(dict.fromkeys(name for row in flat for name in row))
    with whole_file(folder / "results.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(flat)
    with whole_file(folder / "plot.png") as temporary:
        plot(grid, rows).savefig(temporary, dpi=110)
    with whole_file(folder / "index.html") as temporary:
        temporary.write_text(page(config, rows, reference), encoding="utf-8")
    return folder / "index.html"


def plot(grid: Mapping[str, Sequence[Any]], rows: Sequence[Row]) -> Any:
    """Plots PSNR and seconds over the axis with most numbers, a line for each combination of the others."""
    along = max(grid, key=lambda name: sum(isinstance(value, int | float) for value in grid[name]))
    values = [value for value in grid[along]]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    values = sorted(values) if numbers else values
    figure = require_matplotlib()(figsize=(9, 3.8), layout="constrained")
    compared = any(row.psnr is not None for row in rows)
    names = [*(["PSNR to the reference, dB"] if compared else []), "diffusion, s"]
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    others = [name for name in grid if name != along]
    for combination in itertools.product(*(grid[name] for name in others)):
        fixed = dict(zip(others, combination, strict=True))
        line = {row.cell[along]: row for row in rows if fixed.items() <= row.cell.items()}
        chosen = [line[value] for value in values]
        x = values if numbers else range(len(values))
        finite = [math.nan if row.psnr is None or math.isinf(row.psnr) else row.psnr for row in chosen]
        seconds = [row.seconds.get("diffusion", math.nan) for row in chosen]
        for panel, y in zip(panels, (finite, seconds)[-len(names) :], strict=True):
            panel.plot(x, y, marker="o", label=label(fixed))
    for panel, name in zip(panels, names, strict=True):
        panel.set(xlabel=along, ylabel=name)
        panel.grid(alpha=0.3)
        if not numbers:
            panel.set_xticks(range(len(values)), [str(value)[:24] for value in values])
    panels[-1].set_ylim(bottom=0)
    if others:
        figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    return figure


def label(cell: Mapping[str, Any]) -> str:
    """Returns settings as NAME=VALUE, NAME=VALUE."""
    return ", ".join(f"{name}={value}" for name, value in cell.items())


def page(config: ConfigDict, rows: Sequence[Row], reference: Mapping[str, Any]) -> str:
    """Returns the contact sheet, a row of it for all values of the last axis."""
    last = list(rows[0].cell)[-1]
    columns = len({row.cell[last] for row in rows})
    explanation = f"PSNR: of the frames shown, to those with {label(reference)} and else the same settings."
    figures = []
    for row in rows:
        images = "".join(f'<img src="{html.escape(name)}" alt="">' for name in row.frames)
        difference = "" if row.psnr is None else f"PSNR {row.psnr:.1f} dB, "
        video, text = html.escape(row.video), html.escape(label(row.cell))
        seconds = row.seconds.get("diffusion", math.nan)
        figures.append(FIGURE.format(video=video, images=images, label=text, difference=difference, seconds=seconds))
    return PAGE.format(
        title=html.escape(" and ".join(rows[0].cell)),
        columns=columns,
        prompt=html.escape("" if "prompt" in rows[0].cell else config.prompt),
        explanation=html.escape(explanation if reference else ""),
        figures="\n".join(figures),
    )
