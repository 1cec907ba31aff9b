"Tar files as a data set: lossless, each pair once whoever reads, repeatable, and nothing believed that is not checked"
import io
import json
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import same_state, two_processes
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from test_scaling import ROOT, SaveAt, close

from synseg.datasets import load_dataset
from synseg.engine import weighted_loss
from synseg.labels import LabelSpace
from synseg.scenes import Scenes
from synseg.schedules import EpochSampler
from synseg.shards import Batches, Shards, read_shard, shuffled, write_shards
from synseg.train import Learner

SPACE = LabelSpace(("dark", "bright"), ((0, 0, 0), (255, 255, 255)))


class Numbered(Dataset):
    "Image i has the value i everywhere, so that a reader can tell which it got; names need cleaning"
    label_space = SPACE

    def __init__(self, n):
        self.n, self.names = n, [f"Köln/straße {i}.jpg" for i in range(n)]

    def __len__(self):
        return self.n

    def raw(self, i):
        label = np.full((6, 8), 255 if i % 5 == 0 else i % 2, np.uint8)
        return np.full((6, 8, 3), i, np.uint8), label

    def __getitem__(self, i):
        image, label = self.raw(i)
        return torch.from_numpy(image).permute(2, 0, 1)/255, torch.from_numpy(label).long()


def numbers(items):
    return [round(float(image[0, 0, 0])*255) for image, _ in items]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(Numbered(23), folder, per_shard=5)
    return folder


def test_nothing_is_lost(tmp_path):
    scenes = Scenes(5, (40, 57), "camera", seed=3)
    write_shards(scenes, tmp_path, per_shard=2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["000000.tar", "000001.tar", "000002.tar", "shards.json"]
    for (image, label), (want, truth) in zip(Shards(tmp_path, shuffle=0), scenes, strict=True):
        assert torch.equal(image, want) and torch.equal(label, truth) and image.dtype == want.dtype and label.dtype == truth.dtype
    read = Shards(tmp_path)
    assert len(read) == 5 and read.label_space == scenes.label_space and "5 images in 3 shards" in repr(read)
    counts = torch.stack([torch.bincount(y.ravel(), minlength=256)[:scenes.label_space.num_classes] for _, y in scenes]).sum(0)
    assert torch.equal(read.class_pixels, counts)
    torch.testing.assert_close(weighted_loss(read, len(counts)).weight, weighted_loss(scenes, len(counts)).weight)


def test_the_same_pictures_make_the_same_bytes(tmp_path):
    for name in "ab":
        write_shards(Numbered(4), tmp_path/name)
    assert (tmp_path/"a"/"000000.tar").read_bytes() == (tmp_path/"b"/"000000.tar").read_bytes()


def test_jpeg_files_stay_as_they_are(tmp_path):
    (tmp_path/"images").mkdir()
    (tmp_path/"labels").mkdir()
    for i, mode in enumerate(["RGB", "L"]):
        noise = np.random.default_rng(i).integers(0, 255, (9, 7, 3) if mode == "RGB" else (9, 7), np.uint8)
        Image.fromarray(noise).save(tmp_path/"images"/f"{i}.jpg")
        Image.fromarray(np.full((9, 7), i, np.uint8)).save(tmp_path/"labels"/f"{i}.png")
    from synseg.datasets import SegmentationFiles
    from synseg.layouts import Sample
    files = SegmentationFiles("two", [Sample(str(i), tmp_path/"images"/f"{i}.jpg", tmp_path/"labels"/f"{i}.png", 0) for i in range(2)], SPACE)
    write_shards(Subset(files, [1, 0]), tmp_path/"shards")
    pairs = list(read_shard(Shards(tmp_path/"shards").shards[0]))
    assert [p.image for p in pairs] == [(tmp_path/"images"/f"{i}.jpg").read_bytes() for i in (1, 0)]
    assert all(torch.equal(a, b) for got, i in zip(Shards(tmp_path/"shards", shuffle=0), (1, 0)) for a, b in zip(got, files[i]))
    write_shards(Scenes(2, (64, 96)), tmp_path/"lossy", quality=80)
    image, label = next(iter(Shards(tmp_path/"lossy", shuffle=0)))
    want, truth = Scenes(2, (64, 96))[0]
    assert torch.equal(label, truth) and 0 < (image - want).abs().mean() < 0.05


def test_camvid_survives(data_root, tmp_path):
    files = load_dataset("camvid", data_root("camvid"), "val")
    write_shards(Subset(files, range(2)), tmp_path)
    for got, i in zip(Shards(tmp_path, shuffle=0), range(2)):
        assert all(torch.equal(a, b) for a, b in zip(got, files[i]))


# --- who reads what ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_each_pair_once_an_epoch(written, monkeypatch, world, workers):
    epochs = []
    for epoch in range(2):
        seen = []
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world))
            read = Shards(written, shuffle=6)
            read.set_epoch(epoch)
            seen.append(numbers(DataLoader(read, None, num_workers=workers)))
        assert sorted(sum(seen, [])) == list(range(23))
        assert max(map(len, seen)) - min(map(len, seen)) <= 1
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def test_order_is_that_of_seed_and_epoch(written):
    def order(seed, epoch, **how):
        read = Shards(written, seed=seed, shuffle=how.get("shuffle", 4))
        read.set_epoch(epoch)
        return numbers(read)
    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(s, e)) for s in range(3) for e in range(3)}) == 9
    assert order(3, 7, shuffle=0) == list(range(23))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 12), st.integers(0, 9))
