"""Predictions of a fold and the labels they are measured against, on the scans' own grids or on the store's.

A prediction that is there is used again as long as the checkpoint, the settings and the case's arrays are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from amaes.data.store import Store
from amaes.evaluation.folds import Fold
from amaes.files import read_json, write_json, written_whole
from amaes.inference import argmax_labels, restore_labels, sliding_window, undo_label_map
from amaes.preprocess.case_record import OF_FILE
from amaes.preprocess.config import IGNORED, Config
from amaes.preprocess.nifti import Header, write_like
from amaes.preprocess.read_case import read_file, read_label


@dataclass(frozen=True)
class Reference:
    """What a prediction is measured against.

    Attributes:
        labels: class numbers, (X, Y, Z) in RAS.
        spacing: mm.
        warnings: on the files that were read.
        header: of the label file; None in the space of the store.
        ignored: voxels left out of both maps, (X, Y, Z) bool; None: none are.
    """

    labels: np.ndarray
    spacing: tuple[float, ...]
    warnings: list[str]
    header: Header | None = None
    ignored: np.ndarray | None = None


class NativeSpace:
    """Predictions are NIfTI files on the grid of the scans; references are the label files as they are.

    Where preprocessing took labels of another grid than the scan's (`on_geometry_mismatch` resample), the prediction is
    resampled onto the label's, so that the label stays as it was drawn; the case gets a warning.

    Args:
        store: of the cases.
        folder: of the predictions.
        ignored_label: value of the label files whose voxels are marked and made background.
    """

    def __init__(self, store: Store, folder: Path, ignored_label: int | None = None) -> None:
        self._store, self._folder, self._ignored_label = store, folder, ignored_label
        self._config = Config.from_dict(store.config)

    def path(self, id: str) -> Path:
        """The file of a prediction."""
        return self._folder / f"{id}.nii.gz"

    def save(self, id: str, logits: torch.Tensor) -> None:
        """Write the prediction of a case with the values that the label files hold; logits (K, x, y, z)."""
        properties = self._store.properties(id, *OF_FILE)
        values = undo_label_map(restore_labels(logits, properties), self._config.label_map)
        write_like(self.path(id), values, properties)

    def reference(self, id: str) -> Reference:
        """The label file of a case; RejectedInput where it cannot be read."""
        path, warnings = Path(self._store.properties(id, "label_file")["label_file"] or ""), []
        header, _ = read_file(path, self._config)
        config, leaves_out = self._config, self._store.ignored is not None
        if self._ignored_label is not None:
            label_map = {**config.label_map, self._ignored_label: IGNORED}
            config, leaves_out = replace(config, label_map=label_map), True
        labels, _ = read_label(path, header, config, warnings)
        labels, ignored = _left_out(labels) if leaves_out else (labels, None)
        return Reference(labels, header.ras_spacing, warnings, header, ignored)

    def image(self, id: str, reference: Reference) -> np.ndarray:
        """The first channel of the scan, (X, Y, Z) in RAS; ValueError where it has another grid than the reference."""
        path = Path(next(file for file in self._store.properties(id)["source_files"] if file is not None))
        channels = len(self._store.channels) if len(self._store.properties(id)["source_files"]) == 1 else 1
        _, data = read_file(path, self._config, channels, reference.header)
        image = data if data.ndim == 3 else data[..., 0]
        if image.shape != reference.labels.shape:
            raise ValueError(f"{path}: has another grid than its label")
        return np.nan_to_num(np.asarray(image, np.float32))

    def prediction(self, id: str, reference: Reference) -> np.ndarray:
        """Class numbers (X, Y, Z) in RAS on the label's grid; RejectedInput where that is another and stays so."""
        return read_label(self.path(id), reference.header, self._config, reference.warnings)[0]


