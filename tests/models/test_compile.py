"""Every network is one graph for torch.compile. Sizes of a family differ in numbers alone: one of each is traced."""

import pytest
import torch

from amaes.models import RECONSTRUCTION_DECODERS, SEGMENTATION_DECODERS, build_autoencoder, build_segmenter

FAMILIES = ("unet_tiny", "mednext_s", "resenc_s", "swin_tiny")
DECODERS = [
    *((build_autoencoder, {"decoder": name, "skips": name == "standard"}) for name in RECONSTRUCTION_DECODERS),
    *((build_segmenter, {"decoder": name, "deep_supervision": True}) for name in SEGMENTATION_DECODERS),
]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def one_graph(module, x):
    """Output of the module, which must be a single graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        output = torch.compile(module, fullgraph=True, backend=backend)(x)
    assert len(graphs) == 1
    return output[0] if isinstance(output, list) else output


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_is_one_graph(arch):
    device = "cpu" if arch == "swin_tiny" else "meta"  # a mask of its attention cannot be traced on meta
    with torch.device(device):
        network, image = build_autoencoder(arch), torch.rand(1, 1, 32, 64, 32)
    assert one_graph(network, image).shape == image.shape


@pytest.mark.parametrize(("build", "options"), DECODERS)
@pytest.mark.parametrize("arch", FAMILIES)
def test_every_decoder_is_one_graph_on_the_features_of_every_family(arch, build, options):
    with torch.device("meta"):
        network = build(arch, **options)
        encoder = network.encoder
        features = [
            torch.rand(1, channels, 32 // stride, 64 // stride, 32 // stride)
            for channels, stride in zip(encoder.channels, encoder.strides, strict=True)
        ]
    assert one_graph(network.decoder, features).shape[2:] == (32, 64, 32)


@pytest.mark.parametrize("decoder", RECONSTRUCTION_DECODERS)
def test_the_graph_gives_the_numbers_and_gradients_of_the_eager_network(decoder):
    torch.manual_seed(0)
    network, image = (
        build_autoencoder("unet_tiny", decoder=decoder).double(),
        torch.rand(1, 1, 16, 32, 16, dtype=torch.float64),
    )
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    results = []
    for run in (network, compiled):
        network.zero_grad()
        output = run(image)
        output.square().mean().backward()
        results.append([output.detach(), *(p.grad.clone() for p in network.parameters())])
    for ours, eager in zip(results[1], results[0], strict=True):
        assert (ours - eager).abs().max() <= 1e-9 * max(1e-3, eager.abs().max())


def test_a_unet_is_exported_with_dynamic_sides():
    torch.manual_seed(0)
    network = build_segmenter("unet_tiny", num_classes=3).eval()
    sides = {axis: 16 * torch.export.Dim(f"side{axis}", min=2, max=16) for axis in (2, 3, 4)}  # of 16 voxels each
    exported = torch.export.export(network, (torch.rand(1, 1, 32, 48, 32),), dynamic_shapes=(sides,)).module()
    with torch.no_grad():
        for shape in ((1, 1, 32, 48, 32), (1, 1, 48, 32, 64)):
            image = torch.rand(shape)
            assert torch.equal(exported(image), network(image))
