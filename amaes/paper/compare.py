"""A run beside the published numbers: which row is about it, and what it did in another way."""

from __future__ import annotations

from collections.abc import Mapping

from amaes.choices import SCRATCH
from amaes.cli import as_options
from amaes.evaluation.tables import markdown_table, markdown_text, mean_sd_text
from amaes.paper.numbers import (
    ABLATIONS,
    EVALUATION,
    FINETUNING,
    MASKED_PRETRAINING,
    OPEN_POINTS,
    PRETRAINING,
    PRETRAINING_EPOCHS,
    TABLE_4,
    TESTED,
)
from amaes.paper.protocols import EVALUATIONS, FOLDS, PROTOCOLS
from amaes.training.presets import hyperparameters

NO_PROTOCOL = (
    "the run was made without `protocol`, so neither its cases nor its folds are those of an experiment of the paper"
)
UNCHECKED = "what these are was NOT checked: the file is gone or does not say how it was made."


def compare_with_paper(
    options: Mapping, summary: Mapping, evaluation: str | None = None, pretraining: Mapping | None = None
) -> dict:
    """A run beside the rows of the paper that are about its network and task.

    Args:
        options: of train_finetune.py, from the run's config.json.
        summary: of `amaes.evaluation.scores.summarise`, with "settings".
        evaluation: key of EVALUATIONS where other cases than the fold's own were tested.
        pretraining: options of train_pretrain.py, where the weights are of a run of ours.

    Returns:
        {"task", "rows": [{"row", "mean", "sd", "difference", "within_one_sd", "remark"}, ...] in %, "obstacles": why
        the numbers are not comparable, "notes": what the paper leaves open}; within_one_sd is None where the paper's
        number is no target or has no sd. Texts name options in backquotes.
    """
    task = evaluation or options.get("protocol")
    if task not in (*EVALUATIONS, *PROTOCOLS):
        return {"task": None, "rows": [], "obstacles": [NO_PROTOCOL], "notes": []}
    pretrained = options["weights"] != SCRATCH
    published = _published_rows(options, task, pretraining)
    obstacles = _finetuning_obstacles(options, summary, task)
    if not published:
        obstacles.insert(0, _no_row(options, task, pretraining))
    if pretrained and pretraining is not None:  # else they may be the authors' own weights
        obstacles += _pretraining_obstacles(pretraining, options["arch"], is_ablation=task == "brats21_cv")
    notes = [point.text for point in OPEN_POINTS if task in point.tasks and (pretrained or not point.pretrained_only)]
    if pretrained:
        checked = "of these, only what the file says of its options was compared." if pretraining else UNCHECKED
        notes.append(
            f"Weights: {options['weights']}. The paper's are of {PRETRAINING_EPOCHS} epochs on BRAINS-45K; {checked}"
        )
    rows = [_difference(summary["dice"], **row) for row in published]
    return {"task": task, "rows": rows, "obstacles": obstacles, "notes": notes}


def title(task: str) -> str:
    """The task as the paper calls it."""
    return (EVALUATIONS.get(task) or PROTOCOLS[task]).title


# Rows -----------------------------------------------------------------------------------------------------------------


def _published_rows(options: Mapping, task: str, pretraining: Mapping | None) -> list[dict]:
    """What the paper has for a run: {"name" of the row, "mean", "sd", "is_target"}."""
    pretrained = options["weights"] != SCRATCH
    key = (options["arch"], options["decoder"], pretrained)
    if task == "brats21_cv":
        pretrained_with = _pretrained_with(pretraining) if pretraining else None
        if key != ("unet_xl", "unet", True) or pretrained_with not in ABLATIONS:
            return []
        name, mean, sd = ABLATIONS[pretrained_with]
        return [{"name": name, "mean": mean, "sd": sd, "is_target": True}]
    if key not in TABLE_4:
        return []
    row, (mean, sd) = TABLE_4[key], TABLE_4[key].dice[task]
    name = f"Table 4, {row.model}, {'pretrained' if pretrained else 'from scratch'}, {title(task)}"
    return [{"name": name, "mean": mean, "sd": sd, "is_target": task not in row.no_target}]


def _pretrained_with(pretraining: Mapping) -> tuple:
    """The key of ABLATIONS."""
    return tuple(pretraining.get(name) for name in ("decoder", "skips", "augment"))


def _difference(ours: Mapping, *, name: str, mean: float, sd: float | None, is_target: bool) -> dict:
    difference = 100 * ours["mean"] - mean
    within = None if sd is None or not is_target else abs(difference) <= sd
    remark = "" if is_target else "do not use as a target: the paper's number contradicts its printed difference"
    return {"row": name, "mean": mean, "sd": sd, "difference": difference, "within_one_sd": within, "remark": remark}


# Obstacles ------------------------------------------------------------------------------------------------------------


