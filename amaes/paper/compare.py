"""The published numbers, and how a run compares with them.

Munk et al. 2024, arXiv 2408.00640: Dice in %, mean and standard deviation over 6 folds of 20 training cases.
"""

from __future__ import annotations

from collections.abc import Mapping

from amaes.evaluation.tables import spread, table
from amaes.paper.numbers import TESTED, Row, _row
from amaes.paper.protocols import EVALUATIONS, FOLDS, PROTOCOLS
from amaes.training.optim import hyperparameters

TABLE_4: dict[tuple[str, str, bool], Row] = {  # (architecture, decoder in fine-tuning, pretrained)
    ("unet_xl", "unet", False): _row("U-Net XL", 90, (56.00, 2.55), (48.30, 2.94), (68.32, 1.75), (67.22, 1.59)),
    ("unet_b", "unet", False): _row("U-Net B", 22, (55.28, 1.75), (45.66, 2.40), (66.18, 2.28), (64.96, 2.52)),
    ("mednext_m", "unet", False): _row(
        "MedNeXt M, U-Net decoder", 21, (58.38, 1.44), (56.15, 2.77), (70.01, 1.48), (67.64, 1.74)
    ),
    ("mednext_l", "unet", False): _row(
        "MedNeXt L, U-Net decoder", 55, (58.28, 1.23), (55.40, 1.88), (70.32, 1.77), (67.57, 1.48)
    ),
    ("mednext_l", "mednext", False): _row(
        "MedNeXt L, MedNeXt decoder", 62, (55.42, 2.25), (53.88, 1.52), (68.75, 2.18), (67.14, 1.28)
    ),
    ("swin_unetr", "unet", False): _row("SwinUNETR", 62, (50.00, 2.59), (42.55, 2.49), (64.96, 3.90), (65.02, 2.86)),
    ("unet_xl", "unet", True): _row("U-Net XL", 90, (58.98, 0.88), (53.58, 0.76), (70.40, 1.46), (68.22, 1.16)),
    ("unet_b", "unet", True): _row("U-Net B", 22, (57.20, 1.75), (48.42, 1.32), (69.11, 2.28), (67.51, 1.56)),
    ("mednext_m", "unet", True): _row("MedNeXt M", 21, (56.81, 2.40), (55.89, 2.17), (71.70, 1.62), (68.80, 0.79)),
    ("mednext_l", "unet", True): _row("MedNeXt L", 55, (58.73, 1.33), (56.83, 1.39), (71.63, 1.67), (68.68, 0.97)),
    ("swin_unetr", "unet", True): _row(
        "SwinUNETR", 62, (49.54, 0.94), (48.42, 3.14), (67.28, 2.67), (68.14, 1.43), no_target=("isles22", "wmh_ood")
    ),
}

# Tables 2 and 3, and the text on skip connections: pretrained U-Net XL, BraTS21, validation cases of the pool. By what
# it was pretrained with: (decoder, skip connections, augmentation); the text gives no sd.
ABLATIONS: dict[tuple[str, bool, str], tuple[str, float, float | None]] = {
    ("standard", False, "none"): ("Table 2, standard U-Net decoder", 56.65, 1.85),
    ("standard", True, "none"): ("text on skip connections, standard decoder", 56.22, None),
    ("light", False, "none"): ("Tables 2 and 3, light-weight decoder, no augmentation", 58.61, 1.94),
    ("light", False, "all"): ("Table 3, all augmentations", 59.85, 0.98),
}

# What the paper leaves open, by what it concerns; the order is that of the influence to expect.
_ALL = tuple(TESTED)
_OPEN: tuple[tuple[tuple[str, ...], bool, str], ...] = (  # tasks, pretrained runs only, text
    (
        _ALL,
        False,
        "Learning rate and batch size of fine-tuning: the table of Appendix A lost its column spans and can be read in "
        "two ways (--preset appendix_r1, the default, and appendix_r2); the published code has a third.",
    ),
    (
        _ALL,
        True,
        "Optimizer of pretraining: the appendix has amsgrad and weight decay 3e-5, the published code no amsgrad and "
        "0.01 (--preset code).",
    ),
    (_ALL, False, "Which 20 cases formed each fold is not published; the rule here is our own."),
    (
        ("wmh", "wmh_ood"),
        False,
        "Label 2 (other pathology): background in training here, its voxels left out of evaluation (--wmh-label2); the "
        "published code kept three classes, and how the table averages them is not said. Its level of about 70 fits "
        "class 1 alone.",
    ),
    (
        _ALL,
        True,
        "Images of ADNI, OASIS3, OASIS4 and PPMI: which were downloaded is not published, only the filter is known.",
    ),
    (
        ("brats21_cv",),
        False,
        "The paper states 866 validation cases; the pool without a fold's 20 training cases has 918, all tested here.",
    ),
    (
        _ALL,
        False,
        "Standard deviation: the paper does not say which, here n - 1; that cross-validation was scored on the scans' "
        "own grids is assumed.",
    ),
    (
        _ALL,
        False,
        "Elastic deformation: listed with the intensity transforms, but part of the spatial one in the published code, "
        "which is followed.",
    ),
    (
        ("brats21", "brats21_cv"),
        True,
        "Leakage: the images of MSD BrainTumour in BRAINS-45K come from earlier BraTS years under other names and may "
        "show patients of the test cases.",
    ),
    (("isles22", "wmh"), True, "Leakage: BRAINS-45K holds the images of the cases tested here, without labels."),
    (
        ("wmh_ood",),
        False,
        "90 of the 110 cases are of the three training scanners; the 20 of GE1T5 and Philips alone are of unseen ones.",
    ),
)

