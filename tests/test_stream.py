"Large images in bands, frames in order, threads that end, and a counter with a clock of its own"
import sys
import threading
import time
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from synseg.inference import as_image, predict
from synseg.stopwatch import peak_memory
from synseg.stream import (FrameRate, Frame, Smoother, ahead, flicker, frames_of, moving, natural, predict_large, seamless, stream)
from synseg.zoo import create_model


def network(name="unet_small", classes=5, **options):
    torch.manual_seed(0)
    return create_model(name, classes, **{"width": 4, **options}).eval()


def threads():
    return [t for t in threading.enumerate() if t.name == "synseg-ahead"]


def quiet():
    "True once all reader threads have ended"
    for _ in range(200):
        if not threads(): return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("name,halo", [("unet_small", 64), ("segnet", 192), ("hrnet_w18", 192), ("deeplabv1", 224)])
def test_a_seamless_halo_is_one(name, halo, tmp_path):
    thin = dict(modules=[1, 1, 1], blocks=1, first=[1, 4], stem=8) if name.startswith("hrnet") else {}
    model = network(name, **thin)
    assert seamless(model) == halo
    image = np.random.default_rng(0).integers(0, 256, (71, 2 * halo + 101, 3), dtype=np.uint8)
    got = np.load(predict_large(model, image, tmp_path / "a.npy", tile=96))
    assert got.dtype == np.uint8 and (got == predict(model, image).numpy()).mean() > 0.9999


@pytest.mark.parametrize("name", ["pspnet", "deeplabv3"])
def test_global_pooling_is_said(name, tmp_path):
    model = network(name)
    assert seamless(model, limit=256) is None
    with pytest.warns(UserWarning, match="without seams"):
        predict_large(model, np.zeros((64, 130, 3), np.uint8), tmp_path / "a.npy", tile=64)


@pytest.mark.parametrize("shape", [(130, 203, 3), (97, 150)])
def test_files_in_bands(shape, tmp_path):
    model, image = network(), np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "in.npy", image)
    Image.fromarray(image).save(tmp_path / "in.png")
    want = predict(model, image).numpy()
    for source in ("in.npy", "in.png"):
        for out in ("out.npy", "out.png"):
            path = predict_large(model, tmp_path / source, tmp_path / out, tile=64)
            got = np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path))
            assert got.shape == shape[:2] and (got == want).mean() > 0.9999
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.npy", "in.png", "out.npy", "out.png"]


def test_what_cannot_be_labelled(tmp_path):
    model, image = network(), np.zeros((70, 70, 3), np.uint8)
    for source, out, how, says in [(image, "a.tif", {}, "npy or .png"), (image, "a.npy", dict(tile=0), "at least 1"), (image, "a.npy", dict(halo=-1), "at least 0"),
                                   ([1], "a.npy", {}, "expected a path"), (image[:0], "a.npy", {}, "shape"), (image[None], "a.npy", {}, "shape")]:
        with pytest.raises(ValueError, match=says): predict_large(model, source, tmp_path / out, **how)
    for name, error in [("gone.npy", FileNotFoundError), ("gone.png", FileNotFoundError)]:
        with pytest.raises(error): predict_large(model, tmp_path / name, tmp_path / "a.npy")
    (tmp_path / "text.npy").write_text("not an array")
    with pytest.raises(ValueError): predict_large(model, tmp_path / "text.npy", tmp_path / "a.npy")


def test_a_failure_keeps_the_old_file(tmp_path):
    (tmp_path / "a.npy").write_text("old")
    bad = np.full((200, 70, 3), 0.5, np.float32)
    bad[190] = 7
    with pytest.raises(ValueError, match="divide by 255"): predict_large(network(), bad, tmp_path / "a.npy", tile=64, halo=0)
    assert (tmp_path / "a.npy").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def label_file(source, out):
    "For `peak_memory`: a call that labels a file, with everything else warmed up before"
    torch.set_num_threads(1)
    model = network()
    predict_large(model, np.zeros((384, 384, 3), np.uint8), out, 128)
    return lambda: predict_large(model, source, out, 128)


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_memory_is_that_of_a_window(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(__import__("pathlib").Path(__file__).parent))
    monkeypatch.setenv("PYTHONPATH", f"{__import__('pathlib').Path(__file__).parent}:{__import__('os').environ.get('PYTHONPATH', '')}")
    label_file.__module__ = "test_stream"
    took = []
    for rows in (640, 4096):  # both have windows with a halo on all sides
        array = np.lib.format.open_memmap(tmp_path / f"{rows}.npy", "w+", np.uint8, (rows, 512, 3))
        array[:] = np.random.default_rng(0).integers(0, 256, (1, 512, 3))
        del array
        found = peak_memory(label_file, str(tmp_path / f"{rows}.npy"), str(tmp_path / "out.png"))
        took.append(found["peak"] - found["before"])
    floats = 4096 * 512 * 3 * 4
    assert took[1] < took[0] + floats / 2, took


