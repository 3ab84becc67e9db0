import pathlib
from functools import partial

import numpy as np
import pytest
import torch

from amaes.hardware import saved_bytes
from amaes.models import (
    ARCHITECTURES,
    RECONSTRUCTION_DECODERS,
    SEGMENTATION_DECODERS,
    LightDecoder,
    MedNeXt,
    MedNeXtDecoder,
    Network,
    ResEnc,
    ResEncDecoder,
    SwinUNETR,
    UNet,
    UNetDecoder,
    build_autoencoder,
    build_encoder,
    build_network,
    build_segmenter,
)
from amaes.published import recognise, rename
from tests import formula

REFERENCE = np.load(pathlib.Path(__file__).parent.parent / "fixtures" / "unet_reference.npz", allow_pickle=False)


MEDNEXT_COUNTS = {
    "mednext_s": 5_550_881,
    "mednext_b": 10_526_273,
    "mednext_m": 17_548_929,
    "mednext_l": 61_779_233,
    "mednext_s_k5": 5_980_513,
    "mednext_b_k5": 10_955_905,
    "mednext_m_k5": 18_260_801,
    "mednext_l_k5": 62_992_865,
    "mednext_v2_base": 61_969_441,
    "mednext_v2_wide": 246_536_257,
}


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
        (lambda: build_autoencoder("mednext_m"), 16_236_385),
        (lambda: build_autoencoder("mednext_l"), 50_496_993),
        (lambda: build_autoencoder("mednext_v2_wide"), 201_609_793),
        (lambda: build_segmenter("mednext_m", num_classes=1), 20_937_985),
        (lambda: build_segmenter("mednext_l", num_classes=1), 55_198_593),
        *((partial(build_segmenter, arch, 1, 1, "mednext"), count) for arch, count in MEDNEXT_COUNTS.items()),
        (lambda: build_segmenter("mednext_v2_base", num_classes=3, decoder="mednext"), 61_969_507),
        (lambda: build_segmenter("mednext_v2_wide", num_classes=3, decoder="mednext"), 246_536_387),
        (lambda: build_encoder("resenc_s"), 29_945_408),
        (lambda: build_encoder("resenc_l"), 90_296_576),
        (lambda: build_segmenter("resenc_s", num_classes=1), 41_997_797),
        (lambda: build_segmenter("resenc_l", num_classes=1), 102_348_965),
        (lambda: build_encoder("swin_unetr"), 8_062_002),
        (lambda: build_segmenter("swin_unetr", num_classes=1), 62_186_659),
        (lambda: build_segmenter("swin_unetr", num_classes=14), 62_187_296),
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
    published_keys = [str(key) for key in published_keys]
    names = {rename(key, recognise(published_keys).rules): key for key in published_keys}
    state = network.state_dict()
    assert set(names) == set(state)
    weights = {key: formula.value(names[key], tuple(tensor.shape)) for key, tensor in state.items()}
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
    keys = [str(key) for key in REFERENCE[f"{name}/keys"]]
    names = [rename(key, recognise(keys).rules) for key in keys]
    expected = dict(zip(names, REFERENCE[f"{name}/grad_norms"], strict=True))
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


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_encoder_publishes_the_channels_and_strides_of_its_features(arch):
    with torch.device("meta"), torch.no_grad():
        encoder = build_encoder(arch, in_channels=2)
        features = encoder(torch.rand(1, 2, 32, 96, 64))
    shapes = [(1, c, 32 // s, 96 // s, 64 // s) for c, s in zip(encoder.channels, encoder.strides, strict=True)]
    assert [tuple(f.shape) for f in features] == shapes


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_decoder_joins_every_encoder(arch):
    builds = [lambda d=d, s=s: build_autoencoder(arch, 2, d, s) for d in RECONSTRUCTION_DECODERS for s in (False, True)]
    builds += [lambda d=d: build_segmenter(arch, 2, 3, d, True) for d in SEGMENTATION_DECODERS]
    features = None
    for build in builds:
        with torch.device("meta"), torch.no_grad():
            network = build()
            features = features or network.encoder(torch.rand(1, 2, 64, 32, 96))
            outputs = network.decoder(features)
        assert isinstance(outputs, list) == network.decoder.deep_supervision
        if isinstance(outputs, list):
            strides = network.encoder.strides
            if type(network.decoder) is ResEncDecoder:  # no head on the deepest feature
                strides = strides[:-1]
            shapes = [(1, 3, 64 // s, 32 // s, 96 // s) for s in strides]
            assert [tuple(output.shape) for output in outputs] == shapes
        else:
            assert outputs.shape == (1, 2, 64, 32, 96)


@pytest.mark.parametrize(
    ("arch", "build"),
    [
        ("mednext_s", lambda arch: build_autoencoder(arch)),
        ("mednext_s", lambda arch: build_segmenter(arch, decoder="mednext")),
        ("mednext_v2_base", lambda arch: build_segmenter(arch)),
        ("unet_tiny", lambda arch: build_segmenter(arch, decoder="mednext")),
        ("swin_unetr", lambda arch: build_autoencoder(arch, skips=True)),
        ("swin_tiny", lambda arch: build_segmenter(arch)),
        ("swin_tiny", lambda arch: build_segmenter(arch, decoder="mednext")),
    ],
)
def test_every_parameter_trains(arch, build):
    network = build(arch)
    sides = (32, 32, 64) if arch.startswith("swin") else (16, 16, 32)
    network(torch.rand(1, 1, *sides)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_the_memory_estimate_knows_of_checkpointed_activations():
    with torch.device("meta"):
        plain, again = (
            build_network("segment", {"arch": "mednext_m", "decoder": "mednext"}, on) for on in (False, True)
        )
    shape = (1, 1, 64, 64, 64)
    assert 0.1 < saved_bytes(again, shape) / saved_bytes(plain, shape) < 0.6


SMALL = {
    "unet": lambda: UNet(1, 4),
    "mednext": lambda: MedNeXt(1, 4, (1, 2, 1), (2, 3, 4), grn="mean"),
    "resenc": lambda: ResEnc(1, (4, 8, 16), (1, 2, 2)),
    "swin": lambda: SwinUNETR(1, 12),
}


@pytest.mark.parametrize("family", SMALL)
def test_checkpointed_activations_give_the_same_numbers_from_less_memory(family):
    torch.manual_seed(0)
    encoder = SMALL[family]()
    decoder = encoder.decoders.get("mednext" if family == "mednext" else "unet", UNetDecoder)
    network = Network(encoder, decoder(encoder.channels, encoder.strides, 2), 1)
    image = torch.rand(1, 1, 32, 32, 64)
    results, kept = [], []
    for on in (False, True):
        network.checkpoint_activations(on)
        network.zero_grad()
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            output = network(image)
        output.square().mean().backward()
        results.append([output.detach(), *(p.grad.clone() for p in network.parameters() if p.requires_grad)])
        kept.append(total)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < 0.6 * kept[0]


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
        (lambda: build_encoder("nope"), "`arch` 'nope' is unknown; accepted: unet_tiny"),
        (
            lambda: build_autoencoder("unet_tiny", decoder="unet"),
            "`decoder` 'unet' is unknown; accepted: light, standard",
        ),
        (lambda: build_network("other", {}), "task 'other' is unknown"),
        (lambda: build_segmenter("unet_tiny")(torch.rand(1, 1, 32, 40, 32)), r"\(32, 40, 32\) must be multiples of 16"),
        (lambda: build_segmenter("unet_tiny")(torch.rand(1, 2, 32, 32, 32)), "takes 1 channels, got 2"),
        (lambda: build_segmenter("unet_tiny")(torch.rand(1, 1, 16, 16, 16)), r"at least one must be 32 or more"),
        (lambda: build_segmenter("swin_unetr")(torch.rand(1, 1, 48, 32, 32)), r"must be multiples of 32"),
        (lambda: build_segmenter("unet_b", merging="legacy"), "unet_b has no such option; .* have it: swin_unetr"),
        (
            lambda: build_segmenter("mednext_s", grn="sum"),
            "mednext_s has no such option; .*: mednext_v2_base, mednext_v",
        ),
        (lambda: build_encoder("swin_unetr", merging="old"), "`merging` 'old' is unknown; accepted: legacy, fixed, v2"),
        (lambda: build_encoder("unet_b", colour="red"), "option 'colour' is unknown; accepted: merging, grn"),
        (lambda: UNetDecoder((4, 8), (2, 4), 1), "stride 2"),
        (lambda: UNetDecoder((4, 8, 16), (1, 2), 1), "3 channels and 2 strides"),
        (lambda: UNetDecoder((4, 8, 16), (1, 2, 3), 1), r"strides \(1, 2, 3\): 3 after 2"),
        (lambda: MedNeXtDecoder((4, 8), (1, 4), 1), "4 after 1; each must be 2 times the last"),
        (lambda: Network(UNet(1, 4), UNetDecoder((8, 16), (1, 2), 1), 1), r"decoder of channels \(8, 16\) for an enc"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
