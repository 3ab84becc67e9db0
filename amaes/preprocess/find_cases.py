"""Which files make which case: reads names and dataset.json only, opens no image."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from amaes.data.store import STORE_FORMAT

SEQUENCES = (  # the first match wins; between T1 and T2 the one named first
    ("FLAIR", r"flair"),
    ("T1ce", r"t1ce|t1gd|gado|t1c|post"),
    ("ADC", r"adc"),
    ("SWI", r"swi|minip"),
    ("T2star", r"t2\*|t2star|gre|fl2d.*hemo"),
    ("TOF", r"angio|tof"),
    ("DWI", r"dwi|dti|trace|diff"),
    ("PD", r"pd|dp|proton"),
    ("T1", r"^(?:(?!t2).)*?(?:t1|mprage|spgr|bravo)"),
    ("T2", r"t2"),
)
MAX_CHANNELS = 32  # more _0000, _0001, ... of one name are a series of cases, not channels


@dataclass(frozen=True)
class Item:
    """One case: files in, one array out.

    Attributes:
        id: name in the store, may contain "/".
        images: one file per channel (None = missing), or one 4-D file that holds all channels.
        label: the label file, or None.
        subject, session, sequence: read from the names; the sequence of single-channel cases only.
        problem: (reason code, message) of an item that must not be processed.
        volume: (k, n): the case is volume k of a 4-D file of n; None: the whole file.
        corpus_filter: only taken where the rules of the published corpus let it pass.
    """

    id: str
    images: tuple[Path | None, ...]
    label: Path | None = None
    subject: str = ""
    session: str | None = None
    sequence: str | None = None
    problem: tuple[str, str] | None = None
    volume: tuple[int, int] | None = None
    corpus_filter: bool = False

    @property
    def files(self) -> list[str]:
        return [str(path) for path in (*self.images, self.label) if path is not None]


@dataclass(frozen=True)
class Collection:
    """What a folder holds.

    Attributes:
        items: sorted by id, ids unique.
        channels: names, in the order of `Item.images`.
        classes: declared label values and their names; empty where none are declared.
        notes: what the user should know, such as files that were not used.
        foreground_name: what a single foreground class is called where none are declared.
        unused: for a network (`network_channels`), the files that belong to no case; else they are a note.
    """

    items: list[Item]
    channels: list[str]
    classes: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    foreground_name: str | None = None
    unused: list[Path] = field(default_factory=list)

    def summary(self) -> str:
        """One line: how many cases of what."""
        subjects, labelled = (
            len({item.subject for item in self.items}),
            sum(item.label is not None for item in self.items),
        )
        counts = sorted(Counter(item.sequence or "UNKNOWN" for item in self.items).items())
        what = ", ".join(f"{name} {count}" for name, count in counts)
        what = what if len(self.channels) == 1 else f"channels {' '.join(self.channels)}"
        return f"{len(self.items)} cases of {subjects} subjects, {labelled} labelled; {what}"


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
        label_name: label files lie beside the images and are called NAME, *_NAME or *-NAME.
        subject: regular expression on the id; its group "subject" or first group is the subject.
        missing_channel: "error" marks a case without all channels, "zeros" lets it pass.
        network_channels: the images alone, for a network of so many channels: no labels, every file of the folder and
            not those of a training list; a dataset.json one folder up counts for a folder imagesT* only.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: nothing found, nothing matches, or two inputs with one id (both are named).
    """
    if labels is not None and label_name is not None:
        if Path(labels).resolve() != Path(images).resolve():
            raise ValueError(
                "--labels and --label-name exclude each other: labels lie in a tree of their own or beside images"
            )
        labels = None
    for_network = network_channels is not None
    declared = _declaration(Path(images), for_network)
    images, labels = _folders(Path(images), labels, label_name, for_network)
    root = images if images.is_dir() else images.parent
    notes: list[str] = []
    found, unused = _nifti_files(images, "--images", notes, skip=labels), []
    if not for_network and (listed := _listed(declared, images)):
        if others := sorted(set(found) - set(listed)):
            notes.append(f"{len(others)} files are not in the training list of dataset.json: {_some(others)}")
        found = listed
    label_files = {} if labels is None else _by_id(labels, _nifti_files(labels, "--labels", notes))
    beside = [path for path in found if label_name is not None and channel_prefix(path, [label_name])]
    if label_name is not None and not beside:
        raise ValueError(_nothing("--label-name", root, f"{label_name}, *_{label_name} or *-{label_name}", found))
    found = [path for path in found if path not in set(beside)]
    if channels:
        items, unused = _by_channel_name(root, found, channels, for_network)
        names = list(channels)
        if unused and not for_network:
            notes.append(f"{len(unused)} files are none of the channels {' '.join(names)}: {_some(unused)}")
    elif groups := _by_channel_number(root, found, declared, label_files, network_channels):
        count = 1 + max(map(max, groups.values()))
        names = declared.channels or (["image"] if count == 1 else [f"channel_{k}" for k in range(count)])
        items = [Item(name, _padded(files, len(names))) for name, files in groups.items()]
    else:
        names, items = declared.channels or ["image"], [Item(_id(root, path), (path,)) for path in found]
        if len(names) > 1:
            notes.append(f"dataset.json declares {len(names)} channels: each file must be 4-D, one volume per channel")
    _check_ids(items, with_labels=not for_network)
    items = [_complete(item, names, missing_channel) for item in items]
    if labels is not None:
        items = _with_labels(items, label_files, labels, notes)
    if label_name is not None:
        items = _with_labels_beside(items, beside, label_name, notes)
    items = [_described(item, subject, len(names) == 1) for item in sorted(items, key=lambda item: item.id)]
    if without := [item.id for item in items if not item.subject]:
        raise ValueError(f"--subject {subject!r}: no subject in {len(without)} ids, such as {_some(without)}")
    return Collection(items, names, declared.classes, notes, label_name, unused if for_network else [])


