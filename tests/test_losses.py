import math

import pytest
import torch
import torch.nn.functional as F

from amaes.losses import dice_ce_loss, reconstruction_loss, segmentation_loss


def test_dice_and_cross_entropy_by_hand():
    # One voxel of class 1 among four, logits that give p(1) = 0.8 there and 0.4 elsewhere.
    p1 = torch.tensor([0.8, 0.4, 0.4, 0.4]).view(1, 1, 4, 1, 1)
    logits = torch.cat([(1 - p1).log(), p1.log()], dim=1)
    label = torch.tensor([1, 0, 0, 0]).view(1, 4, 1, 1)
    entropy = -(math.log(0.8) + 3 * math.log(0.6)) / 4
    dice1 = (2 * 0.8 + 1) / (2.0 + 1 + 1 + 1e-8)  # TP 0.8, sum p 2.0, one voxel
    dice0 = (2 * 1.8 + 1) / (2.0 + 3 + 1 + 1e-8)
    assert dice_ce_loss(logits, label).item() == pytest.approx(entropy - (dice0 + dice1) / 2, rel=1e-6)


def test_a_perfect_prediction_reaches_minus_one():
    label = torch.randint(0, 3, (2, 5, 6, 7))
    logits = 50.0 * F.one_hot(label, 3).permute(0, 4, 1, 2, 3).float()
    assert dice_ce_loss(logits, label).item() == pytest.approx(-1, abs=1e-5)


def test_dice_is_a_mean_over_samples():
    label = torch.randint(0, 2, (2, 4, 5, 6))
    logits = torch.randn(2, 2, 4, 5, 6)
    halves = [dice_ce_loss(logits[i : i + 1], label[i : i + 1]) for i in range(2)]
    assert dice_ce_loss(logits, label).item() == pytest.approx(sum(h.item() for h in halves) / 2, rel=1e-5)


def test_losses_are_computed_in_float32_under_autocast():
    logits, label = torch.randn(1, 2, 4, 5, 6), torch.randint(0, 2, (1, 4, 5, 6))
    plain = dice_ce_loss(logits.bfloat16().float(), label)
    with torch.autocast("cpu", torch.bfloat16):
        assert dice_ce_loss(logits.bfloat16(), label).item() == plain.item()


def test_deep_supervision_weighs_stages_and_takes_every_nth_voxel():
    label = torch.randint(0, 2, (1, 4, 8, 12))
    fine, coarse = torch.randn(1, 2, 4, 8, 12), torch.randn(1, 2, 2, 4, 6)
    expected = (dice_ce_loss(fine, label) + 0.5 * dice_ce_loss(coarse, label[:, ::2, ::2, ::2])) / 1.5
    assert segmentation_loss([fine, coarse], label).item() == pytest.approx(expected.item(), rel=1e-6)
    assert segmentation_loss(fine, label).item() == dice_ce_loss(fine, label).item()


def test_ignored_voxels_take_no_part():
    torch.manual_seed(0)
    label, logits = torch.randint(0, 3, (2, 4, 6, 8)), torch.randn(2, 3, 4, 6, 8, requires_grad=True)
    label[:, :, 3:] = 255
    loss = dice_ce_loss(logits, label, ignored=255)
    assert loss.item() == pytest.approx(dice_ce_loss(logits[:, :, :, :3], label[:, :, :3]).item(), rel=1e-6)
    loss.backward()
    assert not logits.grad[:, :, :, 3:].any()
    assert logits.grad[:, :, :, :3].all()
    coarse = torch.randn(2, 3, 2, 3, 4)
    expected = (loss + 0.5 * dice_ce_loss(coarse, label[:, ::2, ::2, ::2], ignored=255)) / 1.5
    assert segmentation_loss([logits, coarse], label, ignored=255).item() == pytest.approx(expected.item(), rel=1e-6)
    plain = dice_ce_loss(logits, label.clamp(max=2))
    assert dice_ce_loss(logits, label.clamp(max=2), ignored=255).item() == pytest.approx(plain.item(), rel=1e-6)
    nothing = dice_ce_loss(logits, torch.full_like(label, 255), ignored=255)
    assert nothing.item() == pytest.approx(-1)  # 0 / 0 voxels of every class, smoothed; and no cross-entropy


@pytest.mark.parametrize("ignored", [None, 9])
def test_class_weights_weigh_voxels_in_the_cross_entropy_alone(ignored):
    logits = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    label = torch.randint(0, 3, (2, 4, 5, 6), generator=torch.Generator().manual_seed(1))
    seen = torch.ones_like(label, dtype=torch.bool)
    if ignored is not None:
        label[:, :2], seen[:, :2] = ignored, False
    weights = torch.tensor([1.0, 4.0, 0.5])
    of_voxels = torch.where(seen, weights[label.where(seen, 0)], 0)
    log_p = logits.log_softmax(1).gather(1, label.where(seen, 0)[:, None])[:, 0]
    plain, even = (dice_ce_loss(logits, label, ignored=ignored, class_weights=w) for w in (None, torch.full((3,), 7.0)))
    dice = plain + (log_p * seen).sum() / seen.sum()
    assert dice_ce_loss(logits, label, ignored=ignored, class_weights=weights).item() == pytest.approx(
        (dice - (log_p * of_voxels).sum() / of_voxels.sum()).item(), abs=1e-6
    )
    assert even.item() == pytest.approx(plain.item(), abs=1e-6)


def test_masked_loss_is_the_mean_over_hidden_voxels():
    target, prediction = torch.zeros(1, 2, 2, 2, 2), torch.zeros(1, 2, 2, 2, 2)
    mask = torch.zeros(1, 1, 2, 2, 2, dtype=torch.bool)
    mask[..., 0] = True
    prediction[..., 0], prediction[..., 1] = 2.0, 5.0
    assert reconstruction_loss(prediction, target, mask, over="masked").item() == 4.0
    assert reconstruction_loss(prediction, target, mask, over="masked-parity").item() == 2.0
    assert reconstruction_loss(prediction, target).item() == 14.5


def test_wrong_arguments_are_named():
    x = torch.zeros(1, 1, 2, 2, 2)
    with pytest.raises(ValueError, match="`over` 'some' is unknown"):
        reconstruction_loss(x, x, over="some")
    with pytest.raises(ValueError, match="needs `mask`"):
        reconstruction_loss(x, x, over="masked")
