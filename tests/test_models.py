import pathlib

import numpy as np
import pytest
import torch

from amaes.checkpoint import _AMAES_UNET, rename
from amaes.models import (
    ARCHITECTURES,
    LightDecoder,
    Network,
    UNet,
    UNetDecoder,
    build_autoencoder,
    build_encoder,
    build_network,
    build_segmenter,
)
from tests import formula

REFERENCE = np.load(pathlib.Path(__file__).parent / "data" / "unet_reference.npz", allow_pickle=False)


def parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: build_encoder("unet_b"), 14_134_944),
        (lambda: build_encoder("unet_xl"), 56_526_144),
        (lambda: build_autoencoder("unet_b"), 17_879_617),
        (lambda: build_autoencoder("unet_xl"), 71_500_929),
        (lambda: build_autoencoder("unet_b", skips=True), 20_229_697),
        (lambda: build_autoencoder("unet_xl", skips=True), 80_901_249),
        (lambda: build_autoencoder("unet_xl", decoder="standard", skips=True), 90_304_449),
        (lambda: build_segmenter("unet_b", num_classes=1), 22_581_217),
        (lambda: build_segmenter("unet_xl", num_classes=1), 90_304_449),
    ],
)
def test_parameter_counts_equal_the_published(build, count):
    with torch.device("meta"):
        assert parameters(build()) == count


def small_reference(name):
    encoder = UNet(1, 4)
    args = (encoder.channels, encoder.strides)
    decoder = {
        "unet_f4_light_rec": lambda: LightDecoder(*args, 1),
        "unet_f4_light_skips": lambda: LightDecoder(*args, 1, skips=True),
        "unet_f4_std_skips_ds": lambda: UNetDecoder(*args, 2, deep_supervision=True),
    }[name]()
    return load_formula(Network(encoder, decoder, 1), REFERENCE[f"{name}/keys"], half=True)


def load_formula(network, published_keys, half):
    names = {rename(str(key), _AMAES_UNET): str(key) for key in published_keys}
    own = network.state_dict()
    assert set(names) == set(own)
    weights = {key: formula.value(names[key], tuple(tensor.shape)) for key, tensor in own.items()}
    network.load_state_dict({key: w.half().float() if half else w for key, w in weights.items()})
    return network


@pytest.mark.parametrize("name", ["unet_f4_light_rec", "unet_f4_light_skips", "unet_f4_std_skips_ds"])
def test_outputs_and_gradients_equal_the_reference_in_double_precision(name):
    network = small_reference(name).double()
    image = formula.image(1, 1, 32, 32, 32).double().requires_grad_()
    outputs = network(image)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    for i, output in enumerate(outputs):
        expected = torch.from_numpy(REFERENCE[f"{name}/output{i}"])
        step = output.shape[-1] // expected.shape[-1]
        difference = (output[..., ::step, ::step, ::step] - expected).abs().max()
        assert difference <= 1e-6 * max(1, expected.abs().max())
    assert f"{name}/output{len(outputs)}" not in REFERENCE

    loss = sum(output.square().mean() for output in outputs)
    loss.backward()
    assert loss.item() == pytest.approx(float(REFERENCE[f"{name}/loss"]), rel=1e-6)
    assert image.grad.norm().item() == pytest.approx(float(REFERENCE[f"{name}/input_grad_norm"]), rel=1e-6)
    expected = dict(
        zip(
            (rename(str(k), _AMAES_UNET) for k in REFERENCE[f"{name}/keys"]),
            REFERENCE[f"{name}/grad_norms"],
            strict=True,
        )
    )
    floor = 1e-3 * max(expected.values())
    for key, parameter in network.named_parameters():
        assert abs(parameter.grad.norm().item() - expected[key]) <= 1e-6 * max(expected[key], floor), key


def test_unet_b_equals_the_reference_at_full_size():
    network = load_formula(build_autoencoder("unet_b"), REFERENCE["unet_f4_light_rec/keys"], half=False)
    step = int(REFERENCE["unet_b_light_rec/stride"])
    expected = torch.from_numpy(REFERENCE["unet_b_light_rec/output0"])
    with torch.no_grad():
        output = network(formula.image(1, 1, 32, 32, 32))[..., ::step, ::step, ::step]
    assert (output - expected).abs().max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("arch", [name for name in ARCHITECTURES if name != "unet_xl"])  # unet_b, twice as wide
def test_encoder_publishes_the_channels_and_strides_of_its_features(arch):
    encoder = build_encoder(arch, in_channels=2)
    features = encoder(torch.rand(1, 2, 32, 48, 64))
    shapes = [(1, c, 32 // s, 48 // s, 64 // s) for c, s in zip(encoder.channels, encoder.strides, strict=True)]
    assert [tuple(f.shape) for f in features] == shapes


@pytest.mark.parametrize("decoder", ["light", "standard"])
@pytest.mark.parametrize("skips", [False, True])
def test_autoencoder_keeps_the_shape_and_trains_every_parameter(decoder, skips):
    network = build_autoencoder("unet_tiny", in_channels=2, decoder=decoder, skips=skips)
    image = torch.rand(2, 2, 32, 48, 64)
    output = network(image)
    assert output.shape == image.shape
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_deep_supervision_returns_a_list_in_training_and_a_tensor_in_evaluation():
    network = build_segmenter("unet_tiny", num_classes=3, deep_supervision=True)
    image = torch.rand(1, 1, 32, 48, 64)
    sizes = [tuple(o.shape) for o in network(image)]
    assert sizes == [(1, 3, 32 // s, 48 // s, 64 // s) for s in (1, 2, 4, 8, 16)]
    network.eval()
    assert network(image).shape == (1, 3, 32, 48, 64)


def test_network_is_rebuilt_from_plain_data():
    build = {"arch": "unet_tiny", "in_channels": 2, "num_classes": 3, "decoder": "unet", "deep_supervision": False}
    assert parameters(build_network("segment", build)) == parameters(build_segmenter(**build))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_encoder("nope"), "arch 'nope' is unknown; accepted: unet_tiny"),
        (
            lambda: build_autoencoder("unet_tiny", decoder="unet"),
            "decoder 'unet' is unknown; accepted: light, standard",
        ),
        (lambda: build_network("other", {}), "task 'other' is unknown"),
        (lambda: build_segmenter("unet_tiny")(torch.rand(1, 1, 32, 40, 32)), r"\(32, 40, 32\) must be multiples of 16"),
        (lambda: build_segmenter("unet_tiny")(torch.rand(1, 2, 32, 32, 32)), "takes 1 channels, got 2"),
        (lambda: UNetDecoder((4, 8), (2, 4), 1), "stride 2"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