@dataclass(frozen=True)
class _Declaration:
    """What a dataset.json of the Medical Segmentation Decathlon or of nnU-Net says."""

    channels: list[str] = field(default_factory=list)
    classes: dict[int, str] = field(default_factory=dict)
    numbered: bool = False  # files carry _0000, _0001, ...
    training: list[Path] = field(default_factory=list)


def _declaration(images: Path, for_network: bool) -> _Declaration:
    """dataset.json in the folder of the images or in its parent; an empty declaration where there is none."""
    candidates = [images / "dataset.json", images.parent / "dataset.json"]
    if for_network and not Path(os.path.normpath(images.absolute())).name.startswith("imagesT"):
        candidates.pop()  # what lies one folder up may be of something else
    path = next((file for file in candidates if file.is_file()), None)
    if path is None:
        return _Declaration()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, found {type(content).__name__}")
        if content.get("format") == STORE_FORMAT:
            return _Declaration()
        numbered = "channel_names" in content
        names = content.get("channel_names") or content.get("modality") or {}
        entries = [entry.get("image") for entry in content.get("training") or [] if isinstance(entry, dict)]
        training = [path.parent / entry for entry in entries if isinstance(entry, str)]
        return _Declaration(
            channels=_channel_names(names),
            classes=_classes(content.get("labels") or {}),
            numbered=numbered,
            training=training,
        )
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path}: not a dataset.json of MSD or nnU-Net ({type(error).__name__}: {error})") from error


def _channel_names(names: object) -> list[str]:
    """{"0": "T1", ...}, or what others write: ["T1", ...] or "T1"."""
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


