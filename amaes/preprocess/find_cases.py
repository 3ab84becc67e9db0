"""Which files of a folder make which case: reads names and dataset.json only, opens no image.

Begin with `collect`. What a data set's own layout says is in `amaes.preprocess.sources` instead.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from amaes.preprocess.bids import left_out, match_by_entities, sessions, structure_of
from amaes.preprocess.collection import Collection, Item
from amaes.preprocess.dataset_json import DatasetJson, read_dataset_json
from amaes.preprocess.file_names import (
    channel_prefix,
    fault_of_id,
    id_of,
    is_nifti,
    no_file_message,
    printable,
    sequence_of,
    session_of,
    shorten,
    stem_of,
    subject_of,
)
from amaes.preprocess.match_labels import by_id, match_beside, match_by_id, with_label
from amaes.preprocess.other_formats import has_known_format, kind_by_name

MAX_CHANNELS = 32  # files that end in higher numbers than _0031 are a series of cases, not channels


class NoSuchChannels(ValueError):
    """The files of a folder are not named after the channels."""


def collect(
    images: str | Path,
    labels: str | Path | None = None,
    *,
    channels: Sequence[str] = (),
    label_name: str | None = None,
    subject: str | None = None,
    missing_channel: str = "error",
    network_channels: int | None = None,
) -> Collection:
    """Find the cases of a folder.

    Args:
        images: any tree of NIfTI files, an imagesTr folder, the folder of a dataset.json, or one file.
        labels: tree of label files; a label belongs to the case with the same relative name.
        channels: names; the files of one folder called NAME, *_NAME or *-NAME form one case.
        label_name: label files are called NAME, *_NAME or *-NAME; beside the images, or by BIDS entities in `labels`.
        subject: regular expression on the id; its group "subject" or first group is the subject.
        missing_channel: "error" marks a case without all channels, "zeros" lets it pass.
        network_channels: collect images for a network of so many channels: without labels, and all files of the
            folder instead of those of a training list. A dataset.json one folder up counts for a folder imagesT* only.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: there are no files, no names match, or two inputs have one id (both are named).
    """
    for_network = network_channels is not None
    declared = read_dataset_json(Path(images), for_network)
    if declared.cases and not (for_network or channels or labels or label_name):
        return _listed(declared, subject)
    images, labels = _folders(Path(images), labels, label_name, for_network)
    root = images if images.is_dir() else images.parent
    notes: list[str] = []
    training = [] if for_network else declared.training_files(images)
    files, beside = _without_labels(root, _image_files(images, labels, training, notes), None if labels else label_name)
    if images.is_dir() and not training:
        files = left_out(root, files, channels, notes, masks_too=not for_network)
    label_files = {} if labels is None else _label_files(labels, label_name, notes)
    unused: list[Path] = []
    if channels:
        names = list(channels)
        items, unused = _by_channel_name(root, files, names, for_network)
        if unused and not for_network:
            notes.append(_not_grouped(root, unused, names))
    elif numbered := _by_channel_number(root, files, label_files, declared.numbered, network_channels):
        names, items = _numbered_items(numbered, declared.channels)
    else:
        names, items = declared.channels or ["image"], [Item(id_of(root, path), (path,)) for path in files]
        if len(names) > 1:
            notes.append(f"dataset.json declares {len(names)} channels: each file must be 4-D, one volume per channel")
    check_ids(items, with_labels=not for_network)
    items = [_marked_if_incomplete(item, names, missing_channel, unused) for item in items]
    items = items if for_network else [_marked_if_unnamable(item) for item in items]
    if labels is not None:
        items = _match(items, label_files, labels, label_name, notes)
    elif label_name is not None:
        items = match_beside(items, beside, label_name, notes)
    items = _described(sorted(items, key=lambda item: item.id), subject, with_sequence=len(names) == 1)
    foreground, unused = structure_of(label_name), unused if for_network else []
    return Collection(items, names, declared.classes, notes, foreground, unused, regions=declared.regions)


def _listed(declared: DatasetJson, subject: str | None) -> Collection:
    """The cases whose files dataset.json lists; no other file is looked for."""
    items = [_marked_if_unnamable(Item(id, *files)) for id, files in declared.cases.items()]
    if any(item.label for item in items):
        items = [item if item.label else with_label(item, None, "in the list of dataset.json") for item in items]
    count = len(items[0].images)
    names = declared.channels or (["image"] if count == 1 else [f"channel_{k}" for k in range(count)])
    check_ids(items, with_labels=True)
    items = _described(sorted(items, key=lambda item: item.id), subject, with_sequence=count == 1)
    notes = [f"the files of {len(items)} cases are those that dataset.json lists"]
    return Collection(items, names, declared.classes, notes, regions=declared.regions)


# Folders and files ----------------------------------------------------------------------------------------------------


def _folders(
    images: Path, labels: str | Path | None, label_name: str | None, for_network: bool
) -> tuple[Path, Path | None]:
    """The folders to read: imagesTr and labelsTr where the images' folder is that of a data set."""
    labels = None if labels is None else Path(labels)
    if labels is not None and label_name is not None and labels.resolve() == images.resolve():
        labels = None  # beside the images
    if not images.exists():
        raise FileNotFoundError(f"`images` {images}: no such folder")
    if (images / "imagesTr").is_dir():
        if labels is None and label_name is None and not for_network and (images / "labelsTr").is_dir():
            labels = images / "labelsTr"
        images = images / "imagesTr"
    if labels is not None and not labels.is_dir():
        raise FileNotFoundError(f"`labels` {labels}: no such folder")
    if labels is not None and labels.resolve() == images.resolve():
        raise ValueError(f"`images` and `labels` are both {images}; for labels beside the images take `label_name`")
    return images, labels


