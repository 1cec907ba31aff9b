"Physics of the photograph: each stage alone, and what none of them may do"
from dataclasses import replace

import numpy as np
import pytest

from synseg.camera import (Shot, add_clouds, add_grain, add_haze, add_shadow, blur, compress, develop, expose, illuminate, look, noise_tile, photograph, sample_shot,
                           shadow_mask, vignette)
from synseg.street import Street, View, label_map, polygons, rasterise
from synseg.things import LAMP, PAVEMENT, ROAD, SKY, TREE
from synseg.town import CAMERA, sample_street

SIZE = (48, 64)
DAY = Shot((.6, .64, .48), (1.0, 1.0, .9), (.35, .38, .42), extinction=1 / 200, cloud=.4, blur=.5, vignette=.3, noise=.02, quality=60)


@pytest.fixture(scope="module")
def scene(): return polygons(sample_street(np.random.default_rng([0, 2]), CAMERA))


@pytest.fixture(scope="module")
def ids(scene): return rasterise(scene, SIZE)


@pytest.fixture
def light(scene, ids): return expose(scene, ids, DAY)


def test_stages_set_to_nothing_do_nothing(scene, ids, light):
    sight, none = look(scene, ids, SIZE), replace(DAY, extinction=0.0)
    for after in (add_haze(light, sight, none), add_clouds(light, sight, 0.0), blur(light, 0.0), vignette(light, 0.0)): assert np.allclose(after, light, atol=1e-6)


def test_grain_and_shadow_touch_no_sky_and_only_darken_the_ground(scene, ids, light):
    sight = look(scene, ids, SIZE)
    sky = sight.labels == SKY
    assert np.array_equal(add_grain(light, sight)[sky], light[sky])
    shaded = add_shadow(light, scene, sight, DAY)
    changed = (shaded != light).any(-1)
    assert changed.any() and (shaded <= light + 1e-6).all()
    assert set(np.unique(sight.labels[changed])) <= {ROAD, PAVEMENT, TREE} and sight.flat[changed].all()


def test_lamps_shine_by_themselves(scene):
    assert (illuminate(scene, DAY)[scene.material == LAMP] == 1).all()


def test_haze_follows_the_distance(scene, ids, light):
    sight, shot = look(scene, ids, SIZE), replace(DAY, extinction=.02, airlight=(1.0, 1.0, 1.0))
    on = sight.labels != SKY
    assert np.allclose(add_haze(0 * light, sight, shot)[on][:, 0], 1 - np.exp(-.02 * sight.depth[on]), atol=1e-5)


def test_the_shadow_of_a_post_falls_where_the_sun_puts_it():
    street = Street(View(1.5, .4, 1.0))
    street.place("lamp", -3, 10, [(90, 90, 90), (60, 60, 60)], (6, 6, 1))
    mask = shadow_mask(polygons(street), (-.5**.5, .5**.5, 0), (200, 240))
    rows, cols = np.nonzero(mask)
    assert abs(rows.mean() - (.4 * 200 + 200 * 1.5 / 10)) < 2 and abs(cols.max() - (120 + 200 * 3 / 10)) < 8
    with pytest.raises(ValueError, match="above the horizon"): shadow_mask(polygons(street), (1, 0, 0), SIZE)


@pytest.mark.parametrize("sigma", [.1, .4, .8])
def test_blur_keeps_light_and_has_its_variance(sigma):
    point = np.zeros((15, 17, 3), np.float32)
    point[7, 8] = 1
    spread = blur(point, sigma)[..., 1]
    assert spread.sum() == pytest.approx(1, abs=1e-5)
    assert (spread * (np.arange(17) - 8)**2).sum() == pytest.approx(sigma**2, rel=1e-4)
    with pytest.raises(ValueError, match="0 to 0.8"): blur(point, sigma + 1)


def test_noise_grows_with_the_light():
    plain = replace(DAY, noise=.05)
    variance = [((develop(np.full((80, 80, 3), v, np.float32), plain, np.random.default_rng(0)) / 255.)**2).var() for v in (.1, .3, .6)]
    assert np.polyfit((.1, .3, .6), variance, 1)[0] == pytest.approx(.0025, rel=.15)


def test_tile_is_normal_and_without_seam():
    tile = noise_tile()
    assert abs(tile.mean()) < 1e-4 and tile.std() == pytest.approx(1, abs=1e-4)
    assert np.abs(tile[0] - tile[-1]).mean() == pytest.approx(np.abs(np.diff(tile, axis=0)).mean(), rel=.1)


def test_better_files_are_nearer_to_the_picture(scene, ids):
    picture = photograph(scene, ids, SIZE, replace(DAY, quality=100), np.random.default_rng(0))
    error = [np.abs(compress(picture, q).astype(int) - picture).mean() for q in (20, 60, 95)]
    assert error[0] > error[1] > error[2]


def test_labels_are_the_same_under_every_photographer(scene, ids):
    before, pictures = label_map(scene, ids).copy(), set()
    for i in range(8):
        rng = np.random.default_rng(i)
        pictures.add(photograph(scene, ids, SIZE, sample_shot(rng), rng).tobytes())
        assert np.array_equal(label_map(scene, ids), before)
    assert len(pictures) == 8


def test_a_photograph_can_be_taken_again(scene, ids):
    a, b = (photograph(scene, ids, SIZE, sample_shot(np.random.default_rng(4)), np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(a, b) and a.dtype == np.uint8 and a.shape == (*SIZE, 3)


def test_shots_are_sane():
    for i in range(300):
        s = sample_shot(np.random.default_rng(i))
        assert np.linalg.norm(s.sun) == pytest.approx(1) and s.sun[1] > .1
        assert 0 <= s.blur <= .8 and 0 <= s.noise < .1 and 20 <= s.quality <= 95 and min(s.gains) > 0
