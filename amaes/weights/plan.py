"""What a published file says about its network and the volumes it saw: adaptation plans of nnssl, plans of nnU-Net.

nnssl keeps the plan in the file, as `nnssl_adaptation_plan`, or beside it, in adaptation_plan.json. Both projects list
axes as (Z, Y, X).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from amaes.files import read_json
from amaes.weights.tensor_files import without_wrappers

INSIDE, BESIDE = "nnssl_adaptation_plan", "adaptation_plan.json"
RESIDUAL_ENCODERS = ("ResEncL", "NoSkipResEncL", "ResidualEncoderUNet")  # their names of networks that we have
# Their names of what `amaes.preprocess` calls `normalization`; other schemes have no counterpart here.
NORMALIZATIONS = {"ZScoreNormalization": "zscore", "NoNormalization": "none", "RescaleTo01Normalization": "unit"}
MAX_SIDE = 4096  # voxels, of a patch


@dataclass(frozen=True)
class Plan:
    """The part of a plan that is used here; None: the plan does not say.

    Attributes:
        arch: their name of the network.
        in_channels: channels of the image in pretraining.
        patch_size: recommended for fine-tuning, voxels along (X, Y, Z).
        encoder, stem: what the names of the encoder's stages, and of its stem, begin with, without prefixes of
            wrappers.
        first: names of the first convolution; all but one are second names.
        spacing: of the volumes in pretraining, mm along (X, Y, Z); None also where they were not resampled.
        resampled: they were resampled to `spacing`; False: each kept its own.
        normalization: their name of how intensities were scaled.
    """

    arch: str | None = None
    in_channels: int | None = None
    patch_size: tuple[int, ...] | None = None
    encoder: str | None = None
    stem: str | None = None
    first: tuple[str, ...] = ()
    spacing: tuple[float, ...] | None = None
    resampled: bool | None = None
    normalization: str | None = None


# Reading --------------------------------------------------------------------------------------------------------------


def find_plan(content: Mapping, path: Path) -> Plan | None:
    """The plan in a file, or the one beside it if it fits the file; else what nnU-Net keeps; None if there is none.

    Args:
        content: of the file (`tensor_files.read`).
        path: of the file.

    Raises:
        ValueError: a plan that is none, or contradicts the file.
    """
    if INSIDE in content:
        return read_plan(content[INSIDE], f"{path}: its {INSIDE}")
    weights, beside = content.get("network_weights"), path.with_name(BESIDE)
    if isinstance(weights, Mapping) and beside.is_file():
        plan = read_plan(read_json(beside), beside)
        keys = [without_wrappers(str(key)) for key in weights]
        if all(_any_begins(keys, [name]) for name in (plan.encoder, plan.stem) if name is not None):
            return plan
    arguments = content.get("init_args")  # of a trainer of nnU-Net
    if isinstance(arguments, Mapping) and isinstance(arguments.get("plans"), Mapping):
        where = f"{path}: the plans in its init_args"
        return Plan(**_of_configuration(arguments["plans"], arguments.get("configuration"), where))
    return None


def read_plan(plan: object, where: object) -> Plan:
    """A plan of nnssl, checked.

    Raises:
        ValueError: names the entry that is not what it should be.
    """
    if not isinstance(plan, Mapping):
        raise ValueError(f"{where}: expected an object, found {type(plan).__name__}")
    architecture = _entry(plan, "architecture_plans", Mapping, where) or plan
    patch_size = _numbers(plan, "recommended_downstream_patchsize", where, int, MAX_SIDE)
    return Plan(
        arch=_entry(architecture, "arch_class_name", str, where),
        in_channels=_entry(plan, "pretrain_num_input_channels", int, where),
        patch_size=patch_size[::-1] if patch_size else None,
        encoder=_clean(_entry(plan, "key_to_encoder", str, where)),
        stem=_clean(_entry(plan, "key_to_stem", str, where)),
        first=tuple(filter(None, map(_clean, _names(plan, "keys_to_in_proj", where)))),
        **_of_configuration(_entry(plan, "pretrain_plan", Mapping, where) or {}, None, where),
    )


def _of_configuration(plans: Mapping, name: object, where: object) -> dict:
    """Spacing and normalisation of the configuration `name`, or of the only one; nothing where it is not known."""
    configurations = _entry(plans, "configurations", Mapping, where) or {}
    chosen = [name] if isinstance(name, str) else list(configurations)
    if len(chosen) != 1 or not isinstance(configurations.get(chosen[0]), Mapping):
        return {}
    configuration, where = configurations[chosen[0]], f"{where}, configuration {chosen[0]!r:.40}"
    schemes = _names(configuration, "normalization_schemes", where)
    spacing = _numbers(configuration, "spacing", where, float, 1000.0)
    back = plans.get("transpose_backward")  # which of their axes, after transposing, were Z, Y and X of the file
    if spacing is not None and isinstance(back, Sequence) and sorted(map(str, back)) == ["0", "1", "2"]:
        spacing = tuple(spacing[int(axis)] for axis in back)
    return {
        "spacing": spacing[::-1] if spacing is not None else None,
        "resampled": spacing is not None if "spacing" in configuration else None,
        "normalization": schemes[0] if len(set(schemes)) == 1 else None,
    }


def _entry(content: Mapping, name: str, kind: type, where: object) -> object:
    """An entry of the type `kind`, or None where it is missing or null."""
    value = content.get(name)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise ValueError(f"{where}: {name} should be of type {kind.__name__}, found {value!r:.80}")
    return value


def _clean(name: str | None) -> str | None:
    """What names of tensors begin with, without prefixes of wrappers and dots at its ends."""
    return without_wrappers(f"{name.strip('.')}.").strip(".") or None if name is not None else None


def _names(content: Mapping, name: str, where: object) -> list[str]:
    values = content.get(name)
    values = [] if values is None else values
    if isinstance(values, str) or not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{where}: {name} should be a list of names, found {values!r:.80}")
    return list(values)


def _numbers(content: Mapping, name: str, where: object, kind: type, high: float) -> tuple | None:
    """Three positive numbers, or None where the entry is missing or null."""
    values = content.get(name)
    if values is None:
        return None
    if (
        not isinstance(values, Sequence)
        or len(values) != 3
        or not all(_is_number(value) and 0 < value <= high and kind(value) == value for value in values)
    ):
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{where}: {name} should be three {what} above 0, at most {high:g}, found {values!r:.80}")
    return tuple(map(kind, values))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# Using ----------------------------------------------------------------------------------------------------------------


def with_usual_names(tensors: Mapping[str, object], plan: Plan, where: object) -> dict[str, object]:
    """Tensors under the names that a residual encoder of nnssl usually has: encoder.stem, encoder.stages.

    Args:
        tensors: of the file, without prefixes of wrappers.
        plan: says which names the file has instead.
        where: the file, for messages.

    Raises:
        ValueError: no tensor's name begins as the plan says, two would become one, or the first convolution has other
            input channels.
    """
    table = {name: f"encoder.stem.convs.0.{'all_modules.0' if i else 'conv'}" for i, name in enumerate(plan.first)}
    if plan.first and not _any_begins(tensors, plan.first):
        raise ValueError(f"{where}: its plan says that the first convolution is {plan.first[0]}, which is not in it")
    for name, usual in ((plan.stem, "encoder.stem"), (plan.encoder, "encoder.stages")):
        if name is None:
            continue
        if not _any_begins(tensors, [name]):
            raise ValueError(f"{where}: its plan names {name}, with which no tensor's name begins")
        whole = name == plan.encoder and not name.endswith("stages")  # stem and stages together
        table[name] = "encoder" if whole else usual
    for name in plan.first:
        weight = tensors.get(f"{name}.weight")
        if plan.in_channels is not None and weight is not None and weight.shape[1:2] != (plan.in_channels,):
            shape = tuple(weight.shape)
            raise ValueError(f"{where}: its plan says {plan.in_channels} input channels, {name}.weight is {shape}")
    longest_first = sorted(table, key=len, reverse=True)
    pattern = re.compile(rf"^({'|'.join(map(re.escape, longest_first))})(?=\.)") if table else re.compile("$^")
    renamed: dict[str, object] = {}
    for key, value in tensors.items():
        usual_key = pattern.sub(lambda match: table[match[1]], key)
        if usual_key in renamed:
            raise ValueError(f"{where}: by its plan, {key} and another tensor would both become {usual_key}")
        renamed[usual_key] = value
    return renamed


def _any_begins(keys: Iterable[str], names: Iterable[str]) -> bool:
    starts = tuple(f"{name}." for name in names)
    return any(key.startswith(starts) for key in keys)


def compare(plan: Plan, config: Mapping, where: object, store: object) -> str:
    """One line for the log: how the volumes of pretraining were prepared, and those of a store; "" if unknown.

    Args:
        plan: of the weights.
        config: of the store's preprocessing.
        where, store: the file and the store, for the message.
    """
    saw, options, others = [], [], []
    if plan.spacing is not None:
        saw.append(f"{_times(plan.spacing)} mm")
        if not all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(plan.spacing, config["spacing"], strict=True)):
            options.append(f"`spacing` {' '.join(f'{value:g}' for value in plan.spacing)}")
    elif plan.resampled is False:
        saw.append("the spacing of each file")
    if plan.normalization is not None:
        saw.append(plan.normalization)
        wanted = NORMALIZATIONS.get(plan.normalization)
        if wanted is None:
            others.append(f"{plan.normalization} has no counterpart here")
        elif wanted != config["normalization"]:
            options.append(f"`normalization` {wanted}")
    if not saw:
        return ""
    text = f"{where}: pretrained on volumes with {', '.join(saw)}"
    patch = f"; it recommends patches of {_times(plan.patch_size)}" if plan.patch_size else ""
    if not options and not others:
        return f"{text}, as those of {store}{patch}"
    has = f"{_times(config['spacing'])} mm, {config['normalization']}"
    remedy = [f"preprocess with {' '.join(options)} for the same"] if options else []
    return f"WARNING: {text}; {store} has {has}; {'; '.join([*others, *remedy])}{patch}"


def _times(values: Iterable[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)