def _folders(
    images: Path, labels: str | Path | None, label_name: str | None, for_network: bool
) -> tuple[Path, Path | None]:
    """The folders to read: imagesTr and labelsTr where the images' folder is that of a data set."""
    labels = None if labels is None else Path(labels)
    if not images.exists():
        raise FileNotFoundError(f"--images {images}: no such folder")
    if (images / "imagesTr").is_dir():
        if labels is None and label_name is None and not for_network and (images / "labelsTr").is_dir():
            labels = images / "labelsTr"
        images = images / "imagesTr"
    if labels is not None and not labels.is_dir():
        raise FileNotFoundError(f"--labels {labels}: no such folder")
    if labels is not None and labels.resolve() == images.resolve():
        raise ValueError(f"--images and --labels are both {images}; labels beside the images are named by --label-name")
    return images, labels


def _listed(declared: _Declaration, images: Path) -> list[Path]:
    """The training list where it names files of this folder; a listed file that is absent stays in, to be reported."""
    here = os.path.normpath(images.absolute())  # by name: a link is the file that the list names, wherever it leads
    listed = [Path(os.path.normpath(path.absolute())) for path in declared.training]
    listed = [path for path in listed if path.is_relative_to(here)]
    if not any(path.is_file() for path in listed):
        return []
    return sorted({images / path.relative_to(here) for path in listed})


def _nifti_files(folder: Path, option: str, notes: list[str], skip: Path | None = None) -> list[Path]:
    """Sorted NIfTI files below a folder, without hidden and resource files and without those below `skip`.

    Folders that cannot be read go into `notes`; they are an error where nothing else is there.
    """
    if folder.is_file():
        if not _is_nifti(folder.name):
            raise ValueError(f"{option} {folder}: expected a folder or a file named *.nii or *.nii.gz")
        return [folder]
    seen, found, others, unreadable = {folder.resolve()}, [], [], []
    for parent, folders, files in os.walk(folder, onerror=unreadable.append, followlinks=True):
        keep = []
        for name in sorted(folders):
            target = (Path(parent) / name).resolve()
            if (
                not name.startswith(".")
                and name != "__MACOSX"
                and target not in seen
                and target != (skip and skip.resolve())
            ):
                seen.add(target)  # links in a circle are walked once
                keep.append(name)
        folders[:] = keep
        visible = [Path(parent) / name for name in files if not name.startswith(".")]
        found += [path for path in visible if _is_nifti(path.name)]
        others += [path for path in visible if not _is_nifti(path.name)][:5]
    if unreadable and not found:
        raise unreadable[0]
    if unreadable:
        notes.append(
            f"{len(unreadable)} folders cannot be read: {_some([str(error.filename) for error in unreadable])}"
        )
    if not found:
        raise ValueError(_nothing(option, folder, "*.nii or *.nii.gz", others))
    return sorted(found)


def _by_channel_name(
    root: Path, found: list[Path], names: Sequence[str], for_network: bool
) -> tuple[list[Item], list[Path]]:
    """Files of one folder with one prefix form a case: folder/{FLAIR,T1}.nii.gz or folder/case_{flair,t1}.nii.gz.

    Also returns the files of other names. A network of one channel takes any name, so there all files must match.
    """
    if len({name.lower() for name in names}) != len(names):
        raise NoSuchChannels(f"--channels: expected different names, found {' '.join(names)}")
    groups: dict[str, dict[str, Path]] = defaultdict(dict)
    unused = []
    for path in found:
        match = channel_prefix(path, names)
        if match is None:
            unused.append(path)
            continue
        name, prefix = match
        folder = path.parent.relative_to(root)
        key = (folder if prefix in ("", folder.name) else folder / prefix).as_posix()
        key = root.resolve().name if key == "." else key  # the files lie in the root itself
        if name in groups[key]:
            raise ValueError(f"id_collision: {groups[key][name]} and {path} are both channel {name} of case {key!r}")
        groups[key][name] = path
    if not groups or (for_network and unused and len(names) == 1):
        pattern = " or ".join(f"{name}, *_{name}, *-{name}" for name in names)
        raise NoSuchChannels(_nothing("--images" if for_network else "--channels", root, pattern, found))
    return [Item(key, tuple(files.get(name) for name in names)) for key, files in groups.items()], unused


