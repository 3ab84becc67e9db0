"""The objectives of pretraining: what each refuses, how each resumes, and AMAES's own in numbers."""

import json
import shutil
import signal
import sys

import pytest
import torch

import train_pretrain
from amaes import cli
from amaes.augment import PretrainAugment
from amaes.models import build_autoencoder
from amaes.objectives import OBJECTIVES, options_of
from amaes.objectives.masked import MaskedReconstruction
from amaes.training.presets import remark
from tests.launch import assert_equal_weights
from tests.stores import make_store

PATCH = (16, 32, 24)
CPU = torch.device("cpu")


@pytest.fixture
def pretrain():
    """Function: train_pretrain.py in this process, `pretrain("--option", value, ...)`."""

    def call(*argv):
        options = train_pretrain.parse_options(["--device", "cpu", "--workers", "0", *map(str, argv)])
        return train_pretrain.main(options)

    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield call
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def two_stores(tmp_path_factory):
    """Stores of the classes one, two and one, three."""
    folder = tmp_path_factory.mktemp("stores")
    paths = [make_store(folder / name, count=count, labels=True) for name, count in (("large", 5), ("small", 2))]
    content = json.loads((paths[1] / "dataset.json").read_text())
    content["labels"] = {"0": "background", "1": "One", "2": "three"}
    (paths[1] / "dataset.json").write_text(json.dumps(content))
    return paths


# All three ------------------------------------------------------------------------------------------------------------

SMALL = ("--arch", "unet_tiny", "--patch-size", 32, "--batch-size", 2, "--steps", 5, "--save-every", 1, "--keep", 9)
RUNS = {
    "amaes": SMALL,
    "swin": ("--arch", "swin_tiny", "--patch-size", 64, 32, 32, "--batch-size", 1, "--steps", 2, "--save-every", 1),
    "supervised": (*SMALL, "--deep-supervision"),
}


