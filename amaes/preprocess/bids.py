"""What the names of BIDS files say: what is no image, which sequences are one session, which mask is whose."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from amaes.preprocess.collection import Item
from amaes.preprocess.file_names import channel_prefix, shorten, stem_of
from amaes.preprocess.match_labels import with_label

NO_IMAGE = {  # why a file is left out: what its path below the folder looks like, in small letters
    "below a folder derivatives": re.compile(r"(?:^|/)derivatives/"),
    "a phase, real or imaginary part (part-phase, part-real, part-imag)": re.compile(r"_part-(?:phase|real|imag)[_.]"),
    "a segmentation (*_mask, *_dseg, *_probseg)": re.compile(r"_(?:mask|dseg|probseg)\.nii(?:\.gz)?$"),
}
SEGMENTATION = list(NO_IMAGE)[-1]


def entities_of(name: str) -> dict[str, str]:
    """{"sub": "01", "ses": "2", "acq": "iso", ...} of a name without its ending."""
    parts = [part.partition("-") for part in name.split("_")]
    return {key: value for key, _, value in parts if value}


def structure_of(label_name: str | None) -> str | None:
    """What a label shows: "lesion" of label-lesion_mask; a name of another kind as it is."""
    return label_name and entities_of(label_name).get("label", label_name)


def sessions(files: Sequence[tuple[Path, str, str]]) -> list[tuple[Path, str, str]]:
    """Put sequences of one session together that differ in the entity acq: their prefixes become equal.

    Args:
        files: (file, channel, what stands before the channel in its name). Prefixes that do not begin with sub- stay,
            and so do those of a session that has a channel twice.
    """
    members: dict[tuple[Path, str], list[tuple[str, str]]] = {}  # folder and common prefix to channels and prefixes
    for path, channel, prefix in files:
        members.setdefault((path.parent, _without_acq(prefix)), []).append((channel, prefix))
    result = []
    for path, channel, prefix in files:
        common = _without_acq(prefix)
        channels, prefixes = zip(*members[path.parent, common], strict=True)
        differ = len(set(prefixes)) > 1 and len(set(channels)) == len(channels)
        result.append((path, channel, common if differ else prefix))
    return result


def _without_acq(prefix: str) -> str:
    return re.sub(r"_acq-[A-Za-z0-9]+", "", prefix) if prefix.startswith("sub-") else prefix


def left_out(
    root: Path, files: Iterable[Path], channels: Sequence[str], notes: list[str], *, masks_too: bool = True
) -> list[Path]:
    """The files without those that are no images; a note counts these.

    Args:
        root: folders above it do not count.
        files: below it.
        channels: names; a segmentation that is called after one of them is taken.
        notes: gets a line.
        masks_too: leave out segmentations.

    Raises:
        ValueError: no file is left.
    """
    kept, why = [], {}
    for path in files:
        name = path.relative_to(root).as_posix().lower()
        reason = next((reason for reason, rule in NO_IMAGE.items() if rule.search(name)), None)
        if reason == SEGMENTATION and (not masks_too or channel_prefix(path, channels)):
            reason = None
        if reason is None:
            kept.append(path)
        else:
            why[path] = reason
    text = "; ".join(f"{count} {reason}" for reason, count in Counter(why.values()).items())
    if why:
        notes.append(f"{len(why)} files are left out, as they are no images: {text}; {shorten(list(why))}")
    if why and not kept:
        raise ValueError(f"`images` {root}: no image there; {notes[-1]}")
    return kept


def match_by_entities(
    items: list[Item], label_files: Mapping[str, Path], labels: Path, label_name: str, notes: list[str]
) -> list[Item]:
    """Give each case its label from another tree; a case without one cannot be used.

    In BIDS, the label has the subject and session of the case, and where it has acq or run, one of the case; of several
    such labels, the one that has most of these. Names of another kind match by what stands before `label_name`.

    Args:
        items: the cases.
        label_files: those called NAME, *_NAME or *-NAME, by the id that stands before NAME.
        labels: their folder.
        label_name: that NAME.
        notes: gets the labels that belong to no case.

    Raises:
        ValueError: no label belongs to a case.
    """
    by_session: dict[tuple[str, str | None], list[Path]] = {}
    for path in label_files.values():
        if found := _entities(path):
            by_session.setdefault((found["sub"], found.get("ses")), []).append(path)
    where = f"called {label_name}, *_{label_name} or *-{label_name} in {labels}"
    result, used = [], set()
    for item in items:
        images = [_entities(path) for path in item.images if path is not None]
        if images[0]:
            candidates = by_session.get((images[0]["sub"], images[0].get("ses")), [])
        else:
            candidates = [label_files[item.id]] if item.id in label_files else []
        fitting = _most_specific(images, candidates)
        used.update(fitting)
        if len(fitting) > 1 and item.problem is None:
            text = (
                f"{item.id}: {len(fitting)} labels belong to it: {shorten(fitting)}; a longer `label_name` chooses one"
            )
            result.append(replace(item, problem=("ambiguous_label", text)))
        else:
            result.append(with_label(item, fitting[0] if fitting else None, where))
    if not used:
        first = next(iter(label_files.values())).name
        text = f"no label matches an image: labels such as {first}, images such as {items[0].files[0]}"
        raise ValueError(f"`labels` {labels}: {text}")
    if unused := sorted(set(label_files.values()) - used):
        notes.append(f"{len(unused)} labels belong to no image: {shorten(unused)}")
    return result


def _entities(path: Path) -> dict[str, str]:
    """`entities_of` a file; {} where its name does not begin with sub-."""
    stem = stem_of(path.name)
    return entities_of(stem) if re.match("sub-[^_]", stem) else {}


def _most_specific(images: Sequence[dict[str, str]], labels: Sequence[Path]) -> list[Path]:
    """The labels whose acq and run, where they have them, are those of an image; of these, those that have most."""
    scores: dict[Path, int] = {}
    for path in labels:
        given = [(key, value) for key, value in _entities(path).items() if key in ("acq", "run")]
        if all(any(image.get(key) == value for image in images) for key, value in given):
            scores[path] = len(given)
    return [path for path, score in scores.items() if score == max(scores.values())]
