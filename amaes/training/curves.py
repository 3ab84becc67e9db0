"""The curves of a run as one picture: loss, validation, Dice and learning rate over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from amaes.files import written_whole
from amaes.training.verdict import metrics_lines

# Of metrics.jsonl: what is drawn in each panel, with its name and its style.
LOSS = {"loss": ("training", "-"), "val_loss": ("validation", "o-"), "val_baseline": ("trivial prediction", ":")}
DICE = {"dice": ("training patches", "-"), "val_dice": ("validation scans", "o-")}
RATE = {"lr": ("learning rate", "-")}


def draw_progress(folder: Path) -> str | None:
    """Write `progress.png` beside the metrics.jsonl of a run or fold; without matplotlib or a line nothing.

    Returns:
        Why it could not be drawn, in one line: a picture never ends a run. None where it was, or is not to be.
    """
    if find_spec("matplotlib") is None or not (folder / "metrics.jsonl").is_file():
        return None
    try:
        lines = metrics_lines(folder / "metrics.jsonl")
        if lines:
            _draw(folder / "progress.png", folder.name, lines)
    except Exception as error:  # whatever a picture may raise
        return f"{folder / 'progress.png'}: not drawn ({type(error).__name__}: {str(error).splitlines()[:1]})"
    return None


def _draw(path: Path, title: str, lines: Sequence[Mapping]) -> None:
    from matplotlib.figure import Figure

    panels = {"loss": LOSS, "Dice": DICE, "learning rate": RATE}
    drawn = {name: curves for name, curves in panels.items() if any(_points(lines, key)[0] for key in curves)}
    figure = Figure(figsize=(9, 2.6 * max(1, len(drawn))), dpi=100, layout="constrained")
    figure.suptitle(f"{title}, step {max(line.get('step', 0) for line in lines)}", fontsize=10)
    for axes, (name, curves) in zip(
        figure.subplots(max(1, len(drawn)), squeeze=False)[:, 0], drawn.items(), strict=False
    ):
        for key, (label, style) in curves.items():
            steps, values = _points(lines, key)
            if steps:
                style = style if len(steps) > 1 else "o"  # a line needs two points
                axes.plot(steps, values, style, label=label, markersize=3, linewidth=1)
        if name == "loss" and _points(lines, "val_baseline")[0]:  # a squared error; other losses may fall below 0
            axes.set_yscale("log")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.axes[-1].set_xlabel("step")
    with written_whole(path) as file:
        figure.savefig(file, format="png")


def _points(lines: Sequence[Mapping], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of an entry; what is not a number is left out."""
    found = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float) and "step" in line]
    return [step for step, _ in found], [value for _, value in found]