# Options of fine-tuning as in the paper: name -> value.
_SETTING = {
    "steps": 2500,
    "patch_size": [128, 128, 128],
    "deep_supervision": False,
    "foreground": 0.33,
    "augment_options": [],
}
# The same of pretraining, and of the masks of AMAES.
_PRETRAINING = {"patch_size": [128, 128, 128], "augment_options": [], "warmup": 0.05}
_MASKED = {"mask_ratio": 0.6, "token_size": 4, "loss_over": "all"}
_EVALUATION = {"space": "native", "tta": False, "overlap": 0.5, "empty": "nan"}


def compare(
    options: Mapping, summary: Mapping, evaluation: str | None = None, pretraining: Mapping | None = None
) -> dict:
    """A run beside the rows of the paper that are about its network and task.

    Args:
        options: of train_finetune.py, from the run's config.json.
        summary: of `amaes.evaluation.tables.summarise`, with "settings".
        evaluation: key of EVALUATIONS where other cases than the fold's own were tested.
        pretraining: options of train_pretrain.py, where the weights are of a run of ours.

    Returns:
        {"task", "rows": [{"row", "mean", "sd", "difference", "within_one_sd", "remark"}, ...] in %, "obstacles": why
        the numbers are not comparable, "notes": what the paper leaves open}; within_one_sd is None where the paper's
        number is no target or has no sd.
    """
    task = evaluation or options.get("protocol")
    if task is None:
        return {"task": None, "rows": [], "obstacles": [NO_PROTOCOL], "notes": []}
    pretrained = options["weights"] != "scratch"
    published = _published(options, task, pretrained, pretraining)
    obstacles = _obstacles(options, summary, task, pretrained)
    if not published:
        of = f"{options['arch']} with decoder {options['decoder']}, {'pretrained' if pretrained else 'from scratch'}"
        if task == "brats21_cv" and pretrained and pretraining is None:
            of += " in a way that the weights do not tell (file gone, or not written by train_pretrain.py)"
        obstacles.insert(0, f"the paper has no row for {of}, on {title(task)}")
    if pretrained and pretraining is not None:  # else the authors' own weights, say
        obstacles += _pretraining_obstacles(pretraining, options["arch"], ablation=task == "brats21_cv")
    notes = [text for tasks, only_pretrained, text in _OPEN if task in tasks and (pretrained or not only_pretrained)]
    if pretrained:
        notes.append(
            f"Weights: {options['weights']}. The paper's are of 100 epochs on BRAINS-45K; "
            + ("of these, only what the file says of its options was compared." if pretraining else NOT_TOLD)
        )
    rows = [_against(summary["dice"], *entry) for entry in published]
    return {"task": task, "rows": rows, "obstacles": obstacles, "notes": notes}


NOT_TOLD = "what these are was NOT checked: the file is gone or does not say how it was made."
NO_PROTOCOL = (
    "the run was made without --protocol, so neither its cases nor its folds are those of an experiment of the paper"
)


def title(task: str) -> str:
    """The task as the paper calls it."""
    return (EVALUATIONS.get(task) or PROTOCOLS[task]).title


def _published(
    options: Mapping, task: str, pretrained: bool, pretraining: Mapping | None
) -> list[tuple[str, float, float | None, bool]]:
    """(name of the row, mean, sd, whether it is a target) of what the paper has for a run."""
    key = (options["arch"], options["decoder"], pretrained)
    if task == "brats21_cv":
        how = _pretrained_how(pretraining) if pretraining else None
        if key != ("unet_xl", "unet", True) or how not in ABLATIONS:
            return []
        return [(*ABLATIONS[how], True)]
    if key not in TABLE_4:
        return []
    row = TABLE_4[key]
    start = "pretrained" if pretrained else "from scratch"
    return [(f"Table 4, {row.model}, {start}, {title(task)}", *row.dice[task], task not in row.no_target)]