def test_a_buffer_loses_nothing_and_delays_little(n, size, seed):
    out = list(shuffled(range(n), size, np.random.default_rng(seed)))
    assert sorted(out) == list(range(n))
    assert all(item <= place + size for place, item in enumerate(out))  # nothing comes out before it was read


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 3), st.integers(0, 30), st.integers(0, 5))
def test_batches_are_disjoint_equally_many_and_skipped_exactly(written, size, world, workers, epoch, start):
    "The workers of a DataLoader, played by hand: asked in turn, those that have nothing left passed over"
    from synseg import shards as module
    read, before = Shards(written, shuffle=4, seed=1), module._worker

    def sequence(rank, skipped):
        part = Batches(read, size, rank, world)
        part.set_epoch(epoch)
        part.skip(skipped*part.batch_size*world)
        iterators = []
        for worker in range(max(1, workers)):
            module._worker = lambda worker=worker: (worker, max(1, workers))
            iterators.append(iter([numbers(zip(*b)) for b in part]))
        found = []
        while iterators:
            for it in list(iterators):
                batch = next(it, None)
                if batch is None:
                    iterators.remove(it)
                else:
                    found.append(batch)
        return found, len(part)
    try:
        whole = [sequence(rank, 0) for rank in range(world)]
        start = min(start, whole[0][1])
        rest = [sequence(rank, start) for rank in range(world)]
    finally:
        module._worker = before
    assert all(len(found) == length == whole[0][1] for found, length in whole)
    flat = [i for found, _ in whole for batch in found for i in batch]
    assert len(set(flat)) == len(flat) > 23 - size*world
    assert [found for found, _ in rest] == [found[start:] for found, _ in whole]


def test_several_places_and_numbers_run_on(written, tmp_path):
    write_shards(Numbered(4), tmp_path/"more")
    read = Shards([written, tmp_path/"more"], shuffle=0)
    assert numbers(read) == [*range(23), *range(4)]
    assert [p.number for p in read.encoded(20, 27)] == list(range(20, 27))
    write_shards(Scenes(1, (64, 64)), tmp_path/"other")
    with pytest.raises(ValueError, match="other classes"):
        Shards([written, tmp_path/"other"])


def test_chance_is_that_of_seed_epoch_and_number(written):
    noisy = lambda image, label: (image.float()/255 + torch.rand(()), label.long())
    read = [Shards(written, noisy, shuffle=size, seed=2) for size in (0, 3)]
    found = [{int(x[0, 0, 0]*0 + p.number): float(x[0, 0, 0]) for p in r.encoded(0, 23) for x in [r.decoded(p)[0]]} for r in read]
    assert found[0] == found[1] and len(set(found[0].values())) == 23
    before = torch.get_rng_state()
    next(iter(read[0]))
    assert torch.equal(before, torch.get_rng_state())


# --- from elsewhere ------------------------------------------------------------------------------------------------

def test_over_the_network(written):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(written)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        read = Shards(f"http://127.0.0.1:{server.server_port}/", shuffle=3)
        assert sorted(numbers(read)) == list(range(23))
        assert [p.number for p in read.encoded(7, 18)] and len(list(read.encoded(7, 18))) == 11
        with pytest.raises(FileNotFoundError, match="nowhere/shards.json"):
            Shards(f"http://127.0.0.1:{server.server_port}/nowhere")
    finally:
        server.shutdown()
        server.server_close()


