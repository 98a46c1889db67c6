"""Files are whole or absent."""

import pytest

from reports.files import write_file, write_folder
from traces.errors import InputError


def test_a_file_takes_its_place(tmp_path):
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    write_file(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(path, write)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["absent/out.bin", "folder", "file/out.bin"])
def test_places_that_take_no_file(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written|is a folder") as error:
        write_file(tmp_path / name, lambda file: file.write(b""))
    assert "\n" not in str(error.value)


def test_a_folder_gets_its_files_and_keeps_others(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    write_folder(tmp_path, {"a/b.txt": b"1", "c.txt": b"2"})
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*"))
    assert found == ["a", "a/b.txt", "c.txt", "mine.txt"]


def test_a_folder_is_made(tmp_path):
    write_folder(tmp_path / "x" / "y", {"c.txt": b"2"})
    assert (tmp_path / "x" / "y" / "c.txt").read_bytes() == b"2"


def test_a_folder_that_takes_no_file(tmp_path):
    (tmp_path / "c.txt").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_folder(tmp_path, {"c.txt": b"2"})
    assert [p.name for p in tmp_path.iterdir()] == ["c.txt"]
