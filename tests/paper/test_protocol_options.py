"""What --protocol sets, and what it refuses beside it."""

from __future__ import annotations

import sys

import pytest

import train_finetune


def options(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train_finetune.py", "--data", "STORE", *words])
    return train_finetune.parse_options()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--folds", "5"], "--folds 5: --protocol wmh has 6"),
        (["--train-cases", "10"], "--train-cases 10: --protocol wmh has 20"),
        (["--split-seed", "1"], "--split-seed 1: --protocol wmh has 0"),
    ],
)
def test_options_that_the_protocol_sets_are_refused(monkeypatch, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        options(monkeypatch, "--protocol", "wmh", *words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert options(monkeypatch, "--protocol", "wmh", "--fold", "5").fold == "5"


def test_incomplete_is_an_option_of_protocols(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        options(monkeypatch, "--allow-incomplete")
    assert "accepted with --protocol" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "arch", "lr", "batch_size"),
    [
        ("appendix_r1", "unet_xl", 5e-4, 8),
        ("appendix_r1", "unet_b", 5e-4, 8),
        ("appendix_r1", "mednext_m", 6e-4, 2),
        ("appendix_r1", "mednext_l", 6e-4, 2),
        ("appendix_r1", "swin_unetr", 1e-4, 4),
        ("appendix_r2", "unet_xl", 1e-4, 4),
        ("appendix_r2", "mednext_l", 1e-4, 4),
        ("appendix_r2", "swin_unetr", 1e-4, 4),
        ("code", "unet_xl", 1e-4, 8),
    ],
)
def test_a_protocol_trains_with_the_published_hyperparameters(monkeypatch, preset, arch, lr, batch_size):
    args = options(monkeypatch, "--protocol", "brats21", "--preset", preset, "--arch", arch)
    assert (args.lr, args.batch_size, args.steps, args.patch_size) == (lr, batch_size, 2500, (128, 128, 128))
    assert (args.weight_decay, args.amsgrad) == ((0.01, False) if preset == "code" else (3e-5, True))
    assert (args.augment, args.foreground, args.deep_supervision, args.decoder) == ("all", 0.33, False, "unet")
    assert options(monkeypatch, "--protocol", "brats21", "--weights", "W").augment == "spatial"
