import os
import pickle
import resource
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from amaes import checkpoint
from amaes.models import build_autoencoder, build_segmenter
from amaes.published import recognise, rename
from amaes.weights import tensor_files


def content(step=1, **more):
    return {"task": "pretrain", "step": step, "model": {"w": torch.arange(4.0)}, "build": {"arch": "unet_tiny"}, **more}


def test_what_is_saved_is_read_back_with_weights_only(tmp_path):
    path = checkpoint.save(tmp_path / "checkpoints", content(step=7, labels={"0": "background"}), keep=2)
    assert path.name == "step-7.pt"
    back = torch.load(path, weights_only=True)
    assert back["format"] == checkpoint.FORMAT
    assert torch.equal(back["model"]["w"], torch.arange(4.0))
    assert checkpoint.read(path)["labels"] == {"0": "background"}
    assert '"file": "step-7.pt"' in (path.parent / "last.json").read_text()


def test_only_the_newest_are_kept(tmp_path):
    for step in (2, 9, 10, 100):
        checkpoint.save(tmp_path, content(step), keep=2)
    assert [path.name for path in checkpoint.saved(tmp_path)] == ["step-100.pt", "step-10.pt"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    checkpoint.save(tmp_path, content(1), keep=3)
    path = checkpoint.save(tmp_path, content(2, model={"w": torch.rand(10_000)}), keep=3)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 0xFF  # a byte of a tensor: torch.load alone does not notice
    path.write_bytes({"truncate": data[: len(data) // 2], "flip": data, "empty": b"", "text": b"hello"}[damage])
    newest, path, skipped = checkpoint.latest(tmp_path)
    assert newest["step"] == 1
    assert path.name == "step-1.pt"
    assert len(skipped) == 1
    assert "step-2.pt: skipped" in skipped[0]


def test_a_damaged_newer_checkpoint_and_leftovers_go_with_the_next_save(tmp_path):
    for step in (1, 9):
        checkpoint.save(tmp_path, content(step), keep=2)
    (tmp_path / "step-9.pt").write_bytes(b"damaged")
    (tmp_path / ".step-3.pt.77.tmp").write_bytes(b"half")
    checkpoint.save(tmp_path, content(2), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.json", "step-2.pt"]


def test_any_flipped_byte_is_survived(tmp_path):
    checkpoint.save(tmp_path, content(1), keep=9)
    path = checkpoint.save(tmp_path, content(2), keep=9)
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        newest, _, _ = checkpoint.latest(tmp_path)
        assert torch.equal(newest["model"]["w"], torch.arange(4.0))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "its 'task' is nothing, expected str"),
        ({"task": "segment"}, "its 'model' is nothing, expected dict"),
        (
            {"task": "segment", "model": {"w": 3}, "build": {}},
            "holds other things than tensors|'preprocess' is nothing",
        ),
        ({"task": "segment", "model": {}, "build": {"arch": 3}}, "describes no network|'preprocess' is nothing"),
    ],
)
def test_entries_are_checked_before_they_are_used(tmp_path, entries, message):
    torch.save({"format": checkpoint.FORMAT, **entries}, tmp_path / "odd.pt")
    for reader in (checkpoint.load_segmenter, checkpoint.import_weights):
        with pytest.raises(ValueError, match=message):
            reader(tmp_path / "odd.pt")


@pytest.mark.parametrize("name", ["model", "optimizer", "step"])
@pytest.mark.parametrize("value", ["missing", None, "2", [], {}])
def test_a_checkpoint_that_cannot_be_continued_falls_back_to_the_one_before(tmp_path, name, value):
    whole = {"optimizer": {"state": {}}}
    checkpoint.save(tmp_path, content(1, **whole), keep=3)
    path = checkpoint.save(tmp_path, content(2, **whole), keep=3)
    odd = content(2, **whole) | {name: value}
    if value == "missing":
        del odd[name]
    torch.save({"format": checkpoint.FORMAT, **odd}, path)
    newest, _, skipped = checkpoint.latest(tmp_path, to_continue=True)
    assert (newest["step"], len(skipped)) == (1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.to_sparse(), "is torch.sparse_coo on cpu, expected plain numbers"),
        (lambda w: w.to("meta"), "on meta, expected plain numbers|not a checkpoint"),
        (lambda w: w > 0, "type torch.bool, expected real numbers"),
        (lambda w: w.to(torch.int64), "type torch.int64, expected real numbers"),
        (lambda w: w.to(torch.complex64), "type torch.complex64, expected real numbers"),
    ],
)
def test_weights_that_are_no_plain_real_numbers_are_refused(tmp_path, change, message):
    network = build_segmenter("unet_tiny", num_classes=2)
    weights = {name: change(tensor) for name, tensor in network.state_dict().items()}
    torch.save({"model": weights}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=message):
        checkpoint.load_weights(network, tmp_path / "odd.pt", checkpoint.read(tmp_path / "odd.pt")["model"])
    with pytest.raises(ValueError, match=message):
        checkpoint.load_encoder(network, tmp_path / "odd.pt")


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("part", ["encoder.", "decoder."])
def test_either_half_of_a_network_must_hold_real_numbers(tmp_path, kind, part):
    network = build_segmenter("unet_tiny", num_classes=2)
    weights = {name: w.to(kind) if name.startswith(part) else w for name, w in network.state_dict().items()}
    torch.save(weights, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=f"weights of type {kind}, expected real numbers"):
        checkpoint.load_encoder(network, tmp_path / "odd.pt", transfer="all")


