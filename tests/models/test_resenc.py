"""The residual encoder U-Net against dynamic-network-architectures: outputs, gradients, heads."""

import pathlib
import re

import numpy as np
import pytest
import torch

from amaes.models import Network, ResEnc, ResEncDecoder, build_segmenter
from amaes.published import recognise, rename
from tests import formula

REFERENCE = np.load(pathlib.Path(__file__).parent.parent / "fixtures" / "resenc_reference.npz", allow_pickle=False)
KEYS = [str(key) for key in REFERENCE["keys"]]


def small(deep_supervision):
    encoder = ResEnc(1, (4, 8, 16, 16), (1, 2, 2, 1))
    return Network(encoder, ResEncDecoder(encoder.channels, encoder.strides, 2, deep_supervision), 1)


def own_name(key):
    """Our name in the network of four stages; the rules number the decoder's stages as in one of six."""
    name = rename(key, recognise(KEYS).rules)
    return re.sub(r"^(decoder\.\w+\.)(\d)", lambda m: f"{m[1]}{int(m[2]) - 2}", name)


def reference_network():
    """Each tensor holds the formula of the last of its names, which the reference loaded last."""
    names, network = {own_name(key): key for key in KEYS}, small(deep_supervision=True)
    state = network.state_dict()
    assert set(names) == set(state)
    network.load_state_dict({key: formula.value(names[key], tuple(t.shape)).half() for key, t in state.items()})
    return network.double()


def test_outputs_and_gradients_equal_the_reference():
    network = reference_network()
    image = formula.image(1, 1, 16, 24, 32).double().requires_grad_()
    outputs = network(image)
    assert len(outputs) == 3
    for i, output in enumerate(outputs):
        expected = torch.from_numpy(REFERENCE[f"output{i}"])
        step = output.shape[-1] // expected.shape[-1]
        assert (output[..., ::step, ::step, ::step] - expected).abs().max() <= 1e-6 * max(1, expected.abs().max())
    loss = sum(output.square().mean() for output in outputs)
    loss.backward()
    assert loss.item() == pytest.approx(float(REFERENCE["loss"]), rel=1e-6)
    assert image.grad.norm().item() == pytest.approx(float(REFERENCE["input_grad_norm"]), rel=1e-6)
    expected = {
        own_name(str(key)): norm for key, norm in zip(REFERENCE["grad_keys"], REFERENCE["grad_norms"], strict=True)
    }
    assert set(expected) == {name for name, _ in network.named_parameters()}
    floor = 1e-3 * max(expected.values())
    for key, parameter in network.named_parameters():
        assert abs(parameter.grad.norm().item() - expected[key]) <= 1e-6 * max(expected[key], floor), key


def test_heads_of_coarser_stages_train_with_deep_supervision_alone():
    network = small(deep_supervision=False)
    network(torch.rand(1, 1, 16, 24, 32)).square().mean().backward()
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert frozen == {f"decoder.heads.{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert all((p.grad is None) == (name in frozen) for name, p in network.named_parameters())


def test_sides_must_be_multiples_of_the_stride():
    with torch.device("meta"), pytest.raises(ValueError, match=r"sides \(32, 48, 64\) must be multiples of 32"):
        build_segmenter("resenc_s")(torch.rand(1, 1, 32, 48, 64))


def test_ddp_waits_for_no_gradient_that_never_comes(tmp_path):
    """Heads of coarser stages are frozen without deep supervision; DDP would stop in the second step otherwise."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(small(deep_supervision=False))
        for _ in range(2):
            model(torch.rand(1, 1, 16, 24, 32)).square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
