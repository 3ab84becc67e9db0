"""Networks: an encoder, which turns a patch into feature maps, and a decoder, which reads them.

In: patches (B, C, X, Y, Z). Out: reconstructions of the same shape, or logits (B, num_classes, X, Y, Z).

Begin with `build`: the sizes, the tables of names, and the functions that build a network by name. `unet`, `mednext`,
`resenc` and `swin_unetr` hold the encoders, `decoder` what all decoders share, `network` joins the two, and `ops` has
the operations that take the time. Any encoder goes with any decoder: an encoder has `channels` and `strides`, finest
first.
"""

from typing import TYPE_CHECKING

from amaes.lazy import exports

if TYPE_CHECKING:
    from amaes.models.build import (
        ARCHITECTURES,
        ENCODER_OPTIONS,
        RECONSTRUCTION_DECODERS,
        RECONSTRUCTION_HEADS,
        SEGMENTATION_DECODERS,
        TASKS,
        build_autoencoder,
        build_encoder,
        build_network,
        build_segmenter,
        build_swin_ssl,
    )
    from amaes.models.decoder import LightDecoder, UNetDecoder
    from amaes.models.mednext import MedNeXt, MedNeXtDecoder
    from amaes.models.network import Network
    from amaes.models.resenc import ResEnc, ResEncDecoder
    from amaes.models.swin_heads import SwinHeads
    from amaes.models.swin_unetr import SwinUNETR, SwinUNETRDecoder
    from amaes.models.transfer import upkern_
    from amaes.models.unet import UNet

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "build": [
            "ARCHITECTURES",
            "ENCODER_OPTIONS",
            "RECONSTRUCTION_DECODERS",
            "RECONSTRUCTION_HEADS",
            "SEGMENTATION_DECODERS",
            "TASKS",
            "build_autoencoder",
            "build_encoder",
            "build_network",
            "build_segmenter",
            "build_swin_ssl",
        ],
        "decoder": ["LightDecoder", "UNetDecoder"],
        "mednext": ["MedNeXt", "MedNeXtDecoder"],
        "network": ["Network"],
        "resenc": ["ResEnc", "ResEncDecoder"],
        "swin_heads": ["SwinHeads"],
        "swin_unetr": ["SwinUNETR", "SwinUNETRDecoder"],
        "transfer": ["upkern_"],
        "unet": ["UNet"],
    },
)
