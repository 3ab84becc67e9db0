import errno
import json
import os

import pytest

from amaes.files import write_json, written_whole


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
