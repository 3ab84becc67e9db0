"""Encoders, decoders, and the tables that build them by name."""

from amaes.models.build import (
    ARCHITECTURES,
    ENCODER_OPTIONS,
    RECONSTRUCTION_DECODERS,
    SEGMENTATION_DECODERS,
    TASKS,
    Network,
    build_autoencoder,
    build_encoder,
    build_network,
    build_segmenter,
    build_swin_ssl,
)
from amaes.models.decoder import LightDecoder, UNetDecoder
from amaes.models.mednext import MedNeXt, MedNeXtDecoder, upkern_
from amaes.models.swin_heads import RECONSTRUCTION_HEADS, SwinHeads
from amaes.models.swin_unetr import SwinUNETR, SwinUNETRDecoder
from amaes.models.unet import UNet

__all__ = [
    "ARCHITECTURES",
    "ENCODER_OPTIONS",
    "RECONSTRUCTION_DECODERS",
    "RECONSTRUCTION_HEADS",
    "SEGMENTATION_DECODERS",
    "TASKS",
    "LightDecoder",
    "MedNeXt",
    "MedNeXtDecoder",
    "Network",
    "SwinHeads",
    "SwinUNETR",
    "SwinUNETRDecoder",
    "UNet",
    "UNetDecoder",
    "build_autoencoder",
    "build_encoder",
    "build_network",
    "build_segmenter",
    "build_swin_ssl",
    "upkern_",
]
