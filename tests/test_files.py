"Pictures and archives as they are met in the wild"
import hashlib
import http.server
import io
import tarfile
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from synseg.files import Archive, fetch, read_image, read_label, unpack

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (7, 9, 3), np.uint8)


def save(array, path):
    Image.fromarray(array).save(path)
    return path


def test_colour_grey_alpha_and_palette_images(tmp_path):
    assert np.array_equal(read_image(save(RGB, tmp_path / "rgb.png")), RGB)
    grey = read_image(save(RGB[..., 0], tmp_path / "grey.png"))
    assert grey.shape == (7, 9, 3) and (grey == RGB[..., :1]).all()
    rgba = np.dstack([RGB, RNG.integers(0, 256, (7, 9), np.uint8)])
    assert np.array_equal(read_image(save(rgba, tmp_path / "rgba.png")), RGB)  # dropped, not blended
    palette = Image.fromarray(RGB[..., 0] % 3)
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(read_image(tmp_path / "palette.png"), np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]])[RGB[..., 0] % 3])


def test_sixteen_bit_image_keeps_its_upper_byte(tmp_path):
    deep = RNG.integers(0, 65536, (7, 9), np.uint16)
    assert np.array_equal(read_image(save(deep, tmp_path / "deep.png"))[..., 1], deep >> 8)


def test_palette_label_is_read_as_indices(tmp_path):
    ids = RNG.integers(0, 21, (7, 9), np.uint8)
    file = Image.fromarray(ids)
    file.putpalette(RNG.integers(0, 256, 768, np.uint8).tobytes())
    assert file.mode == "P"
    file.save(tmp_path / "p.png")
    assert np.array_equal(read_label(tmp_path / "p.png"), ids)


def test_label_modes(tmp_path):
    wide = RNG.integers(0, 40000, (7, 9), np.uint16)
    assert np.array_equal(read_label(save(wide, tmp_path / "wide.png")), wide)
    bits = RGB[..., 0] > 99
    found = read_label(save(bits, tmp_path / "bits.png"))
    assert found.dtype == np.uint8 and np.array_equal(found, bits)
    assert read_label(save(RGB, tmp_path / "rgb.png")).shape == (7, 9, 3)
    with pytest.raises(ValueError, match="JPEG"): read_label(save(RGB[..., 0], tmp_path / "l.jpg"))
    with pytest.raises(ValueError, match="mode is F"): read_label(save(RGB[..., 0].astype(np.float32), tmp_path / "f.tif"))
    with pytest.raises(ValueError, match="floating"): read_image(tmp_path / "f.tif")


