"""Hyper-parameters as published, by preset, task and architecture."""

from __future__ import annotations

from collections.abc import Mapping

# Appendix A of arXiv 2408.00640: AdamW with amsgrad, weight decay 3e-5. Its table lost the spans of two rows, so that
# learning rate and batch size can be read in two ways, "appendix_r1" and "appendix_r2"; "code" is what the published
# program passes to AdamW. Rows: (task, first part of the architecture's name), the first that fits is taken.
_APPENDIX = {"weight_decay": 3e-5, "amsgrad": True}
_R1 = {
    ("pretrain", "swin"): {"lr": 1e-4, "batch_size": 8},
    ("pretrain", ""): {"lr": 1e-4, "batch_size": 16},
    ("finetune", "mednext"): {"lr": 6e-4, "batch_size": 2},
    ("finetune", "swin"): {"lr": 1e-4, "batch_size": 4},
    ("finetune", ""): {"lr": 5e-4, "batch_size": 8},
}
_R2 = {
    ("pretrain", "mednext_m"): {"lr": 5e-4, "batch_size": 8},
    ("pretrain", "mednext"): {"lr": 1e-4, "batch_size": 8},
    ("pretrain", "swin"): {"lr": 6e-4, "batch_size": 2},
    ("pretrain", ""): {"lr": 1e-4, "batch_size": 16},
    ("finetune", ""): {"lr": 1e-4, "batch_size": 4},
}
_CODE = {("pretrain", ""): {"lr": 1e-4, "batch_size": 16}, ("finetune", ""): {"lr": 1e-4, "batch_size": 8}}
PRESETS: dict[str, tuple[dict, dict]] = {
    "paper": (_R1, _APPENDIX),
    "appendix_r1": (_R1, _APPENDIX),
    "appendix_r2": (_R2, _APPENDIX),
    "code": (_CODE, {"weight_decay": 0.01, "amsgrad": False}),
}

# By preset and objective: what the paper and its code do, also where our default is another one.
OF_OBJECTIVE: dict[tuple[str, str], dict] = {
    ("paper", "amaes"): {
        **{"crop": "window", "mask_ratio": 0.6, "token_size": 4, "loss_over": "all", "target": "absolute"},
        **{"decoder": "light", "skips": False},
    }
}


def remark(options: Mapping[str, object]) -> str:
    """One line: what a preset sets of the masked objective, and what was asked for instead; "" where it sets nothing.

    Args:
        options: of train_pretrain.py, by name.
    """
    values = OF_OBJECTIVE.get((options["preset"], options["objective"]), {})
    if not values:
        return ""
    same = [f"`{name}` {value}" for name, value in values.items() if options[name] == value]
    other = [f"`{name}` {options[name]}" for name, value in values.items() if options[name] != value]
    text = f"`preset` {options['preset']}: as published, {', '.join(same)}"
    return f"{text}; NOT as published, {', '.join(other)}" if other else text


def hyperparameters(preset: str, task: str, arch: str) -> dict:
    """Learning rate, global batch size, weight decay and amsgrad of a preset.

    Args:
        preset: a key of PRESETS.
        task: "pretrain" or "finetune".
        arch: name of the architecture.
    """
    if preset not in PRESETS:
        raise ValueError(f"`preset` {preset!r} is unknown; accepted: {', '.join(PRESETS)}")
    rows, common = PRESETS[preset]
    row = next(row for (row_task, start), row in rows.items() if row_task == task and arch.startswith(start))
    return row | common
