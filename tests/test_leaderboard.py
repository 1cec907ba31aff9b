"The leaderboard reads any record, says what was not run, and types nothing"
import json
from dataclasses import asdict

import pytest

from synseg.leaderboard import PUBLISHED, entries, last_of, leaderboard, parameters_of, published, read_records, start_of
from synseg.papers import CONTEXT, REALTIME
from synseg.recipes import RECIPES
from synseg.zoo import list_models, model_info


def record(folder, name, iou, profile="cpu", **metrics):
    runs = {n: asdict(r) | dict(size=[120, 160]) for n, r in RECIPES[name].profiles[profile].items()}
    scores = dict(mean_iou=iou, mean_iou_last=iou - 0.01, pixel_accuracy=0.9, minutes=9.5, trained_images=1234) | metrics
    machine = dict(gpu=None, processor="abacus", threads=2)
    content = dict(name=name, config=dict(profile=profile, runs=runs), metrics=scores, machine=machine)
    (folder / f"{name}.json").write_text(json.dumps(content, sort_keys=True))


def test_without_records_nothing_was_run(tmp_path):
    board = entries(tmp_path)
    assert board and all(e.profile is None and e.mean_iou is None for e in board)
    assert {"camvid_unet_small", "camvid_segnet", "camvid_fcn8s"} <= {e.recipe for e in board}
    assert not any(e.recipe.endswith("_holdout") for e in board)
    assert "camvid_seggan" in RECIPES and "camvid_seggan" not in {e.recipe for e in board}, "a comparison is not a row"
    assert "not run" in repr(leaderboard(tmp_path)) and read_records(tmp_path) == []


def test_new_records_become_rows_best_first(tmp_path):
    record(tmp_path, "camvid_segnet", 0.4)
    record(tmp_path, "camvid_unet_small", 0.6)
    record(tmp_path, "camvid_unet_small_holdout", 0.35)
    first, second, *others = entries(tmp_path)
    assert (first.model, first.mean_iou, first.last, first.held_out) == ("unet_small", 0.6, 0.59, 0.35 - 0.01)
    assert (second.model, second.held_out, second.images, second.machine) == ("segnet", None, 1234, "abacus, 2 threads")
    assert all(e.profile is None for e in others)
    row = repr(leaderboard(tmp_path)).splitlines()[1]
    assert "60.0 / 59.0" in row and "34.0" in row and "120x160" in row and "488,171" in row
    assert first.command == "synseg recipe run camvid_unet_small --profile cpu --data-root data/camvid"


def test_a_chain_is_read_by_its_links_not_by_its_names(tmp_path):
    record(tmp_path, "camvid_fcn8s", 0.3)
    row = entries(tmp_path)[0]
    assert row.model == "fcn8s" and row.start == "random" and row.profile == "cpu"
    gpu = {n: asdict(r) for n, r in sorted(RECIPES["camvid_fcn8s"].profiles["gpu"].items())}
    assert last_of(gpu)["model"] == "fcn8s" and start_of(gpu) == "imagenet"


def test_strange_records_are_left_out_or_read(tmp_path):
    record(tmp_path, "camvid_segnet", 0.4)
    (tmp_path / "speed.json").write_text(json.dumps(dict(name="speed", config=None, metrics=dict(seconds=1))))
    (tmp_path / "other.json").write_text(json.dumps(dict(name="other", config=dict(runs=dict(a=dict(data="scenes"))), metrics=dict(mean_iou=1))))
    content = json.loads((tmp_path / "camvid_segnet.json").read_text())
    content["name"], content["config"]["runs"]["run"]["model"] = "camvid_tomorrow", "a_network_of_tomorrow"
    for key in ("mean_iou_last", "pixel_accuracy", "minutes", "trained_images"):
        del content["metrics"][key]
    (tmp_path / "tomorrow.json").write_text(json.dumps(content))
    board = {e.recipe: e for e in entries(tmp_path)}
    assert board["camvid_tomorrow"].parameters is None and board["camvid_tomorrow"].last is None
    assert {e.recipe for e in board.values() if e.profile} == {"camvid_segnet", "camvid_tomorrow"}
    assert "tomorrow" in repr(leaderboard(tmp_path))


def test_parameters_are_those_of_the_run():
    run = asdict(RECIPES["camvid_unet_small"].profiles["cpu"]["run"])
    assert parameters_of(run) == model_info("unet_small").parameters
    assert parameters_of(run | dict(options=dict(width=8))) < parameters_of(run)


def test_published_figures_name_their_source():
    assert all(0 < iou < (acc or 100) <= 100 and where for iou, acc, where in PUBLISHED.values())
    assert "none" in published("unet_small") and "57.0" in published("fcn8s") and "65.3 / – (the paper's Dilation8" in published("dilated_vgg")
    assert set(PUBLISHED) <= set(list_models()) | {*CONTEXT, *REALTIME}, "a context network may not be in the zoo yet"


def test_networks_that_are_not_there_yet_have_a_row_all_the_same():
    rows, table = {e.recipe: e for e in entries()}, repr(leaderboard())
    for name in [*CONTEXT, *REALTIME]:
        row = rows[f"camvid_{name}"]
        assert row.model == name and (row.parameters is not None) == (name in list_models())
        assert row.command.startswith(f"synseg recipe run camvid_{name} ") and name in table


def test_the_courses_own_records():
    board = entries()
    assert any(e.recipe == "camvid_unet_small" and e.mean_iou > 0.6 and e.held_out for e in board)


@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("camvid_") and n.endswith("_holdout")])
def test_each_held_out_recipe_has_its_twin(name):
    plain, held = RECIPES[name.removesuffix("_holdout")], RECIPES[name]
    for profile in ("cpu", "gpu"):
        for a, b in zip(plain.profiles[profile].values(), held.profiles[profile].values()):
            assert (a.model, a.size, a.lr, a.options) == (b.model, b.size, b.lr, b.options) and b.hold_out == "0001TP" and a.hold_out is None
