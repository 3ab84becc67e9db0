"""Checkpoints with a field that is missing, null or of another type: one line that names file and field."""

from itertools import islice

import pytest
import torch

from amaes import checkpoint
from amaes.models import build_segmenter
from amaes.preprocess.config import Config
from tests.damaged import MISSING, damaged

BUILD = {"arch": "unet_tiny", "in_channels": 1, "num_classes": 2, "decoder": "unet", "deep_supervision": False}


@pytest.fixture(scope="module")
def whole():
    return {
        "format": checkpoint.FORMAT,
        "task": "segment",
        "model": build_segmenter(**BUILD).state_dict(),
        "step": 3,
        "build": BUILD,
        "preprocess": Config().as_dict(),
        "channels": ["T1w"],
        "labels": {"0": "background", "1": "lesion"},
        "patch_size": [32, 48, 32],
        "provenance": {"options": {}},
    }


def load(content, path):
    """The network and the metadata of the file, without writing it: torch.save takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "read", lambda path: content)
        path.touch()
        return checkpoint.load_segmenter(path)


def test_a_whole_checkpoint_is_loaded(whole, tmp_path):
    meta = load(whole, tmp_path / "a.pt")[1]
    assert meta == {name: value for name, value in whole.items() if name != "model"}


FIELDS = ["format", "task", "model", "build", "preprocess", "channels", "labels", "patch_size"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_a_checkpoint(whole, tmp_path, field):
    right = {"channels": [["x"]], "labels": [{}], "preprocess": [{}]}.get(field, [])
    for content, value in damaged(whole, field):
        if value in right:
            load(content, tmp_path / "a.pt")
            continue
        with pytest.raises(ValueError, match=rf"a\.pt: .*({field}|weights do not fit)") as caught:
            load(content, tmp_path / "a.pt")
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("field", ["step", "provenance"])
def test_what_a_network_does_not_need_may_be_missing(whole, tmp_path, field):
    for content, value in islice(damaged(whole, field), 4):
        meta = load(content, tmp_path / "a.pt")[1]
        assert meta.get(field, MISSING) is value


@pytest.mark.parametrize("field", ["arch", "in_channels", "num_classes", "decoder"])
def test_a_field_of_what_rebuilds_the_network(whole, tmp_path, field):
    for build, value in damaged(BUILD, field):
        if value is MISSING and field in ("in_channels", "decoder"):  # one channel; the U-Net's decoder
            load({**whole, "build": build}, tmp_path / "a.pt")
            continue
        with pytest.raises(ValueError, match=r"a\.pt: its ('build' |network takes )") as caught:
            load({**whole, "build": build}, tmp_path / "a.pt")
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("field", sorted(Config().as_dict()))
def test_a_field_of_how_scans_are_prepared(whole, tmp_path, field):
    for config, value in damaged(Config().as_dict(), field):
        fits = value is MISSING or (type(value) is type(getattr(Config(), field)) and value in (True, {}))
        if fits:
            load({**whole, "preprocess": config}, tmp_path / "a.pt")
            continue
        with pytest.raises(ValueError, match=rf"a\.pt: its 'preprocess' is not what preprocessing wrote \(.*{field}"):
            load({**whole, "preprocess": config}, tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("channels", [["a", "b"], [1], [["x"]]]),
        ("labels", [{"x": "a"}, {"0": 7}, {"0": None}, {"-1": "a"}, {"1000": "a"}, {0: "a"}]),
        ("patch_size", [[32, 32], [32, 32, 0], [32, 32, 2.5], [32, 32, "32"], [32, 32, True], [10**19] * 3]),
    ],
)
def test_entries_of_a_field(whole, tmp_path, field, values):
    for value in values:
        with pytest.raises(ValueError, match=r"a\.pt: its "):
            load({**whole, field: value}, tmp_path / "a.pt")


def test_the_kinds_of_a_file_are_those_of_the_table(whole, tmp_path):
    torch.save({**whole, "channels": [7]}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: its 'channels' is \[7\], expected names of channels"):
        checkpoint.load_segmenter(tmp_path / "a.pt")
