"""Records of a store with fields that are missing, null or of another type: one line that names file and field."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from amaes.data.classes import labelled
from amaes.data.loader import loader
from amaes.data.patches import Patches
from amaes.data.store import Store
from amaes.evaluation.folds import Fold, check_cases
from amaes.evaluation.leakage import find_leakage
from amaes.inference import sliding_window
from amaes.models import build_segmenter
from amaes.preprocess.case_record import FIELDS, HEADER, OF_FILE
from amaes.preprocess.config import Config
from amaes.preprocess.find_cases import collect
from amaes.preprocess.write_store import write_store
from tests.conftest import make_volume, save_nifti
from tests.damaged import MISSING, damaged


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A store of two labelled cases, as preprocessing writes it."""
    folder = tmp_path_factory.mktemp("records")
    for k in range(2):
        save_nifti(folder / f"images/p{k}.nii", make_volume(seed=k))
        save_nifti(folder / f"labels/p{k}.nii", (make_volume(seed=k) > 500).astype(np.uint8))
    write_store(collect(folder / "images", folder / "labels"), folder / "store", Config())
    return folder / "store"


@pytest.fixture
def store(written, tmp_path):
    return shutil.copytree(written, tmp_path / "store")


def test_what_preprocessing_writes_is_right(store):
    record = Store(store).properties("p0", *FIELDS)
    assert set(record["header"]) >= set(HEADER)


OPTIONAL_VALUES = {  # that a damaged record may hold by chance, beside texts
    "label_file": [None],
    "label_counts": [{}],
    "channel_sha256": [[], ["x"]],
    "source_stamps": [[], [None]],
    "warnings": [[]],
    "label_values": [[]],
    "raw_label_values": [[]],
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_a_cases_record(store, field):
    path, whole = store / "cases" / "p0.json", Store(store)
    optional = OPTIONAL_VALUES.get(field, [])
    texts = ["x", ""] if field == "label_file" else []
    for record, value in damaged(json.loads(path.read_text()), field):
        path.write_text(json.dumps(record))
        if value is MISSING:
            with pytest.raises(ValueError, match=rf"p0\.json: has no '{field}'; preprocess the case again"):
                whole.properties("p0", *OF_FILE, field)
        elif any(value is not True and value == right for right in [*optional, *texts]):
            whole.properties("p0")
        else:
            with pytest.raises(ValueError, match=rf"p0\.json: its '{field}' is .*, expected ") as caught:
                whole.properties("p0")
            assert len(str(caught.value).splitlines()) == 1
            for reader in (
                lambda: check_cases(whole, [Fold(0, store, store, [], ["p0"])], "native"),
                lambda: labelled(whole, ["p0"]),
            ):
                with pytest.raises(ValueError, match=f"its '{field}' is"):
                    reader()
            assert find_leakage(whole, ["p0"], [whole]).not_compared > 0  # says so, and goes on


@pytest.mark.parametrize("field", HEADER)
def test_a_field_of_the_header_in_a_cases_record(store, field):
    path, whole = store / "cases" / "p0.json", Store(store)
    record = json.loads(path.read_text())
    for header, _ in damaged(record["header"], field):
        path.write_text(json.dumps({**record, "header": header}))
        with pytest.raises(ValueError, match=r"p0\.json: its 'header' is .*, expected the fields of a NIfTI header"):
            whole.properties("p0")


OPTIONAL = {"session", "sequence"}
ANY_TEXT = {"id", "subject", "session", "sequence", "config_hash"}
ACCEPTED = {"labelled", "config_hash"}  # anything: true or not; what the fingerprint is made of


@pytest.mark.parametrize("field", ["format", "config", "config_hash", "channels", "labels", "cases"])
def test_a_field_of_a_stores_index(store, field):
    path = store / "dataset.json"
    for index, value in damaged(json.loads(path.read_text()), field):
        path.write_text(json.dumps(index))
        if field not in ACCEPTED or value is MISSING:
            right = {"channels": [["x"]], "labels": [{}], "cases": [[]]}.get(field, [])
            if value not in right:
                with pytest.raises(ValueError, match=r"dataset\.json: (not a store's index|format)"):
                    Store(store)
                continue
        Store(store)


@pytest.mark.parametrize("field", ["id", "subject", "labelled", "shape", "session", "sequence"])
def test_a_field_of_a_case_in_a_stores_index(store, field):
    path = store / "dataset.json"
    whole = json.loads(path.read_text())
    for case, value in damaged(whole["cases"][0], field):
        path.write_text(json.dumps({**whole, "cases": [case, *whole["cases"][1:]]}))
        empty = field in OPTIONAL and (value is MISSING or not value)
        text = field in ANY_TEXT and isinstance(value, str) and (value or field == "subject")
        if (field in ACCEPTED and value is not MISSING) or empty or text:
            Store(store)
        else:
            with pytest.raises(ValueError, match=r"dataset\.json: not a store's index"):
                Store(store)


@pytest.mark.parametrize("kind", [np.float16, np.float64, np.int16, bool, np.complex64, ">f4"])
def test_images_of_other_types_are_read_or_refused(store, kind):
    path, whole = store / "cases" / "p0.npy", Store(store)
    np.save(path, np.load(path).astype(kind))
    patches = Patches(whole, (8, 8, 8))
    if kind not in (np.float16, np.float64):
        with pytest.raises(ValueError, match=r"p0\.npy: holds .*, expected floating|byte order"):
            next(iter(loader(patches, [[(0, 0)]], 0, pin_memory=False)))
        return
    batch = next(iter(loader(patches, [[(0, 0), (0, 1)]], 0, pin_memory=False)))
    assert batch["image"].dtype.is_floating_point
    network = build_segmenter("unet_tiny").eval()
    assert sliding_window(network, whole.image("p0"), (32, 16, 16)).isfinite().all()


@pytest.mark.parametrize("field", ["label_values", "raw_label_values", "warnings", "source_stamps", "shape", "header"])
def test_a_case_whose_record_is_damaged_is_done_again(store, field):
    path = store / "cases" / "p0.json"
    whole = json.loads(path.read_text())
    folder = Path(whole["source_files"][0]).parent.parent  # where the scans lie
    collection = collect(folder / "images", folder / "labels")
    for value in (None, 7, "x", {}, [{}]):
        path.write_text(json.dumps({**whole, field: value}))
        result = write_store(collection, store, Config())
        assert [outcome.row["status"] for outcome in result.outcomes] == ["ok", "skipped"]
        assert json.loads(path.read_text()) == whole
