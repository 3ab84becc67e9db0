"""What the commands evaluate.py and `amaes.predict` share; imports no torch, so that --help answers at once."""

from __future__ import annotations

import argparse

from amaes import cli
from amaes.choices import DEVICES, PRECISIONS
from amaes.files import is_disk_full

PROBABILITIES = "probabilities"  # folder beside the predictions


def add_inference_options(parser: argparse._ActionsContainer) -> None:
    """Options of the sliding window."""
    parser.add_argument(
        "--tta", action="store_true", help="average over the 8 mirrorings of every window: 8 times the time"
    )
    parser.add_argument("--overlap", type=cli.fraction, default=0.5, help="share of a window that neighbours overlap")
    parser.add_argument(
        "--batch-size",
        type=cli.batch,
        help="windows per call of the network (default: 1 to 8, by patch size and device)",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: CUDA where there is a GPU")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="auto", help="auto: bf16 autocast on CUDA, fp32 on the CPU"
    )


def failure_message(error: Exception) -> str:
    """One line that says why a case failed.

    The class of the error comes first where it is not one that is written for users.
    """
    kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
    return kind + cli.as_options(" ".join(str(error).split()))


def stop_if_disk_full(error: Exception, state: str) -> None:
    """On a full disk no later case can do better: raise an OSError that says `state` and what to do."""
    if is_disk_full(error):
        text = "the disk is full; what was written is whole, free some space and run the same command again"
        raise OSError(f"{state}; {text}") from error
