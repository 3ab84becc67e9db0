import errno
import json
import os
import subprocess
import sys
import threading

import pytest

from amaes.files import first_line, is_disk_full, write_json, written_whole


def test_a_file_appears_whole_with_its_folder(tmp_path):
    path = tmp_path / "new" / "a.bin"
    with written_whole(path) as file:
        file.write(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first"
    write_json(tmp_path / "a.json", {"b": [1, 2.5, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, 2.5, None]}


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def full(wrapped):
    try:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        if not wrapped:
            raise
        raise RuntimeError("unexpected pos 64 vs 0") from None  # as torch.save reports it


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_told_with_the_final_name(tmp_path, wrapped):
    message = r"a\.bin: could not be written \(No space left on device\)"
    with pytest.raises(OSError, match=message) as caught, written_whole(tmp_path / "a.bin"):
        full(wrapped)
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


# What is no regular file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["device", "link", "pipe"])
def test_a_device_or_a_pipe_gets_the_content_and_stays(tmp_path, kind):
    path, received = tmp_path / "target", []
    if kind == "pipe":
        os.mkfifo(path)
        reader = threading.Thread(target=lambda: received.append(path.read_bytes()))
        reader.start()
    elif kind == "link":
        path.symlink_to("/dev/null")
    else:
        try:
            os.mknod(path, 0o020666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root makes devices")
    before = path.lstat()
    with written_whole(path) as file:
        file.write(b"a")
        file.seek(0)  # as the writers of arrays do, which a pipe cannot
        file.write(b"whole")
    assert (path.lstat().st_mode, path.lstat().st_ino) == (before.st_mode, before.st_ino)
    assert list(tmp_path.iterdir()) == [path]
    if kind == "pipe":
        reader.join()
        assert received == [b"whole"]


def test_an_error_writes_nothing_onto_a_pipe(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(KeyboardInterrupt), written_whole(path) as file:  # would wait for a reader otherwise
        file.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("target", "reason"), [("/dev/full", "No space left on device"), (".", "Is a directory")])
def test_what_cannot_be_written_onto_is_named(tmp_path, target, reason):
    path = tmp_path / "target"
    path.symlink_to(target)
    with pytest.raises(OSError, match=rf"target: could not be written \({reason}\)$") as caught:
        write_json(path, {})
    assert path.is_symlink()
    assert is_disk_full(caught.value) == (target == "/dev/full")


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_is_written_in_its_order(tmp_path, name):
    code = f"from amaes.files import write_text; write_text({name!r}, 'first\\n'); print('second')"
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "first\nsecond\n"


def test_an_error_of_others_keeps_its_remedy():
    remedy = "what is needed is not installed " * 6 + "and comes with: pip install something"
    assert first_line(ValueError(f"  {remedy}\nat line 3")) == remedy
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    page = first_line(ValueError("word " * 1000))
    assert page == ("word " * 80).strip() + " ..."
