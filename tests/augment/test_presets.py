"""What the presets are, and which options and patches are refused."""

from __future__ import annotations

import pytest

from amaes.augment import FINETUNE_PRESETS, PRETRAIN_PRESETS, FinetuneAugment, PretrainAugment
from tests.augment.test_pipeline import PATCH


def test_presets():
    assert set(PRETRAIN_PRESETS) == set(FINETUNE_PRESETS) == {"all", "spatial", "none"}
    assert PretrainAugment((128, 128, 128)).window_size == (182, 182, 182)
    assert PretrainAugment((128, 128, 128), preset="none").window_size == (128, 128, 128)
    assert PretrainAugment((128, 128, 128), window="official").window_size == (181, 181, 181)
    assert PretrainAugment(PATCH, preset="basic").preset == "spatial"
    assert FinetuneAugment((128, 128, 128)).window_size == (128, 128, 128)
    assert FinetuneAugment((128, 128, 128), window="parity").window_size == (182, 182, 182)
    finetune = FinetuneAugment(PATCH)
    assert not finetune.options.clip
    assert finetune.options.elastic == finetune.options.gamma == 0
    assert finetune.options.rotation == finetune.options.scale == 0.2
    assert FinetuneAugment(PATCH, preset="all").options.elastic == 0.33


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 2}, "order=2: expected 1, 3"),
        ({"window": "big"}, "window='big': expected 'parity', 'official', 'none'"),
        ({"gibbs": "relative"}, "gibbs='relative'"),
        ({"gibbs": "absolute"}, "gibbs='absolute': needs sides of at least 128"),
        ({"bias": "linear"}, "bias='linear': expected 'official', 'exp'"),
        ({"fill": "max"}, "fill='max': expected 'min' or a number in"),
        ({"clip": 1}, "clip=1: expected True, False"),
        ({"rotation": 1.2}, r"rotation=1.2: expected a probability in \[0, 1\]"),
        ({"gamma": float("nan")}, "gamma=nan"),
        ({"fill": 1e300}, r"fill=1e\+300: expected 'min' or a number in \[-1e\+06, 1e\+06\]"),
        ({"blur_sigma": (1, 0)}, "blur_sigma=.*low <= high"),
        ({"ghosting_repetitions": (2, 10.5)}, "ghosting_repetitions=.*whole numbers"),
        ({"ghosting_repetitions": (0, 10)}, r"in \[1, "),
        ({"low_resolution_zoom": (0.5, 1.5)}, "low_resolution_zoom="),
        ({"elastic_alpha": 3}, "elastic_alpha=3: expected a pair"),
        ({"brightness": 0.1}, "brightness=0.1: no such option; accepted: order, window"),
        ({"preset": "full"}, "`preset` 'full' is unknown; accepted: all, spatial, none"),
        ({"preset": "spatial", "gamma": 0.5}, "gamma=0.5: the preset 'spatial' has no gamma"),
        ({"preset": "none", "mirror": 0.5}, "mirror=0.5: the preset 'none' has no mirror"),
        ({"preset": "spatial", "bias": "exp"}, "the preset 'spatial' has no bias_field"),
        ({"seed": -1}, "`seed` -1: expected an integer >= 0"),
        ({"patch_size": (12, 16)}, "`patch_size` 12 16: expected three whole numbers"),
        ({"patch_size": (12, 16, 0)}, "`patch_size` 12 16 0: "),
    ],
)
def test_bad_options_name_value_and_accepted(options, message):
    with pytest.raises(ValueError, match=message):
        PretrainAugment(**({"patch_size": PATCH} | options))
