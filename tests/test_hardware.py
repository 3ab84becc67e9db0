"""What the hardware allows: precision, compilation, known defects, memory."""

import pytest
import torch

from amaes import hardware
from amaes.distributed import Ranks, pick_device
from amaes.models import build_autoencoder

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, 1, CPU)


def test_precision():
    assert not hardware.use_bf16(CPU, "auto")
    assert hardware.use_bf16(CPU, "bf16")
    assert hardware.use_bf16(torch.device("cuda"), "auto")
    assert not hardware.use_bf16(torch.device("cuda"), "fp32")
    with pytest.raises(ValueError, match="`precision` fp16 is unknown; accepted: auto, bf16, fp32"):
        hardware.use_bf16(CPU, "fp16")


def test_compile_auto_is_eager_on_the_cpu_and_says_why():
    wrap, why = hardware.compiler(CPU, "auto")
    network = torch.nn.Linear(1, 1)
    assert wrap(network) is network
    assert why == "eager (auto compiles on CUDA only)"
    with pytest.raises(ValueError, match="`compile` yes is unknown"):
        hardware.compiler(CPU, "yes")


def test_compile_auto_is_eager_where_operations_are_fused(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)  # nor tried
    _, why = hardware.compiler(torch.device("cuda"), "auto", fused=True)
    assert why == "eager (auto does not compile fused operations)"


def test_compile_falls_back_where_it_does_not_work(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no Triton here\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match=r"`compile` on: torch.compile does not work here \(no Triton here\)"):
        hardware.compiler(CPU, "on")
    monkeypatch.setattr(torch, "ones", lambda *args, **options: None)
    wrap, why = hardware.compiler(torch.device("cuda"), "auto")
    assert wrap(3) == 3
    assert why == "eager: torch.compile does not work here (no Triton here)"


@pytest.mark.parametrize(
    ("torch_version", "cudnn", "said"),
    [
        ("2.9.0+cu128", 91002, "3 times the memory"),
        ("2.9.0+cu128", 91500, "3 times the memory"),
        ("2.9.1+cu128", 91002, "3 times the memory"),
        ("2.8.0+cu126", 91002, "large 3D convolutions in bf16 may be wrong"),
        ("2.11.0+cu130", 91400, "3 times the memory"),
    ],
)
def test_versions_with_slow_or_wrong_convolutions_are_named_with_the_remedy(torch_version, cudnn, said):
    (line,) = hardware.convolution_defects(torch_version, cudnn)
    assert said in line
    assert torch_version in line
    assert "cuDNN 9.15 or newer" in line


@pytest.mark.parametrize(
    ("torch_version", "cudnn"),
    [("2.9.1+cu128", 91500), ("2.8.0", 90701), ("2.8.0", 91300), ("2.13.0a0", 92000), ("2.13.0", None)],
)
def test_other_versions_are_not(torch_version, cudnn):
    assert hardware.convolution_defects(torch_version, cudnn) == []


def test_the_cpu_has_no_such_defects():
    assert hardware.known_defects(CPU) == []


# Memory ---------------------------------------------------------------------------------------------------------------


def test_saved_bytes_equal_what_autograd_keeps():
    shape = (1, 1, 32, 48, 16)
    with torch.device("meta"):
        expected = hardware.saved_bytes(build_autoencoder("unet_tiny"), shape)
    network, kept = build_autoencoder("unet_tiny"), 0

    def count(tensor):
        nonlocal kept
        kept += 0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        network(torch.rand(shape))
    assert kept <= expected <= 1.15 * kept  # meta counts the decoder in two steps, the CPU fuses the finest of them


def test_counting_saved_bytes_leaves_a_network_as_it_was():
    shape = (1, 1, 32, 32, 32)
    with torch.device("meta"):
        network = build_autoencoder("unet_tiny")
        everything = hardware.saved_bytes(network, shape)
        network.checkpoint_activations()
        of_stages = hardware.saved_bytes(network, shape)
        assert hardware.saved_bytes(network, shape) == of_stages < everything
    assert not any(stage._forward_hooks or stage._forward_pre_hooks for stage in network.checkpointed_stages())


