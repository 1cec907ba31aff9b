"SpineNet against its counts, a restatement with functions only, torchvision's ResNet-50, and its own graph"
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synseg.check import check_segmenter, count_parameters
from synseg.conv import multiply_adds
from synseg.spinenet import (ENTRIES, R0_SP53, RESNET50, SPINENET49, TABLES, Block, Resample, SpineNet, Spine, checked, descendants,
                             draw_table, edges, merged, ordered)


def scramble(net):
    "Random weights, scales and running statistics, in double precision"
    for m in net.modules():
        if isinstance(m, nn.Conv2d): nn.init.normal_(m.weight, std=(1.5 / m.weight[0].numel())**0.5)
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.7, 1.3)
            nn.init.normal_(m.bias, std=0.2)
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
    return net.double().eval()


class _Finest(nn.Module):
    def __init__(self, spine): super().__init__(); self.spine = spine
    def forward(self, x): return self.spine(x)[3]


def restated(x, t, rows, width, alpha, repeats):
    "The authors' loop with functions only; `rows` are (level, is bottleneck, parents, output), `t` is a state dict"
    unit = {2: 1, 3: 2, 4: 4, 5: 4, 6: 4, 7: 4}
    def cn(x, conv, norm, stride=1, act=True):
        w = t[conv + ".weight"]
        x = F.conv2d(x, w, None, stride, w.shape[-1] // 2)
        x = F.batch_norm(x, t[norm + ".running_mean"], t[norm + ".running_var"], t[norm + ".weight"], t[norm + ".bias"], eps=1e-3)
        return x.clamp(min=0) if act else x
    def block(x, at, bottleneck):
        n, y = 3 if bottleneck else 2, x
        for k in range(1, n + 1): y = cn(y, f"{at}.conv{k}", f"{at}.bn{k}", act=k < n)
        if at + ".downsample.0.weight" in t: x = cn(x, at + ".downsample.0", at + ".downsample.1", act=False)
        return (x + y).clamp(min=0)
    x = F.max_pool2d(cn(x, "stem.0.0", "stem.0.1", 2), 3, 2, 1)
    net, out, outdegree = [], {}, []
    for i, (level, bottleneck, parents, output) in enumerate(rows):
        if len(parents) == 2:
            x = 0
            for p in parents:
                at, y = f"resample.{p}_{i}.", cn(net[p], f"resample.{p}_{i}.0.0", f"resample.{p}_{i}.0.1")
                assert y.shape[1] == int(alpha * width * unit[rows[p][0]])
                if level > rows[p][0]:
                    y = cn(y, at + "1.0", at + "1.1", 2)
                    for _ in range(level - rows[p][0] - 1): y = F.max_pool2d(y, 3, 2, 1)
                for _ in range(rows[p][0] - level): y = y.repeat_interleave(2, 2).repeat_interleave(2, 3)
                last = at + str(1 + (level != rows[p][0]) + max(level - rows[p][0] - 1, 0))
                x = x + cn(y, last + ".0", last + ".1", act=False)
                outdegree[p] += 1
            if output:
                for j, m in enumerate(net):
                    if outdegree[j] == 0 and m.shape == x.shape: x, outdegree[j] = x + m, 1
            x = x.clamp(min=0)
        elif parents: x = net[parents[0]]
        for r in range(repeats): x = block(x, f"blocks.{i}.{r}", bottleneck)
        net.append(x); outdegree.append(0)
        if len(parents) == 1: outdegree[parents[0]] += 1
        if output: out[level] = cn(x, f"endpoints.{level}.0", f"endpoints.{level}.1")
    return out


def as_rows(table): return [(b.level, b.kind == "bottleneck", b.parents, b.output) for b in table]


def retina_head(features=256, classes=90, anchors=9, levels=5):
    "RetinaNet's two towers as in the authors' code: convolutions shared over the levels, batch norms not"
    tower = 4 * (features**2 * 9 + levels * 2 * features)
    return 2 * tower + (features * 9 + 1) * anchors * (classes + 4)


@pytest.mark.parametrize("options, backbone, printed", [({}, 21_831_488, "28.5"), (dict(repeats=2), 36_262_976, "43.0"), (dict(repeats=3, alpha=1.0), 60_247_616, "66.9")])
def test_parameters_of_the_paper(options, backbone, printed):
    "SpineNet-49, -96 and -143 with the detector's head: 28.5M, 43.0M and 66.9M"
    with torch.device("meta"): net = Spine(**options)
    assert count_parameters(net) == backbone and f"{(backbone + retina_head()) / 1e6:.1f}" == printed
    assert retina_head() == 6_689_102


def test_multiply_adds_of_the_paper():
    with torch.device("meta"): found = multiply_adds(_Finest(Spine()), (640, 640)).multiply_adds
    towers = sum((640 // 2**n)**2 for n in range(3, 8)) * 9 * 256 * (8 * 256 + 9 * 94)
    assert found == 28_261_990_400 and abs((found + towers) / 85.4e9 - 1) < 0.005


def test_entry():
    entry = ENTRIES["spinenet49"]
    with torch.device("meta"): net = entry.build(entry.info.classes, entry.info.in_channels)
    assert count_parameters(net) == entry.info.parameters == 21_831_488 + 295_168 + 73_856 + 65 * 19 and entry.info.deviations


def test_sizes_of_the_endpoints():
    with torch.device("meta"): found = Spine()(torch.rand(2, 3, 640, 640, device="meta"))
    assert {n: tuple(m.shape) for n, m in found.items()} == {n: (2, 256, s, s) for n, s in zip(range(3, 8), (80, 40, 20, 10, 5))}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("options", [{}, dict(repeats=2, alpha=1.0)])
def test_same_as_the_restatement(name, options):
    torch.manual_seed(1)
    net = scramble(Spine(TABLES[name], 2, 4, 8, **options))
    x = torch.rand(2, 2, 128, 256, dtype=torch.float64)
    with torch.no_grad():
        got, want = net(x), restated(x, net.state_dict(), as_rows(TABLES[name]), 4, options.get("alpha", 0.5), options.get("repeats", 1))
    assert got.keys() == want.keys()
    for n in got: torch.testing.assert_close(got[n], want[n])


def test_a_chain_is_torchvisions_resnet50():
    "The table of ResNet-50 makes ResNet-50: weights carried in order, outputs of every stage equal"
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = scramble(torchvision.models.resnet50(weights=None))
    ours = Spine(RESNET50, widths={2: 1, 3: 2, 4: 4, 5: 8}).double().eval()
    for m in ours.modules():
        if isinstance(m, nn.BatchNorm2d): m.eps = 1e-5
    trunk = [v for k, v in theirs.state_dict().items() if not k.startswith("fc.")]
    own = {k: v for k, v in ours.state_dict().items() if not k.startswith("endpoints.")}
    assert [v.shape for v in own.values()] == [v.shape for v in trunk]
    ours.load_state_dict(dict(zip(own, trunk)), strict=False)
    x = torch.rand(1, 3, 97, 129, dtype=torch.float64)
    with torch.no_grad():
        maps, y = ours.maps(x), theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for last, stage in zip((2, 6, 12, 15), (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4)):
            y = stage(y)
            torch.testing.assert_close(maps[last], y, rtol=1e-10, atol=1e-10)


def test_the_table_is_the_papers():
    assert [SPINENET49[i].level for i in range(17)] == [2, 2, 2, 4, 3, 4, 6, 4, 5, 7, 5, 5, 4, 3, 5, 7, 6]
    assert [i for i, b in enumerate(SPINENET49) if b.kind == "residual"] == [3, 6, 8, 9] and merged(SPINENET49) == {14: (11,)}
    assert len(edges(SPINENET49)) == 1 + 30 + 1


@pytest.mark.parametrize("table, count", [(SPINENET49, (1, 2, 4, 4, 2, 2)), (R0_SP53, (1, 4, 6, 2, 1, 1)), (ordered(SPINENET49), (1, 2, 4, 4, 2, 2))])
def test_blocks_of_a_level(table, count):
    "The paper's table 1 counts blocks by level; an inner block reads from the five before it, as the search had to"
    assert tuple(sum(b.level == n for b in table[2:]) for n in range(2, 8)) == count
    assert [b.output for b in table] == [False] * 12 + [True] * 5
    assert all(i - p <= 5 for i, b in enumerate(table) if not b.output for p in b.parents)
    assert {j for j, _ in edges(table)} >= set(range(12)) and checked(table) == table


def test_ordered_only_reorders():
    for table in (SPINENET49, R0_SP53):
        new = ordered(table)
        assert sorted(b[:2] + b[3:] for b in new) == sorted(b[:2] + b[3:] for b in table) and merged(new) == {}
        inner = [b.level for b in new if not b.output]
        assert inner == sorted(inner) and [b.level for b in new if b.output] == [7, 6, 5, 4, 3]


@pytest.mark.parametrize("name", TABLES)
def test_what_the_graph_reaches_changes_and_nothing_else(name):
    torch.manual_seed(2)
    table, x = TABLES[name], torch.rand(1, 3, 128, 128, dtype=torch.float64)
    net = scramble(Spine(table, 3, 4, 8))
    with torch.no_grad():
        before = net.maps(x)
        for i in range(len(table)):
            hook = net.blocks[i].register_forward_hook(lambda m, inputs, out: out + torch.rand_like(out))
            changed = {j for j, (a, b) in enumerate(zip(before, net.maps(x))) if not torch.equal(a, b)}
            hook.remove()
            assert changed == {i} | descendants(table, i)


@pytest.mark.parametrize("name", TABLES)
def test_gradients_come_from_ancestors_only(name):
    torch.manual_seed(3)
    table = TABLES[name]
    net = scramble(Spine(table, 3, 16, 8))  # wide enough that no ReLU is off everywhere
    maps = net.maps(torch.rand(1, 3, 128, 128, dtype=torch.float64))
    for i in range(len(table)):
        net.zero_grad(set_to_none=True)
        maps[i].square().sum().backward(retain_graph=True)
        felt = {j for j, b in enumerate(net.blocks) if any(p.grad is not None and p.grad.any() for p in b.parameters())}
        assert felt == {j for j in range(len(table)) if j == i or i in descendants(table, j)}


@pytest.mark.parametrize("down", range(-5, 6))
def test_resample_sizes_and_what_it_is_underneath(down):
    "Every pair of levels; with convolutions that pass on or average, it is nearest upsampling, or a mean and then maxima"
    there, back = 2**max(-down, 0), 2**max(down, 0)
    net, x = Resample(3, 3, 3, down).double().eval(), torch.rand(2, 3, 2 * back, 3 * back, dtype=torch.float64)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.eps = 0.0
        if isinstance(m, nn.Conv2d): m.weight.data = torch.eye(3, dtype=torch.float64)[..., None, None].expand_as(m.weight) / m.kernel_size[0]**2
    want = F.avg_pool2d(x, 3, 2, 1) if down > 0 else F.interpolate(x, scale_factor=float(there), mode="nearest")
    for _ in range(down - 1): want = F.max_pool2d(want, 3, 2, 1)
    got = net(x)
    assert got.shape[-2:] == (2 * there, 3 * there)
    torch.testing.assert_close(got, want)
    assert Resample(8, 2, 5, down).eval()(torch.rand(1, 8, 2 * back, 3 * back)).shape == (1, 5, 2 * there, 3 * there)
    assert (net(-x) == 0).all()  # the first 1x1 ends in a ReLU
    net[-1][1].bias.data -= 10
    assert (net(x) < 0).all()  # the last one does not


def test_alpha_is_of_the_inner_width():
    net = Spine(width=8)
    for i, b in enumerate(SPINENET49):
        for p in b.parents if len(b.parents) == 2 else ():
            assert net.resample[f"{p}_{i}"][0].out_channels == 8 * {2: 1, 3: 2}.get(SPINENET49[p].level, 4) // 2


def test_the_extra_edge_counts():
    torch.manual_seed(0)
    net, x = scramble(Spine(width=4)), torch.rand(1, 3, 128, 128, dtype=torch.float64)
    with torch.no_grad():
        out = net(x)[5]
        net.merged = {}
        assert not torch.allclose(net(x)[5], out)


@pytest.mark.parametrize("size", [(64, 64), (129, 200), (97, 300), (256, 128)])
def test_odd_sizes(size):
    net = SpineNet(4, width=2).eval()
    assert net.stride == 128 and net(torch.rand(1, 3, *size)).shape == (1, 4, *size)


def test_padding_is_to_multiples_of_128():
    net = SpineNet(3, width=2).eval()
    x = torch.rand(1, 3, 100, 140)
    torch.testing.assert_close(net(x), net(F.pad(x, (0, 116, 0, 28), mode="reflect"))[..., :100, :140])


def test_the_head_is_a_mean():
    net, x = SpineNet(3, width=2), torch.rand(1, 8, 16, 24)
    maps = {n: F.avg_pool2d(x, 2**(n - 3)) for n in range(3, 6)}
    want = sum(F.interpolate(m, (16, 24), mode="bilinear") for m in maps.values()) / 3
    torch.testing.assert_close(net.fuse(maps), want)
    torch.testing.assert_close(net.fuse({n: torch.full((1, 8, 2**(7 - n), 2**(7 - n)), 2.0) for n in range(3, 8)}), torch.full((1, 8, 16, 16), 2.0))


def test_contract():
    for table in TABLES: check_segmenter(lambda: SpineNet(5, width=4, table=table))


def test_rows_as_lists_and_fewer_levels():
    "What a checkpoint's header makes of a table: lists; and a table that stops at level 5 pads to 32"
    rows = [[2, "bottleneck", [], False], [2, "bottleneck", [0], False], [3, "residual", [0, 1], True], [5, "residual", [1, 2], True]]
    net = SpineNet(2, width=4, table=rows).eval()
    assert net.stride == 32 and net(torch.rand(1, 3, 70, 99)).shape == (1, 2, 70, 99)


def test_one_image_in_training():
    net = SpineNet(2, width=2).train()
    with pytest.raises(ValueError, match="batches of two or more, larger images"): net(torch.rand(1, 3, 64, 64))
    assert net(torch.rand(1, 3, 64, 129)).shape == (1, 2, 64, 129) and net(torch.rand(2, 3, 64, 64)).shape == (2, 2, 64, 64)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.eval()
    net(torch.rand(1, 3, 64, 64))


A, Z = Block(2, "bottleneck"), Block(3, "bottleneck", (0,), True)


@pytest.mark.parametrize("table, says", [
    ([A._replace(kind="mbconv"), Z], "row 0 .* bottleneck or residual"), ([A._replace(level=8), Z], "from 2 to 7"), ([A, Z._replace(parents=(1,))], "earlier rows"),
    ([A, Z._replace(parents=())], "two different parents"), ([A, Z._replace(parents=(0, 0))], "two different parents"), ([A, Z, Z._replace(level=2, parents=(1,))], "finer"),
    ([A, Z, Z], "each of its own level"), ([A], "outputs at levels \\[\\]"), ([A, A._replace(parents=(0,)), Z], "rows \\[1\\] are read by nobody")])
def test_refuses_tables(table, says):
    with pytest.raises(ValueError, match=says): Spine(table, width=2)


@pytest.mark.parametrize("options, says", [(dict(table="resnet"), "spinenet49, ordered, r0_sp53"), (dict(width=0), "width is 0"), (dict(repeats=1.5), "repeats is 1.5"),
                                           (dict(alpha=0.0), "alpha is 0.0"), (dict(width=True), "width is True")])
def test_refuses_options(options, says):
    with pytest.raises(ValueError, match=says): SpineNet(3, **{"width": 2, **options})


@pytest.mark.parametrize("seed", range(4))
def test_random_tables_are_networks(seed):
    "Any permutation with any two parents: builds, equals the restatement, and every block gets a gradient"
    rng = torch.Generator().manual_seed(seed)
    def pick(n): return int(torch.randint(n, (), generator=rng))
    levels = [3 + pick(5) for _ in range(4)] + [3 + k for k in torch.randperm(5, generator=rng).tolist()]
    table = [Block(2, "bottleneck"), Block(2, "bottleneck", (0,))]
    for k, level in enumerate(levels):
        pairs = list(combinations(range(len(table)), 2))
        table.append(Block(level, ("bottleneck", "residual")[pick(2)], pairs[pick(len(pairs))], k >= 4))
    alone = {j for j, b in enumerate(table) if not b.output} - {j for j, _ in edges(tuple(table))}
    if alone:
        with pytest.raises(ValueError, match="read by nobody"): checked(table)
        return
    net, x = scramble(Spine(table, 1, 2, 4)), torch.rand(2, 1, 128, 128, dtype=torch.float64)
    got, want = net(x), restated(x, net.state_dict(), as_rows(table), 2, 0.5, 1)
    for n in got: torch.testing.assert_close(got[n], want[n])


def test_overfits_one_batch():
    torch.manual_seed(0)
    net = SpineNet(3, width=8)
    x = F.interpolate(torch.rand(2, 3, 6, 6), (128, 128), mode="bicubic").clamp(0, 1)
    y = x.argmax(1)
    opt, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(30):
        loss = F.cross_entropy(net(x), y)
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_table_is_in_the_checkpoint(tmp_path):
    from synseg.zoo import create_model, load_model, save_model
    net, x = create_model("spinenet49", 3, width=2, table="ordered").eval(), torch.rand(1, 3, 64, 64)
    again = load_model(save_model(net, tmp_path / "s.safetensors")).eval()
    assert again.encoder.table == net.encoder.table == ordered(SPINENET49) and torch.equal(again(x), net(x))
    assert len(list(net.encoder_parameters())) == len(list(net.encoder.parameters()))


def test_drawing():
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.text import Annotation
    fig, ax = plt.subplots()
    draw_table(ax, SPINENET49, loose=(Block(5, "residual"),))
    arrows = [a for a in ax.get_children() if isinstance(a, Annotation)]
    assert len(arrows) == len(edges(SPINENET49)) and sum(a.arrow_patch.get_linestyle() == "--" for a in arrows) == 1
    assert len(ax.lines) == 18
    fig.canvas.draw()
    plt.close(fig)