def test_a_tensor_that_a_file_makes_larger_than_itself_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "MAX_REPEATED_BYTES", 4000)

    class Large:
        def __reduce__(self):
            return torch.FloatTensor, (100, 200)

    torch.save({"model": {"w": torch.ones(100), "large": Large()}}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"its tensor model\.large claims \(100, 200\), the file holds less"):
        checkpoint.read(tmp_path / "odd.pt")


def test_names_from_a_file_never_steer_the_terminal(tmp_path):
    torch.save({"model": {"w\x1b[2J\ud800": torch.ones(1)}}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"'model\.w\\x1b\[2J\\ud800' cannot be printed"):
        checkpoint.read(tmp_path / "odd.pt")


def test_no_checkpoint_is_no_error(tmp_path):
    assert checkpoint.latest(tmp_path / "nothing") == (None, None, [])


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("writer", [pickle.dump, torch.save])
def test_a_pickle_with_a_payload_is_refused_and_not_run(tmp_path, writer):
    path = tmp_path / "evil.pt"
    with path.open("wb") as file:
        writer({"model": Touch(tmp_path / "pwned")}, file)
    for reader in (checkpoint.read, checkpoint.load_segmenter, checkpoint.import_weights):
        with pytest.raises(ValueError, match=r"evil\.pt: not a checkpoint"):
            reader(path)
    assert not (tmp_path / "pwned").exists()


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        checkpoint.read(tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        checkpoint.read(tmp_path / "list.pt")
    torch.save({"a": 1}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="holds no tensors"):
        checkpoint.import_weights(tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="format None"):
        checkpoint.load_segmenter(tmp_path / "empty.pt")
    path = checkpoint.save(tmp_path, content(), keep=1)
    with pytest.raises(ValueError, match="task 'pretrain'; fine-tune it first"):
        checkpoint.load_segmenter(path)


def test_a_full_disk_leaves_the_last_checkpoint_and_no_rest(tmp_path):
    checkpoint.save(tmp_path, content(1), keep=3)
    code = (
        "import resource, sys, torch; from pathlib import Path; from amaes import checkpoint\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try:\n"
        "    checkpoint.save(Path(sys.argv[1]), {'step': 2, 'model': {'w': torch.rand(100000)}}, keep=3)\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "step-2.pt: could not be written (File too large); what was there before is untouched" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.json", "step-1.pt"]
    assert checkpoint.latest(tmp_path)[0]["step"] == 1
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20000  # the limit was the child's


@pytest.mark.parametrize(
    "reader",
    [
        checkpoint.read,
        checkpoint.load_segmenter,
        checkpoint.import_weights,
        lambda path: checkpoint.load_encoder(build_segmenter("unet_tiny"), path),
    ],
)
def test_one_flipped_bit_is_refused_by_every_reader(tmp_path, reader):
    network = build_segmenter("unet_tiny")
    build = {"arch": "unet_tiny", "in_channels": 1, "num_classes": 2}
    path = tmp_path / "step-1.pt"
    torch.save({"format": checkpoint.FORMAT, "task": "segment", "build": build, "model": network.state_dict()}, path)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 64
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"step-1\.pt: damaged, the checksum of .* is wrong"):
        reader(path)


# Preprocessing


