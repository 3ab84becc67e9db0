"""What a run has shown, in one line at its end: of pretraining, validation beside a trivial prediction; of fine-tuning,
Dice on its own patches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from amaes import distributed
from amaes.files import parse_json

ENOUGH_VOLUMES = 5  # of validation: below, one unusual scan decides
CLEARLY = 0.95  # share of the trivial prediction's loss, above which a network has hardly learned
RISEN = 0.1  # Dice that a class which is learned reaches


class TrainingDice:
    """Dice of the training patches since the last line, by class, without waiting for the device.

    Args:
        classes: outputs of the network, background included.
        device: of the network.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        self._counts = torch.zeros(classes - 1, 2, dtype=torch.int64, device=device)  # 2 TP, and 2 TP + FP + FN

    @torch.no_grad()
    def add(self, outputs: torch.Tensor | Sequence[torch.Tensor], label: torch.Tensor) -> None:
        """Count the voxels of a batch: logits (B, K, X, Y, Z), or a list of which they are the first; (B, X, Y, Z).

        Voxels whose label is no class, which losses leave out, do not count.
        """
        logits = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        predicted = logits.max(1).indices  # (B, X, Y, Z); as argmax, which takes ten times as long on the CPU
        predicted = predicted.masked_fill(label > len(self._counts), 0)
        for row, counts in enumerate(self._counts, 1):
            found, wanted = predicted == row, label == row
            counts += torch.stack([2 * (found & wanted).sum(), found.sum() + wanted.sum()])

    def read(self) -> dict[str, float]:
        """{"dice": mean over the classes that were there or were found, and "dice_1", ... of several}; starts anew.

        Over all ranks, which call it together. NaN where a class was neither there nor found.
        """
        counts = distributed.sum_over_ranks(self._counts).tolist()
        self._counts = torch.zeros_like(self._counts)
        of_class = {f"dice_{row}": both / total if total else math.nan for row, (both, total) in enumerate(counts, 1)}
        there = [value for value in of_class.values() if not math.isnan(value)]
        mean = sum(there) / len(there) if there else math.nan
        return {"dice": mean, **(of_class if len(of_class) > 1 else {})}


def of_finetuning(metrics: Path, names: Mapping[int, str]) -> str:
    """Whether training Dice rose, in one line, from metrics.jsonl.

    Args:
        metrics: the file.
        names: of the classes.
    """
    lines = [line for line in metrics_lines(metrics) if isinstance(line.get("dice"), float)]
    if not lines:
        return "no verdict: no line of metrics.jsonl has a Dice"
    highest = {k: max((line.get(f"dice_{k}") or 0 for line in lines), default=0) for k in names if k}
    best, last = max(line["dice"] for line in lines), lines[-1]["dice"]
    if best < RISEN:
        return (
            f"WARNING: training Dice never rose above {100 * best:.1f} %: the network does not even segment what it is "
            "trained on; more `steps`, another `lr`, a higher `foreground`, or a look at the labels may help"
        )
    text = f"training Dice {100 * last:.1f} % at the end"
    never = [f"{names[k]} ({100 * value:.1f} %)" for k, value in highest.items() if value < RISEN]
    if len(highest) > 1 and never:
        text = f"WARNING: {text}, but it never rose for {', '.join(never)}; more `steps` may help"
    return text


def few_volumes(count: int) -> str:
    """A warning where validation has so few volumes that it says little; "" where it has enough, or none."""
    if not 0 < count < ENOUGH_VOLUMES:
        return ""
    volumes = "validation volume is" if count == 1 else "validation volumes are"
    return f"{count} {volumes} too few to tell, at least {ENOUGH_VOLUMES} are needed: a larger `val_fraction`"


def of_pretraining(metrics: Path, trivial: str, options: Mapping[str, object]) -> str:
    """Whether validation fell below a trivial prediction, by how much, and what to try if not, from metrics.jsonl.

    Args:
        metrics: the file.
        trivial: what is predicted trivially (`Objective.trivial`).
        options: of train_pretrain.py, by name.
    """
    lines = [line for line in metrics_lines(metrics) if isinstance(line.get("val_loss"), float)]
    if not lines:
        return "no verdict: nothing was validated; a larger `val_fraction` keeps volumes for it"
    loss, baseline = lines[-1]["val_loss"], lines[-1]["val_baseline"]
    both = f"{loss:.4g} against {baseline:.4g} of predicting {trivial}"
    below = 100 * (1 - loss / baseline) if loss >= 0 and baseline > 0 else None  # Dice losses may be negative
    if loss >= baseline:
        text = (
            f"WARNING: validation is NOT below the trivial prediction, {both}: nothing was learned; {_advice(options)}"
        )
    elif below is not None and loss > CLEARLY * baseline:
        text = f"WARNING: validation is only {below:.1f} % below the trivial prediction, {both}; {_advice(options)}"
    else:
        text = f"validation is {f'{below:.0f} % ' if below is not None else ''}below the trivial prediction, {both}"
    few = few_volumes(lines[-1].get("val_volumes", ENOUGH_VOLUMES))
    return f"{text}; but {few}" if few else text


def _advice(options: Mapping[str, object]) -> str:
    """What else to try."""
    better = {"target": "standardized", "crop": "patch"}
    tips = [f"`{name}` {value}" for name, value in better.items() if options.get(name) not in (None, value)]
    return f"try {', '.join([*tips, 'more `steps`', 'another `lr`'])}"


def metrics_lines(path: Path) -> list[dict]:
    """The sound lines of metrics.jsonl."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            line = parse_json(text)
        except ValueError:  # cut short when a run was killed
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines
