"""The weights that a run begins with."""

from __future__ import annotations

from collections.abc import Callable

from amaes import checkpoint
from amaes.choices import SCRATCH
from amaes.data.several_stores import SeveralStores
from amaes.data.store import Store
from amaes.files import sha256


def find_weights(weights: str, store: Store | SeveralStores, log: Callable[[str], None]) -> str:
    """The absolute path of the file that `weights` stands for, found from any working folder; "scratch" stays.

    Args:
        weights: a file, a run or a fold, or "scratch".
        store: the volumes that the network is to see; how they were prepared is compared with what the file says.
        log: is told which file was taken, and how far the two differ.

    Raises:
        FileNotFoundError, ValueError: of `checkpoint.find_one` and `checkpoint.check_preprocessing`.
    """
    if weights == SCRATCH:
        return weights
    path = checkpoint.find_one(weights).absolute()
    if str(path) != weights:
        log(f"weights: {path}")
    if line := checkpoint.check_preprocessing(path, checkpoint.read(path), store):
        log(line)
    return str(path)


def identity(weights: str) -> str:
    """What config.json records of the weights: another file under the same name shows."""
    return SCRATCH if weights == SCRATCH else sha256(weights)
