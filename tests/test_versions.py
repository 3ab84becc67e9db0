"""Warnings about the installation, and running out of memory explained."""

import pytest
import torch

from amaes import hardware

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("torch_version", "cudnn", "said"),
    [
        ("2.9.0+cu128", 91002, "does not use cuDNN"),
        ("2.9.0+cu128", 91500, "does not use cuDNN"),
        ("2.9.1+cu128", 91002, "is not used for 3D convolutions"),
        ("2.8.0+cu126", 91002, "may compute large 3D convolutions in bf16 wrongly"),
        ("2.11.0+cu130", 91400, "is not used for 3D convolutions"),
        ("2.13.0", None, "has no cuDNN"),
    ],
)
def test_versions_with_slow_or_wrong_convolutions_are_told_with_the_remedy(torch_version, cudnn, said):
    (line,) = hardware.slow_convolutions(torch_version, cudnn)
    assert said in line
    assert torch_version in line
    assert "cuDNN 9.15 or newer" in line


@pytest.mark.parametrize(("torch_version", "cudnn"), [("2.9.1+cu128", 91500), ("2.8.0", 90701), ("2.13.0a0", 92000)])
def test_other_versions_are_not(torch_version, cudnn):
    assert hardware.slow_convolutions(torch_version, cudnn) == []


def test_the_cpu_has_no_such_defects():
    assert hardware.complaints(CPU) == []


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: 9 bytes")],
)
def test_running_out_of_memory_names_three_options_and_what_was_measured(error):
    with (
        pytest.raises(ValueError, match=r"out of memory on cpu: memory .* GB, .* GB of them free") as caught,
        hardware.out_of_memory_explained(CPU, 4, (96, 128, 96)),
    ):
        raise error
    for part in ("--accumulate 8 (now 4)", "--checkpoint-activations", "--patch-size (now 96 128 96)"):
        assert part in str(caught.value)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes differ"), hardware.out_of_memory_explained(CPU, 1, (32, 32, 32)):
        raise RuntimeError("shapes differ")
