"Geometry: projection, painting, depth, sub-sampling"
import numpy as np
import pytest

from synseg.core import VOID
from synseg.street import Street, View, depth_map, label_map, polygons, rasterise, shade, spans, tent
from synseg.things import BUILDING, CAR, ROAD, SKY
from synseg.town import CAMERA, SYNTHETIC, Dice, sample_street

WHITE = [(240, 240, 240)]


def draw(seed, style=SYNTHETIC): return polygons(sample_street(np.random.default_rng(seed), style))


def test_parallel_lines_meet_on_the_horizon():
    view = View(1.2, .37, 1.3)
    start = np.random.default_rng(0).uniform(-9, 9, (40, 3))
    assert np.allclose(view.project(start + (0, 0, 1e7), (61, 77)), (77 / 2, .37 * 61), atol=1e-3)


def test_projection_scales_with_the_picture():
    points = np.random.default_rng(1).uniform((-5, 0, 2), (5, 5, 40), (30, 3))
    view = View()
    assert np.allclose(view.project(points, (120, 160)), 2 * view.project(points, (60, 80)))


def test_spans():
    first, count = np.array([5, 0, 9]), np.array([2, 0, 3])
    assert spans(first, count).tolist() == [5, 6, 9, 10, 11]


def wall(z, key=None, x=-.5, colour=WHITE):
    street = Street(View(1.0, .5, 1.0))
    street.place("block", x, z, colour, (1, 2, 1), key=key)
    return street


def test_an_upright_wall_covers_exactly_its_samples():
    scene = polygons(wall(5, x=0))
    ids = rasterise(scene, (100, 100))
    rows, cols = np.nonzero(ids >= 0)
    assert rows.min() == 60 and rows.max() == 140 and cols.min() == 80 and cols.max() == 120


def test_near_things_hide_far_ones_whatever_the_order_of_placing():
    for order in ((4, 9), (9, 4)):
        street = Street(View(1.0, .5, 1.0))
        for z in order: street.place("block" if z == 9 else "bin", 0, z, WHITE, (6, 4, 1) if z == 9 else (1, 1, 1))
        labels = label_map(polygons(street), rasterise(polygons(street), (60, 80)))
        assert labels[40, 40] == VOID and labels[20, 40] == BUILDING


def test_depth_of_the_road_is_that_of_the_formula():
    street = Street(View(1.5, .4, 1.1))
    street.place("strip", -20, 0, WHITE, (40, 1, 1))
    scene, size = polygons(street), (64, 48)
    ids = rasterise(scene, size)
    depth, on = depth_map(scene, ids, size), label_map(scene, ids) == ROAD
    rows = np.broadcast_to(np.arange(64)[:, None], size)[on]
    assert np.allclose(depth[on], 1.1 * 64 * 1.5 / (rows + .5 - .4 * 64), rtol=1e-4)


def test_depth_of_a_wall_across_is_its_distance():
    scene = polygons(wall(7))
    ids = rasterise(scene, (40, 40))
    depth = depth_map(scene, ids, (40, 40))
    assert np.allclose(depth[label_map(scene, ids) == BUILDING], 7, rtol=1e-5)


@pytest.mark.parametrize("style", [SYNTHETIC, CAMERA], ids=["synthetic", "camera"])
def test_labels_agree_at_common_pixel_centres(style):
    agree = []
    for i in range(6):
        scene = draw([3, i], style)
        small, large = (label_map(scene, rasterise(scene, s)) for s in ((41, 53), (123, 159)))
        agree.append((large[1::3, 1::3] == small).mean())
    assert np.mean(agree) > .95


def test_odd_sizes_and_wide_ones():
    scene = draw([0, 0])
    for size in ((61, 77), (96, 128), (1, 1), (64, 256)):
        labels = label_map(scene, rasterise(scene, size))
        assert labels.shape == size and set(np.unique(labels)) <= set(range(11)) | {VOID}
        assert shade(scene, rasterise(scene, size), 1.0).shape == (*size, 3)
    with pytest.raises(ValueError, match="0x5"): rasterise(scene, (0, 5))


def test_every_pixel_is_painted():
    for i in range(10):
        assert (rasterise(draw([1, i], CAMERA), (48, 64)) >= 0).all()


def test_tent_is_the_weighted_mean_of_nine_samples():
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 256, (15, 21, 4), dtype=np.uint8)
    kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
    want = [[(samples[2*r:2*r+3, 2*c:2*c+3, :3] * kernel[..., None]).sum((0, 1)) for c in range(10)] for r in range(7)]
    assert np.abs(tent(samples.view(np.uint32)[..., 0]) - np.array(want)).max() <= .5


def test_flat_colour_survives_shading():
    scene = polygons(wall(2, colour=[(200, 100, 50)]))
    image, ids = shade(scene, rasterise(scene, (40, 40)), .5), rasterise(scene, (40, 40))
    assert (image[label_map(scene, ids) == BUILDING].max(0) == (100, 50, 25)).all()


def test_the_same_generator_gives_the_same_street():
    a, b, c = (sample_street(np.random.default_rng(s), CAMERA) for s in (5, 5, 6))
    assert a.things == b.things and a.colours == b.colours and a.things != c.things


def test_faces_that_look_away_are_dropped_also_when_mirrored():
    colours = [(v, v, v) for v in range(0, 240, 30)]
    counts = []
    for scale, z in (((1, 1, 1), 9), ((-1, 1, -1), 13)):
        street = Street(View())
        street.place("hatch0", 0, z, colours, scale)
        scene = polygons(street)
        counts.append(len(scene.labels))
        assert (scene.labels == CAR).any()
        seen = scene.points[scene.starts[:-1]] - (0, scene.view.height, 0)
        assert ((scene.normals * seen).sum(1) <= 1e-9).all()
    assert max(counts) < 40


def test_dice_repeat_and_stay_in_range():
    a, b = Dice(np.random.default_rng(1)), Dice(np.random.default_rng(1))
    values = [a(2, 3) for _ in range(1500)]
    assert values == [b(2, 3) for _ in range(1500)] and min(values) >= 2 and max(values) < 3
    assert {a.count((0, 2)) for _ in range(200)} == {0, 1, 2}


def test_sky_is_above_the_road():
    scene = draw([0, 3])
    labels = label_map(scene, rasterise(scene, (96, 128)))
    rows = np.broadcast_to(np.arange(96)[:, None], labels.shape)
    assert rows[labels == SKY].mean() < 35 and rows[labels == ROAD].mean() > 60
