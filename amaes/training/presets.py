"""Hyper-parameters as published, by preset, task and architecture."""

from __future__ import annotations

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
    "appendix_r1": (_R1, _APPENDIX),
    "appendix_r2": (_R2, _APPENDIX),
    "code": (_CODE, {"weight_decay": 0.01, "amsgrad": False}),
}


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
