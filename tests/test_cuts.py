"Cuts against brute force: every energy that a flow claims to be least is compared with all labelings"
import itertools

import numpy as np
import pytest

from synseg.cuts import LARGEST, binary_cut, expand, expansion_move, pairwise_energy, potts_cut, source_side

RNG = np.random.default_rng


def random_graph(rng, nodes, edges):
    ends = np.stack([rng.permutation(nodes)[:2] for _ in range(edges)], 1) if edges else np.zeros((2, 0), int)
    return ends, rng.exponential(1.0, edges)


def all_labelings(nodes, labels=2):
    return np.array(list(itertools.product(range(labels), repeat=nodes)))


def potts_energy(x, difference, ends, weights):
    return (difference * x).sum() + (weights * (x[ends[0]] != x[ends[1]])).sum()


@pytest.mark.parametrize("seed", range(30))
def test_potts_cut_is_the_least_of_all(seed):
    rng = RNG(seed)
    nodes = int(rng.integers(1, 10))
    ends, weights = random_graph(rng, nodes, 0 if nodes < 2 else int(rng.integers(0, 3 * nodes)))
    difference = rng.normal(0, 2, nodes)
    least = min(potts_energy(x, difference, ends, weights) for x in all_labelings(nodes))
    found = potts_cut(difference, ends, weights)
    assert found.dtype == np.int64 and set(found) <= {0, 1}
    assert potts_energy(found, difference, ends, weights) == pytest.approx(least, abs=1e-6)


@pytest.mark.parametrize("seed", range(15))
def test_with_integer_costs_the_cut_is_exact_and_has_the_fewest_ones(seed):
    rng = RNG(seed)
    ends, _ = random_graph(rng, 7, 12)
    weights, difference = rng.integers(0, 3, 12), rng.integers(-3, 4, 7)
    every = all_labelings(7)
    energies = np.array([potts_energy(x, difference, ends, weights) for x in every])
    found, best = potts_cut(difference, ends, weights), every[energies == energies.min()]
    assert potts_energy(found, difference, ends, weights) == energies.min()
    assert found.sum() == best.sum(1).min() and (found <= best).all()


def test_the_flow_equals_the_cut():
    rng = RNG(3)
    ends, weights = random_graph(rng, 8, 15)[0], rng.integers(0, 9, 15)
    source, sink = rng.integers(0, 20, 8), rng.integers(0, 20, 8)
    cost = lambda side: source[~side].sum() + sink[side].sum() + weights[side[ends[0]] != side[ends[1]]].sum()
    assert cost(source_side(source, sink, ends, weights)) == min(cost(x.astype(bool)) for x in all_labelings(8))


def test_capacities_may_reach_the_limit_of_int32():
    side = source_side(np.array([LARGEST, 0]), np.array([0, LARGEST - 1]), np.array([[0], [1]]), np.array([LARGEST]))
    assert side.tolist() == [True, True]
    side = source_side(np.array([LARGEST - 1, 0, 5]), np.array([0, LARGEST, 5]), np.array([[0], [1]]), np.array([LARGEST]))
    assert side.tolist() == [False, False, False]


@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e12])
def test_the_unit_of_energy_does_not_matter(factor):
    rng = RNG(1)
    ends, weights = random_graph(rng, 9, 16)
    difference = rng.normal(0, 2, 9)
    assert (potts_cut(difference * factor, ends, weights * factor) == potts_cut(difference, ends, weights)).all()


def test_infinite_costs_are_obeyed():
    chain, weights = np.array([[0, 1, 2], [1, 2, 3]]), np.array([1.0, 1e-3, 1.0])
    assert potts_cut(np.array([-np.inf, 0, 0, np.inf]), chain, weights).tolist() == [1, 1, 0, 0]
    assert potts_cut(np.array([np.inf, -0.5, 0, 0]), chain, weights).tolist() == [0, 0, 0, 0]


def test_parallel_edges_and_loops_add_up():
    difference, pair = np.array([-1.5, 1.2, 0.1]), np.array([[0, 1, 0, 1, 2], [1, 0, 1, 2, 2]])
    weights = np.array([0.9, 0.8, 0.7, 0.3, 5.0])
    least = min(potts_energy(x, difference, pair, weights) for x in all_labelings(3))
    assert potts_energy(potts_cut(difference, pair, weights), difference, pair, weights) == pytest.approx(least)


