"""The pictures of the README, all from synthetic heads. Needs matplotlib.

    python docs/img/make.py --out docs/img

pretraining.png   patches of validation as the network sees them, as it rebuilds them, as they are
augmentation.png  one head under each transform alone, at its strongest
prediction.png    test heads with the outlines of the reference and of the prediction
data.png          the way of a scan through pretraining

It draws heads, preprocesses, pretrains and fine-tunes in --work with the commands that a user would type. What is in
--work already is used again, so that a changed picture takes seconds.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from amaes import cli, rng
from amaes.augment import PretrainAugment
from amaes.augment.sheets import weak_and_strong
from amaes.checkpoint import read
from amaes.data.loader import loader
from amaes.data.patches import Patches
from amaes.data.pretrain_data import PretrainData, split_for_pretraining
from amaes.data.store import Store
from amaes.demo import run_step, start_of
from amaes.mask import apply_mask, token_mask
from amaes.models import build_network
from amaes.objectives import OBJECTIVES
from amaes.pictures import Panel, Row, centred, hstack, middle_slices, write_sheet
from amaes.preprocess.config import Config
from amaes.preprocess.nifti import to_stored_axes
from amaes.preprocess.read_case import read_file

PATCH = (48, 48, 48)
PRETRAIN_STEPS, FINETUNE_STEPS = 1500, 800
MASK = {"token_size": 4, "mask_ratio": 0.6}
NETWORK = "--arch unet_tiny --workers 0 --compile off --patch-size 48 --batch-size 2"
COMMANDS = (
    "phantom --out {work}/heads --subjects 40 --first 101 --fov 72",
    "preprocess --images {work}/heads/images --out {work}/heads-store",
    f"pretrain --data {{work}}/heads-store {NETWORK} --crop patch --skips --token-size 4 --lr 2e-3 "
    f"--steps {PRETRAIN_STEPS} --val-fraction 0.1 --val-every 300 --out {{work}}/pretrain",
    "phantom --out {work}/lesions --subjects 30 --first 301 --sequences FLAIR --labels --fov 72",
    "preprocess --images {work}/lesions/images --labels {work}/lesions/labels --out {work}/lesions-store",
    f"finetune --data {{work}}/lesions-store {NETWORK} --fold 0 --train-cases 20 --out {{work}}/finetune "
    f"--weights {{work}}/pretrain/checkpoints/step-{PRETRAIN_STEPS}.pt --lr 5e-3 --steps {FINETUNE_STEPS}",
    "evaluate {work}/finetune",
)


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = cli.Parser(description="Make the pictures of the README.")
    parser.add_argument("--out", type=Path, default=Path("docs/img"), metavar="DIR", help="where the PNG files go")
    parser.add_argument("--work", type=Path, default=Path("runs/pictures"), metavar="DIR", help="heads, stores, runs")
    return parser.parse_args()


def run_commands(work: Path) -> None:
    """Run COMMANDS; each uses what it finds in `work`.

    Raises:
        ValueError: one of them failed; names its log.
    """
    work.mkdir(parents=True, exist_ok=True)
    for number, line in enumerate(COMMANDS, 1):
        name, *options = shlex.split(line.format(work=shlex.quote(str(work))))
        log = work / f"{number}-{name}.log"
        if status := run_step([*start_of(name), *options], log, shown=False):
            raise ValueError(f"{name}: status {status}; see {log}")


def pretraining(work: Path) -> tuple[PretrainData, object, torch.nn.Module]:
    """The data, the objective and the trained network of the pretraining run."""
    objective = OBJECTIVES["amaes"](PATCH, 0, "all", {}, crop="patch", skips=True, **MASK)
    data = split_for_pretraining(
        Store(work / "heads-store"),
        PATCH,
        objective.window_size,
        fraction=0.1,
        split_by="subject",
        seed=0,
        reading=objective.reading,
        skip_bad_cases=False,
    )
    content = read(work / "pretrain" / "checkpoints" / f"step-{PRETRAIN_STEPS}.pt")
    network = build_network(content["task"], content["build"])
    network.load_state_dict(content["model"])
    return data, objective, network


def draw_pretraining(path: Path, work: Path) -> None:
    """One patch of each sequence, of three heads that the network was not trained on."""
    data, objective, network = pretraining(work)
    cases = [data.validation[k] for k in (0, 4, 8)]
    batch = next(loader(data.fixed_patches, [[(0, case) for case in cases]], workers=0, pin_memory=False))
    inputs, targets = objective.prepare(batch, torch.device("cpu"), training=False)
    images = objective.panels(inputs, rebuild(network, inputs), targets)
    rows = []
    for k, case in enumerate(cases):
        slices = {name: middle_slices(image[k, 0].numpy())[:2] for name, image in images.items()}
        rows.append(Row(data.store.cases[case].id, [Panel(hstack(pair), name) for name, pair in slices.items()]))
    write_sheet(path, f"Held-out synthetic heads after {PRETRAIN_STEPS} steps, axial and coronal", rows, zoom=3)


@torch.no_grad()
def rebuild(network: torch.nn.Module, seen: torch.Tensor) -> torch.Tensor:
    """What the network makes of masked patches, (B, 1, X, Y, Z)."""
    return network.eval()(seen)


def draw_augmentation(path: Path, work: Path) -> None:
    """The middle axial slice of a head: untouched, and under each transform alone at its strongest setting."""
    augment = PretrainAugment((72, 72, 72))
    store = Store(work / "heads-store")
    volume = np.asarray(store.image("sub-0108_T1w")[0])
    window = torch.from_numpy(centred(volume, augment.window_size))[None, None]
    nothing = augment.draw([0], [0]).only()
    panels = [Panel(middle_slices(augment(window, nothing)[0][0, 0].numpy())[0], "untouched")]
    for name, (_, fields) in weak_and_strong(augment.patch_size).items():
        draws = replace(nothing.only(name), **{key: np.asarray(value) for key, value in fields.items()})
        panels.append(Panel(middle_slices(augment(window, draws)[0][0, 0].numpy())[0], name.replace("_", " ")))
    rows = [Row("", panels[k : k + 6]) for k in range(0, len(panels), 6)]
    write_sheet(path, "Each transform alone, at the strongest setting that training draws", rows, zoom=2)


def draw_prediction(path: Path, work: Path) -> None:
    """Test heads of fold 0: the slice with the most lesion, as it is, with the reference, with the prediction."""
    scans, fold = work / "lesions", work / "finetune" / "fold0"
    cases = {case["id"]: case["classes"] for case in json.loads((fold / "results.json").read_text())["cases"]}
    rows = []
    for name in sorted(cases)[:3]:
        image, label, prediction = (
            oriented_volume(folder / f"{name}.nii.gz")
            for folder in (scans / "images", scans / "labels", fold / "predictions")
        )
        height = int(np.argmax((label == 1).sum(axis=(0, 1))))
        shown, reference, found = (middle_slices(v[:, :, height : height + 1])[0] for v in (image, label, prediction))
        grey = shown / np.quantile(image, 0.995)
        lesion, ventricle = (100 * cases[name][value]["dice"] for value in "12")
        caption = f"prediction: lesion {lesion:.0f} %, ventricle {ventricle:.0f} %"
        panels = [Panel(grey, "scan"), Panel(grey, "reference", reference), Panel(grey, caption, found)]
        rows.append(Row(name, panels))
    heading = (
        f"Test heads, {FINETUNE_STEPS} steps on 20 others; Dice of the whole scan: lesion (orange), ventricle (blue)"
    )
    write_sheet(path, heading, rows, zoom=3)


def oriented_volume(path: Path) -> np.ndarray:
    """A NIfTI file, (X, Y, Z), RAS+."""
    return np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)


def draw_data(path: Path, work: Path) -> None:
    """One scan at every station of pretraining: the middle slice of the volume, then of a patch of it."""
    data, objective, network = pretraining(work)
    case = next(k for k in data.validation if data.store.cases[k].id.endswith("T1w"))
    id = data.store.cases[case].id
    header, turned = read_file(Path(data.store.properties(id)["source_files"][0]), Config())
    stored, volume = to_stored_axes(turned, header.ornt), np.asarray(data.store.image(id)[0])
    window = Patches(data.store, PATCH, objective.window_size, crop="patch")[0, case]["image"][None]
    plain = objective.augment.draw([0], [case]).only()
    patch, _ = objective.augment(window, plain)
    draws = plain.only("rotation", "low_resolution", "gamma")
    draws = replace(
        draws,
        rotation_degrees=np.array([[0.0, 0.0, 20.0]]),
        low_resolution_lengths=np.array([[[30, 30, 48]]]),
        gamma_value=np.array([[1.6]]),
        gamma_inversion=np.array([[False]]),
    )
    augmented, target = objective.augment(window, draws)
    mask = token_mask(augmented, **MASK, keys=rng.keys(0, [0], [case], "mask"))
    seen = apply_mask(augmented, mask)
    rebuilt = objective.panels(seen, rebuild(network, seen), (target, mask))["rebuilt"]
    sides = " x ".join(f"{mm:g}" for mm in header.spacing)
    raw = middle_slices(stored / np.quantile(stored, 0.99), header.spacing, pixel=0.5)[0]
    panels = [
        Panel(raw, f"as stored: {header.orientation}\n{sides} mm"),
        Panel(middle_slices(volume, pixel=0.5)[0], "RAS, cropped,\nin [0, 1], 1 mm"),
    ]
    captions = ("patch", "augmented:\nthe input", "masked:\nwhat is seen", "rebuilt", "target: turned,\nnot degraded")
    for caption, batch in zip(captions, (patch, augmented, seen, rebuilt, target), strict=True):
        panels.append(Panel(middle_slices(batch[0, 0].numpy(), pixel=1 / 3)[0], caption))
    write_sheet(path, "From a file to the loss of pretraining: a held-out synthetic head", [Row("", panels)])


DRAWINGS = {
    "pretraining.png": draw_pretraining,
    "augmentation.png": draw_augmentation,
    "data.png": draw_data,
    "prediction.png": draw_prediction,
}


def main(args: argparse.Namespace) -> int:
    """Run the commands, draw the pictures."""
    run_commands(args.work)
    for name, draw in DRAWINGS.items():
        draw(args.out / name, args.work)
    return cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main, parse_options())
