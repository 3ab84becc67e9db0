"""The operations that take the networks' time, one file each.

    conv          convolution before a norm (`unet.ConvUnit`, `resenc`, `swin_unetr`)
    norm_act      instance norm and leaky ReLU, and max pooling (`unet.ConvUnit`)
    up_conv       an upsampling, the convolution after it, norm and leaky ReLU (`decoder.UNetDecoder`)
    depthwise     depthwise convolution (`mednext.Block`)
    norm_mlp      norm, expand, GELU, response norm, project (`mednext.Block`)
    pointwise     1x1x1 convolution (`mednext`), also of a head (`decoder.Decoder`)
    shortcut      what a block that changes the resolution adds to its output (`mednext.Block`)
    masked_error  mean squared error of the masked autoencoder (`objectives.masked`)

A file begins with the function that is called, which chooses the way it is computed. Then come the plain
mathematics, and after them each faster way to the same numbers: in Triton, for NVIDIA GPUs (its kernels are in the
folder `kernels`), and the CPU's. A way for another device is written below those, and no network changes. `dispatch`
says which way an input takes, and in which number type.
"""

from amaes.models.ops.conv import conv_before_norm
from amaes.models.ops.depthwise import depthwise
from amaes.models.ops.dispatch import are_fused, describe
from amaes.models.ops.masked_error import masked_error
from amaes.models.ops.norm_act import norm_act, norm_act_pool, norm_only
from amaes.models.ops.norm_mlp import norm_mlp, response_norm
from amaes.models.ops.pointwise import head, pointwise
from amaes.models.ops.shortcut import add_upsampled, depthwise_down
from amaes.models.ops.up_conv import fused_is_cheaper, up_conv, up_conv_norm_act

__all__ = [
    "add_upsampled",
    "are_fused",
    "conv_before_norm",
    "depthwise",
    "depthwise_down",
    "describe",
    "fused_is_cheaper",
    "head",
    "masked_error",
    "norm_act",
    "norm_act_pool",
    "norm_mlp",
    "norm_only",
    "pointwise",
    "response_norm",
    "up_conv",
    "up_conv_norm_act",
]