@pytest.mark.parametrize("objective", RUNS)
def test_a_run_continues_to_the_same_weights_from_within_a_line_of_metrics(objective, pretrain, two_stores, tmp_path):
    given = ("--objective", objective, *RUNS[objective], "--data", *two_stores, "--log-every", 4, "--val-fraction", 0)
    pretrain(*given, "--out", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for path in (tmp_path / "killed" / "checkpoints").glob("step-[2-9].pt"):  # as if killed after the first step
        path.unlink()
    pretrain(*given, "--out", tmp_path / "killed")
    assert_equal_weights(tmp_path / "whole", tmp_path / "killed")
    config = json.loads((tmp_path / "killed" / "config.json").read_text())
    assert len(config["starts"]) == 2
    of_some = {name for other in OBJECTIVES for name in options_of(other)}
    recorded = {name for name in of_some if config["options"][name] is not None}
    assert recorded == set(options_of(objective))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--foreground", "0.5"), "--foreground 0.5: is not read with --objective amaes"),
        (("--deep-supervision",), "--deep-supervision: is not read with --objective amaes"),
        (("--decoder", "mednext"), "--decoder mednext: --objective amaes takes light or standard"),
        (("--objective", "supervised", "--mask-ratio", "0.5"), "--mask-ratio 0.5: is not read with"),
        (("--objective", "supervised", "--crop", "patch"), "--crop patch: is not read with --objective supervised"),
        (("--objective", "supervised", "--decoder", "light"), "--decoder light: --objective supervised takes unet or"),
        (("--objective", "swin", "--skips"), "--skips: is not read with --objective swin"),
        (("--objective", "swin", "--decoder", "light"), "--decoder light: is not read with --objective swin"),
        (("--data", "demo", "STORE"), "--data demo STORE: demo stands alone"),
    ],
)
def test_options_of_another_objective_are_refused(given, message, pretrain, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain(*given, "--out", tmp_path / "run")
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--objective", "swin", "--arch", "unet_tiny"), "`arch` 'unet_tiny': these heads read a Swin encoder"),
        (("--arch", "unet_tiny", "--merging", "legacy"), "`merging` 'legacy': unet_tiny has no such option"),
        (("--objective", "swin", "--arch", "swin_tiny", "--patch-size", 64, 64, 96), "must be equally long"),
        (("--objective", "swin", "--augment", "none"), "`augment` none: this objective has views of its own"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused_before_the_demo_is_drawn(given, message, pretrain, tmp_path):
    with pytest.raises(ValueError, match=message):
        pretrain("--patch-size", 32, *given, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_panels_without_matplotlib_are_refused_with_what_is_missing(pretrain, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"`panels_every`: needs matplotlib \(.*matplotlib.*\): pip install"):
        pretrain("--panels-every", 1, "--out", tmp_path / "run")


# AMAES ----------------------------------------------------------------------------------------------------------------


def masked_reconstruction(preset="none", over="all", target="standardized", **options):
    augment = PretrainAugment(PATCH, preset, **options)
    return MaskedReconstruction(augment, token_size=4, mask_ratio=0.6, over=over, target=target)


def some(cases, epochs=None, channels=1):
    image = torch.rand(len(cases), channels, *PATCH, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.1
    return {"image": image, "epoch": epochs or [0] * len(cases), "case": cases}


def test_validation_hides_the_same_tokens_every_time_and_changes_nothing_else():
    objective, batch = masked_reconstruction("all"), some([3, 5])
    batch["image"] = torch.rand(2, 1, *PATCH) * 0.9 + 0.1
    inputs, (target, mask) = objective.prepare(batch, CPU, training=False)
    assert torch.equal(target, batch["image"])
    assert mask.shape == (2, 1, *PATCH)
    assert torch.equal(inputs, target.masked_fill(mask, 0))
    kept = int(4 * 8 * 6 * 0.4)  # of the tokens of a patch
    assert (~mask).sum((1, 2, 3, 4)).tolist() == [kept * 64] * 2
    again, _ = objective.prepare(batch, CPU, training=False)
    assert torch.equal(again, inputs)


def test_masks_follow_from_seed_epoch_and_case_and_not_from_the_batch():
    objective = masked_reconstruction()
    _, (_, both) = objective.prepare(some([3, 5], [1, 2]), CPU)
    _, (_, alone) = objective.prepare(some([5], [2]), CPU)
    assert torch.equal(both[1:], alone)
    _, (_, later) = objective.prepare(some([5], [3]), CPU)
    _, (_, other) = masked_reconstruction(seed=1).prepare(some([5], [2]), CPU)
    _, (_, validation) = objective.prepare(some([5], [2]), CPU, training=False)
    assert not any(torch.equal(alone, mask) for mask in (later, other, validation))


def test_channels_share_the_mask_and_the_first_one_is_shown():
    objective = masked_reconstruction()
    inputs, targets = objective.prepare(some([0], channels=2), CPU)
    hidden = targets[1].expand_as(inputs)
    assert not inputs[hidden].any()
    assert inputs[~hidden].all()
    shown = objective.panels(inputs, inputs + 1, targets)
    assert {name: tuple(image.shape) for name, image in shown.items()} == dict.fromkeys(
        ("seen", "rebuilt", "target"), (1, 1, *PATCH)
    )
    assert not shown["seen"][targets[1]].any()  # what is hidden is not in the picture
    assert torch.equal(shown["target"], targets[0][:, :1])


@pytest.mark.parametrize(
    ("over", "loss", "baseline"), [("all", 0.45, 0.25), ("masked", 0.5, 0.5), ("masked-parity", 0.25, 0.25)]
)
def test_the_loss_and_that_of_the_visible_mean_by_hand(over, loss, baseline):
    objective = masked_reconstruction(over=over, target="absolute")
    target = torch.tensor([0.5, 0.5, 0.5 + 0.5**0.5, 0.5 - 0.5**0.5]).view(1, 1, 1, 1, 4)
    mask = torch.tensor([False, False, True, True]).view(1, 1, 1, 1, 4)
    errors = torch.tensor([0.8, 0.0, 0.6, 0.4]).sqrt().view(1, 1, 1, 1, 4)
    terms = objective.losses(target + errors, (target, mask))
    assert list(terms) == ["reconstruction"]
    assert terms["reconstruction"].item() == pytest.approx(loss)
    assert objective.baseline((target, mask)).item() == pytest.approx(baseline)


# Visible: 0.2 and 0.6 (mean 0.4, sd 0.2) of the first patch, 0.5 and 0.5 (sd 0, floored at 0.1) of the second.
TWO = torch.tensor([[0.2, 0.6, 0.8, 0.4], [0.5, 0.5, 0.7, 0.5]]).view(2, 1, 1, 1, 4)
HIDDEN = torch.tensor([False, False, True, True]).view(1, 1, 1, 1, 4).expand(2, 1, 1, 1, 4)


@pytest.mark.parametrize(("over", "baseline"), [("all", (1 + 1 + 4 + 4) / 8), ("masked", (4 + 4) / 4)])
def test_the_standardized_target_by_hand(over, baseline):
    objective = masked_reconstruction(over=over)
    answer = torch.tensor([[-1.0, 1.0, 2.0, 0.0], [0.0, 0.0, 2.0, 0.0]]).view(2, 1, 1, 1, 4)
    assert objective.losses(answer, (TWO, HIDDEN))["reconstruction"].item() == pytest.approx(0, abs=1e-10)
    assert objective.baseline((TWO, HIDDEN)).item() == pytest.approx(baseline)
    shown = objective.panels(TWO, answer.bfloat16(), (TWO, HIDDEN))["rebuilt"]
    assert torch.allclose(shown, TWO)  # in intensities of the store


def test_the_standardized_loss_leaves_out_brightness_and_contrast_and_the_absolute_one_does_not():
    def loss(image, target):
        objective = masked_reconstruction(target=target)
        _, targets = objective.prepare({"image": image, "epoch": [0, 0], "case": [3, 4]}, CPU, training=False)
        answer = torch.rand(2, 2, *PATCH, generator=torch.Generator().manual_seed(2))
        return objective.losses(answer, targets)["reconstruction"].item(), objective.baseline(targets).item()

    image = torch.rand(2, 2, *PATCH, generator=torch.Generator().manual_seed(1))
    factor, offset = torch.tensor([0.9, 0.5]).view(1, 2, 1, 1, 1), torch.tensor([0.0, 0.3]).view(2, 1, 1, 1, 1)
    assert loss(image * factor + offset, "standardized") == pytest.approx(loss(image, "standardized"), rel=1e-5)
    assert loss(image * factor + offset, "absolute") != pytest.approx(loss(image, "absolute"), rel=0.01)


def test_an_unknown_target_is_named():
    with pytest.raises(ValueError, match="`target` 'mine' is unknown; accepted: standardized, absolute"):
        masked_reconstruction(target="mine")


@pytest.mark.parametrize(
    ("given", "target", "line"),
    [
        ((), "standardized", ""),
        (("--preset", "paper"), "absolute", "--preset paper: as published, --crop window, --mask-ratio 0.6, --token-s"),
        (("--preset", "paper", "--skips"), "absolute", "--decoder light; NOT as published, --skips True"),
        (("--preset", "paper", "--objective", "supervised"), None, ""),
    ],
)
def test_the_preset_of_the_paper_sets_the_objective_and_says_so(given, target, line, tmp_path):
    args = train_pretrain.parse_options([*given, "--out", str(tmp_path)])
    assert args.target == target
    said = cli.as_options(remark(vars(args)))
    assert line in said
    assert bool(line) == bool(said)


def test_a_run_of_an_earlier_version_continues_with_the_defaults_it_had(pretrain, two_stores, tmp_path):
    given = (*SMALL, "--data", two_stores[0], "--val-fraction", 0.3, "--out", tmp_path / "run")
    pretrain(*given, "--target", "absolute", "--token-size", 4)
    losses = (tmp_path / "run" / "metrics.jsonl").read_text()
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    del config["options"]["target"]
    file.write_text(json.dumps(config))
    for path in (tmp_path / "run" / "checkpoints").glob("step-[3-9].pt"):
        path.unlink()
    pretrain(*given)
    again = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["val_loss"] for line in again if "val_loss" in line] == [
        json.loads(line)["val_loss"] for line in losses.splitlines() if "val_loss" in line
    ]
    with pytest.raises(ValueError, match="`target` standardized: the run in .* has absolute; take another"):
        pretrain(*given, "--target", "standardized")
    assert train_pretrain.parse_options([*map(str, given), "--overwrite"]).target == "standardized"


@pytest.mark.parametrize("target", ["standardized", "absolute"])
def test_one_batch_is_learnt_better_than_by_the_visible_mean(target):
    torch.manual_seed(0)
    augment = PretrainAugment((32, 32, 48), "none")
    objective = MaskedReconstruction(augment, token_size=4, mask_ratio=0.6, target=target)
    ramp = torch.linspace(0, 1, 32)[:, None, None] * torch.linspace(0.2, 1, 48)
    inputs, targets = objective.prepare({"image": ramp.expand(2, 1, 32, 32, 48), "epoch": [0, 0], "case": [0, 1]}, CPU)
    network = build_autoencoder("unet_tiny")
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for _ in range(30):
        loss = sum(objective.losses(network(inputs), targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * objective.baseline(targets)