def _by_channel_number(
    root: Path, found: list[Path], declared: _Declaration, label_files: dict[str, Path], network_channels: int | None
) -> dict[str, dict[int, Path]]:
    """nnU-Net's case_0000, case_0001, ... as {case: {0: file, 1: file}}; empty where names do not mean that.

    A four-digit ending may as well number cases or years. It counts as a channel where a dataset.json says so, where a
    label is named without it, or in a folder imagesTr or imagesTs; and only if every file has it and every case a 0000.
    For a network it counts where it gives as many channels as the network has.
    """
    groups: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in found:
        match = re.fullmatch(r"(.+)_(\d{4})", _id(root, path))
        if match is None or _id(root, path) in label_files or int(match[2]) >= MAX_CHANNELS:
            return {}
        if int(match[2]) in groups[match[1]]:
            raise ValueError(
                f"id_collision: {groups[match[1]][int(match[2])]} and {path} are one channel of {match[1]!r}"
            )
        groups[match[1]][int(match[2])] = path
    in_dataset = root.name.startswith("imagesT")
    if declared.numbered or network_channels is None:
        meant = declared.numbered or in_dataset or any(name in label_files for name in groups)
    else:
        count = 1 + max(map(max, groups.values()))
        meant = count == network_channels and (count > 1 or in_dataset)
    return dict(groups) if meant and all(0 in files for files in groups.values()) else {}


def _padded(files: dict[int, Path], count: int) -> tuple[Path | None, ...]:
    if max(files) >= count:
        raise ValueError(
            f"{files[max(files)]}: dataset.json declares {count} channels, found a file of channel {max(files)}"
        )
    return tuple(files.get(channel) for channel in range(count))


def _check_ids(items: Iterable[Item], with_labels: bool) -> None:
    """Two inputs with one output name stop everything; "a_label" would take the name of the label of "a"."""
    taken: dict[str, Item] = {}
    for item in items:
        if item.id in taken:
            raise ValueError(f"id_collision: {taken[item.id].files[0]} and {item.files[0]} both map to {item.id!r}")
        taken[item.id] = item
    for name, item in taken.items():
        if with_labels and f"{name}_label" in taken:
            other = taken[f"{name}_label"].files[0]
            raise ValueError(
                f"id_collision: {other} maps to the name of the label of {item.files[0]}; see --label-name"
            )


def _complete(item: Item, names: Sequence[str], missing_channel: str) -> Item:
    missing = [name for name, path in zip(names, item.images, strict=False) if path is None]
    if not missing or missing_channel == "zeros":
        return item
    message = f"{item.id}: expected channels {' '.join(names)}, missing {' '.join(missing)}"
    return replace(item, problem=("missing_channel", message))


def _with_labels(items: list[Item], label_files: dict[str, Path], labels: Path, notes: list[str]) -> list[Item]:
    matched = [item for item in items if item.id in label_files]
    if not matched:
        first = next(iter(label_files))
        text = f"no label matches an image by name: labels such as {first!r}, images such as {items[0].id!r}"
        raise ValueError(f"--labels {labels}: {text}")
    if unused := sorted(set(label_files) - {item.id for item in items}):
        notes.append(f"{len(unused)} labels belong to no image: {_some(unused)}")
    return [_labelled(item, label_files.get(item.id), f"in {labels}") for item in items]