def test_micro_batches_shrink_until_they_fit(monkeypatch):
    with torch.device("meta"):
        network = build_autoencoder("unet_tiny")
        one = hardware.saved_bytes(network, (1, 1, 32, 32, 32))
    fixed = 20 * sum(p.numel() for p in network.parameters())

    def fit(free, total=1e15, batch=12, ranks=ALONE):
        monkeypatch.setattr(hardware, "memory_of", lambda device, local_world: (total, free))
        return hardware.fit_micro_batch(network, (32, 32, 32), batch, ranks, bf16=False)

    assert fit(1e15) == 1
    assert fit(fixed + 1.3 * 6 * one) == 2
    assert fit(fixed + 1.3 * 4 * one) == 3
    assert fit(0) == 12
    assert fit(0, batch=12, ranks=Ranks(1, 4, 1, 4, CPU)) == 3
    with pytest.raises(ValueError, match=r"`patch_size` 32 32 32: one patch takes about .* GB, cpu has"):
        fit(0, total=fixed)


def test_memory_is_shared_by_the_ranks_of_a_machine():
    total, free = hardware.memory_of(CPU)
    if total is None:
        pytest.skip("this system does not tell its memory")
    assert 0 < free <= total
    assert hardware.memory_of(CPU, local_world=2)[0] == pytest.approx(total / 2)


def test_devices(monkeypatch):
    assert pick_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    with pytest.raises(ValueError, match="`device` cuda: no usable GPU found"):
        pick_device("cuda")


class Volume:
    """What statvfs says of a file system: blocks of 4096 bytes."""

    f_frsize = 4096

    def __init__(self, free):
        self.f_bavail = free // 4096


@pytest.fixture
def host(monkeypatch, tmp_path):
    """Function: pretend that so many bytes of /dev/shm and of memory are free."""

    def pretend(shared, memory):
        monkeypatch.setattr(hardware, "SHARED_MEMORY", tmp_path)
        monkeypatch.setattr(hardware.os, "statvfs", lambda path: Volume(shared))
        monkeypatch.setattr(hardware, "memory_of", lambda device, local_world=1: (memory, memory))

    return pretend


def test_batches_that_fit_into_shared_memory_give_no_warning(host):
    host(shared=5 << 30, memory=1 << 40)
    assert hardware.check_shared_memory(2, 1 << 30) is None  # 2 workers x 2 batches + 1 in use = 5
    assert hardware.check_shared_memory(0, 1 << 40) is None
    host(shared=(5 << 30) - 4096, memory=1 << 40)
    assert hardware.check_shared_memory(2, 1 << 30) is not None


@pytest.mark.parametrize(
    ("workers", "batch", "ranks", "flag"),
    [
        (2, 10 << 20, 2, "--shm-size=1g"),  # 100 MiB
        (4, 256 << 20, 1, "--shm-size=3g"),  # 2.25 GiB
        (1, 1 << 30, 1, "--shm-size=4g"),  # 3 GiB, and room for others
        (8, 64 << 20, 8, "--shm-size=9g"),  # 8.5 GiB
    ],
)
def test_too_little_shared_memory_names_the_size_to_ask_for(host, workers, batch, ranks, flag):
    host(shared=64 << 20, memory=1 << 40)  # what docker gives
    line = hardware.check_shared_memory(workers, batch, ranks)
    assert f"docker run {flag} or --ipc=host" in line
    assert f"{workers} `workers` of {ranks} ranks" in line
    assert "0.1 GB free" in line
    assert "\n" not in line


def test_too_little_memory_behind_enough_shared_memory_gives_a_warning(host):
    host(shared=1 << 40, memory=4 << 30)
    assert "4.3 GB of memory are free" in hardware.check_shared_memory(2, 1 << 30)


def test_advice_says_what_is_free(host, monkeypatch):
    host(shared=64 << 20, memory=4 << 30)
    assert hardware.memory_advice().startswith("free now: 4.3 GB of memory and 0.1 GB of ")
    monkeypatch.setattr(hardware, "memory_of", lambda device, local_world=1: (None, None))
    monkeypatch.setattr(hardware, "free_shared_memory", lambda: None)
    assert hardware.memory_advice().startswith("free now: unknown; what helps: fewer `workers` or 0")


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
    for part in ("`accumulate` 8 (now 4)", "`checkpoint_activations`", "`patch_size` (now 96 128 96)"):
        assert part in str(caught.value)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes differ"), hardware.out_of_memory_explained(CPU, 1, (32, 32, 32)):
        raise RuntimeError("shapes differ")