def test_pages_of_a_tiff(tmp_path):
    pages = [Image.fromarray(np.full((4, 5), n, np.uint8)) for n in range(3)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    assert [int(read_label(tmp_path / "stack.tif", n).max()) for n in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="stack.tif"): read_label(tmp_path / "stack.tif", 3)


def test_damaged_files_are_named(tmp_path):
    whole = save(RNG.integers(0, 256, (64, 64, 3), np.uint8), tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise.png").write_bytes(RNG.bytes(500))
    (tmp_path / "flipped.png").write_bytes(whole[:200] + bytes(255 - b for b in whole[200:260]) + whole[260:])
    (tmp_path / "page.png").write_text("<html>404 not found</html>")
    # a PNG header that claims a width of zero
    (tmp_path / "zero.png").write_bytes(whole[:16] + b"\0\0\0\0" + whole[20:])
    for name in ("cut", "noise", "flipped", "page", "zero"):
        for read in (read_image, read_label):
            with pytest.raises(ValueError, match=f"{name}.png cannot be read"): read(tmp_path / f"{name}.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ValueError, match="0 bytes"): read_image(tmp_path / "empty.png")
    with pytest.raises(FileNotFoundError, match="does not exist"): read_image(tmp_path / "none.png")


def tar_of(path, members, mode="w"):
    with tarfile.open(path, mode) as file:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = b"" if isinstance(content, tarfile.TarInfo) else content
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_honest_archives(tmp_path):
    files = {"a/b.txt": b"one", "c.txt": b"two"}
    tar_of(tmp_path / "t.tgz", files, "w:gz")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as file:
        for name, content in files.items(): file.writestr(name, content)
    for archive, out in (("t.tgz", "out1"), ("z.zip", "out2")):
        assert unpack(tmp_path / archive, tmp_path / out) == ["a/b.txt", "c.txt"]
        assert (tmp_path / out / "a/b.txt").read_bytes() == b"one"


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/tmp/synseg-evil.txt"])
def test_members_outside_are_refused_and_nothing_is_written(tmp_path, name):
    tar_of(tmp_path / "t.tar", {"good.txt": b"x", name: b"evil"})
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as file:
        file.writestr("good.txt", "x")
        file.writestr(name, "evil")
    for archive in ("t.tar", "z.zip"):
        with pytest.raises(ValueError, match="outside"): unpack(tmp_path / archive, tmp_path / "deep/out")
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"t.tar", "z.zip"}


def test_links_and_devices_are_left_out(tmp_path):
    tar_of(tmp_path / "t.tar", {"out": link("out", "../.."), "out/evil.txt": b"evil", "hard": link("hard", "good", tarfile.LNKTYPE),
                                "pipe": link("pipe", "", tarfile.FIFOTYPE), "good": b"x"})
    assert unpack(tmp_path / "t.tar", tmp_path / "box") == ["good", "out/evil.txt"]
    assert not (tmp_path / "box/out").is_symlink() and (tmp_path / "box/out/evil.txt").is_file()
    assert not any(p.name == "evil.txt" and tmp_path / "box" not in p.parents for p in tmp_path.rglob("*"))
    assert not (tmp_path / "box/hard").exists() and not (tmp_path / "box/pipe").exists()


def test_cut_archives_and_full_disks(tmp_path, monkeypatch):
    whole = tar_of(tmp_path / "t.tgz", {"a": RNG.bytes(50000)}, "w:gz").read_bytes()
    for name, content in (("cut.tgz", whole[:20000]), ("noise.tar", RNG.bytes(3000)), ("page.zip", b"<html>")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is not a whole"): unpack(tmp_path / name, tmp_path / "out")
    import shutil
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10, 10, 5))
    with pytest.raises(OSError, match="GB are free"): unpack(tmp_path / "t.tgz", tmp_path / "out")
    with pytest.raises(OSError, match="GB free"): fetch(Archive("x", "0" * 64, 10, ()), tmp_path)


@pytest.fixture
def server(tmp_path):
    "A web server on the loopback that offers the files of a folder"
    folder = tmp_path / "www"
    folder.mkdir()
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args): super().__init__(*args, directory=str(folder))
        def log_message(self, *args): pass
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{http_server.server_port}"
    http_server.shutdown()


def test_fetch_tries_mirrors_and_checks_the_hash(tmp_path, server):
    folder, url = server
    (folder / "good.tar").write_bytes(b"the real file")
    (folder / "bad.tar").write_bytes(b"something else")
    digest = hashlib.sha256(b"the real file").hexdigest()
    archive = Archive("data.tar", digest, 13, (f"{url}/none.tar", f"{url}/bad.tar", f"{url}/good.tar"))
    path = fetch(archive, tmp_path / "root", progress=False)
    assert path.read_bytes() == b"the real file" and path.name == "data.tar"
    (folder / "good.tar").unlink()
    assert fetch(archive, tmp_path / "root", progress=False) == path  # already there: no network needed
    with pytest.raises(FileNotFoundError, match=f"put it at .*data.tar .SHA-256 {digest}") as error:
        fetch(archive, tmp_path / "other", progress=False)
    assert "404" in str(error.value) and not list((tmp_path / "other").glob("data.tar"))


def test_a_whole_file_of_the_wrong_kind_is_not_called_damaged(tmp_path):
    save(RGB, tmp_path / "label.jpg")
    save(RGB[..., 0].astype(np.float32), tmp_path / "deep.tiff")
    for read, name, words in ((read_label, "label.jpg", "saved as JPEG"), (read_image, "deep.tiff", "floating-point")):
        with pytest.raises(ValueError, match=f"{name} cannot be used: .*{words}") as error: read(tmp_path / name)
        assert "damaged" not in str(error.value)