def _with_labels_beside(items: list[Item], beside: list[Path], name: str, notes: list[str]) -> list[Item]:
    """The label in an image's folder whose prefix begins the image's name; the longest prefix of several."""
    folders: dict[Path, dict[str, Path]] = defaultdict(dict)
    for path in beside:
        prefix = channel_prefix(path, [name])[1]
        if prefix in folders[path.parent]:
            raise ValueError(f"id_collision: {folders[path.parent][prefix]} and {path} are labels of one case")
        folders[path.parent][prefix] = path
    result = []
    for item in items:
        image = next(path for path in item.images if path is not None)
        stem, choices = stem_of(image.name), folders[image.parent]
        fitting = [prefix for prefix in choices if not prefix or re.match(re.escape(prefix) + "[_-]", stem)]
        label = choices[max(fitting, key=len)] if fitting else None
        result.append(_labelled(item, label, f"called {name}, *_{name} or *-{name} in {image.parent}"))
    if unused := sorted(set(beside) - {item.label for item in result}):
        notes.append(f"{len(unused)} labels belong to no image: {_some(unused)}")
    return result


def _labelled(item: Item, label: Path | None, where: str) -> Item:
    if label is None and item.problem is None:
        return replace(item, problem=("missing_label", f"{item.id}: expected a label {where}, found none"))
    return replace(item, label=label)


def _described(item: Item, pattern: str | None, single: bool) -> Item:
    """Subject, session and sequence by name: sub-XXX, else the first folder, else the id itself; ses-XX."""
    if pattern is None:
        token = re.search(r"(?:^|[/_])(sub-[A-Za-z0-9]+)", item.id)
        subject = token[1] if token else item.id.split("/")[0]
    else:
        subject = _matched_subject(pattern, item.id)
    session = re.search(r"(?:^|[/_])(sess?-[A-Za-z0-9]+)", item.id)
    sequence = None
    if single:
        sequence = sequence_of(stem_of(item.images[0].name))
    return replace(item, subject=subject, session=session[1] if session else None, sequence=sequence)


def sequence_of(text: str) -> str | None:
    """The sequence that a file name or the description of a series speaks of; None where it names none."""
    return next((name for name, rule in SEQUENCES if re.search(rule, text.lower())), None)


def _matched_subject(pattern: str, name: str) -> str:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--subject {pattern!r} is not a regular expression: {error}") from error
    if not compiled.groups:
        raise ValueError(f"--subject {pattern!r} has no group: put the subject's part in parentheses")
    match = compiled.search(name)
    return "" if match is None else match["subject" if "subject" in compiled.groupindex else 1] or ""


def channel_prefix(path: Path, names: Sequence[str]) -> tuple[str, str] | None:
    """(name, what stands before it) where a file is called NAME, *_NAME or *-NAME, in any case; longest name first."""
    stem = stem_of(path.name)
    for name in sorted(names, key=len, reverse=True):
        if stem.lower() == name.lower():
            return name, ""
        if stem.lower().endswith((f"_{name.lower()}", f"-{name.lower()}")):
            return name, stem[: -len(name) - 1]
    return None


def _by_id(root: Path, files: Sequence[Path]) -> dict[str, Path]:
    result: dict[str, Path] = {}
    for path in files:
        name = _id(root, path)
        if name in result:
            raise ValueError(f"id_collision: {result[name]} and {path} both map to {name!r}")
        result[name] = path
    return result


def _id(root: Path, path: Path) -> str:
    return path.relative_to(root).with_name(stem_of(path.name)).as_posix()


def stem_of(name: str) -> str:
    """A file name without `.nii` or `.nii.gz`, in any capitals."""
    return re.sub(r"\.nii(\.gz)?$", "", name, flags=re.IGNORECASE)


def _is_nifti(name: str) -> bool:
    return stem_of(name) not in (name, "")


def _nothing(option: str, folder: Path, pattern: str, there: Sequence[Path]) -> str:
    names = f"found {_some(there)}" if there else "found no file"
    return f"{option}: no file called {pattern} in {folder}; {names}"


def _some(names: Sequence[str | Path]) -> str:
    """Up to five of the names, for a message."""
    shown = [name.name if isinstance(name, Path) else name for name in names[:5]]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
