"""dataset.json of the Medical Segmentation Decathlon (MSD) and of nnU-Net: channels, classes, training list."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from amaes.preprocess.config import STORE_FORMAT


@dataclass(frozen=True)
class DatasetJson:
    """What a dataset.json declares; empty where there is none.

    Attributes:
        channels: names.
        classes: label value to name.
        numbered: the files of a case end in _0000, _0001, ..., one per channel (nnU-Net).
        training: image files of the training list.
    """

    channels: list[str] = field(default_factory=list)
    classes: dict[int, str] = field(default_factory=dict)
    numbered: bool = False
    training: list[Path] = field(default_factory=list)

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
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, found {type(content).__name__}")
        if content.get("format") == STORE_FORMAT:
            return DatasetJson()
        entries = [entry.get("image") for entry in content.get("training") or [] if isinstance(entry, dict)]
        return DatasetJson(
            channels=_channel_names(content.get("channel_names") or content.get("modality") or {}),
            classes=_classes(content.get("labels") or {}),
            numbered="channel_names" in content,
            training=[path.parent / entry for entry in entries if isinstance(entry, str)],
        )
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path}: not a dataset.json of MSD or nnU-Net ({type(error).__name__}: {error})") from error


def _channel_names(names: object) -> list[str]:
    """{"0": "T1", ...}, or what some data sets write instead: ["T1", ...] or "T1"."""
    if isinstance(names, dict):
        return [str(names[key]) for key in sorted(names, key=int)]
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"expected names of channels, found {names!r}")
    return names


def _classes(labels: dict | list) -> dict[int, str]:
    """{"0": "background", ...} (MSD) or {"background": 0, "region": [1, 2], ...} (nnU-Net) to value -> name.

    A list of names counts from 0.
    """
    if isinstance(labels, list):
        labels = {str(value): name for value, name in enumerate(labels)}
    if all(isinstance(name, str) for name in labels.values()):
        return {int(value): name for value, name in sorted(labels.items(), key=lambda pair: int(pair[0]))}
    names = {value: name for name, value in labels.items() if isinstance(value, int)}
    for values in labels.values():
        for value in values if isinstance(values, list) else []:
            names.setdefault(int(value), f"label_{int(value)}")
    return dict(sorted(names.items()))
