import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from amaes import cli
from amaes.distributed import Ranks
from amaes.training import options

ROOT = Path(__file__).parent.parent.parent


def parse(*argv, task="pretrain"):
    parser = cli.Parser()
    options.add_model_options(parser, arch="unet_xl")
    return options.parse(parser, task, list(argv))


@pytest.mark.parametrize(
    ("argv", "task", "lr", "batch"),
    [
        ([], "pretrain", 1e-4, 16),
        ([], "finetune", 5e-4, 8),
        (["--preset", "appendix_r2"], "finetune", 1e-4, 4),
        (["--lr", "0.3", "--batch-size", "6"], "finetune", 0.3, 6),
    ],
)
def test_presets_set_defaults_that_options_override(argv, task, lr, batch):
    args = parse(*argv, task=task)
    assert (args.lr, args.batch_size) == (lr, batch)


def test_patch_size_is_a_cube_or_three_sides():
    assert parse("--patch-size", "64").patch_size == (64, 64, 64)
    assert parse("--patch-size", "64", "96", "32").patch_size == (64, 96, 32)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arch", "nope"], "invalid choice: 'nope'"),
        (["--preset", "mine"], "invalid choice: 'mine'"),
        (["--arch"], "expected one argument"),
        (["--patch-size", "1", "2"], "--patch-size 1 2: 2 numbers, accepted: N or X Y Z"),
        (["--batch-size", "0"], "'0' is not an integer >= 1"),
        (["--lr", "nan"], "'nan' is not a number > 0"),
        (["--batch", "3"], "unrecognized arguments: --batch"),
        (["--accumulate", "some"], "'some' is not an integer >= 1"),
    ],
)
def test_wrong_options_are_one_line_and_status_two(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_patches_must_divide():
    options.check_patch_size((32, 48, 64), "unet_tiny", token_size=4)
    for patch, hint in [
        ((33, 32, 32), "e.g. 32 or 48"),
        ((0, 32, 32), "e.g. 32 or 48"),
        ((32, 100, 32), "e.g. 96 or 112"),
    ]:
        with pytest.raises(ValueError, match=f"multiples of 16, {hint}"):
            options.check_patch_size(patch, "unet_tiny")
    with pytest.raises(ValueError, match="multiples of 48, e.g. 48 or 96"):
        options.check_patch_size((32, 48, 48), "unet_tiny", token_size=6)


def test_a_patch_must_leave_the_coarsest_stage_enough_voxels():
    options.check_patch_size((16, 32, 32), "unet_tiny")
    options.check_patch_size((16, 32, 16), "mednext_s")
    options.check_patch_size((32, 64, 32), "swin_tiny")
    for patch, arch, message in [
        ((16, 32, 16), "unet_tiny", "leaves 2 voxels .* multiples of 16 that leave 4 or more"),
        ((16, 16, 16), "mednext_s", "leaves 1 voxels .* multiples of 16 that leave 2 or more"),
        ((32, 32, 32), "swin_tiny", "leaves 1 voxels .* multiples of 32 that leave 2 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            options.check_patch_size(patch, arch)


def test_batches_must_be_shared_out():
    options.check_batch(8, 2, "auto")
    options.check_batch(8, 2, 4)
    with pytest.raises(
        ValueError, match="--batch-size 3: cannot be split over 2 ranks; accepted: multiples of 2, e.g. 2"
    ):
        options.check_batch(3, 2, "auto")
    with pytest.raises(ValueError, match="over 1 ranks x --accumulate 5; accepted: multiples of 5"):
        options.check_batch(8, 1, 5)


def test_masks_must_keep_and_hide_something():
    options.check_mask((32, 32, 32), 4, 0.6, "all")
    options.check_mask((32, 32, 32), 4, 0.0, "all")
    with pytest.raises(ValueError, match="--mask-ratio 0.9: keeps 0 of 8 tokens of 16 voxels"):
        options.check_mask((32, 32, 32), 16, 0.9, "all")
    with pytest.raises(ValueError, match="--mask-ratio 0.0: keeps 512 of 512"):
        options.check_mask((32, 32, 32), 4, 0.0, "masked")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("order=3", ("order", 3)),
        ("bias=exp", ("bias", "exp")),
        ("fill=0.5", ("fill", 0.5)),
        ("clip=false", ("clip", False)),
        ("rotation=0.5", ("rotation", 0.5)),
        ("rotation_degrees=-15,15", ("rotation_degrees", (-15.0, 15.0))),
    ],
)
def test_options_of_the_augmentation(text, expected):
    assert options.augment_option(text) == expected


@pytest.mark.parametrize("text", ["nope=3", "order", "order=x", "clip=maybe", "rotation_degrees=a,b"])
def test_wrong_options_of_the_augmentation_are_named(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}': "):
        options.augment_option(text)


def test_an_option_of_the_augmentation_is_given_once():
    assert options.unique([("order", 3)], window="none") == {"order": 3, "window": "none"}
    for pairs in ([("order", 3), ("order", 1)], [("window", "parity")]):
        with pytest.raises(ValueError, match=f"--augment-options {pairs[-1][0]}="):
            options.unique(pairs, window="none")


def test_batch_is_described():
    assert options.describe_batch(8, 2, Ranks(0, 2, 0, 2, torch.device("cpu")), 10) == (
        "10 steps of 8 patches = 2 ranks x 2 micro-steps x 2 on cpu"
    )


def test_options_become_plain_data():
    args = argparse.Namespace(b=Path("x/y"), a=(1, 2, 3), c=None)
    assert options.as_plain(args) == {"a": [1, 2, 3], "b": "x/y", "c": None}


@pytest.mark.parametrize(
    "error", ["ValueError('--x 3: no\\n such')", "FileNotFoundError('f: no such')", "KeyboardInterrupt()"]
)
def test_scripts_end_with_one_line(error):
    code = f"from amaes import cli\ndef main():\n    raise {error}\ncli.run(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == (130 if "Interrupt" in error else 2)
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_programming_errors_keep_their_traceback():
    code = "from amaes import cli\ndef main():\n    raise KeyError('x')\ncli.run(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("script", ["train_pretrain.py", "train_finetune.py"])
def test_help_shows_the_real_defaults(script):
    done = subprocess.run(
        [sys.executable, script, "--arch", "unet_b", "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    text = " ".join(done.stdout.split())
    for default in ("(default: unet_xl)", "or X Y Z (default: 128)", "(default: 3e-05)", "(default: auto)"):
        assert default in text
    assert ("base learning rate of AdamW (default: 0.0001)" if "pretrain" in script else "(default: 0.0005)") in text
    assert "of weights, order, crops, augmentation, masks, validation split (default: 0)" in text
