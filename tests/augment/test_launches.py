"""How many kernels the augmentation starts: on a GPU with small patches they take most of its time."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from amaes.augment import FinetuneAugment, PretrainAugment, pipeline
from amaes.augment.options import INTENSITY, SPATIAL
from amaes.objectives.masked import MaskedReconstruction

PATCH = (16, 16, 16)
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "_unsafe_view"}
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}


class Launches(TorchDispatchMode):
    """Counts, by name, the operators that would start a kernel on a GPU: no views, no allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        results, name = operator._schema.returns, operator.overloadpacket.__name__
        is_view = any(result.alias_info is not None and not result.alias_info.is_write for result in results)
        if not is_view and name not in ALLOCATIONS:
            self.counts[name] += 1
        if name == "index":  # by booleans it waits for their number
            assert all(index is None or index.dtype != torch.bool for index in args[1])
        return operator(*args, **(kwargs or {}))


def launches(function, *arguments) -> int:
    function(*arguments)  # makes the tables
    with pytest.MonkeyPatch.context() as patch, Launches() as mode:
        patch.setattr(pipeline, "check_finite", lambda window: None)  # as on a GPU
        function(*arguments)
    assert not WAITING & mode.counts.keys()
    return mode.counts.total()


def augmented(*names, preset=PretrainAugment) -> int:
    """Launches for two samples that drew these transforms and no others."""
    augment = preset(PATCH, "all", elastic_sigma=(3.0, 5.0), mirror=0.5)
    draws = augment.draw([0, 0], [0, 1])
    off = {name: np.zeros_like(getattr(draws, name)) for name in (*SPATIAL, *INTENSITY, "mirror")}
    draws = replace(draws, **off, **{f"{name}_axis": np.zeros((2, 1), int) for name in ("ghosting", "gibbs_ringing")})
    draws = replace(draws, **{name: ~off[name] for name in names})
    label = () if preset is PretrainAugment else (torch.ones(2, *augment.window_size, dtype=torch.uint8),)
    return launches(augment, torch.rand(2, 1, *augment.window_size), *label, draws)


def test_what_no_sample_drew_starts_none():
    assert augmented() == 2  # the copies that become source and target
    assert augmented(preset=FinetuneAugment) == 3  # and the label


# Kernels of each transform as counted, the drawing of elastic coefficients on the host with them.
@pytest.mark.parametrize(
    ("name", "most"),
    {
        "rotation": 20,
        "scale": 20,
        "elastic": 89,
        "additive_noise": 36,
        "blur": 52,
        "multiplicative_noise": 37,
        "ghosting": 16,
        "gibbs_ringing": 16,
        "low_resolution": 28,
        "bias_field": 21,
        "gamma": 15,
        "mirror": 9,
    }.items(),
)
def test_a_transform_starts_no_more_than_counted(name, most):
    assert 0 < augmented(name) - 2 <= most


def test_both_noises_are_made_together():
    assert augmented("additive_noise", "multiplicative_noise") - augmented("additive_noise") <= 8


def test_mask():
    objective = MaskedReconstruction(PretrainAugment(PATCH, "none"), token_size=4, mask_ratio=0.6)
    batch = {"image": torch.rand(2, 1, *PATCH), "epoch": [0, 0], "case": [0, 1]}
    assert launches(objective.prepare, batch, torch.device("cpu")) - 2 <= 21
