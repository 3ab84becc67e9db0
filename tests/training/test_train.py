"""The training scripts, run as a user runs them: subprocesses, torchrun, signals."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess

import pytest
import torch

from amaes import checkpoint
from amaes.phantom import write
from tests.launch import (
    ROOT,
    TINY,
    assert_equal_weights,
    command,
    fork,
    lines_of,
    pretrain_options,
    run,
    wait_for,
    weights,
)
from tests.stores import make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "store", count=9, labels=True)


@pytest.fixture(scope="module")
def pretrained(store, tmp_path_factory):
    """A pretraining run of 8 steps that nothing disturbed."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    run("train_pretrain.py", *pretrain_options(store, out, **{"--log-every": 1}))
    return out


def test_pretraining_writes_what_the_contract_says(pretrained, store):
    assert sorted(p.name for p in (pretrained / "checkpoints").iterdir()) == ["last.json", "step-6.pt", "step-8.pt"]
    content = torch.load(pretrained / "checkpoints" / "step-8.pt", weights_only=True)
    assert content["build"] == {"arch": "unet_tiny", "in_channels": 1, "decoder": "light", "skips": False}
    assert content["patch_size"] == [32, 32, 16]
    assert content["preprocess"]["normalization"] == "unit"
    assert not any("module." in key or "_orig_mod" in key for key in content["model"])
    losses = lines_of(pretrained)
    assert [line["step"] for line in losses] == list(range(1, 9))
    assert {
        "lr",
        "grad_norm",
        "data_ms",
        "augment_ms",
        "forward_backward_ms",
        "optimizer_ms",
        "wall_ms",
        "patches_per_s",
        "gb",
    } <= set(losses[0])
    lines = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if "val_loss" in line]  # of the same patches
    assert last["val_loss"] < first["val_loss"]
    assert first["val_volumes"] == 1
    config = json.loads((pretrained / "config.json").read_text())
    assert config["options"]["arch"] == "unet_tiny"
    splits = json.loads((store / "splits.json").read_text())["splits"]
    assert any(name.startswith("pretrain") for name in splits)


def test_workers_change_nothing(pretrained, store, tmp_path):
    run("train_pretrain.py", *pretrain_options(store, tmp_path / "b", **{"--workers": 2}))
    assert_equal_weights(pretrained, tmp_path / "b")
    assert not multiprocessing.active_children()  # one that is left delays the end of the program by half a minute


