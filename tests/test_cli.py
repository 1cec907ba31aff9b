"The command line as a user meets it: answers on stdout, sentences on stderr, exit codes 0, 2 and 130"
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

import synseg as package
from synseg.cli import app
from synseg.inference import as_image, predict, predict_probabilities
from synseg.zoo import create_model, load_model, save_model, shipped_weights

PROGRAM = [sys.executable, "-c", "from synseg.cli import main; main()"]
FAST = ["--size", "64x64", "--epochs", "1", "--batch-size", "2"]


def synseg(*words):
    "Exit code, stdout and stderr of a command line"
    result = CliRunner().invoke(app, [str(w) for w in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def refused(*words):
    "The sentence of a command that must end with exit code 2"
    code, out, err = synseg(*words)
    assert code == 2 and "Traceback" not in err and not out, (code, out, err)
    return err


@pytest.fixture
def folder(tmp_path):
    "Six pairs of images and masks with three classes, in train and val"
    rng = np.random.default_rng(1)
    for split, n in (("train", 4), ("val", 2)):
        for part, shape, top in (("images", (70, 90, 3), 255), ("masks", (70, 90), 3)):
            (tmp_path / "data" / split / part).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, top, shape, dtype=np.uint8)).save(tmp_path / "data" / split / part / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of a few seconds on scenes"
    out = tmp_path_factory.mktemp("runs") / "first"
    code, stdout, stderr = synseg("train", "--images", 16, *FAST, "--out", out)
    assert code == 0 and "synseg predict" in stdout and "Traceback" not in stderr
    return out


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(np.random.default_rng(2).integers(0, 255, (83, 131, 3), dtype=np.uint8)).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def commands():
    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        yield from ([[name, sub] for sub in command.commands] if hasattr(command, "commands") else [[name]])


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_help_shows_an_example(words):
    code, out, _ = synseg(*words, "--help")
    assert code == 0 and f"Example:\n    synseg {' '.join(words)}" in out


def test_help_does_not_wait_for_torch():
    done = subprocess.run([*PROGRAM, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "train" in done.stdout
    heavy = subprocess.run([sys.executable, "-c", "import sys, synseg.cli; print('torch' in sys.modules)"], capture_output=True, text=True)
    assert heavy.stdout.strip() == "False"


def test_models():
    code, out, _ = synseg("models")
    assert code == 0 and "unet_small" in out and "488,171" in out
    assert "arXiv 1505.04597" in synseg("models", "unet")[1]
    assert "did you mean" in refused("models", "unett")


def test_a_run_leaves_what_is_promised(run):
    assert {"model.safetensors", "metrics.jsonl", "samples.png", "run.json", "state.pt"} <= {p.name for p in run.iterdir()}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["epoch"] == 1 and {"loss", "mean_iou"} <= set(rows[-1])
    card = load_model(run / "model.safetensors").card
    assert card.name == "unet_small" and tuple(card.input_size) == (64, 64) and card.label_space.names[3] == "Road"


def test_evaluate_prints_one_json_object(run):
    code, out, _ = synseg("evaluate", run, "--data", "scenes", "--images", 5, "--json")
    result = json.loads(out)
    assert code == 0 and result["images"] == 5 and set(result) == {"mean_iou", "pixel_accuracy", "iou", "images", "seconds"}
    assert len(result["iou"]) == 11 and 0 <= result["mean_iou"] <= result["pixel_accuracy"] + 1 <= 2
    table = synseg("evaluate", run, "--images", 5)[1]
    assert f"{100 * result['mean_iou']:.1f}" in table and "Bicyclist" in table


def test_evaluate_on_camvid(run, data_root):
    code, out, _ = synseg("evaluate", run, "--data", "camvid", "--root", data_root("camvid"), "--split", "val", "--images", 3, "--json")
    assert code == 0 and json.loads(out)["images"] == 3


def test_predict_writes_three_pictures(run, photo, tmp_path):
    code, out, _ = synseg("predict", run, photo, "--out", tmp_path / "out")
    assert code == 0 and "%" in out
    index, colour, overlay = (Image.open(tmp_path / "out" / f"photo_{kind}.png") for kind in ("index", "colour", "overlay"))
    assert (index.mode, colour.mode, overlay.mode) == ("L", "RGB", "RGB")
    assert index.size == colour.size == overlay.size == (131, 83)
    model = load_model(run / "model.safetensors")
    want = predict(model, photo, size=64).numpy()
    assert (np.asarray(index) == want).mean() > 0.999
    assert np.array_equal(np.asarray(colour), model.card.label_space.to_colour(np.asarray(index)))


def test_tiles_do_not_change_the_answer(run, photo, tmp_path):
    for name, words in dict(whole=[], tiles=["--tile", 64]).items():
        assert synseg("predict", run / "model.safetensors", photo, "--size", "full", "--out", tmp_path / name, *words)[0] == 0
    a, b = (np.asarray(Image.open(tmp_path / n / "photo_index.png")) for n in ("whole", "tiles"))
    assert (a == b).mean() > 0.999


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_grey_and_transparent_photographs(run, photo, tmp_path, mode):
    Image.open(photo).convert(mode).save(tmp_path / "other.png")
    assert synseg("predict", run, tmp_path / "other.png", "--out", tmp_path / "out")[0] == 0


def test_bad_photographs(run, photo, tmp_path):
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:300])
    assert "cannot be read" in refused("predict", run, tmp_path / "cut.png", "--out", tmp_path)
    assert "no image file" in refused("predict", run, tmp_path / "gone.png", "--out", tmp_path)
    (tmp_path / "zero.png").write_bytes(b"")
    assert "cannot be read" in refused("predict", run, tmp_path / "zero.png", "--out", tmp_path)


@pytest.mark.parametrize("kind,name", [("dense", "DenseCRF"), ("conv", "ConvCRF")])
def test_predict_with_a_crf_is_the_network_and_then_the_field(run, photo, tmp_path, kind, name):
    code, out, _ = synseg("predict", run, photo, "--crf", kind, "--out", tmp_path / kind)
    assert code == 0 and "pictures are in" in out
    model = load_model(run / "model.safetensors")
    log_probs = predict_probabilities(model, photo, size=64).log()
    field = getattr(package, name)(11)
    with torch.no_grad():
        want = field(log_probs[None], as_image(photo)[None])[0].max(0).indices.numpy()
    got = np.asarray(Image.open(tmp_path / kind / "photo_index.png"))
    assert got.shape == (83, 131) and (got == want).mean() > 0.999


def test_a_crf_sharpens_what_the_shipped_weights_say(tmp_path):
    scenes = package.Scenes(8, size=(120, 160), domain="camera", seed=20)
    Image.fromarray(scenes.raw(7)[0]).save(tmp_path / "street.png")
    answers = {}
    for kind, words in dict(plain=[], dense=["--crf", "dense"], tiles=["--crf", "dense", "--tile", 64]).items():
        assert synseg("predict", "scenes", tmp_path / "street.png", "--size", "full", "--out", tmp_path / kind, *words)[0] == 0
        answers[kind] = np.asarray(Image.open(tmp_path / kind / "street_index.png"))
    assert 0.5 < (answers["plain"] == answers["dense"]).mean() < 1
    assert (answers["tiles"] == answers["dense"]).mean() > 0.995
    borders = {k: (a[:, 1:] != a[:, :-1]).sum() for k, a in answers.items()}
    assert borders["dense"] < borders["plain"]


def test_crf_names_what_there_is(run, photo, tmp_path):
    assert "dense or conv" in refused("predict", run, photo, "--crf", "magic", "--out", tmp_path)


def test_benchmark_lists_what_there_is():
    code, out, err = synseg("benchmark")
    assert code == 0 and not err and all(name in out for name in ("crf", "kmeans", "metrics", "synseg benchmark"))
    assert set(json.loads(synseg("benchmark", "--json")[1])) == {"crf", "kmeans", "metrics", "realtime", "train", "infer", "data"}


def test_benchmark_prints_a_table_or_one_json_object(tmp_path):
    words = ["--size", "32x48", "--rounds", "1"]
    code, out, err = synseg("benchmark", "metrics", "kmeans", *words)
    assert code == 0 and "from logits" in out and "scikit-learn" in out and "cores" in out and "round 1 of 1" in err
    code, out, err = synseg("benchmark", "metrics", *words, "--json", "--record", tmp_path)
    found = json.loads(out)
    assert code == 0 and set(found) == {"metrics"} and set(found["metrics"]["groups"]) == {"from labels", "from logits"}
    (record,) = tmp_path.glob("benchmark_metrics*.json")
    saved = json.loads(record.read_text())
    assert saved["metrics"]["groups"].keys() == found["metrics"]["groups"].keys() and saved["machine"]["cores"] >= 1


@pytest.mark.parametrize("words,part", [(["crv"], "no benchmark 'crv'"), (["metrics", "crv"], "no benchmark 'crv'"),
                                        (["metrics", "--size", "360"], "height x width"), (["metrics", "--size", "4x4"], "at least 16"),
                                        (["metrics", "--rounds", "0"], "at least one"), (["metrics", "--device", "abacus"], "does not work here")])
def test_benchmark_mistakes(words, part):
    code, out, err = synseg("benchmark", *words)
    assert code == 2 and not out and part in err and "Traceback" not in err


def test_train_on_files_and_on_grey_ones(folder, tmp_path):
    Image.open(folder / "train/images/0.png").convert("L").save(folder / "train/images/0.png")
    Image.open(folder / "train/images/1.png").convert("RGBA").save(folder / "train/images/1.png")
    code, _, err = synseg("train", "--data", "folder", "--root", folder, *FAST, "--out", tmp_path / "run")
    assert code == 0, err
    assert json.loads(synseg("evaluate", tmp_path / "run", "--json")[1])["images"] == 2


def test_missing_and_empty_folders(tmp_path):
    out = tmp_path / "run"
    assert "does not exist" in refused("train", "--data", "camvid", "--root", tmp_path / "gone", "--out", out)
    (tmp_path / "empty").mkdir()
    assert "expected" in refused("train", "--data", "camvid", "--root", tmp_path / "empty", "--out", out)
    assert "--root" in refused("train", "--data", "camvid", "--out", out)
    assert "no data set" in refused("train", "--data", "camvit", "--root", tmp_path, "--out", out)
    assert not out.exists()


def test_sizes_that_differ(folder, tmp_path):
    Image.new("RGB", (40, 40)).save(folder / "train/images/2.png")
    sentence = refused("train", "--data", "folder", "--root", folder, *FAST, "--out", tmp_path / "run")
    assert "40x40" in sentence and "70x90" in sentence


def test_label_out_of_range(folder, tmp_path):
    (folder / "label_space.json").write_text(json.dumps(dict(names=["a", "b"], palette=[[0, 0, 0], [9, 9, 9]], ids=[0, 1], void=[255])))
    sentence = refused("train", "--data", "folder", "--root", folder, *FAST, "--out", tmp_path / "run")
    assert "label value 2" in sentence


def test_deep_label_out_of_range(folder, tmp_path):
    Image.fromarray(np.full((70, 90), 700, np.uint16)).save(folder / "train/masks/1.png")
    sentence = refused("train", "--data", "folder", "--root", folder, *FAST, "--out", tmp_path / "run")
    assert "700" in sentence or "701" in sentence


def test_corrupt_image_in_the_training_set(folder, tmp_path):
    path = folder / "train/images/0.png"
    path.write_bytes(path.read_bytes()[:200])
    assert "cannot be read" in refused("train", "--data", "folder", "--root", folder, *FAST, "--out", tmp_path / "run")


@pytest.mark.parametrize("words,part", [(["--model", "unett"], "did you mean"), (["--size", "64"], "height x width"),
                                        (["--size", "32x32"], "at least 64"), (["--epochs", "0"], "above 0"),
                                        (["--loss", "hinge"], "choose one of"), (["--domain", "oil"], "choose one of"),
                                        (["--option", "width"], "NAME=VALUE"), (["--option", "depht=3"], "depht"),
                                        (["--encoder", "resnet18"], "resnet18"), (["--weights", "gone.safetensors"], "gone.safetensors")])
def test_wrong_settings(tmp_path, words, part):
    assert part in refused("train", "--images", 4, *FAST[2:], "--size", "64x64", *words, "--out", tmp_path / "run")


def test_weights_of_another_model_or_class_count(run, tmp_path, folder):
    save_model(create_model("unet_small", 3), tmp_path / "three.safetensors")
    sentence = refused("train", "--images", 4, *FAST, "--weights", tmp_path / "three.safetensors", "--out", tmp_path / "a")
    assert "3 classes" in sentence and "11" in sentence
    sentence = refused("train", "--model", "unet", "--images", 4, *FAST, "--weights", run / "model.safetensors", "--out", tmp_path / "b")
    assert "unet_small" in sentence
    sentence = refused("evaluate", run, "--data", "folder", "--root", folder, "--json")
    assert "11 classes" in sentence and "3" in sentence


def test_damaged_checkpoints(run, tmp_path, photo):
    whole = (run / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "cut short or damaged" in refused("predict", tmp_path / "cut.safetensors", photo, "--out", tmp_path)
    torch.save(dict(a=1), tmp_path / "pickle.safetensors")
    assert "pickle" in refused("evaluate", tmp_path / "pickle.safetensors", "--data", "scenes", "--json")
    assert "no run" in refused("evaluate", tmp_path / "gone", "--json")
    assert "no model.safetensors" in refused("evaluate", tmp_path, "--json")


def test_a_run_is_not_overwritten(run):
    before = (run / "model.safetensors").read_bytes()
    assert "--resume" in refused("train", "--images", 16, *FAST, "--out", run)
    assert synseg("train", "--out", run, "--resume")[0] == 0
    assert (run / "model.safetensors").read_bytes() == before


def test_resume_without_a_run(tmp_path):
    assert "holds no run" in refused("train", "--out", tmp_path / "nothing", "--resume")


def test_disk_full(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    sentence = refused("train", "--images", 4, *FAST, "--out", tmp_path / "run")
    assert "No space left" in sentence and "room" in sentence
    assert not list((tmp_path / "run").glob("*.tmp")) and not (tmp_path / "run" / "state.pt").exists()


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    words = [*PROGRAM, "train", "--images", "32", "--size", "64x64", "--epochs", "8", "--out", str(out)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while time.time() < deadline and not (out / "state.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr[-2000:]
    assert f"synseg train --out {out} --resume" in stderr and "Traceback" not in stderr
    done = len((out / "metrics.jsonl").read_text().splitlines())
    assert 1 <= done < 8
    assert synseg("train", "--out", out, "--resume")[0] == 0
    rows = [json.loads(line)["epoch"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 9))


def test_data_commands(folder, tmp_path):
    assert "cityscapes" in synseg("data", "list")[1]
    assert "register" in synseg("data", "info", "cityscapes")[1]
    assert "class 2" in synseg("data", "info", "folder", "--root", folder)[1]
    code, _, _ = synseg("data", "preview", "folder", "--root", folder, "--out", tmp_path / "sheet.png")
    assert code == 0 and min(Image.open(tmp_path / "sheet.png").size) > 300
    assert "licence" in refused("data", "download", "cityscapes", "--root", tmp_path)
    assert "choose one of" in refused("data", "info", "mnist")
    assert "--n" in refused("data", "preview", "scenes", "--n", 0)


def test_data_info_names_bad_pairs(folder):
    Image.new("RGB", (40, 40)).save(folder / "train/images/3.png")
    out = synseg("data", "info", "folder", "--root", folder)
    assert "40x40" in out[1] + out[2]


def test_recipe_commands(tmp_path):
    assert "camvid_unet_small" in synseg("recipe", "list")[1]
    assert "hold_out='0001TP'" in synseg("recipe", "show", "camvid_unet_small_holdout", "--profile", "cpu")[1]
    assert "no recipe is called" in refused("recipe", "show", "nope")
    assert "--data-root" in refused("recipe", "run", "camvid_unet_small", "--profile", "cpu")
    code, out, _ = synseg("recipe", "run", "camvid_metric_reference", "--out", tmp_path)
    assert code == 0 and 0 < json.loads(out)["mean_iou"] < 1


def strict(text):
    "JSON without NaN, which other languages cannot read"
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


@pytest.mark.parametrize("name", ["voc_samples_crf", "conv_crf_synthetic"])
def test_recipes_of_random_fields(name, tmp_path):
    code, out, _ = synseg("recipe", "run", name, "--out", tmp_path)
    found = strict(out)
    row = found["network" if name == "voc_samples_crf" else "unary"]
    assert code == 0 and 0 < row["mean_iou"] < row["pixel_accuracy"] < 1
    assert "nothing to train" in synseg("recipe", "show", name)[1]


def test_recipe_of_the_photographs_without_them(tmp_path):
    assert "--data-root" in refused("recipe", "run", "voc_samples_crf", "--profile", "cpu", "--out", tmp_path)
    assert "deeplab_logits" in refused("recipe", "run", "voc_samples_crf", "--profile", "cpu", "--data-root", tmp_path, "--out", tmp_path)


@pytest.mark.parametrize("form", ["ipynb", "py", "md"])
def test_notebooks(tmp_path, form):
    code, out, _ = synseg("notebooks", tmp_path / "course", "--format", form)
    assert code == 0 and (tmp_path / "course" / "nbs" / f"00_core.{form}").is_file()
    assert "--force" in refused("notebooks", tmp_path / "course", "--format", form)
    assert synseg("notebooks", tmp_path / "course", "--format", form, "--force")[0] == 0
    assert "ipynb, py or md" in refused("notebooks", tmp_path, "--format", "pdf")


def test_doctor():
    code, out, _ = synseg("doctor")
    assert code == 0 and "float32 ok" in out and f"torch          {torch.__version__.split('+')[0]}" in out
    found = json.loads(synseg("doctor", "--json")[1])
    assert {p["name"] for p in found["optional"]} >= {"pydensecrf", "jupytext", "quarto"}


def test_program_from_the_shell(run, photo, tmp_path):
    done = subprocess.run([*PROGRAM, "predict", str(run), str(photo), "--out", str(tmp_path / "o")], capture_output=True, text=True)
    assert done.returncode == 0 and len(list((tmp_path / "o").glob("*.png"))) == 3
    wrong = subprocess.run([*PROGRAM, "evaluate", str(tmp_path / "gone")], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("synseg: ") and wrong.stdout == ""
    assert Path(tmp_path / "o" / "photo_overlay.png").stat().st_size > 1000


def test_folders_and_films_are_streamed(run, photo, tmp_path):
    pages = [Image.fromarray(np.full((70, 90, 3), v, np.uint8)) for v in (20, 120, 220)]
    pages[0].save(tmp_path / "film.gif", save_all=True, append_images=pages[1:])
    (tmp_path / "photos").mkdir()
    for i in (2, 10): Image.open(photo).save(tmp_path / "photos" / f"p{i}.png")
    code, out, err = synseg("predict", run, tmp_path / "film.gif", tmp_path / "photos", "--out", tmp_path / "out", "--batch", 2, "--alpha", 0.5)
    assert code == 0 and "frames/s over 1 frames, after 2 to warm up" in out and "too few for a rate" in out and ("frame" in err or "TQDM_DISABLE" in os.environ)
    assert {p.name[:-10] for p in (tmp_path / "out").glob("*_index.png")} == {"film_000000", "film_000001", "film_000002", "p2", "p10"}
    assert np.asarray(Image.open(tmp_path / "out" / "p10_index.png")).shape == (83, 131)
    assert "one by one" in refused("predict", run, tmp_path / "photos", "--tta", "--out", tmp_path)
    assert "alpha is 0.0" in refused("predict", run, tmp_path / "photos", "--alpha", 0, "--out", tmp_path)
    assert "no folder" in refused("predict", run, tmp_path / "gone.gif", "--out", tmp_path)
    (tmp_path / "none").mkdir()
    assert "no photographs" in refused("predict", run, tmp_path / "none", "--out", tmp_path)


@pytest.mark.parametrize("command", ["predict", "evaluate", "export"])
def test_the_help_names_what_ships(command):
    out = synseg(command, "--help")[1]
    assert all(name in out for name in ("scenes", *(n for n in shipped_weights() if n != "unet_small")))


def test_export(tmp_path):
    code, out, err = synseg("export", "scenes", "--out", tmp_path / "net.onnx", "--format", "onnx")
    if code and "of its time" in err:
        pytest.skip("this torch is older than this onnxscript")
    assert code == 0 and "any size" in out
    code, out, _ = synseg("export", "scenes", "--out", tmp_path / "net.pt2", "--size", "64x96")
    assert code == 0 and "images of 64x96;" in out and (tmp_path / "net.pt2").is_file()
    assert "choose one of onnx, torch" in refused("export", "scenes", "--out", tmp_path / "net.tflite", "--format", "tflite")
    assert "must end in .onnx" in refused("export", "scenes", "--out", tmp_path / "net.bin")
    assert "no run nowhere" in refused("export", "nowhere", "--out", tmp_path / "a.onnx")


@pytest.mark.parametrize("out", ["taken", "taken/below", "taken/a.onnx/below"])
def test_an_out_that_is_a_file_is_named_before_any_work(photo, tmp_path, monkeypatch, out):
    (tmp_path / "taken").touch()
    monkeypatch.setattr("synseg.inference.predict", lambda *a, **k: pytest.fail("the network was run"))
    monkeypatch.setattr("synseg.deploy.export", lambda *a, **k: pytest.fail("the network was traced"))
    monkeypatch.setattr("synseg.benchmark.run", lambda *a, **k: pytest.fail("something was timed"))
    for words in (["predict", photo, "--out"], ["benchmark", "metrics", "--record"], ["notebooks"], ["train", "--images", 4, *FAST, "--out"],
                  ["recipe", "run", "unet_losses", "--profile", "cpu", "--record"]):
        assert "taken is a file, and a folder is needed there" in refused(*words, tmp_path / out)
    assert "taken is a file" in refused("export", "scenes", "--out", tmp_path / "taken" / "net.onnx")
    assert "is a folder, and a file" in refused("data", "preview", "scenes", "--n", 1, "--out", tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"taken", "photo.jpg"}


def test_one_bad_photograph_costs_one_photograph(photo, tmp_path):
    (tmp_path / "album").mkdir()
    for name in ("a.jpg", "c.jpg"): (tmp_path / "album" / name).write_bytes(photo.read_bytes())
    (tmp_path / "album" / "b.jpg").write_text("no picture")
    for words, wanted in ((sorted((tmp_path / "album").iterdir()), {"a", "c"}), ([tmp_path / "album"], {"a", "c"})):
        out = tmp_path / f"out{len(words)}"
        code, stdout, err = synseg("predict", *words, "--out", out)
        assert code == 2 and "b.jpg cannot be read" in err and f"pictures are in {out}" in stdout
        assert {p.name[:-10] for p in out.glob("*_index.png")} == wanted


def test_photographs_of_one_name_are_all_kept(photo, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "photo.jpg").write_bytes(photo.read_bytes())
    code, out, _ = synseg("predict", tmp_path / "a/photo.jpg", tmp_path / "b/photo.jpg", tmp_path / "a/photo.jpg", "--out", tmp_path / "out")
    assert code == 0 and "b/photo.jpg as photo-2" in out
    assert {p.name for p in (tmp_path / "out").glob("*_index.png")} == {"photo_index.png", "photo-2_index.png"}
    assert synseg("predict", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "two")[0] == 0 and len(list((tmp_path / "two").iterdir())) == 6


def test_names_that_are_nearly_right(photo, tmp_path):
    assert "did you mean photo.jpg?" in refused("predict", photo.with_name("phto.jpg"), "--out", tmp_path / "out")
    assert "did you mean scenes?" in refused("predict", "scene", photo, "--out", tmp_path / "out")
    assert "train it with synseg train --model enet" in refused("predict", "enet", photo, "--out", tmp_path / "out")
    assert "no image file" in refused("predict", photo, photo.with_name("gone.jpg"), "--out", tmp_path / "out")  # before the first is worked on
    assert not (tmp_path / "out").exists()
    assert "did you mean 'unet_small'" in refused("models", "UNET_Small")
    assert "did you mean 'camvid'" in refused("train", "--data", "camvidd", "--out", tmp_path / "out")
    assert "did you mean 'scenes'" in refused("train", "--data", "Scenes", "--out", tmp_path / "out")


def test_what_is_neither_a_run_nor_a_photograph(photo, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "neither photographs" in refused("predict", tmp_path / "empty")
    assert "is an address" in refused("predict", "https://example.org/a.jpg")
    (tmp_path / "phone.heic").write_bytes(bytes(99))
    assert "a JPEG, PNG or TIFF" in refused("predict", tmp_path / "phone.heic", "--out", tmp_path)
    assert "or full" in refused("predict", photo, "--size", "large") and "size is 0" in refused("predict", photo, "--size", "0")
    for name in ("net.onnx", "photo.jpg"):
        (tmp_path / name).write_bytes(bytes(99))
        assert "no .safetensors file" in refused("evaluate", tmp_path / name, "--data", "scenes")


def test_resume_obeys_the_run_and_says_so(run, tmp_path):
    sentence = refused("train", "--out", run, "--resume", "--epochs", 7, "--lr", 0.5, "--size", "64x64")
    assert "begun with epochs=1, lr=0.003" in sentence and "Leave out --epochs, --lr;" in sentence
    assert synseg("train", "--out", run, "--resume", "--epochs", 1)[0] == 0
    assert synseg("train", "--images", 4, *FAST, "--weights", run, "--out", tmp_path / "more")[0] == 0


@pytest.mark.parametrize("words,part", [(["--weight-decay", "-1"], "weight_decay is -1.0"), (["--lr", "inf"], "above 0"), (["--option", "width=many"], "width='many'")])
def test_numbers_that_are_none(tmp_path, words, part):
    assert part in refused("train", "--images", 4, *FAST, *words, "--out", tmp_path / "run") and not (tmp_path / "run").exists()


def test_memory_that_is_not_there(photo, tmp_path, monkeypatch):
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 180000000000 bytes"),
                  RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 180000000000 bytes")):
        def full(*args, error=error, **kwargs): raise error
        monkeypatch.setattr("synseg.inference.predict", full)
        assert "memory is full" in refused("predict", photo, "--out", tmp_path / "out")


def test_scenes_have_no_test_split(run):
    assert "no split 'test'" in refused("evaluate", run, "--split", "test", "--images", 2)


def test_the_next_step_is_named(tmp_path):
    assert synseg("doctor")[1].splitlines()[-1].startswith("Next: synseg predict PHOTO")
    assert f"Next: jupyter lab {tmp_path / 'nbs/00_core.ipynb'}" == synseg("notebooks", tmp_path)[1].splitlines()[-1]
    assert "must end in .onnx or .pt2" in refused("export", "scenes", "--out", tmp_path / "net.tflite")
