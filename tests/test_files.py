"""Files that are written whole, whatever is there already."""

import os
import threading

import pytest

from timm_attn.files import replace_file


def test_a_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.csv").write_bytes(b"old")
    (tmp_path / "a.csv").symlink_to(tmp_path / "there" / "a.csv")
    replace_file(tmp_path / "a.csv", b"new")
    assert (tmp_path / "a.csv").is_symlink() and (tmp_path / "there" / "a.csv").read_bytes() == b"new"


def test_a_link_to_itself_is_an_error_of_the_disk(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match=r"symbolic links: .*a"):
        replace_file(tmp_path / "a", b"new")
    assert os.listdir(tmp_path) == ["a"]


def test_who_may_read_a_file_stays(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    (tmp_path / "a").chmod(0o600)
    replace_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new" and (tmp_path / "a").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_or_device_is_written_to(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    reader.start()
    replace_file(pipe, b"content")
    reader.join(60)
    assert found == [b"content"] and pipe.is_fifo()


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