def test_webdataset_reads_them_and_opens_what_we_do_not(written):
    wds = pytest.importorskip("webdataset")
    urls = [s.url for s in Shards(written).shards]
    found = list(wds.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [int(s["image.png"][0, 0, 0]) for s in found] == list(range(23))
    assert found[7]["__key__"].endswith("00000007-K_ln_stra_e_7_jpg") and found[3]["label.png"].shape[:2] == (6, 8)
    shard = Shards(written).shards[1]
    piped = list(read_shard(shard._replace(url=f"pipe:cat {shard.url}")))
    assert [p.image for p in piped] == [p.image for p in read_shard(shard)]


# --- what is refused -----------------------------------------------------------------------------------------------

def tar_of(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, data, *kind in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if kind:
                info.type, info.linkname, info.size = kind[0], "/etc/passwd", 0
            tar.addfile(info, io.BytesIO(data))


def picture(mode="RGB", size=(8, 6), value=1):
    file = io.BytesIO()
    Image.new(mode, size, value if mode != "RGB" else (value,)*3).save(file, "PNG")
    return file.getvalue()


GOOD = [("00000000.image.png", picture()), ("00000000.label.png", picture("L"))]


@pytest.mark.parametrize("members, message", [
    ([("../../evil.image.png", picture())], r"000000.tar: member '../../evil.image.png' is not named"),
    ([("/etc/evil", b"x")], "member '/etc/evil' is not named"),
    ([("00000000.image.png", b"", tarfile.SYMTYPE)], "no plain file"),
    ([GOOD[1]], "'00000000.label.png' is out of place"),
    ([GOOD[0], GOOD[0]], "'00000000.image.png' is out of place"),
    ([GOOD[0], ("00000001.label.png", picture("L"))], "'00000001.label.png' is out of place"),
    ([*GOOD, ("00000001.image.png", picture())], "out of place; expected 1 pairs"),
    ([GOOD[0]], "cut short: 0 pairs, and the index says 1"),
    ([("00000000.image.png", b"no picture"), GOOD[1]], "000000.tar, 00000000.image cannot be read as an image"),
    ([("00000000.image.png", picture()[:40]), GOOD[1]], "00000000.image cannot be read"),
    ([GOOD[0], ("00000000.label.png", picture())], "00000000.label.png cannot be read.*mode is RGB"),
    ([GOOD[0], ("00000000.label.png", picture("L", (8, 7)))], r"label.png is \(7, 8\), its image \(6, 8\)"),
    ([GOOD[0], ("00000000.label.png", picture("L", value=7))], "000000.tar, 00000000.label.png: label value 7"),
])
def test_bad_members_are_refused_by_name(tmp_path, members, message):
    write_shards(Numbered(1), tmp_path/"set")
    tar_of(tmp_path/"set"/"000000.tar", *members)
    with pytest.raises(ValueError, match=message):
        list(Shards(tmp_path/"set"))
    assert [f.name for f in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("keep", [0, 100, 700, 3000, 0.5, 0.95])
def test_cut_files_are_refused(tmp_path, keep):
    write_shards(Numbered(4), tmp_path)
    data = (tmp_path/"000000.tar").read_bytes()
    end = data.rindex(b"label.png") if keep == 0.95 else len(data)  # in the last pair: what follows is padding
    (tmp_path/"000000.tar").write_bytes(data[:keep if keep >= 1 or keep == 0 else int(end*(keep if keep < 0.9 else 1))])
    with pytest.raises(ValueError, match="000000.tar.*(cut short|damaged)"):
        list(Shards(tmp_path))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=40))
def test_damage_anywhere_is_a_sentence_or_harmless(tmp_path_factory, place, junk):
    folder = tmp_path_factory.mktemp("fuzz")
    write_shards(Numbered(3), folder)
    data = bytearray((folder/"000000.tar").read_bytes())
    place %= len(data)
    data[place:place + len(junk)] = junk
    (folder/"000000.tar").write_bytes(data)
    try:
        assert len(list(Shards(folder))) == 3
    except ValueError as error:
        assert "000000.tar" in str(error)


@pytest.mark.parametrize("change, message", [
    (dict(format=9), "its format is 9"), (dict(shards=[]), "no index of shards"), (dict(shards=[["../x.tar", 1, 1]]), "it names .*x.tar"),
    (dict(shards=[["pipe:rm.tar", 1, 1]]), "it names"), (dict(shards=[["a.tar", 0, 1]]), "empty shard"), (dict(label_space={}), "no index")])
def test_a_strange_index_is_refused(tmp_path, change, message):
    path = write_shards(Numbered(1), tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        Shards(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        Shards(tmp_path)


def test_writing_is_checked_and_whole(tmp_path):
    class Broken(Numbered):
        def raw(self, i):
            if i == 7:
                raise OSError("the disk is gone")
            return super().raw(i)
    with pytest.raises(OSError):
        write_shards(Broken(9), tmp_path, per_shard=3)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["000000.tar", "000001.tar"]
    with pytest.raises(FileNotFoundError, match="was the writing finished"):
        Shards(tmp_path)
    write_shards(Numbered(9), tmp_path, per_shard=3)
    assert len(list(Shards(tmp_path))) == 9
    with pytest.raises(ValueError, match="holds shards already"):
        write_shards(Numbered(9), tmp_path)
    with pytest.raises(ValueError, match="empty or has no label_space"):
        write_shards(Numbered(0), tmp_path/"none")
    with pytest.raises(ValueError, match="per_shard is 0"):
        write_shards(Numbered(1), tmp_path/"none", per_shard=0)
    with pytest.raises(ValueError, match="no place"):
        Shards([])
    with pytest.raises(ValueError, match="shuffle is -1"):
        Shards(tmp_path, shuffle=-1)

    class Fine(Numbered):
        def raw(self, i):
            return np.full((6, 8, 3), 0.1234), super().raw(i)[1]
    with pytest.raises(ValueError, match=r"image 0 \(Köln.*no multiples of 1/255"):
        write_shards(Fine(1), tmp_path/"none")

    class Wrong(Numbered):
        def raw(self, i):
            return super().raw(i)[0], np.full((6, 8), 9, np.uint8)
    with pytest.raises(ValueError, match=r"image 0 \(Köln.*label value 9"):
        write_shards(Wrong(1), tmp_path/"none")


# --- training from them --------------------------------------------------------------------------------------------

def learner(folder, batch_size, **more):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(4, 2, 1))
    model.num_classes = 2
    noisy = lambda image, label: ((image.float()/255 + 0.1*torch.rand(())).clamp(0, 1), label.long())
    return Learner(model, Shards(folder, noisy, shuffle=4), Numbered(3), batch_size=batch_size, progress=False, ema=0.9, **more)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_learner_trains_from_shards_and_resumes(written, tmp_path, workers):
    run = learner(written, 4, workers=workers, out=tmp_path/"run", callbacks=[SaveAt(5, tmp_path/"end"), SaveAt(8, tmp_path/"middle")]).fit(3)
    assert run.progress.step == 15 and run.progress.images == 60 and run.history[-1]["mean_iou"] > 0
    for name in ("end", "middle"):
        again = learner(written, 4, workers=workers).resume(tmp_path/name).fit(3)
        assert all(torch.equal(a, b) for a, b in zip(run.model.state_dict().values(), again.model.state_dict().values()))
        assert same_state([{k: v for k, v in r.items() if k != "mean_iou"} for r in run.history],
                          [{k: v for k, v in r.items() if k != "mean_iou"} for r in again.history])
    with pytest.raises(ValueError, match="shuffle was 4 and is 9"):
        other = Shards(written, shuffle=9)
        Learner(run.model, other, batch_size=4, ema=0.9, progress=False).resume(tmp_path/"middle")


def test_what_a_stream_cannot_do_is_said(written, tmp_path):
    learner(written, 4, workers=0, callbacks=[SaveAt(3, tmp_path)]).fit(1)
    with pytest.raises(ValueError, match=r"middle of an epoch, of which \[processes, workers\] \[1, 0\]"):
        learner(written, 4, workers=2).resume(tmp_path)
    with pytest.raises(ValueError, match="orders itself"):
        learner(written, 4, sampler=EpochSampler(23))
    assert len(learner(written, 50).loader) == 1  # fewer images than one batch: one smaller batch


TWO = """
import sys
sys.path.insert(0, {tests!r})
from test_shards import *
from synseg.shards import process
run = learner({folder!r}, 2, out={out!r}, workers=1).fit(2)
weights = run.engine.gather(run.model[0].weight.detach())
assert run.engine.world == 2 and torch.equal(*weights) and process()[1] == 2
assert run.progress.step == 2*(23//4) and run.progress.images == 2*20
sys.stdout.write("[fine]")
run.engine.accelerator.wait_for_everyone()
run.engine.accelerator.end_training()
"""


def test_two_processes_train_from_shards(written, tmp_path):
    text = TWO.format(tests=str(ROOT/"tests"), folder=str(written), out=str(tmp_path/"run"))
    assert two_processes(tmp_path/"two.py", text).count("fine") == 2
    run = learner(written, 4).resume(tmp_path/"run")  # at the end of an epoch by another number
    assert run.fit(3).progress.images == 60
    close(tmp_path/"run", learner(written, 4).resume(tmp_path/"run").model)
