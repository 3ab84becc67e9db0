"""dataset.json of the Medical Segmentation Decathlon (MSD) and of nnU-Net: channels, classes, training list."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from amaes.files import parse_json
from amaes.preprocess.config import STORE_FORMAT


@dataclass(frozen=True)
class DatasetJson:
    """What a dataset.json declares; empty where there is none.

    Attributes:
        channels: names.
        classes: label value to name.
        regions: name to label values that are scored as one (nnU-Net); empty where every value stands for itself.
        numbered: the files of a case end in _0000, _0001, ..., one per channel (nnU-Net).
        training: image files of the training list.
        cases: where the files of each case are listed (nnU-Net's key "dataset"): one per channel, and the label.
    """

    channels: list[str] = field(default_factory=list)
    classes: dict[int, str] = field(default_factory=dict)
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    numbered: bool = False
    training: list[Path] = field(default_factory=list)
    cases: dict[str, tuple[tuple[Path, ...], Path | None]] = field(default_factory=dict)

    def training_files(self, folder: Path) -> list[Path]:
        """The training list where it names files of this folder, else [].

        A listed file that does not exist stays in the list, so that it is reported.
        """
        # Paths are compared by name, links not followed: a link is the file that the list names, wherever it leads.
        root = os.path.normpath(folder.absolute())
        listed = [Path(os.path.normpath(path.absolute())) for path in self.training]
        listed = [path for path in listed if path.is_relative_to(root)]
        if not any(path.is_file() for path in listed):
            return []
        return sorted({folder / path.relative_to(root) for path in listed})


def read_dataset_json(images: Path, for_network: bool) -> DatasetJson:
    """The dataset.json in the folder of the images or one folder up.

    Args:
        images: folder of the images, or one file.
        for_network: look one folder up only where `images` is called imagesT*, since that file may be of something
            else.

    Raises:
        ValueError: it is neither a dataset.json of MSD or nnU-Net nor the index of a store.
    """
    candidates = [images / "dataset.json", images.parent / "dataset.json"]
    if for_network and not Path(os.path.normpath(images.absolute())).name.startswith("imagesT"):
        candidates.pop()
    path = next((file for file in candidates if file.is_file()), None)
    if path is None:
        return DatasetJson()
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, found {type(content).__name__}")
        if content.get("format") == STORE_FORMAT:
            return DatasetJson()
        entries = [entry.get("image") for entry in content.get("training") or [] if isinstance(entry, dict)]
        channels = _channel_names(content.get("channel_names") or content.get("modality") or {})
        return DatasetJson(
            channels=channels,
            classes=_classes(content.get("labels") or {}),
            regions=_regions(content.get("labels")),
            numbered="channel_names" in content,
            training=[path.parent / entry for entry in entries if isinstance(entry, str)],
            cases=_cases(content.get("dataset") or {}, path.parent, len(channels)),
        )
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        reason = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: not a dataset.json of MSD or nnU-Net ({reason})") from error


def _channel_names(names: object) -> list[str]:
    """{"0": "T1", ...}, or what some data sets write instead: ["T1", ...] or "T1"."""
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=int)]
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"expected names of channels, found {names!r}")
    return names


def _classes(labels: object) -> dict[int, str]:
    """{"0": "background", ...} (MSD) or {"background": 0, "region": [1, 2], ...} (nnU-Net) to value -> name.

    A list of names counts from 0. A value may be written as text, "1".
    """
    if isinstance(labels, list):
        if not all(isinstance(name, str) for name in labels):
            raise ValueError(f"expected a list of names of labels, found {labels!r:.80}")
        labels = {str(value): name for value, name in enumerate(labels)}
    if not isinstance(labels, dict):
        raise ValueError(f"expected labels as names and values, found {labels!r:.80}")
    if all(_is_whole(key) and isinstance(name, str) for key, name in labels.items()):
        return {int(value): name for value, name in sorted(labels.items(), key=lambda pair: int(pair[0]))}
    names, in_regions = {}, []
    for name, value in labels.items():
        values = value if isinstance(value, list) else [value]
        if not all(map(_is_whole, values)):
            raise ValueError(f"the label {name!r:.80} is {value!r:.80}, expected a whole number")
        if isinstance(value, list):
            in_regions += map(int, values)
        else:
            names[int(value)] = name
    for value in in_regions:
        names.setdefault(value, f"label_{value}")
    return dict(sorted(names.items()))


def _regions(labels: object) -> dict[str, tuple[int, ...]]:
    """{"background": 0, "whole": [1, 2], "core": 2} to {"whole": (1, 2), "core": (2,)}; {} where no value is a list."""
    if not isinstance(labels, dict) or not any(isinstance(value, list) for value in labels.values()):
        return {}
    values = {name: value if isinstance(value, list) else [value] for name, value in labels.items()}
    return {name: tuple(map(int, of)) for name, of in values.items() if name != "ignore" and set(map(int, of)) != {0}}


def _is_whole(value: object) -> bool:
    """A whole number, perhaps written as text."""
    return type(value) is int or (isinstance(value, str) and bool(re.fullmatch(r"-?\d{1,9}", value)))


def _cases(listed: object, root: Path, channels: int) -> dict[str, tuple[tuple[Path, ...], Path | None]]:
    """{case: {"images": [file of each channel], "label": file}}; files are relative to the folder of dataset.json.

    Args:
        listed: of the key "dataset".
        root: that folder.
        channels: number of channels that are declared; 0: as many as the first case has files.
    """
    cases: dict[str, tuple[tuple[Path, ...], Path | None]] = {}
    if not isinstance(listed, dict):
        raise ValueError(f"expected 'dataset' to list the files of each case, found {listed!r:.80}")
    for name, entry in listed.items():
        images, label = (entry.get("images"), entry.get("label")) if isinstance(entry, dict) else (None, None)
        if (
            not isinstance(images, list)
            or not images
            or not all(isinstance(file, str) and "\0" not in file for file in [*images, label or ""])
        ):
            raise ValueError(f"the case {name!r:.80} of 'dataset' is {entry!r:.160}, expected its images and label")
        channels = channels or len(images)
        if len(images) != channels:
            raise ValueError(f"the case {name!r:.80} of 'dataset' has {len(images)} images, expected {channels}")
        cases[name] = tuple(root / file for file in images), root / label if label else None
    return cases
