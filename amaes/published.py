"""Weights that others have published: recognised by the names of their tensors, and renamed to ours.

Known are the files of AMAES and FOMO25 (U-Net), AMAES (MedNeXt), MedNeXt (the authors' and MONAI's), residual encoder
U-Nets (nnU-Net, nnssl, asparagus), SwinUNETR (MONAI), and the self-supervised Swin encoders: `model_swinvit.pt`,
MONAI's training script, disruptive autoencoders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from amaes.models.swin_unetr import WINDOW, position_index
from amaes.weights.plan import RESIDUAL_ENCODERS, Plan, with_usual_names
from amaes.weights.tensor_files import find_state_dict, without_wrappers

Rules = tuple[tuple[str, str | Callable[[re.Match], str]], ...]  # (pattern, replacement), applied in order

# Stage i counts from full resolution with us, in order of execution with them.
_UNET: Rules = (
    (r"^(rec_head|pred_head)\.", "decoder."),
    (r"\bin_conv\.", "stages.0."),
    (r"\bencoder_conv(\d)\.", r"stages.\1."),
    (r"\bdecoder_conv(\d)\.", lambda m: f"stages.{4 - int(m[1])}."),
    (r"\bupsample(\d)\.", lambda m: f"ups.{4 - int(m[1])}."),
    (r"\bds_out_conv(\d)\.", lambda m: f"heads.{4 - int(m[1])}."),
    (r"\bout_conv\.", "heads.0."),
    (r"\.conv(\d)\.(?=conv|norm)", lambda m: f".{int(m[1]) - 1}."),
)
_MEDNEXT: Rules = (
    (r"^(?=stem\.|enc_block_|down_|bottleneck\.)", "encoder."),
    (r"^(?=up_|dec_block_|out_)", "decoder."),
    (r"\b(?:enc|dec)_block_(\d)\.", r"stages.\1."),
    (r"\bbottleneck\.", "stages.4."),
    (r"\bdown_(\d)\.", r"downs.\1."),
    (r"\bup_(\d)\.", r"ups.\1."),
    (r"\bout_(\d)\.conv_out\.", r"heads.\1."),
    (r"\.conv1\.", ".depthwise."),
    (r"\.conv2\.", ".expand."),
    (r"\.conv3\.", ".project."),
    (r"\.res_conv\.", ".shortcut."),
    (r"\.grn_(gamma|beta)$", r".grn.\1"),
)
_MONAI_MEDNEXT: Rules = (
    (r"^enc_stages\.(\d)\.", r"enc_block_\1."),
    (r"^down_blocks\.(\d)\.", r"down_\1."),
    (r"^up_blocks\.(\d)\.", lambda m: f"up_{3 - int(m[1])}."),
    (r"^dec_stages\.(\d)\.", lambda m: f"dec_block_{3 - int(m[1])}."),
    (r"^out_blocks\.(\d)\.", lambda m: f"out_{4 - int(m[1])}."),
    (r"\.global_resp_(gamma|beta)$", r".grn_\1"),
    *_MEDNEXT,
)
# nnU-Net's networks list a tensor up to four times: as conv and norm, as all_modules, and the encoder's again in the
# decoder. In asparagus's (AMAES-300K) convs.0 is conv1, and norm is norm_op.
_SECOND_NAME = re.compile(r"^decoder\.encoder\.|\.all_modules\.\d\.")
_RESENC: Rules = (
    (r"^decoder\.encoder\.", "encoder."),
    (r"\.all_modules\.0\.", ".conv."),
    (r"\.all_modules\.1\.", ".norm."),
    (r"\.norm_op\.", ".norm."),
    (r"\bstem\.(?:convs\.0|conv1)\.", "stem."),
    (r"\.blocks\.(\d+)\.", r".\1."),
    (r"\.skip\.1\.", ".shortcut."),
    (r"^decoder\.stages\.(\d)\.(?:convs\.0|conv1)\.", lambda m: f"decoder.stages.{4 - int(m[1])}.0."),
    (r"^decoder\.transpconvs\.(\d)\.", lambda m: f"decoder.ups.{4 - int(m[1])}."),
    (r"^decoder\.seg_layers\.(\d)\.", lambda m: f"decoder.heads.{4 - int(m[1])}."),
)
_SWIN: Rules = (
    (r"^(?:swinViT|swin_vit|encoder)\.", ""),
    (r"^patch_embed\.proj\.", "encoder.patch_embed."),
    (r"^layers(\d)c\.", r"encoder.residual_\1."),  # of MONAI's use_v2, which has no place here
    (r"^layers(\d)\.0\.(?:0\.)?", lambda m: f"encoder.stages.{int(m[1]) - 1}."),
    (r"\.attn\.relative_position_bias_table$", ".attention.bias"),
    (r"\.attn\.", ".attention."),
    (r"\.mlp\.(?:linear1|fc1)\.", ".expand."),
    (r"\.mlp\.(?:linear2|fc2)\.", ".project."),
    (r"\.downsample\.", ".merge."),
    (r"^encoder10\.layer\.", "decoder.laterals.5."),
    (r"^encoder(\d)\.layer\.", lambda m: f"decoder.laterals.{int(m[1]) - 1}."),
    (r"^decoder(\d)\.transp_conv\.conv\.", lambda m: f"decoder.ups.{int(m[1]) - 1}."),
    (r"^decoder(\d)\.conv_block\.", lambda m: f"decoder.stages.{int(m[1]) - 1}."),
    (r"^(decoder\..*)\.conv3\.conv\.", r"\1.shortcut."),
    (r"^(decoder\..*\.conv[12])\.conv\.", r"\1."),
    (r"^out\.conv\.conv\.", "decoder.heads.0."),
)


@dataclass(frozen=True)
class Family:
    """A kind of published file.

    Attributes:
        name: for messages.
        marks: patterns, each of which some key must match.
        rules: from its names to ours; a name that none of them changes is no weight of ours.
        variant: options of the encoder that do not show in the shapes (`encoder.variant`); None: files of this kind
            do not tell.
    """

    name: str
    marks: tuple[str, ...]
    rules: Rules
    variant: Mapping[str, str | None] = field(default_factory=dict)


_LEGACY, _UNKNOWN_MERGING = {"merging": "legacy"}, {"merging": None}
FAMILIES = (
    Family("our own names", (r"^encoder\.stages\.0\.", r"^decoder\.heads\.0\."), (), {"merging": None, "grn": None}),
    Family("AMAES U-Net", (r"^encoder\.in_conv\.", r"^encoder\.encoder_conv4\."), _UNET),
    Family("AMAES MedNeXt", (r"^encoder\.stem\.", r"^encoder\.enc_block_0\."), _UNET + _MEDNEXT),
    Family("MedNeXt v1 or v2", (r"^stem\.", r"^enc_block_0\."), _MEDNEXT),
    Family("MONAI MedNeXt", (r"^stem\.", r"^enc_stages\.0\."), _MONAI_MEDNEXT),
    Family("residual encoder U-Net", (r"^encoder\.stem\.conv", r"^encoder\.stages\.0\.blocks\.0\."), _RESENC),
    Family("MONAI SwinUNETR", (r"^swinViT\.layers1\.", r"^encoder10\."), _SWIN, _UNKNOWN_MERGING),
    Family("MONAI's self-supervised Swin", (r"^swinViT\.layers1\.", r"^rotation_head\."), _SWIN, _UNKNOWN_MERGING),
    Family("model_swinvit.pt", (r"^(swinViT\.|swin_vit\.)?layers1\.0\.blocks\.0\.mlp\.fc1\.",), _SWIN, _LEGACY),
    Family("MONAI Swin", (r"^(swinViT\.|swin_vit\.)?layers1\.0\.blocks\.0\.mlp\.linear1\.",), _SWIN, _UNKNOWN_MERGING),
    Family("disruptive autoencoder (Swin)", (r"^encoder\.patch_embed\.proj\.", r"^encoder\.layers1\."), _SWIN, _LEGACY),
)

# Networks that this library does not have, and a pattern of their keys, so that the message can name them.
_OTHER_NETWORKS = {
    "a plain U-Net of nnU-Net": r"^(encoder\.stages\.\d+\.0\.convs|conv_blocks_context)\.",
    "a vision transformer (Primus, ViT)": r"(^|\.)(pos_embed|cls_token|eva)\b",
}


@dataclass
class Imported:
    """Weights under our names.

    Attributes:
        tensors: name -> tensor.
        family: name of the kind of file they come from, for messages.
        variant: see `Family`.
        dropped: names in the file that are no weights of their own: placeholders, tables that follow from the shapes,
            second names of one tensor.
    """

    tensors: dict[str, torch.Tensor]
    family: str
    variant: Mapping[str, str | None] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


def convert(content: Mapping, where: object, plan: Plan | None = None) -> Imported:
    """Weights of a published file under our names.

    Args:
        content: what the file holds: a state dict, or one in an entry (`tensor_files.HOLDERS`). Prefixes of wrappers
            such as `module.` are taken off wherever they stand.
        where: the file, for messages.
        plan: of the file, if it has one.

    Raises:
        ValueError: no tensors; names of no known family; a network in 2D; names that are not as the plan says; two
            names that become the same; or a table of relative positions for another window.
    """
    _, content = find_state_dict(content)
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{where}: holds no tensors; entries: {', '.join(map(str, list(content)[:5]))}")
    unwrapped: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        _add(unwrapped, without_wrappers(key), value, key, where)
    if plan is not None and plan.arch in (None, *RESIDUAL_ENCODERS):
        unwrapped = with_usual_names(unwrapped, plan, where)
    family = recognise(unwrapped)
    if family is None:
        raise ValueError(f"{where}: {_describe_unknown(unwrapped, plan)}")
    if 4 in (sides := {value.dim() for value in unwrapped.values()}) and 5 not in sides:
        raise ValueError(f"{where}: {family.name} in 2D; the networks of this library are 3D, take the 3D weights")
    imported = Imported({}, family.name, family.variant)
    for key, value in sorted(
        unwrapped.items(), key=lambda item: bool(_SECOND_NAME.search(item[0]))
    ):  # first names first
        if key == "dummy_tensor" or key.endswith(".relative_position_index"):
            _check_positions(key, value, where)
            imported.dropped.append(key)
            continue
        name = rename(key, family.rules)
        if _SECOND_NAME.search(key) and name in imported.tensors:
            _check_same(key, value, imported.tensors[name], where)
            imported.dropped.append(key)
            continue
        _add(imported.tensors, name, value, key, where)
    return imported


def _describe_unknown(keys: Iterable[str], plan: Plan | None) -> str:
    keys = list(keys)
    network = next((name for name, mark in _OTHER_NETWORKS.items() if _any(mark, keys)), None)
    what = f"{network}, no architecture of this library" if network else "names of no file that is known here"
    what += f"; its plan says {plan.arch}" if plan is not None and plan.arch is not None else ""
    known = ", ".join(family.name for family in FAMILIES)
    return f"{what} ({', '.join(keys[:2])}, ...); accepted: our checkpoints, {known}"


def recognise(keys: Iterable[str]) -> Family | None:
    """The first family whose marks all match some of `keys` (without prefixes of wrappers); None if there is none."""
    keys = list(keys)
    return next((family for family in FAMILIES if all(_any(mark, keys) for mark in family.marks)), None)


def rename(key: str, rules: Rules) -> str:
    """`key` with every (pattern, replacement) of `rules` applied in order."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _add(tensors: dict[str, torch.Tensor], name: str, value: torch.Tensor, key: str, where: object) -> None:
    """Enter the tensor `key` of a file under `name`."""
    if name in tensors:
        raise ValueError(f"{where}: two tensors would both become {name}; the second is {key}")
    tensors[name] = value


def _any(pattern: str, keys: Iterable[str]) -> bool:
    """Whether the pattern matches some key."""
    return any(re.search(pattern, key) for key in keys)


def _check_same(key: str, value: torch.Tensor, first: torch.Tensor, where: object) -> None:
    """Refuse a second name of a tensor that holds other values."""
    if value.shape != first.shape or not (value.is_meta or torch.equal(value, first)):
        raise ValueError(f"{where}: {key} should be a second name of a tensor, but holds other values")


def _check_positions(key: str, value: torch.Tensor, where: object) -> None:
    """Refuse a table of relative positions for another window; ours follows from the window."""
    if key != "dummy_tensor" and not torch.equal(value.long(), position_index(WINDOW)):
        raise ValueError(f"{where}: {key} is not that of windows of {WINDOW[0]} tokens, the only ones accepted")
