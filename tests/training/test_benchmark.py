"""The arithmetic of --benchmark."""

import pytest
import torch

from amaes.data.order import Share
from amaes.models import build_autoencoder
from amaes.training import benchmark


def test_training_flop_of_the_published_network():
    with torch.device("meta"):
        network = build_autoencoder("unet_b")
    assert benchmark.training_flop(network, (1, 1, 128, 128, 128)) == pytest.approx(3 * 516.3e9, rel=1e-3)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        ({"network": 1.0, "augmentation": 1.05, "data": 2.1}, "DATA-BOUND, 50 %"),
        ({"network": 1.0, "augmentation": 1.6, "data": 1.6}, "38 % augments"),
        ({"network": 1.0, "augmentation": 1.0, "data": 1.0, "alone": 0.5}, "50 % exchanges gradients"),
        ({"network": 1.0, "augmentation": 1.02, "data": 1.02, "alone": 0.99}, "the network sets the pace, 98 %"),
        ({"network": 1.0, "augmentation": 0.95, "data": 0.9}, "the network sets the pace, 100 %"),  # of noisy times
    ],
)
def test_the_verdict_names_what_takes_more_than_its_share(seconds, said):
    assert said in benchmark.verdict(seconds)


def test_the_table_gives_rates_of_all_ranks_and_flop_of_one(monkeypatch):
    seconds = {"network": 0.5, "augmentation": 0.6, "data": 0.8}
    monkeypatch.setattr(benchmark, "peak_gb", lambda device: 1.5)
    lines = benchmark.timing_table(seconds, Share(4, world=2), flop=1e12, device=torch.device("cpu"))
    assert lines[1].split()[-2:] == ["500.0", "8.00"]
    assert lines[3].split()[-2:] == ["800.0", "5.00"]
    assert any("4 TFLOP/s per rank, counting every layer by itself" in line for line in lines)
    assert any("1.50 GB" in line for line in lines)


def test_warm_up_is_not_timed():
    calls = []
    seconds = benchmark.seconds_per_step(lambda: calls.append(1), 30, torch.device("cpu"))
    assert len(calls) == 33
    assert seconds < 0.01