def _pretrained_how(pretraining: Mapping) -> tuple:
    return tuple(pretraining.get(name) for name in ("decoder", "skips", "augment"))


def _against(ours: Mapping, name: str, mean: float, sd: float | None, target: bool) -> dict:
    difference = 100 * ours["mean"] - mean
    within = None if sd is None or not target else abs(difference) <= sd
    remark = "" if target else "do not use as a target: the paper's number contradicts its printed difference"
    return {"row": name, "mean": mean, "sd": sd, "difference": difference, "within_one_sd": within, "remark": remark}


def _obstacles(options: Mapping, summary: Mapping, task: str, pretrained: bool) -> list[str]:
    """What a run did in another way than the paper."""
    found = []
    if options.get("allow_incomplete"):
        found.append("--allow-incomplete: trained on folds of a release that may lack cases")
    if len(summary["folds"]) != FOLDS:
        found.append(f"{len(summary['folds'])} folds are finished, the paper has {FOLDS}")
    for cases, failed in sorted({(fold["n_cases"], fold["n_failed"]) for fold in summary["folds"]}):
        if (cases, failed) != (TESTED[task], 0):
            found.append(f"a fold has {cases} measured cases and {failed} that failed, expected {TESTED[task]} and 0")
    expected = _SETTING | {"augment": "spatial" if pretrained else "all"}
    for name, value in expected.items():
        if options.get(name, value) != value:
            found.append(f"--{name.replace('_', '-')} {options[name]}, the paper has {value}")
    preset = options.get("preset", "appendix_r1")
    for name, value in hyperparameters(preset, "finetune", options["arch"]).items():
        if options.get(name, value) != value:
            found.append(f"--{name.replace('_', '-')} {options[name]}, preset {preset} has {value}")
    for name, value in _EVALUATION.items():
        if summary["settings"][name] != value:
            found.append(f"evaluated with {name} {summary['settings'][name]}, the paper has {value}")
    return found


def _pretraining_obstacles(pretraining: Mapping, arch: str, ablation: bool) -> list[str]:
    """What the pretraining of a row was not; `ablation`: of Tables 2 and 3, which decoder and augmentation choose."""
    found = []
    swin, objective = arch.startswith("swin"), pretraining.get("objective")
    if swin != (objective == "swin") or objective == "supervised":
        wanted = "SwinUNETR's own losses" if swin else "masked reconstruction"
        found.append(f"pretrained with --objective {objective}, the paper's {arch} with {wanted}")
    elif not swin and not ablation and _pretrained_how(pretraining) != ("light", False, "all"):
        decoder, skips, augment = _pretrained_how(pretraining)
        how = f"decoder {decoder}, {'with' if skips else 'no'} skip connections, augmentation {augment}"
        found.append(f"pretrained with {how}; the paper's has decoder light, no skip connections, augmentation all")
    if pretraining.get("steps") or pretraining.get("epochs") != 100:
        length = f"{pretraining['steps']} steps" if pretraining.get("steps") else f"{pretraining.get('epochs')} epochs"
        found.append(f"pretrained for {length}, the paper's for 100 epochs")
    if pretraining.get("data") in ("demo", ["demo"]):
        found.append("pretrained on synthetic heads")
    preset = pretraining.get("preset", "appendix_r1")
    expected = _PRETRAINING | hyperparameters(preset, "pretrain", arch) | (_MASKED if objective == "amaes" else {})
    for name, value in expected.items():
        if name in pretraining and pretraining[name] != value:
            found.append(f"pretrained with --{name.replace('_', '-')} {pretraining[name]}, the paper has {value}")
    return found


def comparison_text(name: str, summary: Mapping, compared: Mapping) -> str:
    """Markdown of `compare`.

    Args:
        name: of the run.
        summary: of the run.
        compared: by `compare`.
    """
    parts = [f"## {name} and the paper"]
    if compared["rows"]:
        rows = [
            [
                row["row"],
                f"{row['mean']:.2f}" + ("" if row["sd"] is None else f" ± {row['sd']:.2f}"),
                spread(summary["dice"], 100),
                f"{row['difference']:+.2f}",
                row["remark"] or {None: "no sd", True: "yes", False: "no"}[row["within_one_sd"]],
            ]
            for row in compared["rows"]
        ]
        parts.append(table(["Dice %", "paper", "here", "difference", "within one sd of the paper"], rows))
    if compared["obstacles"]:
        parts.append("Not comparable:\n" + "\n".join(f"- {line}" for line in compared["obstacles"]))
    elif compared["rows"]:
        parts.append("Comparable: cases, folds and settings are those of the paper, as far as it states them.")
    if compared["notes"]:
        lines = [f"{number}. {text}" for number, text in enumerate(compared["notes"], 1)]
        parts.append("What the paper leaves open:\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"