def _image_files(images: Path, labels: Path | None, training: list[Path], notes: list[str]) -> list[Path]:
    """The NIfTI files of a folder, without those of its labels; the training list instead where there is one."""
    files = _nifti_files(images, "images", notes, skip=labels)
    if not training:
        return files
    if others := sorted(set(files) - set(training)):
        notes.append(f"{len(others)} files are not in the training list of dataset.json: {shorten(others)}")
    return training


def _nifti_files(folder: Path, parameter: str, notes: list[str], skip: Path | None = None) -> list[Path]:
    """Sorted NIfTI files below a folder, without hidden and resource files and without those below `skip`.

    Folders that cannot be read go into `notes`; they are an error where nothing else is there.
    """
    if folder.is_file():
        if not is_nifti(folder.name):
            expected = "expected a folder or a file named *.nii or *.nii.gz"
            raise ValueError(f"`{parameter}` {folder}: {expected}{kind_by_name([folder])}")
        return [folder]
    visited = {folder.resolve(), *([skip.resolve()] if skip else [])}
    files, others, unreadable, foreign = [], [], [], Counter()
    for parent, folders, names in os.walk(folder, onerror=unreadable.append, followlinks=True):
        folders[:] = [name for name in sorted(folders) if _to_visit(Path(parent), name, visited)]
        visible = [Path(parent) / name for name in names if not name.startswith(".")]
        files += [path for path in visible if is_nifti(path.name)]
        no_nifti = [path for path in visible if not is_nifti(path.name)]
        others += no_nifti[:5]
        foreign.update(path.suffix.lower() for path in no_nifti if has_known_format(path))
    if unreadable and not files:
        raise unreadable[0]
    if unreadable:
        names = [str(error.filename) for error in unreadable]
        notes.append(f"{len(unreadable)} folders cannot be read: {shorten(names)}")
    if not files:
        raise ValueError(no_file_message(parameter, folder, "*.nii or *.nii.gz", others))
    for ending, count in foreign.items():
        notes.append(f"{count} files are not read{kind_by_name([Path(f'x{ending}')])}")
    return sorted(files)