def _no_row(options: Mapping, task: str, pretraining: Mapping | None) -> str:
    pretrained = options["weights"] != SCRATCH
    network = f"{options['arch']} with decoder {options['decoder']}, {'pretrained' if pretrained else 'from scratch'}"
    if task == "brats21_cv" and pretrained and pretraining is None:
        network += " in a way that the weights do not tell (file gone, or not written by train_pretrain.py)"
    return f"the paper has no row for {network}, on {title(task)}"


def _finetuning_obstacles(options: Mapping, summary: Mapping, task: str) -> list[str]:
    """What fine-tuning and evaluation did in another way than the paper."""
    obstacles = []
    if options.get("allow_incomplete"):
        obstacles.append("`allow_incomplete`: trained on folds of a release that may lack cases")
    if len(summary["folds"]) != FOLDS:
        obstacles.append(f"{len(summary['folds'])} folds are finished, the paper has {FOLDS}")
    for cases, failed in sorted({(fold["n_cases"], fold["n_failed"]) for fold in summary["folds"]}):
        if (cases, failed) != (TESTED[task], 0):
            obstacles.append(
                f"a fold has {cases} measured cases and {failed} that failed, expected {TESTED[task]} and 0"
            )
    expected = FINETUNING | {"augment": "all" if options["weights"] == SCRATCH else "spatial"}
    for name, value in expected.items():
        if options.get(name, value) != value:
            obstacles.append(f"`{name}` {options[name]}, the paper has {value}")
    preset = options.get("preset", "appendix_r1")
    for name, value in hyperparameters(preset, "finetune", options["arch"]).items():
        if options.get(name, value) != value:
            obstacles.append(f"`{name}` {options[name]}, preset {preset} has {value}")
    for name, value in EVALUATION.items():
        if summary["settings"][name] != value:
            obstacles.append(f"evaluated with {name} {summary['settings'][name]}, the paper has {value}")
    return obstacles


def _pretraining_obstacles(pretraining: Mapping, arch: str, is_ablation: bool) -> list[str]:
    """What pretraining did in another way than the paper; decoder and augmentation choose the row of an ablation."""
    obstacles = []
    is_swin, objective = arch.startswith("swin"), pretraining.get("objective")
    if is_swin != (objective == "swin") or objective == "supervised":
        losses = "SwinUNETR's own losses" if is_swin else "masked reconstruction"
        obstacles.append(f"pretrained with `objective` {objective}, the paper's {arch} with {losses}")
    elif not is_swin and not is_ablation and _pretrained_with(pretraining) != ("light", False, "all"):
        decoder, skips, augment = _pretrained_with(pretraining)
        ours = f"decoder {decoder}, {'with' if skips else 'no'} skip connections, augmentation {augment}"
        obstacles.append(
            f"pretrained with {ours}; the paper's has decoder light, no skip connections, augmentation all"
        )
    if pretraining.get("steps") or pretraining.get("epochs") != PRETRAINING_EPOCHS:
        length = f"{pretraining['steps']} steps" if pretraining.get("steps") else f"{pretraining.get('epochs')} epochs"
        obstacles.append(f"pretrained for {length}, the paper's for {PRETRAINING_EPOCHS} epochs")
    if pretraining.get("data") in ("demo", ["demo"]):
        obstacles.append("pretrained on synthetic heads")
    expected = PRETRAINING | hyperparameters(pretraining.get("preset", "appendix_r1"), "pretrain", arch)
    if objective == "amaes":
        expected |= MASKED_PRETRAINING
    for name, value in expected.items():
        if name in pretraining and pretraining[name] != value:
            obstacles.append(f"pretrained with `{name}` {pretraining[name]}, the paper has {value}")
    return obstacles


# Text -----------------------------------------------------------------------------------------------------------------


def comparison_text(name: str, summary: Mapping, compared: Mapping) -> str:
    """Markdown of `compare_with_paper`, with the options as on the command line.

    Args:
        name: of the run.
        summary: of the run.
        compared: by `compare_with_paper`.
    """
    parts = [f"## {markdown_text(name)} and the paper"]
    if compared["rows"]:
        rows = [
            [
                row["row"],
                f"{row['mean']:.2f}" + ("" if row["sd"] is None else f" ± {row['sd']:.2f}"),
                mean_sd_text(summary["dice"], 100),
                f"{row['difference']:+.2f}",
                row["remark"] or {None: "no sd", True: "yes", False: "no"}[row["within_one_sd"]],
            ]
            for row in compared["rows"]
        ]
        parts.append(markdown_table(["Dice %", "paper", "here", "difference", "within one sd of the paper"], rows))
    if compared["obstacles"]:
        parts.append("Not comparable:\n" + "\n".join(f"- {as_options(line)}" for line in compared["obstacles"]))
    elif compared["rows"]:
        parts.append("Comparable: cases, folds and settings are those of the paper, as far as it states them.")
    if compared["notes"]:
        lines = [f"{number}. {as_options(text)}" for number, text in enumerate(compared["notes"], 1)]
        parts.append("What the paper leaves open:\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"
