import pathlib

import numpy as np
import pytest
import torch

from amaes import rng
from amaes.losses import reconstruction_loss
from amaes.mask import apply_mask, check_mask_ratio, hide_tokens, token_mask

REFERENCE = {
    k: torch.from_numpy(np.asarray(v))
    for k, v in np.load(pathlib.Path(__file__).parent / "fixtures" / "masking.npz", allow_pickle=False).items()
}


def test_mask_and_losses_equal_the_reference():
    tokens = hide_tokens(REFERENCE["noise"], REFERENCE["mask_ratio"].item())
    assert torch.equal(tokens.view_as(REFERENCE["mask_coarse"]), REFERENCE["mask_coarse"].bool())
    mask = REFERENCE["mask_coarse"].bool()[:, None]
    for axis in (2, 3, 4):
        mask = mask.repeat_interleave(4, dim=axis)
    assert torch.equal(apply_mask(REFERENCE["input"], mask), REFERENCE["masked_input"])
    pair = (REFERENCE["prediction"], REFERENCE["input"])
    assert reconstruction_loss(*pair).item() == pytest.approx(REFERENCE["loss_all_voxels"].item(), rel=1e-6)
    parity = reconstruction_loss(*pair, mask, over="masked-parity").item()
    assert parity == pytest.approx(REFERENCE["loss_masked_only_official"].item(), rel=1e-6)
    share = mask.float().mean().item()
    assert reconstruction_loss(*pair, mask, over="masked").item() == pytest.approx(parity / share, rel=1e-5)


@pytest.mark.parametrize("keys", [None, rng.keys(0, [0, 0, 1], [4, 5, 4], "mask")])
def test_every_sample_hides_the_same_number_of_whole_cubes(keys):
    x = torch.rand(3, 2, 16, 24, 32)
    mask = token_mask(x, token_size=4, mask_ratio=0.6, keys=keys)
    assert mask.shape == (3, 1, 16, 24, 32)
    assert mask.dtype == torch.bool
    cubes = mask.view(3, 4, 4, 6, 4, 8, 4).permute(0, 1, 3, 5, 2, 4, 6).reshape(3, 4 * 6 * 8, 64)
    assert ((cubes.sum(-1) == 0) | (cubes.sum(-1) == 64)).all()
    hidden = cubes[..., 0].sum(1)
    assert hidden.tolist() == [192 - int(192 * 0.4)] * 3
    assert not torch.equal(mask[0], mask[1])


def test_published_counts_at_128():
    tokens = hide_tokens(torch.rand(1, 32**3), 0.6)
    assert (~tokens).sum().item() == 13_107


def test_a_mask_depends_on_its_key_alone():
    keys = rng.keys(0, [0, 0], [1, 2], "mask")
    both = token_mask(torch.rand(2, 1, 8, 12, 16), keys=keys)
    one = token_mask(torch.rand(1, 1, 8, 12, 16), keys=keys[1:])
    assert torch.equal(both[1:], one)


def test_same_generator_state_same_mask():
    x = torch.rand(2, 1, 8, 12, 16)
    a, b = (token_mask(x, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)


def test_ratio_zero_hides_nothing():
    assert not token_mask(torch.rand(1, 1, 8, 12, 16), mask_ratio=0.0).any()


@pytest.mark.parametrize(
    ("size", "ratio", "message"),
    [
        (5, 0.6, "`token_size` 5"),
        (0, 0.6, "`token_size` 0"),
        (4, 1.0, "`mask_ratio` 1.0"),
        (4, -0.1, "`mask_ratio` -0.1"),
    ],
)
def test_wrong_arguments_are_named(size, ratio, message):
    with pytest.raises(ValueError, match=message):
        token_mask(torch.rand(1, 1, 8, 12, 16), size, ratio)


def test_masking_does_not_change_its_input():
    x = torch.ones(1, 1, 8, 12, 16)
    apply_mask(x, token_mask(x))
    assert x.min() == 1


def test_masks_must_keep_and_hide_something():
    check_mask_ratio((32, 32, 32), 4, 0.6, "all")
    check_mask_ratio((32, 32, 32), 4, 0.0, "all")
    with pytest.raises(ValueError, match="`mask_ratio` 0.9: keeps 0 of 8 tokens of 16 voxels"):
        check_mask_ratio((32, 32, 32), 16, 0.9, "all")
    with pytest.raises(ValueError, match="`mask_ratio` 0.0: keeps 512 of 512"):
        check_mask_ratio((32, 32, 32), 4, 0.0, "masked")