def _to_visit(parent: Path, name: str, visited: set[Path]) -> bool:
    """A folder that is not hidden and was not visited before; links in a circle are followed once."""
    target = (parent / name).resolve()
    if name.startswith(".") or name == "__MACOSX" or target in visited:
        return False
    visited.add(target)
    return True


def _label_files(labels: Path, label_name: str | None, notes: list[str]) -> dict[str, Path]:
    """{id of the case: label file} of a tree of labels; only of those called `label_name`, without that name."""
    files = _nifti_files(labels, "labels", notes)
    return by_id(labels, files if label_name is None else _without_labels(labels, files, label_name)[1], label_name)


def _match(
    items: list[Item], label_files: Mapping[str, Path], labels: Path, label_name: str | None, notes: list[str]
) -> list[Item]:
    if label_name is None:
        return match_by_id(items, label_files, labels, notes)
    return match_by_entities(items, label_files, labels, label_name, notes)


def _without_labels(root: Path, files: list[Path], label_name: str | None) -> tuple[list[Path], list[Path]]:
    """The images, and the labels that lie beside them."""
    if label_name is None:
        return files, []
    labels = [path for path in files if channel_prefix(path, [label_name])]
    if not labels:
        pattern = f"{label_name}, *_{label_name} or *-{label_name}"
        raise ValueError(no_file_message("label_name", root, pattern, files))
    return [path for path in files if path not in set(labels)], labels


# Channels -------------------------------------------------------------------------------------------------------------


def _by_channel_name(
    root: Path, files: list[Path], channels: list[str], for_network: bool
) -> tuple[list[Item], list[Path]]:
    """Files of one folder with one prefix form a case: folder/{FLAIR,T1}.nii.gz or folder/case_{flair,t1}.nii.gz.

    The sequences of a BIDS session form one although their acq differ, unless a channel is there twice.

    Also returns the files of other names. A network of one channel takes any name, so there all files must match.
    """
    if len({name.lower() for name in channels}) != len(channels):
        raise NoSuchChannels(f"`channels`: expected different names, found {' '.join(channels)}")
    cases: dict[str, dict[str, Path]] = defaultdict(dict)  # id to {channel: file}
    unused = [path for path in files if channel_prefix(path, channels) is None]
    for path, name, prefix in sessions([(path, *match) for path in files if (match := channel_prefix(path, channels))]):
        folder = path.parent.relative_to(root)
        id = (folder if prefix in ("", folder.name) else folder / prefix).as_posix()
        id = root.resolve().name if id == "." else id  # the files lie in the root itself
        if name in cases[id]:
            raise ValueError(f"id_collision: {cases[id][name]} and {path} are both channel {name} of case {id!r}")
        cases[id][name] = path
    if not cases or (for_network and unused and len(channels) == 1):
        pattern = " or ".join(f"{name}, *_{name}, *-{name}" for name in channels)
        raise NoSuchChannels(no_file_message("images" if for_network else "channels", root, pattern, files))
    return [Item(id, tuple(paths.get(name) for name in channels)) for id, paths in cases.items()], unused


def _by_channel_number(
    root: Path, files: list[Path], label_files: Mapping[str, Path], declared: bool, network_channels: int | None
) -> dict[str, dict[int, Path]]:
    """nnU-Net's case_0000, case_0001, ... as {case: {0: file, 1: file}}; empty where the numbers are not channels.

    Four digits at the end may also number cases or be a year. They are channels where a dataset.json says so
    (`declared`), where a label is named without them, or in a folder imagesTr or imagesTs; and only if every file has
    them and every case has a file _0000. For a network they are channels where there are as many as the network has.
    """
    cases: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in files:
        id = id_of(root, path)
        match = re.fullmatch(r"(.+)_(\d{4})", id)
        if match is None or id in label_files or int(match[2]) >= MAX_CHANNELS:
            return {}
        case, number = match[1], int(match[2])
        if number in cases[case]:
            raise ValueError(f"id_collision: {cases[case][number]} and {path} are one channel of {case!r}")
        cases[case][number] = path
    in_dataset = root.name.startswith("imagesT")
    if declared or network_channels is None:
        are_channels = declared or in_dataset or any(name in label_files for name in cases)
    else:
        count = 1 + max(map(max, cases.values()))
        are_channels = count == network_channels and (count > 1 or in_dataset)
    return dict(cases) if are_channels and all(0 in numbers for numbers in cases.values()) else {}


