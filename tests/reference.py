"""Reference outputs of the published classes, and networks of ours that carry the same weights (`tests.formula`)."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import torch

from amaes.published import recognise, rename
from tests import formula

DATA = pathlib.Path(__file__).parent / "fixtures"
MODELS = np.load(DATA / "models_reference.npz", allow_pickle=False)
BLOCKS = np.load(DATA / "blocks_reference.npz", allow_pickle=False)
KEYS = np.load(DATA / "published_keys.npz", allow_pickle=False)


def key_list(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published file."""
    shapes = [tuple(int(n) for n in str(shape).split(",")) for shape in KEYS[f"{name}/shapes"]]
    return dict(zip(map(str, KEYS[f"{name}/keys"]), shapes, strict=True))


def own_names(published: list[str]) -> dict[str, str]:
    """Our name -> published name, of the tensors that are weights."""
    rules = recognise(published).rules
    return {rename(k, rules): k for k in published if k != "dummy_tensor" and not k.endswith("position_index")}


def load_formula(network: torch.nn.Module, published: list[str], half: bool) -> torch.nn.Module:
    """Give every tensor the weights of its published name; tensors without one must be GRN's, and stay zero."""
    names, own = own_names(published), network.state_dict()
    assert all(".grn." in key for key in set(own) - set(names))
    weights = {key: formula.value(names[key], tuple(own[key].shape)) for key in own if key in names}
    if half:
        weights = {key: weight.half().float() for key, weight in weights.items()}
    missing = network.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) == set(own) - set(names)
    return network


def block_case(name: str) -> tuple[dict, dict, list[torch.Tensor], torch.Tensor]:
    """Configuration, state dict, inputs and output of a stored block."""
    state = {
        key.split("/state/")[1]: torch.from_numpy(BLOCKS[key])
        for key in BLOCKS.files
        if key.startswith(f"{name}/state/")
    }
    inputs = [torch.from_numpy(BLOCKS[f"{name}/input{i}"]) for i in range(2) if f"{name}/input{i}" in BLOCKS.files]
    return json.loads(str(BLOCKS[f"{name}/config"])), state, inputs, torch.from_numpy(BLOCKS[f"{name}/output"])
