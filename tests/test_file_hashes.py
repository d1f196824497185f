"""A hash of files is that of their contents, and is computed again only where a file changed."""

import hashlib
import os

from train.file_hashes import hash_files
from vla_jax.files import read_json, write_json


def test_a_hash_depends_on_names_and_contents_and_not_on_the_place(tmp_path):
    def hash_of(folder, **contents):
        files = {name: tmp_path / folder / name for name in contents}
        (tmp_path / folder).mkdir(exist_ok=True)
        for name, path in files.items():
            path.write_text(contents[name])
        return hash_files(files, tmp_path / "hashes.json")

    first = hash_of("one", a="x", b="y")
    assert hash_of("two", b="y", a="x") == first
    assert len({first, hash_of("three", a="y", b="x"), hash_of("four", a="x")}) == 3


def test_a_file_is_read_again_only_if_its_size_or_time_changed(tmp_path):
    file, memory = tmp_path / "weights", tmp_path / "hashes.json"
    file.write_text("first")
    before = hash_files({"w": file}, memory)
    (entry,) = read_json(memory, "hashes").values()
    assert entry["sha256"] == hashlib.sha256(b"first").hexdigest()
    write_json(memory, {str(file): {**entry, "sha256": "remembered"}})
    assert hash_files({"w": file}, memory) != before  # taken from the memory
    os.utime(file, ns=(0, 0))
    assert hash_files({"w": file}, memory) == before


def test_a_damaged_memory_costs_time_only(tmp_path):
    file, memory = tmp_path / "weights", tmp_path / "hashes.json"
    file.write_text("first")
    before = hash_files({"w": file}, memory)
    memory.write_text("{")
    assert hash_files({"w": file}, memory) == before
