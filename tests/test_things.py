"The models of things: tables that agree, faces that look outward"
import numpy as np
import pytest

from synseg.core import VOID
from synseg.things import CAR, CARS, Model, ROAD, car_model, disc, frustum, inset, library, panel, stroke, tree_model


def outward(faces):
    normals = np.cross(faces[:, 1] - faces[:, 0], faces[:, 2] - faces[:, 1])
    return (normals * (faces.mean(1) - faces.mean((0, 1)))).sum(1) > 0


def test_faces_of_boxes_look_outward():
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = np.sort(rng.uniform(-3, 3, (2, 2, 2)))
        assert outward(frustum((*a[0], *a[1]), (*b[0], *b[1]), 0, rng.uniform(1, 5))).all()


def test_shapes_have_the_sizes_asked_for():
    assert panel([(0, 0, 2, 1), (1, 1, 2, 3)]).shape == (2, 4, 3)
    bar = stroke(0, 0, 0, 2, .4, .2)[0]
    assert np.ptp(bar[:2, 0]) == pytest.approx(.4) and np.ptp(bar[2:, 0]) == pytest.approx(.2)
    assert np.allclose(np.hypot(*(disc(1, 2, 3, n=17)[0, :, :2] - (1, 2)).T), 3)


def test_inset_of_the_whole_face_is_the_face():
    face = frustum((0, 2, 0, 1), (.5, 1.5, .2, .8), 0, 1)[2]
    assert np.allclose(inset(face, (0, 0, 1, 1))[0], face)


def test_library_is_consistent():
    lib = library()
    assert library() is lib
    for i in range(len(lib.index)):
        assert lib.rows[lib.first[i]:lib.first[i + 1], 0].sum() == lib.vertex[i + 1] - lib.vertex[i]
    assert np.isfinite(lib.points).all() and np.isfinite(lib.rows).all()
    assert set(np.unique(lib.rows[:, 1])) == set(range(11)) | {VOID}


def test_every_polygon_begins_with_three_corners_that_span_a_plane():
    lib = library()
    first = (np.cumsum(lib.rows[:, 0]) - lib.rows[:, 0]).astype(int)
    a, b, c = (lib.points[first + i] for i in range(3))
    assert np.linalg.norm(np.cross(b - a, c - b), axis=1).min() > 1e-9


@pytest.mark.parametrize("kind", sorted(CARS))
def test_a_car_has_its_length_and_casts_its_shade_on_the_road(kind):
    near, far = car_model(*CARS[kind]), car_model(*CARS[kind], True)
    rows = np.concatenate([r for _, r in near.parts])
    assert set(np.unique(rows[:, 1])) == {ROAD, CAR} and (rows[:, 1] == ROAD).sum() == 1
    body = np.concatenate([p for p, r in near.parts if (r[:, 1] == CAR).all()])
    assert np.ptp(body[:, 2]) == pytest.approx(CARS[kind][0], abs=.1) and body[:, 1].max() == pytest.approx(CARS[kind][2])
    assert sum(len(r) for _, r in far.parts) < len(rows)


@pytest.mark.parametrize("kind", ["round", "tall", "bush", "cone", "bare"])
def test_trees_stand_on_the_ground_and_differ(kind):
    trees = [np.concatenate([p for p, _ in tree_model(kind, seed).parts]) for seed in range(4)]
    for points in trees: assert points[:, 1].min() > -.02 and .85 < points[:, 1].max() < 1.25
    if kind != "cone": assert not np.array_equal(trees[0], trees[1])


def test_a_code_for_each_polygon_must_fit():
    with pytest.raises(ValueError): Model(CAR).add(panel([(0, 0, 1, 1)] * 2), code=(0, 1, 2))