@pytest.mark.parametrize(
    ("change", "channels", "message"),
    [
        ({}, True, None),
        ({"spacing": [2.0, 1.0, 1.0]}, False, r"a\.pt: trained on volumes with spacing \[2\.0.*STORE has \[1\.0, 1\.0"),
        ({"normalization": "zscore"}, False, "normalization zscore, STORE has unit; preprocess with the same `normal"),
        ({"channels": ["FLAIR"]}, False, None),
        ({"channels": ["FLAIR"]}, True, r"channels \['FLAIR'\], STORE has \['T1w'\]"),
        ({"preprocess": None}, True, None),  # a published file, which does not tell
    ],
)
def test_a_store_prepared_in_another_way_is_refused(change, channels, message):
    config = {"spacing": [1.0, 1.0, 1.0], "normalization": "unit"}
    store = SimpleNamespace(path="STORE", config=config, channels=["T1w"])
    preprocess = config | {key: value for key, value in change.items() if key in config}
    trained = {"preprocess": preprocess, "channels": ["T1w"]}
    trained |= {key: value for key, value in change.items() if key in trained}
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        checkpoint.check_preprocessing("a.pt", trained, store, channels=channels)


# Weights into an encoder


def saved(tmp_path, network, arch="unet_tiny"):
    path = tmp_path / "weights.pt"
    torch.save(ours(network.state_dict(), arch, network.in_channels), path)
    return path


def ours(model, arch="unet_tiny", in_channels=1):
    build = {"arch": arch, "in_channels": in_channels}
    return {"format": checkpoint.FORMAT, "task": "pretrain", "build": build, "model": model}


def test_an_encoder_takes_all_weights_and_the_decoder_stays(tmp_path):
    source, target = build_autoencoder("unet_tiny"), build_segmenter("unet_tiny", num_classes=3)
    before = {name: tensor.clone() for name, tensor in target.decoder.state_dict().items()}
    report = checkpoint.load_encoder(target, saved(tmp_path, source))
    for name, tensor in source.encoder.state_dict().items():
        assert torch.equal(target.encoder.state_dict()[name], tensor)
    for name, tensor in target.decoder.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert (len(report.loaded), report.adapted, report.new, report.coverage) == (40, [], [], 1.0)
    assert len(report.ignored) == len(source.decoder.state_dict())
    assert "100.0 %" in report.table()


@pytest.mark.parametrize(("old", "new"), [(1, 2), (1, 4), (2, 1), (4, 7)])
def test_repeated_stem_gives_equal_channels_the_old_response(tmp_path, old, new):
    source, target = build_autoencoder("unet_tiny", in_channels=old), build_segmenter("unet_tiny", in_channels=new)
    report = checkpoint.load_encoder(target, saved(tmp_path, source))
    assert report.adapted == ["stages.0.0.conv.weight"]
    image = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        expected = source.encoder(image.expand(1, old, -1, -1, -1))
        features = target.encoder(image.expand(1, new, -1, -1, -1))
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(expected, features, strict=True))


def test_random_stem_is_left_alone(tmp_path):
    target = build_segmenter("unet_tiny", in_channels=2)
    before = target.encoder.stages[0][0].conv.weight.clone()
    report = checkpoint.load_encoder(target, saved(tmp_path, build_autoencoder("unet_tiny")), stem="random")
    assert report.new == ["stages.0.0.conv.weight"]
    assert torch.equal(target.encoder.stages[0][0].conv.weight, before)
    with pytest.raises(ValueError, match="`stem` 'first' is unknown; accepted: repeat, random"):
        checkpoint.load_encoder(target, tmp_path / "weights.pt", stem="first")


def test_another_architecture_is_refused_and_changes_nothing(tmp_path):
    target = build_segmenter("unet_tiny")
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    path = saved(tmp_path, build_autoencoder("unet_b"), "unet_b")
    with pytest.raises(ValueError, match=r"gives 0\.0 % of the encoder's parameters \(0 of 40 tensors\).*`arch`"):
        checkpoint.load_encoder(target, path, allow_partial=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize(
    ("given", "wanted", "message"),
    [
        ("mednext_m", "mednext_b", "encoder tensors of the file have no place"),  # deeper stages of the same width
        ("mednext_v2_base", "mednext_l", "encoder tensors of the file have no place"),  # its response norms
        ("mednext_s_k5", "mednext_s", "of the encoder are not in it"),  # all its spatial filters
    ],
)
def test_an_encoder_that_fits_by_count_alone_is_refused(tmp_path, given, wanted, message):
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build_autoencoder(given).state_dict().items()}
        target = build_segmenter(wanted)
    model = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    torch.save(ours(model, given), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=message):
        checkpoint.load_encoder(target, tmp_path / "other.pt")
    assert checkpoint.load_encoder(target, tmp_path / "other.pt", allow_partial=True).coverage > 0.9


