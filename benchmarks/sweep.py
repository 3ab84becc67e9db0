"""Every architecture with every decoder through the whole chain: pretrain, fine-tune, evaluate, predict.

    python benchmarks/sweep.py [--archs unet_b swin_unetr ...] [--json FILE]

Two steps of each on synthetic heads: it shows that every pair works from one end to the other, not that it learns.
Prints a line per pair with the seconds of each command; status 1 where one fails, with the last lines it wrote.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from amaes import cli
from amaes.files import write_json
from amaes.models import ARCHITECTURES, SEGMENTATION_DECODERS, build_encoder
from amaes.training.run_folder import commit, versions

ROOT = Path(__file__).resolve().parent.parent
PRETRAINING = {"light": ["--decoder", "light"], "standard with skips": ["--decoder", "standard", "--skips"]}


def main() -> int:
    parser = cli.Parser(description="Every architecture with every decoder through the whole chain.")
    parser.add_argument("--archs", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES), metavar="ARCH")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table there")
    args = parser.parse_args()
    rows, failed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        scans, store = prepare(Path(folder))
        for arch in args.archs:
            for way, decoder in zip(PRETRAINING, SEGMENTATION_DECODERS, strict=True):
                row = chain(arch, way, decoder, scans, store, Path(folder) / "run", args.device)
                rows.append(row)
                failed += "error" in row
                times = "  ".join(f"{name} {seconds:.0f} s" for name, seconds in row["seconds"].items())
                print(f"{arch:18s} {way:20s} then {decoder:8s} {times}  {row.get('error', 'ok')}", flush=True)
    if args.json:
        write_json(args.json, {"versions": versions(), "commit": commit(), "rows": rows})
    print(f"{len(rows) - failed} of {len(rows)} went through")
    return 1 if failed else 0


def prepare(folder: Path) -> tuple[Path, Path]:
    """Scans of four small heads and their store."""
    scans, store = folder / "scans", folder / "store"
    heads = ["--subjects", "4", "--sequences", "FLAIR", "--labels", "--fov", "48"]
    for module, *options in (
        ("amaes.phantom", "--out", scans, *heads),
        ("amaes.preprocess", "--images", scans / "images", "--labels", scans / "labels", "--out", store),
    ):
        subprocess.run([sys.executable, "-m", module, *map(str, options)], cwd=ROOT, check=True, capture_output=True)
    return scans, store


def chain(arch: str, way: str, decoder: str, scans: Path, store: Path, run: Path, device: str) -> dict:
    """One pair; seconds of each command, and "error" where one failed."""
    side = 2 * build_encoder(arch).strides[-1]
    network = f"--arch {arch} --patch-size {side} --batch-size 2 --steps 2 --workers 0 --device {device} --overwrite"
    pretrained, tuned = run / "pretrained", run / "tuned"
    scan = scans / "images" / "sub-0001_FLAIR.nii.gz"
    checkpoint = tuned / "fold0" / "checkpoints" / "step-2.pt"
    folds = ["--folds", "1", "--train-cases", "3", "--decoder", decoder]
    weights = ["--weights", pretrained / "checkpoints" / "step-2.pt"]
    commands = {
        "pretrain": ["train_pretrain.py", *network.split(), "--data", store, "--out", pretrained, *PRETRAINING[way]],
        "fine-tune": ["train_finetune.py", *network.split(), "--data", store, "--out", tuned, *weights, *folds],
        "evaluate": ["evaluate.py", tuned, "--device", device],
        "predict": [
            "-m",
            "amaes.predict",
            "--weights",
            checkpoint,
            "--images",
            scan,
            "--out",
            run / f"{arch}-{decoder}",
            "--device",
            device,
        ],
    }
    row: dict = {"arch": arch, "pretraining": way, "decoder": decoder, "seconds": {}}
    for name, command in commands.items():
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        row["seconds"][name] = time.perf_counter() - began
        if done.returncode:
            row["error"] = f"{name}: status {done.returncode}: {' / '.join(done.stderr.splitlines()[-2:])}"
            break
    return row


if __name__ == "__main__":
    cli.run(main)
