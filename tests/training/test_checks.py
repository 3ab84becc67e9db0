import pytest
import torch

from amaes.data.order import Share
from amaes.models.ops import dispatch
from amaes.training import checks


def test_patches_must_divide():
    checks.check_patch_size((32, 48, 64), "unet_tiny", token_size=4)
    for patch, hint in [
        ((33, 32, 32), "e.g. 32 or 48"),
        ((0, 32, 32), "e.g. 32 or 48"),
        ((32, 100, 32), "e.g. 96 or 112"),
    ]:
        with pytest.raises(ValueError, match=f"multiples of 16, {hint}"):
            checks.check_patch_size(patch, "unet_tiny")
    with pytest.raises(ValueError, match="multiples of 48, e.g. 48 or 96"):
        checks.check_patch_size((32, 48, 48), "unet_tiny", token_size=6)


def test_a_patch_must_leave_the_coarsest_stage_enough_voxels():
    checks.check_patch_size((16, 32, 32), "unet_tiny")
    checks.check_patch_size((16, 32, 16), "mednext_s")
    checks.check_patch_size((32, 64, 32), "swin_tiny")
    for patch, arch, message in [
        ((16, 32, 16), "unet_tiny", "leaves 2 voxels .* multiples of 16 that leave 4 or more"),
        ((16, 16, 16), "mednext_s", "leaves 1 voxels .* multiples of 16 that leave 2 or more"),
        ((32, 32, 32), "swin_tiny", "leaves 1 voxels .* multiples of 32 that leave 2 or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            checks.check_patch_size(patch, arch)


@pytest.mark.parametrize(
    ("patch", "instead"),
    [
        ((128, 128, 128), "32 48 32"),
        ((48, 48, 32), "32 48 32"),
        ((32, 64, 64), "32 48 32"),
        ((32, 48, 32), None),
        ((32, 48, 48), None),  # exactly a quarter of it lies outside
        ((16, 32, 32), None),
    ],
)
def test_a_patch_larger_than_the_median_case_is_noted_with_one_that_fits(patch, instead):
    shapes = [(30, 40, 24), (35, 50, 36), (41, 59, 47)]
    notes = checks.notes_on_patch(patch, shapes, "unet_tiny")
    assert [note.partition("`patch_size` ")[2] for note in notes] == ([] if instead is None else [f"{instead} fits"])
    if patch == (128, 128, 128):
        assert "note: 97% of a patch of 128 128 128 lies outside of the median case (35 50 36)" in notes[0]


def test_no_patch_is_advised_that_the_network_refuses():
    assert checks.notes_on_patch((16, 16, 128), [(16, 16, 20)], "unet_tiny") == []  # 16 16 32 leaves too few voxels


def test_batches_must_be_shared_out():
    checks.check_batch(8, 2, "auto")
    checks.check_batch(8, 2, 4)
    with pytest.raises(
        ValueError, match="`batch_size` 3: cannot be split over 2 ranks; accepted: multiples of 2, e.g. 2"
    ):
        checks.check_batch(3, 2, "auto")
    with pytest.raises(ValueError, match="over 1 ranks x `accumulate` 5; accepted: multiples of 5"):
        checks.check_batch(8, 1, 5)


def test_batch_is_described():
    assert checks.describe_batch(Share(8, accumulate=2, world=2), torch.device("cpu"), 10) == (
        "10 steps of 8 patches = 2 ranks x 2 micro-steps x 2 on cpu"
    )


def test_where_nothing_is_left_to_train_nothing_is_compiled_and_no_kernel_tested(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    monkeypatch.setattr(dispatch, "triton_fault", None)
    network = torch.nn.Linear(1, 1)
    compiler, line = checks.settle_compilation(torch.device("cuda", 0), "on", finished=True)
    assert compiler(network) is network
    assert line == "nothing is left to train, nothing is compiled"
    monkeypatch.setattr(dispatch, "triton_fault", lambda device: None)
    compiler, line = checks.settle_compilation(torch.device("cuda", 0), "auto", finished=False)
    assert line == "eager (auto does not compile fused operations), operations in Triton"