def _left_out(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The labels with background in place of what is left out, and where that is."""
    ignored = labels == IGNORED
    return np.where(ignored, 0, labels), ignored


class StoreSpace:
    """Predictions are arrays on the grid of the store; references are its labels.

    Args:
        store: of the cases.
        folder: of the predictions.
        ignored_label: must be None, as a store has classes, not the values of the label files.
    """

    def __init__(self, store: Store, folder: Path, ignored_label: None = None) -> None:
        assert ignored_label is None
        self._store, self._folder = store, folder

    def path(self, id: str) -> Path:
        """The file of a prediction."""
        return self._folder / f"{id}.npy"

    def save(self, id: str, logits: torch.Tensor) -> None:
        """Write the prediction of a case as class numbers; logits (K, X, Y, Z)."""
        with written_whole(self.path(id)) as file:
            np.save(file, argmax_labels(logits))

    def reference(self, id: str) -> Reference:
        """The preprocessed label of a case."""
        at = self._store.properties(id, "cropped_shape", "ras_spacing", "resampled_shape")
        sides = zip(at["cropped_shape"], at["ras_spacing"], at["resampled_shape"], strict=True)
        spacing = tuple(count * size / resampled for count, size, resampled in sides)  # shapes are rounded, so not 1 mm
        labels, ignored = np.asarray(self._store.label(id)), None
        if self._store.ignored is not None:
            labels, ignored = _left_out(labels)
        return Reference(labels, spacing, [], ignored=ignored)

    def image(self, id: str, reference: Reference) -> np.ndarray:
        """The first channel of the preprocessed volume, (X, Y, Z)."""
        return np.asarray(self._store.image(id)[0], np.float32)

    def prediction(self, id: str, reference: Reference) -> np.ndarray:
        """Class numbers, (X, Y, Z); ValueError where the file holds something else."""
        labels = np.load(self.path(id), allow_pickle=False)
        if labels.shape != reference.labels.shape or labels.dtype.kind not in "iu":
            raise ValueError(f"{self.path(id)}: not the class numbers of {reference.labels.shape} voxels")
        return labels


def left_out_value(store: Store, ignored_label: int | None) -> int | None:
    """The value of the label files that is not scored: as evaluation says, or as preprocessing did; None: all are."""
    if ignored_label is not None or store.ignored is None:
        return ignored_label
    return next(old for old, new in Config.from_dict(store.config).label_map.items() if new == store.ignored)


Space = NativeSpace | StoreSpace
SPACES: dict[str, type[Space]] = {"native": NativeSpace, "store": StoreSpace}


def open_predictions(fold: Fold, store: Store, made_by: Mapping) -> Path:
    """The folder of a fold's predictions, made if it is not there.

    Predictions of another checkpoint, of other settings or of other arrays are deleted.

    Args:
        fold: its `test` cases are predicted.
        store: of the cases.
        made_by: what predictions depend on apart from the case, as plain data.
    """
    folder = fold.folder / f"predictions{fold.suffix}"
    record = folder / "made_by.json"
    versions = _array_versions(store, fold.test)
    known = _known_versions(record, made_by)
    current = {id for id, version in versions.items() if known.get(id) == version}
    for old in [*folder.rglob("*.nii.gz"), *folder.rglob("*.npy")]:
        if old.relative_to(folder).as_posix().removesuffix(".npy").removesuffix(".nii.gz") not in current:
            old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, {**made_by, "cases": versions})
    return folder


def _known_versions(record: Path, made_by: Mapping) -> dict:
    """The versions of the arrays that predictions were made from; none where they were made by something else."""
    try:
        before = read_json(record)
    except (OSError, ValueError):  # the first time, or damaged
        return {}
    cases = before.get("cases") if isinstance(before, dict) else None
    return cases if isinstance(cases, dict) and before == {**made_by, "cases": cases} else {}


def _array_versions(store: Store, ids: Sequence[str]) -> dict[str, list]:
    """Bytes and time of change (ns) of every case's array and record; [] where they are absent."""
    versions = {}
    for id in ids:
        files = [store.path / "cases" / f"{id}{suffix}" for suffix in (".npy", ".json")]
        stats = [file.stat() for file in files if file.is_file()]
        versions[id] = [[stat.st_size, stat.st_mtime_ns] for stat in stats]
    return versions


def predict_once(
    model: nn.Module, store: Store, id: str, space: Space, reference: Reference, patch_size: Sequence[int], **options
) -> np.ndarray:
    """The prediction of a case: the file that is there, or else a new one.

    Args:
        model, patch_size, options: of `sliding_window`.
        store: holds the case.
        id: of the case.
        space: where predictions are kept.
        reference: what the prediction is measured against.

    Returns:
        Class numbers on the grid of the reference, (X, Y, Z).
    """
    if space.path(id).is_file():
        try:
            return space.prediction(id, reference)
        except Exception as error:  # a damaged file can raise anything: made again, once
            if getattr(error, "code", "") == "label_geometry":  # not damaged, but the label is on another grid
                raise
            space.path(id).unlink()
    space.save(id, sliding_window(model, store.image(id), patch_size, **options))
    return space.prediction(id, reference)