def test_part_of_an_encoder_needs_permission(tmp_path):
    source, target = build_autoencoder("unet_tiny"), build_segmenter("unet_tiny")
    part = {k: v for k, v in source.state_dict().items() if not k.startswith("encoder.stages.4.1")}
    torch.save(ours(part), tmp_path / "part.pt")
    with pytest.raises(ValueError, match="at least 95 %"):
        checkpoint.load_encoder(target, tmp_path / "part.pt")
    report = checkpoint.load_encoder(target, tmp_path / "part.pt", allow_partial=True)
    assert 0 < report.coverage < 0.95
    assert len(report.new) == 4


@pytest.mark.parametrize(
    "prefix", ["", "model.", "module.", "_orig_mod.", "model._orig_mod.", "module._orig_mod.model."]
)
@pytest.mark.parametrize("outer", [None, "state_dict", "model"])
def test_published_names_are_recognised(tmp_path, prefix, outer):
    keys = published_keys()
    weights = build_autoencoder("unet_tiny").state_dict()
    shapes = {rename(key, recognise(keys).rules): key for key in keys}
    assert set(shapes) == set(weights)
    state = {prefix + shapes[name]: tensor for name, tensor in weights.items()}
    torch.save(state if outer is None else {outer: state, "epoch": 3}, tmp_path / "published.pth")
    loaded = checkpoint.import_weights(tmp_path / "published.pth")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    assert checkpoint.load_encoder(build_segmenter("unet_tiny"), tmp_path / "published.pth").coverage == 1.0


def published_keys():
    import pathlib

    reference = np.load(pathlib.Path(__file__).parent / "fixtures" / "unet_reference.npz", allow_pickle=False)
    return [str(key) for key in reference["unet_f4_light_rec/keys"]]


def test_files_that_would_unpack_to_more_than_they_are_get_refused(tmp_path):
    path = tmp_path / "compressed.pt"
    torch.save({"format": "x", "model": {"w": torch.zeros(1000)}}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    with pytest.raises(ValueError, match=r"compressed\.pt: not a checkpoint \(its entries are compressed\)"):
        checkpoint.read(path)
    torch.save({"model": {"w": torch.zeros(1).expand(10**6, 10**6)}}, tmp_path / "expanded.pt")
    with pytest.raises(ValueError, match=r"its tensor model\.w claims \(1000000, 1000000\)"):
        checkpoint.read(tmp_path / "expanded.pt")


# A run in place of a file ---------------------------------------------------------------------------------------------


def test_a_run_stands_for_the_newest_sound_checkpoint_of_each_fold(tmp_path):
    for fold, step in ((0, 1), (0, 2), (2, 3), (10, 3)):
        checkpoint.save(tmp_path / f"fold{fold}" / "checkpoints", content(step), keep=9)
    (tmp_path / "fold0" / "checkpoints" / "step-2.pt").write_bytes(b"cut short")
    (tmp_path / "fold1").mkdir()
    expected = [tmp_path / f"fold{k}" / "checkpoints" / f"step-{step}.pt" for k, step in ((0, 1), (2, 3), (10, 3))]
    assert checkpoint.find(tmp_path) == expected
    for path in (tmp_path / "fold2", tmp_path / "fold2" / "checkpoints", str(expected[1])):
        assert checkpoint.find_one(path) == expected[1]
    with pytest.raises(ValueError, match=r"a run of 3 folds, one network is expected, such as .*fold0$"):
        checkpoint.find_one(tmp_path)


def test_the_best_checkpoint_of_a_run(tmp_path):
    file = checkpoint.save(tmp_path / "fold0" / "checkpoints", content(1), keep=9)
    with pytest.raises(FileNotFoundError, match=r"no best\.pt there; training with validation cases writes it"):
        checkpoint.find(tmp_path, "best")
    best = file.rename(file.with_name("best.pt"))
    assert checkpoint.find(tmp_path, "best") == [best]


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint step-N\.pt there"):
        checkpoint.find(tmp_path)
    checkpoint.save(tmp_path / "checkpoints", content(1), keep=1).write_bytes(b"cut short")
    with pytest.raises(FileNotFoundError, match=r"step-1\.pt: skipped, it is damaged"):
        checkpoint.find(tmp_path)


def test_networks_are_loaded_from_runs(tmp_path):
    torch.manual_seed(0)
    source, target = build_autoencoder("unet_tiny"), build_segmenter("unet_tiny")
    checkpoint.save(tmp_path / "checkpoints", ours(source.state_dict()) | {"step": 4}, keep=1)
    checkpoint.load_encoder(target, tmp_path)
    for name, value in source.encoder.state_dict().items():
        assert torch.equal(target.encoder.state_dict()[name], value)
    assert checkpoint.import_weights(tmp_path).keys() == source.state_dict().keys()