def test_zero_weights_leave_every_node_to_itself():
    difference = RNG(0).normal(size=50)
    ends = np.stack([np.arange(49), np.arange(1, 50)])
    assert (potts_cut(difference, ends, np.zeros(49)) == (difference < 0)).all()
    assert (potts_cut(difference, np.zeros((2, 0), int), np.zeros(0)) == (difference < 0)).all()
    assert potts_cut(np.zeros(5), np.zeros((2, 0), int), np.zeros(0)).tolist() == [0] * 5
    assert potts_cut(np.zeros(0), np.zeros((2, 0), int), np.zeros(0)).shape == (0,)


def test_bad_costs_say_what_is_wrong():
    one = np.array([[0], [1]])
    with pytest.raises(ValueError, match="NaN found among the costs"):
        potts_cut(np.array([np.nan, 0]), one, np.ones(1))
    with pytest.raises(ValueError, match="weights of 0 or more"):
        potts_cut(np.zeros(2), one, -np.ones(1))
    with pytest.raises(ValueError, match="weights of 0 or more"):
        potts_cut(np.zeros(2), one, np.array([np.nan]))
    with pytest.raises(ValueError, match="edge 0 has the table.*submodular"):
        binary_cut(np.zeros((2, 2)), one, np.array([[[1.0, 0], [0, 1]]]))


@pytest.mark.parametrize("seed", range(20))
def test_binary_cut_of_any_submodular_tables(seed):
    rng = RNG(seed)
    ends, _ = random_graph(rng, 7, 11)
    tables = rng.normal(size=(11, 2, 2))
    tables[:, 0, 1] += np.maximum(0, tables[:, 0, 0] + tables[:, 1, 1] - tables[:, 0, 1] - tables[:, 1, 0])
    costs = rng.normal(size=(2, 7))
    energy = lambda x: costs[x, np.arange(7)].sum() + tables[np.arange(11), x[ends[0]], x[ends[1]]].sum()
    assert energy(binary_cut(costs, ends, tables)) == pytest.approx(min(map(energy, all_labelings(7))), abs=1e-6)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["potts", "line", "truncated"])
def test_a_move_is_the_best_of_all_its_kind(seed, kind):
    rng = RNG(seed)
    line = np.abs(np.subtract.outer(np.arange(4), np.arange(4))).astype(float)
    distance = dict(potts=None, line=line, truncated=np.minimum(line, 2))[kind]
    ends, weights = random_graph(rng, 7, 11)
    costs, labels, alpha = rng.normal(0, 1.5, (4, 7)), rng.integers(0, 4, 7), int(rng.integers(4))
    energy = lambda x: pairwise_energy(costs, x, ends, weights, distance)
    least = min(energy(np.where(switch == 1, alpha, labels)) for switch in all_labelings(7))
    moved = expansion_move(costs, labels, alpha, ends, weights, distance)
    assert ((moved == labels) | (moved == alpha)).all()
    assert energy(moved) == pytest.approx(least, abs=1e-6)


@pytest.mark.parametrize("seed", range(15))
def test_expansion_ends_within_its_bound_and_two_labels_are_exact(seed):
    rng = RNG(seed)
    for labels, nodes in ((3, 6), (2, 9)):
        ends, weights = random_graph(rng, nodes, 12)
        costs = rng.normal(size=(labels, nodes))
        energy = lambda x: pairwise_energy(costs, x, ends, weights)
        least = min(map(energy, all_labelings(nodes, labels)))
        found, history = expand(costs, rng.integers(0, labels, nodes), ends, weights)
        assert all(b <= a for a, b in zip(history, history[1:])) and history[-1] == pytest.approx(energy(found))
        twice = min(2 * energy(x) - costs[x, np.arange(nodes)].sum() for x in all_labelings(nodes, labels))
        assert least - 1e-6 <= energy(found) <= twice + 1e-6
        if labels == 2:
            assert energy(found) == pytest.approx(least, abs=1e-6)


def test_expansion_avoids_what_is_impossible_and_keeps_its_input():
    rng = RNG(0)
    ends = np.stack([np.arange(19), np.arange(1, 20)])
    costs, start = rng.exponential(1.0, (3, 20)), np.full(20, 2)
    costs[0, ::2], costs[2, 5] = np.inf, np.inf
    found, history = expand(costs, start, ends, np.full(19, 0.7))
    assert (start == 2).all() and np.isfinite(history[-1])
    assert (found[::2] != 0).all() and found[5] != 2


def test_a_distance_that_is_no_metric_is_refused():
    square = np.subtract.outer(np.arange(3), np.arange(3)) ** 2.0
    with pytest.raises(ValueError, match="metric"):
        expansion_move(np.zeros((3, 2)), np.array([0, 2]), 1, np.array([[0], [1]]), np.ones(1), square)
