"Seeds, devices, atomic files (with a full disk simulated), recorded results"
import errno
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from synseg import core
from synseg.core import (atomic_path, default_device, fast_bf16, load_result, machine_info, record_result, results_dir,
                         seed_everything, write_json)


def draw():
    return random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()


def test_seed_everything_seeds_all_three_sources():
    seed_everything(5)
    first = draw()
    draw()
    seed_everything(5)
    assert draw() == first
    seed_everything(6)
    assert all(a != b for a, b in zip(draw(), first))


def test_seed_everything_returns_its_own_generator():
    generator = seed_everything(3)
    expected = torch.rand(4)
    torch.rand(100)  # the global state moves on, the generator's does not
    assert torch.equal(torch.rand(4, generator=generator), expected)


def test_seeds_beyond_32_bits():
    seed_everything(2**40 + 1)  # NumPy takes 32 bits only


def test_devices():
    assert default_device().type in ("cuda", "mps", "cpu")
    assert isinstance(fast_bf16(), bool)
    assert fast_bf16("cpu") == fast_bf16(torch.device("cpu"))
    assert fast_bf16("meta") is False


def test_a_scratch_folder_goes_with_its_process(tmp_path):
    "After an end, an exception or a folder that somebody else removed"
    for last in ("pass", "raise ValueError", "shutil.rmtree(folder)", "sys.exit(3)"):
        code = f"import shutil, sys\nfrom synseg.core import scratch_folder\nfolder, other = scratch_folder(), scratch_folder()\n" \
               f"assert folder != other and not any(folder.iterdir())\n(folder/'sub').mkdir()\n(folder/'sub/w').write_bytes(bytes(9))\n{last}"
        done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ, TMPDIR=str(tmp_path)), capture_output=True, text=True)
        assert ("ValueError" in done.stderr) == ("ValueError" in last) and "Error" not in done.stderr.replace("ValueError", ""), done.stderr
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("nbs/*.ipynb")), ids=lambda p: p.stem)
def test_no_chapter_leaves_files_behind(path):
    "A folder of mkdtemp stays: fifty chapters, a gigabyte a run"
    assert "mkdtemp" not in path.read_text(encoding="utf-8")


def test_atomic_path_writes_and_makes_folders(tmp_path):
    target = tmp_path / "a" / "b" / "file.bin"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent and temporary != target
        temporary.write_bytes(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError("x")])
def test_a_failure_while_writing_keeps_the_old_file(tmp_path, fault):
    target = tmp_path / "best.safetensors"
    target.write_bytes(b"old")
    with pytest.raises(type(fault)):
        with atomic_path(target) as temporary:
            temporary.write_bytes(b"half")
            raise fault
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_disk_that_is_really_full(tmp_path, monkeypatch):
    "The write itself fails, as on a full disk, inside torch.save"
    target = tmp_path / "state.pt"
    torch.save(dict(step=1), target)

    class FullDisk:
        def __init__(self, file):
            self.file, self.room = file, 100

        def write(self, data):
            self.room -= len(bytes(data))
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    with pytest.raises((OSError, RuntimeError)):
        with atomic_path(target) as temporary, open(temporary, "wb") as file:
            torch.save(dict(step=2, weights=torch.rand(1000)), FullDisk(file))
    assert torch.load(target, weights_only=True) == dict(step=1)
    assert list(tmp_path.iterdir()) == [target]


def test_a_failing_rename_leaves_nothing_behind(tmp_path, monkeypatch):
    target = tmp_path / "file.txt"
    target.write_text("old")

    def refuse(*_):
        raise PermissionError("the file is open elsewhere")

    monkeypatch.setattr(core.os, "replace", refuse)
    with pytest.raises(PermissionError):
        with atomic_path(target) as temporary:
            temporary.write_text("new")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_readers_never_see_half_a_file(tmp_path):
    target, seen, done = tmp_path / "numbers.json", set(), threading.Event()
    write_json(target, dict(values=[0] * 5000))

    def read():
        while not done.is_set():
            seen.add(len(set(json.loads(target.read_text())["values"])))

    reader = threading.Thread(target=read)
    reader.start()
    for value in range(60):
        write_json(target, dict(values=[value] * 5000))
    done.set()
    reader.join()
    assert seen == {1}


def test_write_json_round_trip(tmp_path):
    content = dict(name="é", values=[1, 2.5, None], nested=dict(a=True))
    assert json.loads(write_json(tmp_path / "x.json", content).read_text(encoding="utf-8")) == content


def test_records(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    path = record_result("run", dict(lr=0.1), dict(mean_iou=0.5), seed=3, folder=tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    assert results_dir() == tmp_path / "results"
    record = load_result("run")
    assert record == json.loads(path.read_text())
    assert (record["metrics"], record["config"], record["seed"]) == (dict(mean_iou=0.5), dict(lr=0.1), 3)
    assert set(machine_info()) <= set(record["machine"])
    assert load_result("another") is None


def test_results_are_found_from_a_folder_below(tmp_path, monkeypatch):
    record_result("run", {}, {}, folder=tmp_path / "results")
    (tmp_path / "nbs" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "nbs" / "deep")
    assert results_dir() == tmp_path / "results"