def test_a_finished_run_compiles_nothing(pretrained, store, monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    options = pretrain_options(store, pretrained, **{"--log-every": 1, "--compile": "on"})
    assert "nothing is left to train, nothing is compiled" in run("train_pretrain.py", *options).stdout


def test_another_seed_changes_the_weights(pretrained, store, tmp_path):
    run("train_pretrain.py", *pretrain_options(store, tmp_path / "b", **{"--seed": 1}))
    assert not torch.equal(
        weights(pretrained)[1]["decoder.heads.0.weight"], weights(tmp_path / "b")[1]["decoder.heads.0.weight"]
    )


def test_a_killed_run_continues_to_the_same_weights(pretrained, store, tmp_path):
    out = tmp_path / "killed"
    process = fork("train_pretrain.py", pretrain_options(store, out), tmp_path / "said.txt")
    wait_for(out / "checkpoints" / "step-3.pt", process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = run("train_pretrain.py", *pretrain_options(store, out))
    assert "continuing at step" in done.stderr + done.stdout
    assert_equal_weights(pretrained, out)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("number", [signal.SIGINT])  # others: test_faults, with two ranks
def test_an_interrupted_run_saves_and_continues_and_needs_no_environment_variable(pretrained, store, tmp_path, number):
    out = tmp_path / "interrupted"
    argv = command("train_pretrain.py", *pretrain_options(store, out, **{"--save-every": 1}))
    clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    clean |= {name: value for name, value in os.environ.items() if name == "OMP_NUM_THREADS"}  # of the suite
    process = subprocess.Popen(argv, cwd=ROOT, env=clean, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(out / "checkpoints" / "step-1.pt", process)
    process.send_signal(number)
    error = process.communicate(timeout=100)[1]
    assert process.returncode == 130
    assert "Traceback" not in error
    assert weights(out)[0] < 8
    run("train_pretrain.py", *pretrain_options(store, out))
    assert_equal_weights(pretrained, out)


def test_two_ranks_and_accumulation_give_the_same_losses(pretrained, store, tmp_path):
    run("train_pretrain.py", *pretrain_options(store, tmp_path / "two", **{"--log-every": 1}), ranks=2)
    run("train_pretrain.py", *pretrain_options(store, tmp_path / "pieces", **{"--log-every": 1, "--accumulate": 4}))
    one, *others = [lines_of(folder) for folder in (pretrained, tmp_path / "two", tmp_path / "pieces")]
    for other in others:
        for name in ("loss", "grad_norm"):  # the first step: equal sums in another order
            assert other[0][name] == pytest.approx(one[0][name], rel=2e-5)
        # Later: Adam makes full-sized updates of the rounding in gradients that are zero, as of biases before a norm.
        assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in one], rel=1e-3)


def finetune_options(store, out, *more, steps=4):
    options = ("--data", store, "--steps", steps, "--workers", 0, "--log-every", 2, "--folds", 2, "--train-cases", 3)
    return [*TINY, *options, "--out", out, *more]


def test_fine_tuning_trains_every_fold_from_the_pretrained_encoder(pretrained, store, tmp_path):
    given = os.path.relpath(pretrained, ROOT)
    done = run("train_finetune.py", *finetune_options(store, tmp_path / "run", "--weights", given))
    assert "loaded     40 tensors" in done.stdout + done.stderr
    path = str(ROOT / given / "checkpoints" / "step-8.pt")  # also where it was given from the working folder on
    assert f"weights: {path}\n" in done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["options"]["weights"] == path
    for fold in (0, 1):
        folder = tmp_path / "run" / f"fold{fold}"
        split = json.loads((folder / "config.json").read_text())
        assert len(split["train"]) == 3
        assert len(split["test"]) == 6
        network, meta = checkpoint.load_segmenter(folder / "checkpoints" / "step-4.pt")
        assert meta["labels"] == {"0": "background", "1": "one", "2": "two"}
        assert network(torch.rand(1, 1, 32, 32, 32)).shape == (1, 3, 32, 32, 32)


def test_scratch_and_fine_tuning_start_from_the_same_decoder(pretrained, store, tmp_path):
    path = pretrained / "checkpoints" / "step-8.pt"
    slow = ("--lr", "1e-30", "--weight-decay", "0", "--fold", "1", "--augment", "none")
    run("train_finetune.py", *finetune_options(store, tmp_path / "a", "--weights", path, *slow, steps=1))
    run("train_finetune.py", *finetune_options(store, tmp_path / "b", *slow, "--deep-supervision", steps=1))
    run("train_finetune.py", *finetune_options(store, tmp_path / "c", *slow, steps=1))
    assert not (tmp_path / "a" / "fold0").exists()
    a, c = weights(tmp_path / "a" / "fold1")[1], weights(tmp_path / "c" / "fold1")[1]
    assert all(torch.equal(a[name], c[name]) for name in a if name.startswith("decoder."))
    assert any(not torch.equal(a[name], c[name]) for name in a if name.startswith("encoder."))
    assert "decoder.heads.4.weight" in weights(tmp_path / "b" / "fold1")[1]


@pytest.mark.parametrize("how", [("--decoder-warmup", 3, "--encoder-lr", 1e-4), ("--freeze", "encoder")])
def test_fine_tuning_continues_within_its_warmup_to_the_same_weights(pretrained, store, tmp_path, how):
    path = pretrained / "checkpoints" / "step-8.pt"
    given = ("--weights", path, "--fold", 0, "--warmup", 0.5, "--save-every", 1, "--keep", 9, "--augment", "none", *how)
    done = run("train_finetune.py", *finetune_options(store, tmp_path / "whole", *given, steps=5))
    assert "encoder frozen" in done.stdout + done.stderr
    assert "training Dice" in done.stdout + done.stderr
    folders = [tmp_path / name / "fold0" for name in ("whole", "killed")]
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for step in (3, 4, 5):  # as if killed while the encoder was frozen
        (folders[1] / "checkpoints" / f"step-{step}.pt").unlink()
    run("train_finetune.py", *finetune_options(store, tmp_path / "killed", *given, steps=5))
    assert_equal_weights(*folders)
    assert all("dice" in line and "dice_2" in line for line in lines_of(folders[0]))
    first, last = [torch.load(folders[0] / "checkpoints" / f"step-{step}.pt")["model"] for step in (3, 5)]
    before = torch.load(path)["model"]
    for name in (name for name in first if name.startswith("encoder.")):
        assert torch.equal(first[name], before[name])
        assert torch.equal(last[name], before[name]) == ("--freeze" in how)


def test_a_warmup_of_the_decoder_is_the_same_with_two_ranks(pretrained, store, tmp_path):
    given = (
        "--weights",
        pretrained / "checkpoints" / "step-8.pt",
        "--fold",
        0,
        "--decoder-warmup",
        2,
        "--log-every",
        1,
    )
    given = (*given, "--augment", "none")
    run("train_finetune.py", *finetune_options(store, tmp_path / "one", *given))
    run("train_finetune.py", *finetune_options(store, tmp_path / "two", *given), ranks=2)
    one, two = [lines_of(tmp_path / name / "fold0") for name in ("one", "two")]
    for name in ("loss", "dice", "grad_norm"):
        assert [line[name] for line in two][:3] == pytest.approx([line[name] for line in one][:3], rel=1e-3)


def test_the_same_command_does_nothing_once_it_is_done(store, tmp_path):
    options = finetune_options(store, tmp_path / "run", "--fold", 0, steps=1)
    run("train_finetune.py", *options)
    path = tmp_path / "run" / "fold0" / "checkpoints" / "step-1.pt"
    before = path.stat().st_mtime_ns
    run("train_finetune.py", *options)
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("train_pretrain.py", ("--arch", "nope"), "argument --arch: invalid choice: 'nope'"),
        (
            "train_pretrain.py",
            ("--batch-size", "6", "--accumulate", "4"),
            "--batch-size 6: cannot be split over 1 ranks",
        ),
        ("train_pretrain.py", ("--patch-size", "33"), "--patch-size 33 33 33: 33 is not accepted"),
        ("train_pretrain.py", ("--patch-size", "1600"), "--patch-size 1600 1600 1600: one patch takes about"),
        ("train_pretrain.py", ("--data", "nowhere"), "nowhere: no store there"),
        ("train_pretrain.py", ("--device", "cuda"), "--device cuda: no usable GPU found"),
        ("train_pretrain.py", ("--augment-options", "orders=3"), "'orders=3': no such option of the augmentation"),
        ("train_finetune.py", ("--weights", "none.pt"), "none.pt: no such checkpoint"),
        ("train_pretrain.py", ("--mask-ratio", "0", "--loss-over", "masked"), "--mask-ratio 0.0: keeps"),
        ("train_pretrain.py", ("--seed", "99999999999"), "'99999999999' is not an integer from 0 to 4294967295"),
        (
            "train_finetune.py",
            ("--patch-size", "1600", "--train-cases", "3"),
            "--patch-size 1600 1600 1600: one patch takes about",
        ),
        ("train_finetune.py", ("--decoder-warmup", "1"), "--decoder-warmup 1: accepted: below --steps 1; --freeze"),
        (
            "train_finetune.py",
            ("--freeze", "encoder", "--encoder-lr", "1"),
            "--freeze encoder: the encoder is not trained, --encoder-lr says how it is",
        ),
        ("train_finetune.py", ("--fold", "6"), "--fold 6: accepted: all, or 0 to 5"),
        ("train_finetune.py", ("--fold", "0", "--overwrite"), "--overwrite --fold 0: would delete all folds"),
        ("train_finetune.py", ("--train-cases", "50"), "--train-cases 50: "),
        (
            "train_finetune.py",
            ("--arch", "unet_b", "--weights", "PRETRAINED"),
            "gives 0.0 % of the encoder's parameters",
        ),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(script, options, message, store, pretrained, tmp_path):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    options = [str(pretrained / "checkpoints" / "step-8.pt") if o == "PRETRAINED" else o for o in options]
    given = ("--data", store, *TINY, "--steps", 1, "--out", tmp_path / "run", *options)
    done = run(script, *given, status=2)
    lines = [line for line in done.stderr.splitlines() if line]
    assert message in lines[-1]
    assert len(lines) == 1
    assert not (tmp_path / "run").exists()


def test_conflicting_preprocessing_shows_both_values(pretrained, store, tmp_path):
    other = make_store(tmp_path / "other", count=5, labels=True)
    index = json.loads((other / "dataset.json").read_text())
    index["config"]["spacing"] = [2.0, 1.0, 1.0]
    (other / "dataset.json").write_text(json.dumps(index))
    path = pretrained / "checkpoints" / "step-8.pt"
    done = run("train_finetune.py", *finetune_options(other, tmp_path / "run", "--weights", path), status=2)
    assert "trained on volumes with spacing [1.0, 1.0, 1.0]" in done.stderr
    assert "[2.0, 1.0, 1.0]" in done.stderr


def test_a_broken_case_is_named(store, tmp_path):
    broken = make_store(tmp_path / "broken", count=4)
    (broken / "cases" / "case02.npy").write_bytes(b"\x93NUMPY")
    done = run("train_pretrain.py", *pretrain_options(broken, tmp_path / "run", **{"--workers": 1}), status=2)
    assert "case case02" in done.stderr.splitlines()[-1]


def test_without_data_it_trains_on_synthetic_heads_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(write.DEMO, "subjects", 2)
    options = [*TINY, "--steps", 1, "--workers", 0, "--out", tmp_path / "run"]
    done = run("train_pretrain.py", *options)
    assert "SYNTHETIC" in done.stdout
    assert weights(tmp_path / "run")[0] == 1
    run("train_pretrain.py", *options, "--overwrite")
    assert weights(tmp_path / "run")[0] == 1


def test_fine_tuning_never_overwrites_the_pretraining_it_starts_from(pretrained, store):
    path = pretrained / "checkpoints" / "step-8.pt"
    options = finetune_options(store, pretrained, "--overwrite")
    assert "holds a run of task 'pretrain'" in run("train_finetune.py", *options, status=2).stderr
    assert "lies in --out" in run("train_finetune.py", *options, "--weights", path, status=2).stderr
    assert path.exists()


def test_a_loss_that_explodes_is_one_line_and_is_not_saved(store, tmp_path):
    options = pretrain_options(
        store, tmp_path / "run", **{"--lr": 1e30, "--warmup": 0, "--log-every": 100, "--save-every": 1}
    )
    done = run("train_pretrain.py", *options, status=2)
    assert "not saved, what was saved before is sound" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    found, _, _ = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert found is None or all(tensor.isfinite().all() for tensor in found["model"].values())