def _numbered_items(cases: dict[str, dict[int, Path]], declared: list[str]) -> tuple[list[str], list[Item]]:
    """The names of the channels, and the cases of `_by_channel_number`."""
    count = 1 + max(map(max, cases.values()))
    names = declared or (["image"] if count == 1 else [f"channel_{k}" for k in range(count)])
    if count > len(names):
        number, path = max(max(paths.items()) for paths in cases.values())
        raise ValueError(f"{path}: dataset.json declares {len(names)} channels, found a file of channel {number}")
    return names, [Item(id, tuple(paths.get(k) for k in range(len(names)))) for id, paths in cases.items()]


def _not_grouped(root: Path, unused: Sequence[Path], names: Sequence[str]) -> str:
    """A note on files that are no channel: how many end in what, and one of each."""
    by_end: dict[str, list[Path]] = defaultdict(list)
    for path in unused:
        by_end[re.split("[_-]", stem_of(path.name))[-1]].append(path)
    largest = sorted(by_end.items(), key=lambda pair: -len(pair[1]))
    shown = [f"{end} ({len(paths)}, such as {paths[0].relative_to(root).as_posix()})" for end, paths in largest]
    text = f"{len(unused)} files are none of the channels {' '.join(names)} (called NAME, *_NAME or *-NAME)"
    return f"{text}: they end in {shorten(shown)}"


def _marked_if_incomplete(item: Item, names: Sequence[str], missing_channel: str, unused: Sequence[Path]) -> Item:
    """The case, with a problem where it lacks a channel that must be there; `unused` files beside it are named."""
    missing = [name for name, path in zip(names, item.images, strict=False) if path is None]
    if not missing or missing_channel == "zeros":
        return item
    message = f"{item.id}: expected channels {' '.join(names)}, missing {' '.join(missing)}"
    folders = {path.parent for path in item.images if path is not None}
    if beside := [path for path in unused if path.parent in folders]:
        message += f"; beside them {shorten(beside)}, which no channel is called after"
    return replace(item, problem=("missing_channel", message))


def _marked_if_unnamable(item: Item) -> Item:
    """The case, with a problem where a store cannot hold its id."""
    fault = fault_of_id(item.id)
    if fault is None:
        return item
    return replace(item, problem=("bad_name", f"{printable(item.id)}: {fault}; rename the file or its folder"))


# Names ----------------------------------------------------------------------------------------------------------------


def check_ids(items: Iterable[Item], with_labels: bool) -> None:
    """Refuse two inputs of one id; and a case "a_label" beside "a", whose label would be stored under that name."""
    item_of: dict[str, Item] = {}
    for item in items:
        if item.id in item_of:
            raise ValueError(f"id_collision: {item_of[item.id].files[0]} and {item.files[0]} both map to {item.id!r}")
        item_of[item.id] = item
    for id, item in item_of.items():
        if with_labels and f"{id}_label" in item_of:
            other = item_of[f"{id}_label"].files[0]
            raise ValueError(
                f"id_collision: {other} maps to the name of the label of {item.files[0]}; see `label_name`"
            )


def _described(items: list[Item], pattern: str | None, with_sequence: bool) -> list[Item]:
    """The cases with subject, session and, where they have one channel, sequence."""
    described = [
        replace(
            item,
            subject=subject_of(item.id, pattern),
            session=session_of(item.id),
            sequence=sequence_of(stem_of(item.images[0].name)) if with_sequence else None,
        )
        for item in items
    ]
    if without := [item.id for item in described if not item.subject]:
        raise ValueError(f"`subject` {pattern!r}: no subject in {len(without)} ids, such as {shorten(without)}")
    return described
