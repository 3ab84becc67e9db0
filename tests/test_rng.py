import numpy as np
import pytest
import torch

from amaes import rng


def test_bits_equal_the_published_splitmix64():
    first = rng.bits(torch.zeros(1, dtype=torch.int64), 3)[0].tolist()
    assert [value % 2**64 for value in first] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_streams_depend_on_every_argument_and_on_nothing_else():
    reference = rng.stream(1, 2, 3, "crop").random(4)
    np.random.default_rng(0).random(100)
    assert np.array_equal(rng.stream(1, 2, 3, "crop").random(4), reference)
    others = [
        rng.stream(*args).random(4)
        for args in [(0, 2, 3, "crop"), (1, 0, 3, "crop"), (1, 2, 0, "crop"), (1, 2, 3, "mask")]
    ]
    assert all(not np.array_equal(other, reference) for other in others)


def test_a_sample_has_the_same_key_in_every_batch():
    batch = rng.keys(7, [0, 1, 2], [5, 6, 7], "mask")
    assert rng.keys(7, [1], [6], "mask").item() == batch[1].item()
    assert len(set(batch.tolist())) == 3


def test_a_shorter_row_is_the_beginning_of_a_longer_one():
    keys = rng.keys(0, [0, 0], [1, 2], "noise")
    assert torch.equal(rng.uniform(keys, 4), rng.uniform(keys, 10)[:, :4])


@pytest.mark.parametrize("draw", [rng.uniform, rng.normal])
def test_moments(draw):
    x = draw(rng.keys(3, [0], [0], "moments"), 400_001)
    assert x.shape == (1, 400_001)
    assert x.dtype == torch.float32
    mean, std = (0.5, 12**-0.5) if draw is rng.uniform else (0.0, 1.0)
    assert x.mean().item() == pytest.approx(mean, abs=5 * std / 400_001**0.5)
    assert x.std().item() == pytest.approx(std, rel=0.01)
    assert x.isfinite().all()


def test_uniform_numbers_are_below_one():
    x = rng.uniform(rng.keys(0, [0], [0], "range"), 1_000_000)
    assert x.min() >= 0
    assert x.max() < 1