def test_ahead_keeps_order_and_bounds():
    made = []

    def source():
        for i in range(30):
            made.append(i)
            yield i
    items = ahead(source(), 3)
    assert next(items) == 0
    time.sleep(0.1)
    assert len(made) <= 3 + 2
    assert list(items) == list(range(1, 30)) and quiet()


def test_ahead_raises_in_turn_and_closes():
    closed = []

    def source(last):
        try:
            yield from range(3)
            if last: raise KeyError("broken film")
            while True: yield 0
        finally: closed.append(threading.current_thread().name)
    items = ahead(source(True), 8)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="broken film"): next(items)
    items = ahead(source(False), 2)
    next(items)
    items.close()
    assert closed == ["synseg-ahead"] * 2 and quiet()
    never = ahead(source(False), 2)
    never.close()
    assert len(closed) == 2 and quiet()


@pytest.mark.parametrize("batch,depth", [(1, 1), (3, 2), (4, 8), (50, 1)])
def test_stream_is_predict(batch, depth):
    model = network()
    frames = [torch.rand(3, 64 + 16 * (i // 3), 80) for i in range(7)]
    got = list(stream(model, iter(frames), batch, depth=depth))
    assert [f.number for f in got] == list(range(7)) and quiet()
    for frame, image in zip(got, frames):
        torch.testing.assert_close(frame.image, image)
        assert frame.labels.shape == image.shape[-2:] and (frame.labels == predict(model, image)).double().mean() > 0.999
    small = list(stream(model, frames, 2, size=64))
    assert all((f.labels == predict(model, f.image, size=64)).double().mean() > 0.995 for f in small)


def test_stream_ends_with_its_caller():
    model, seen = network().train(), []

    def film():
        try:
            while True: yield np.zeros((64, 64, 3), np.uint8)
        finally: seen.append("closed")
    frames = stream(model, film(), 2)
    assert next(frames).number == 0
    frames.close()
    assert seen == ["closed"] and quiet() and model.training and not torch.is_inference_mode_enabled()
    with pytest.raises(ValueError, match="divide by 255"):
        for n, frame in enumerate(stream(model.eval(), [torch.zeros(3, 64, 64), torch.full((3, 64, 64), 9.)])): assert n == 0
    with pytest.raises(RuntimeError, match="channels"): list(stream(nn.Sequential(nn.Conv2d(5, 2, 1)), [torch.zeros(3, 64, 64)]))
    assert quiet()


@pytest.mark.parametrize("how", [dict(batch=0), dict(depth=0), dict(alpha=0), dict(alpha=1.5)])
def test_stream_refuses_at_once(how):
    with pytest.raises(ValueError): stream(network(), [], **how)
    assert list(stream(network(), [])) == []


def test_folders_and_films(tmp_path, monkeypatch):
    for i in (1, 2, 10): Image.fromarray(np.full((70, 80, 3), i, np.uint8)).save(tmp_path / f"a{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_text("")
    assert [f.name for f in frames_of(tmp_path)] == ["a1", "a2", "a10"] and moving(tmp_path)
    assert [f.name for f in stream(network(), tmp_path)] == ["a1", "a2", "a10"]
    Image.fromarray(np.zeros((70, 80, 3), np.uint8)).save(tmp_path / "a1.jpg")
    assert [f.name for f in frames_of(tmp_path)] == ["a1.jpg", "a1.png", "a2.png", "a10.png"]
    pages = [Image.fromarray(np.full((70, 80, 3), v, np.uint8)) for v in (0, 100, 200)]
    pages[0].save(tmp_path / "film.gif", save_all=True, append_images=pages[1:], duration=40)
    film = list(frames_of(tmp_path / "film.gif"))
    assert [f.name for f in film] == ["film_000000", "film_000001", "film_000002"] and moving(tmp_path / "film.gif")
    assert [round(255 * float(as_image(f.image).mean())) for f in film] == [0, 100, 200]
    for path, error, says in [(tmp_path / "gone", FileNotFoundError, "no folder"), (tmp_path / "notes.txt", ValueError, "cannot be read")]:
        with pytest.raises(error, match=says): list(frames_of(path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no photographs"): frames_of(tmp_path / "empty")
    assert not moving(tmp_path / "a1.png") and sorted(["b10", "b9", "B1"], key=natural) == ["B1", "b9", "b10"]


def test_films_need_a_decoder(tmp_path, monkeypatch):
    (tmp_path / "film.mp4").write_text("")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match="pip install av"): next(stream(network(), tmp_path / "film.mp4"))
    picture = types.SimpleNamespace(to_ndarray=lambda format: np.zeros((64, 72, 3), np.uint8))

    class Container:
        def __enter__(self): return self
        def __exit__(self, *error): pass
        def decode(self, video): return iter([picture] * 3)
    monkeypatch.setitem(sys.modules, "av", types.SimpleNamespace(open=lambda path: Container()))
    assert [f.name for f in stream(network(), tmp_path / "film.mp4")] == [f"film_{i:06d}" for i in range(3)]


def test_frame_rate_by_hand():
    now = [0.0]
    rate = FrameRate(warmup=1, clock=lambda: now[0])
    for stage, first, count, start, stop in [("read", 0, 1, 0, 1), ("read", 1, 1, 1, 2), ("run", 0, 2, 2, 12), ("read", 2, 1, 2, 3), ("read", 3, 1, 3, 4),
                                             ("run", 2, 2, 12, 14), ("write", 2, 1, 14, 15), ("write", 3, 1, 15, 16)]:
        now[0] = float(stop)
        rate.add(stage, first, count, float(start))
    assert rate.summary() == dict(warmup=2, frames=2, seconds=4.0, rate=0.5, read=1.0, run=1.0, write=1.0)
    assert "0.5 frames/s over 2 frames, after 2 to warm up" in str(rate)
    assert "too few" in str(FrameRate()) and FrameRate().summary()["frames"] == 0


def test_frame_rate_of_a_stream():
    rate = FrameRate(warmup=2)
    list(stream(network(), [torch.rand(3, 64, 64)] * 9, 4, rate=rate))
    s = rate.summary()
    assert s["warmup"] == 4 and s["frames"] == 5 and s["seconds"] > 0 and min(s["read"], s["run"], s["write"]) > 0
    assert {span[0]: sum(p[2] for p in rate.spans if p[0] == span[0]) for span in rate.spans} == dict(read=9, run=9, write=9)


def test_smoothing_and_flicker():
    a, b = torch.rand(2, 3, 4, 5).softmax(1)
    smooth = Smoother(0.25)
    torch.testing.assert_close(smooth(a), a)
    torch.testing.assert_close(smooth(b), 0.25 * b + 0.75 * a)
    torch.testing.assert_close(smooth(torch.ones(3, 2, 2)), torch.ones(3, 2, 2))
    plain = Smoother(1.0)
    plain(a)
    torch.testing.assert_close(plain(b), b)
    labels = torch.tensor([[[0, 1, 2, 3]], [[0, 2, 2, 0]]])
    truth = torch.tensor([[[0, 1, 2, 3]], [[0, 1, 1, 255]]])
    assert flicker(labels) == 0.5 and flicker(labels, truth) == 0.5 and np.isnan(flicker(labels[:1]))
    frames = [torch.rand(3, 64, 64) for _ in range(5)]
    model = network()
    one, half = (torch.stack([f.labels for f in stream(model, frames, 2, alpha=alpha)]) for alpha in (1.0, 0.2))
    assert flicker(half) < flicker(one)


def test_named_frames_and_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frames = [Frame("left", torch.rand(3, 64, 64)), torch.rand(3, 64, 64)]
        assert [f.name for f in stream(network(), frames)] == ["left", "000001"]
