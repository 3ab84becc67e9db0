"""Make a file of weights to give away: no optimizer, no local paths, a model card beside it.

    python -m amaes.export CKPT|RUN OUT.pt

Begin with `export`; `model_card` is the text beside it. The command line is at the end.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from amaes import cli

SUFFIXES = (".pt", ".safetensors")


def export(source: str | Path, out: Path) -> tuple[str, Path]:
    """Write the weights of a checkpoint with all that loads them, and a model card OUT.md.

    The file loads wherever a checkpoint does; only training cannot be continued from it.

    Args:
        source: one of our checkpoints, or a run or fold (`amaes.checkpoint.find_one`).
        out: .pt, or .safetensors where that package is installed; must not exist.

    Returns:
        The SHA-256 of the file, and the path of the card.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: not one of ours, another ending, or the file or its card is there already.
    """
    from amaes import checkpoint  # here, as it needs torch, and --help does not
    from amaes.files import sha256, write_text
    from amaes.weights import tensor_files

    path, card = checkpoint.find_one(source), out.with_suffix(".md")
    if out.suffix not in SUFFIXES:
        raise ValueError(f"{out}: expected a name that ends in {' or '.join(SUFFIXES)}")
    if there := [file for file in (out, card) if file.exists()]:
        raise ValueError(f"{there[0]}: is there already; take another name, or delete it")
    content = checkpoint.read_ours(path)
    content.pop("optimizer", None)
    content["provenance"] = without_paths(content.get("provenance", {}))
    tensor_files.write(out, content)
    digest = sha256(out)
    write_text(card, model_card(out.name, content, digest, found_beside(path)))
    return digest, card


def without_paths(content: object) -> object:
    """Plain data whose texts that are paths keep their last part alone: /data/me/stores/brains becomes brains."""
    if isinstance(content, Mapping):
        return {key: without_paths(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_paths(value) for value in content]
    if isinstance(content, str) and re.search(r"[/\\]", content):
        return re.split(r"[/\\]", content.rstrip("/\\"))[-1]
    return content


def found_beside(path: Path) -> dict:
    """What the run of a checkpoint tells about it: {"cases": {"train", "test"}, "results": [of evaluate.py, ...]}.

    Results of another checkpoint of the fold are left out. Empty where the file lies in no run.
    """
    from amaes.files import read_json, sha256

    found: dict = {"cases": {}, "results": []}
    fold = path.parent.parent
    try:
        split = read_json(fold / "config.json")
        found["cases"] = {part: len(split[part]) for part in ("train", "test")}
    except (OSError, ValueError, KeyError, TypeError):  # of pretraining, or not in a run
        return found
    digest = sha256(path)
    for file in sorted(fold.glob("results*.json")):
        try:
            results = read_json(file)
            if results["checkpoint"]["sha256"] == digest:
                found["results"].append(results)
        except (OSError, ValueError, KeyError, TypeError):  # damaged
            continue
    return found


# The card -------------------------------------------------------------------------------------------------------------

TASK_NAMES = {"segment": "segmentation", "pretrain": "pretraining"}


def model_card(name: str, content: Mapping, digest: str, beside: Mapping) -> str:
    """Markdown: what the network is, what it was trained on and how, its Dice where that is known, how to load it.

    Args:
        name: of the file.
        content: the checkpoint without paths.
        digest: SHA-256 of the file.
        beside: of `found_beside`.
    """
    from amaes.evaluation.tables import markdown_table, markdown_text

    provenance = _mapping(content["provenance"])
    options = _mapping(provenance.get("options"))
    task = TASK_NAMES.get(content["task"], f"pretraining ({content['task']})")
    parameters = sum(tensor.numel() for tensor in content["model"].values())
    names = tuple(name for name in TRAINING if name != "epochs" or options.get("steps") is None)  # --steps replaces it
    size = " x ".join(map(str, content["patch_size"]))
    build = ", ".join(f"{key} {value}" for key, value in content["build"].items() if key != "arch")
    classes = ", ".join(f"{value} {text}" for value, text in content["labels"].items())
    rows = [
        ["network", f"{content['build'].get('arch')} ({build}), {parameters:,} numbers"],
        ["input", f"channels {', '.join(content['channels'])}; patches of {size} voxels"],
        *([["classes", classes]] if classes else []),
        ["trained on", _trained_on(options, provenance, beside["cases"])],
        ["training", _words(options, names) + f"; {content.get('step')} steps done"],
        ["preprocessing", _words(content["preprocess"])],
        ["made with", _words(_mapping(provenance.get("versions"))) + f"; commit {provenance.get('commit')}"],
        ["SHA-256", digest],
    ]
    lines = [f"# {markdown_text(name)}", "", f"Weights of {task}, made with amaes.", "", markdown_table(["", ""], rows)]
    return "\n".join([*lines, "", "## Dice", "", _dice(content, **beside), "", *_loading(name, content), ""])


TRAINING = ("steps", "epochs", "batch_size", "lr", "weight_decay", "augment", "objective", "preset", "seed", "weights")


def _mapping(value: object) -> Mapping:
    """The value, or nothing where a file holds something else."""
    return value if isinstance(value, Mapping) else {}


def _words(values: Mapping, names: tuple[str, ...] | None = None) -> str:
    return ", ".join(f"{key} {_shown(values[key])}" for key in names or values if values.get(key) is not None)


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return " x ".join(map(str, value))
    return (
        ", ".join(f"{key} to {new}" for key, new in value.items()) or "none" if isinstance(value, dict) else str(value)
    )


def _trained_on(options: Mapping, provenance: Mapping, cases: Mapping) -> str:
    data = options.get("data")
    names = ", ".join(map(str, data)) if isinstance(data, list) else data
    counts = f"; {cases['train']} cases, tested on {cases['test'] or 'no'} others" if cases else ""
    return f"{names} (store {provenance.get('store')}){counts}"


def _dice(content: Mapping, cases: Mapping, results: list[Mapping]) -> str:
    """A table of the scores of this very file on its test cases, or why there is none."""
    from amaes.evaluation.tables import markdown_table

    if content["task"] != "segment":
        return "None: the network was not trained for a segmentation of its own."
    if cases and not cases["test"]:
        return "Not measured: the training left no case to test on."
    if not results:
        return "Not measured with this file (`evaluate.py` before `export` does)."
    rows = []
    for result in results:
        for name, scores in result["classes"].items():
            mean = scores["dice"]["mean"]
            label = "all classes pooled" if name == "all" else f"{name} {content['labels'].get(name, '')}"
            shown = "–" if mean is None else f"{100 * mean:.2f}"
            rows.append([result["settings"]["space"], label, scores["n_cases"], shown])
    note = "Mean over the test cases of the fold; space native: on the scans' own grids."
    return markdown_table(["space", "class", "cases", "Dice %"], rows) + f"\n\n{note}"


def _loading(name: str, content: Mapping) -> list[str]:
    commands = [f'python train_finetune.py --data STORE --arch {content["build"].get("arch")} --weights "{name}"']
    code = f'from amaes.checkpoint import import_weights\n\nweights = import_weights("{name}")  # name -> tensor'
    if content["task"] == "segment":
        commands.insert(0, f'python -m amaes.predict --weights "{name}" --images SCANS --out MASKS')
        code = f'from amaes.checkpoint import load_segmenter\n\nnetwork, meta = load_segmenter("{name}")'
    note = "The file says how scans are to be prepared; `predict` does it. Not validated for clinical use."
    return ["## Load", "", "```bash", *commands, "```", "", "```python", code, "```", "", note]


# Command line ---------------------------------------------------------------------------------------------------------


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = cli.Parser(
        ["RUN/fold0 net.pt", "RUN/fold0/checkpoints/best.pt net.safetensors"],
        description="Write weights without optimizer and local paths, and a model card beside them.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT|RUN", help="file, fold, or run of one network")
    parser.add_argument("out", type=cli.output_file, metavar="OUT", help=f"file that ends in {' or '.join(SUFFIXES)}")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> int:
    """Export one checkpoint; the exit status."""
    from amaes import checkpoint

    path = checkpoint.find_one(args.checkpoint)
    sys.stdout.write(f"weights: {path}\n")
    digest, card = export(path, args.out)
    size = args.out.stat().st_size / 1e6
    sys.stdout.write(f"{args.out}: {size:.1f} MB, SHA-256 {digest}\n{card}: model card\n")
    return cli.EXIT_OK


if __name__ == "__main__":
    cli.run(main, parse_options())
