"""What goes wrong with data while training: cases that cannot be read, processes that die, files that mean harm."""

import errno
import io
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from amaes.data import loader as loader_module
from amaes.data.loader import loader, training_batches
from amaes.data.order import Batches, Share
from amaes.data.patches import BAD_IN_A_ROW, Patches
from amaes.data.store import Store
from amaes.data.workers import Watch
from amaes.distributed import Ranks
from tests.stores import SHAPES, make_store

ROOT = Path(__file__).parent.parent.parent
PATCH = (16, 24, 20)


@pytest.fixture
def store(tmp_path):
    return Store(make_store(tmp_path / "store", count=7, labels=True))


def cases_file(store, name):
    return store.path / "cases" / name


def header_of(shape, kind="<f4"):
    """The beginning of a .npy file of that shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_2_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue()


# A case that cannot be read


def cut_short(store):
    path = cases_file(store, "case03.npy")
    path.write_bytes(path.read_bytes()[:-4])


def other_shape(store):
    shutil.copy(cases_file(store, "case02.npy"), cases_file(store, "case03.npy"))


def not_finite(store):
    image = np.load(cases_file(store, "case03.npy"))
    np.save(cases_file(store, "case03.npy"), np.full_like(image, np.inf))


def missing(store):
    cases_file(store, "case03_label.npy").unlink()


def garbage(store):
    cases_file(store, "case03.json").write_text("[" * 100_000)


def not_a_record(store):
    cases_file(store, "case03.json").write_text("[1, 2]")


def no_record(store):
    cases_file(store, "case03.json").write_text("{}")


def objects(store):
    np.save(cases_file(store, "case03.npy"), np.array([print], dtype=object), allow_pickle=True)


def an_archive(store):
    np.savez(cases_file(store, "case03"), a=np.zeros(3))
    cases_file(store, "case03.npz").rename(cases_file(store, "case03.npy"))


def empty(store):
    cases_file(store, "case03.npy").write_bytes(b"")


def huge(store):
    cases_file(store, "case03.npy").write_bytes(header_of((1, 10**6, 10**6, 10**6)) + bytes(64))


FAULTS = {
    cut_short: r"case03\.npy: not a whole array \(mmap length is greater than file size; the file has 299\d+ bytes",
    other_shape: r"cases/case03\.npy: holds float32 \(1, 20, 60, 34\), expected floating \(1, 40, 52, 36\)",
    not_finite: r"its image holds values that are not finite",
    missing: r"cases/case03_label\.npy: missing from the store",
    garbage: r"cases/case03\.json: not JSON",
    not_a_record: r"cases/case03\.json: holds a list, expected the properties of a case",
    no_record: r"KeyError: 'foreground'",
    objects: r"cases/case03\.npy: not a whole array .*Python objects",
    an_archive: r"cases/case03\.npy: not a whole array",
    empty: r"cases/case03\.npy: not a whole array .*0 bytes",
    huge: r"cases/case03\.npy: not a whole array",
}
each_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)


def patches_of(store, **changed):
    return Patches(store, PATCH, seed=4, **{"labels": True, "foreground": 0.999999} | changed)


def read(patches, epoch=0, position=3, workers=0):
    (batch,) = loader(patches, [[(epoch, position)]], workers, pin_memory=False)
    return batch


@each_fault
def test_a_case_that_cannot_be_read_stops_and_is_named_with_its_file_and_cause(store, fault):
    fault(store)
    with pytest.raises(ValueError, match="case case03 of .*store: .*" + FAULTS[fault]) as caught:
        read(patches_of(store))
    assert "`on_bad_case` skip" in str(caught.value)
    assert "\n" not in str(caught.value)


@each_fault
def test_another_case_takes_its_place_where_that_was_asked_for(store, fault):
    fault(store)
    batch = read(patches_of(store, replace_by=[1, 3, 5]))
    (text,) = batch["bad"]
    assert text.startswith(f"case case03 of {store.path}: ")
    assert text.endswith(("; case01 in its place", "; case05 in its place"))
    assert batch["image"].shape == (1, 1, *PATCH)
    assert batch["label"].max() > 0
    assert (batch["epoch"], batch["case"]) == ([0], [3])  # the sample keeps its random streams


def test_a_case_that_is_sound_is_read_the_same_with_or_without_replacements(store):
    a, b = read(patches_of(store)), read(patches_of(store, replace_by=range(7)))
    assert torch.equal(a["image"], b["image"])
    assert a["bad"] == b["bad"] == []


def test_what_takes_its_place_follows_from_seed_epoch_and_case_alone(store):
    cut_short(store)
    patches = patches_of(store, replace_by=range(7))
    alone = {epoch: read(patches, epoch) for epoch in range(12)}
    chosen = {epoch: batch["bad"][0].split("; ")[-1] for epoch, batch in alone.items()}
    assert len(set(chosen.values())) > 2  # over epochs it is not always the same
    others = [[(epoch, 3), (epoch, 0)] for epoch in reversed(range(12))]
    for workers in (0, 2):
        for (where, _), batch in zip(
            others, loader(patches_of(store, replace_by=range(7)), others, workers, False), strict=True
        ):
            assert torch.equal(batch["image"][:1], alone[where[0]]["image"])
            assert batch["bad"] == alone[where[0]]["bad"]


def test_only_the_cases_that_were_named_take_its_place(store):
    cut_short(store)
    patches = patches_of(store, replace_by=[6, 3])
    assert {read(patches, epoch)["bad"][0].split("; ")[-1] for epoch in range(9)} == {"case06 in its place"}


def test_the_voxels_are_those_of_the_case_in_its_place(store):
    cut_short(store)
    batch = read(patches_of(store, replace_by=[6]))
    full = store.image("case06")[0]
    x, y, z = np.argwhere(full == batch["image"][0, 0, 0, 0, 0].item())[0]
    assert np.array_equal(batch["image"][0, 0], full[x : x + 16, y : y + 24, z : z + 20])


def test_a_case_in_its_place_may_be_bad_too_and_all_are_told(store):
    for name in ("case03", "case04", "case05"):
        cases_file(store, f"{name}.npy").unlink()
    batch = read(patches_of(store, replace_by=[3, 4, 5, 6]))
    named = [text.split()[1] for text in batch["bad"]]
    assert named[0] == "case03"
    assert set(named) <= {"case03", "case04", "case05"}
    assert all(text.endswith("; case06 in its place") for text in batch["bad"])


def test_too_many_bad_cases_in_a_row_stop_it_anyway(store):
    for path in store.path.glob("cases/*.npy"):
        path.unlink()
    with pytest.raises(ValueError, match=f"{BAD_IN_A_ROW} cases in a row cannot be read, too many") as caught:
        read(patches_of(store, replace_by=range(7)))
    assert str(caught.value).count(".npy: missing") == BAD_IN_A_ROW
    with pytest.raises(ValueError, match="2 cases in a row cannot be read"):
        read(patches_of(store, replace_by=[3, 4]))


@pytest.mark.parametrize("error", [MemoryError("no more"), OSError(errno.EMFILE, "Too many open files")])
def test_what_is_no_fault_of_the_case_stops_it_anyway(store, monkeypatch, error):
    def refuse(id):
        raise error

    monkeypatch.setattr(store, "image", refuse)
    with pytest.raises(ValueError, match=r"case case03 of .*(no more|Too many open files)$"):
        read(patches_of(store, replace_by=range(7)))


def test_patches_can_be_sent_to_a_process_that_was_not_forked(store):
    read(patches := patches_of(store, replace_by=range(7)))
    again = pickle.loads(pickle.dumps(patches))  # noqa: S301
    assert torch.equal(read(again)["image"], read(patches)["image"])


def test_a_sample_is_as_large_as_it_says(store):
    batch = read(patches := patches_of(store))
    assert patches.sample_bytes() == batch["image"].nbytes + batch["label"].nbytes
    assert patches_of(store, labels=False, foreground=0.0).sample_bytes() == batch["image"].nbytes


def test_shares_of_ranks_hold_the_same_replacements(store):
    cut_short(store)
    whole, parts = [], []
    for world, found in ((1, whole), (2, parts)):
        for rank in range(world):
            order = Batches(range(7), Share(4, rank=rank, world=world), seed=4, start=0, stop=7)
            for batch in loader(patches_of(store, replace_by=range(7)), order, 0, pin_memory=False):
                found += [
                    (*pair, image.sum().item())
                    for *pair, image in zip(batch["epoch"], batch["case"], batch["image"], strict=True)
                ]
                found += batch["bad"]
    assert len(whole) > 28  # some were replaced
    assert sorted(map(str, whole)) == sorted(map(str, parts))
    assert SHAPES[0] == store.cases[3].shape


# A process that dies


class Dying(Patches):
    """Patches whose reading of the case at position 5 ends the process."""

    def __getitem__(self, where):
        if where[1] == 5:
            self.die()
        return super().__getitem__(where)


class Killed(Dying):
    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Left(Dying):
    def die(self):
        os._exit(3)


class CutWhileRead(Dying):
    def die(self):
        image = self.store.image("case05")
        os.truncate(cases_file(self.store, "case05.npy"), 4096)
        return image.sum()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Killed, "was killed by SIGKILL, as the system does when memory runs out"),
        (CutWhileRead, "was killed by SIGBUS, as happens when /dev/shm is full, or when a file shrinks"),
        (Left, "ended with status 3"),
    ],
)
def test_a_worker_that_dies_is_told_with_what_it_read_and_what_helps(store, kind, told):
    handler = signal.getsignal(signal.SIGCHLD)
    batches = loader(kind(store, PATCH), [[(0, i)] for i in range(7)], 2, pin_memory=False)
    began = time.monotonic()
    with pytest.raises(ChildProcessError, match=told) as caught:
        list(batches)
    assert time.monotonic() - began < 30
    assert signal.getsignal(signal.SIGCHLD) is handler  # torch's would interrupt the training anywhere
    text = str(caught.value)
    assert "case05" in text.split("being read: ")[1]
    for part in ("GB of memory", "GB of /dev/shm", "fewer `workers` or 0", "--shm-size=8g", "--ipc=host"):
        assert part in text
    assert "\n" not in text


def test_workers_end_at_exit_although_their_batches_are_held(store, monkeypatch):
    at_exit = []
    monkeypatch.setattr(loader_module.atexit, "register", lambda function, *given: at_exit.append((function, given)))
    order = Batches([0, 1, 2], Share(1, 1, 0, 1), seed=0, start=0, stop=3)
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"))
    batches = training_batches(patches_of(store), order, workers=1, ranks=ranks)
    next(batches)
    assert multiprocessing.active_children()
    ((function, given),) = at_exit
    function(*given)
    assert not multiprocessing.active_children()


def test_a_worker_that_was_gone_before_it_was_seen_is_told_too():
    told = Watch.explained(RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly\nmore"), [], ["case05"])
    assert isinstance(told, ChildProcessError)
    assert "reads patches ended (DataLoader worker (pid(s) 7) exited unexpectedly); being read: case05" in str(told)


def test_a_worker_whose_end_shows_as_an_error_without_words_is_told_too():
    worker = multiprocessing.get_context("fork").Process(target=os._exit, args=(3,))
    worker.start()
    told = Watch.explained(EOFError(), [worker], ["case05"])
    assert f"(pid {worker.pid}) ended with status 3; being read: case05" in str(told)


def test_an_error_that_no_worker_died_of_stays_what_it_is(store):
    def broken():
        yield [(0, 0)]
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError, match="ours"):
        list(loader(patches_of(store), broken(), 0, pin_memory=False))


def test_shared_memory_that_is_full_is_one_line(store, monkeypatch):
    def refuse(tensors):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device\nmore")

    monkeypatch.setattr(loader_module, "default_collate", refuse)
    with pytest.raises(
        OSError, match=r"no memory for a batch of patches \(unable to .* device\); free now: .*--ipc=host"
    ):
        read(patches_of(store), workers=1)


def test_stores_of_two_precisions_make_one_batch(store):
    for i in range(2):
        path = cases_file(store, f"case0{i}.npy")
        np.save(path, np.load(path).astype(np.float16 if i else np.float32))
    for workers in (0, 1):
        (batch,) = loader(patches_of(store), [[(0, 1), (0, 0)]], workers, pin_memory=False)
        assert batch["image"].dtype == torch.float32


def test_pretraining_ends_with_one_line_when_a_worker_is_killed(store, tmp_path):
    command = [sys.executable, "train_pretrain.py", "--arch", "unet_tiny", "--patch-size", "32", "--batch-size", "2"]
    command += ["--device", "cpu", "--steps", "100000", "--workers", "2", "--log-every", "1", "--data", str(store.path)]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, until = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 100
    while not (metrics.is_file() and metrics.stat().st_size):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    worker = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
    os.kill(int(worker), signal.SIGKILL)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    (line,) = errors.splitlines()
    assert f"error: a process that reads patches (pid {worker}) was killed by SIGKILL" in line
