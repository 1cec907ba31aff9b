"GridNet against its counts, a restatement with functions only, and the three networks that hide in it"
from collections import Counter
from itertools import product
from math import comb

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import scramble
from synseg.check import check_segmenter, count_parameters
from synseg.gridnet import (ENTRIES, PATHS, Block, GridNet, GridUnit, TotalDropout, all_paths, draw_grid, fcn_paths, frrn_paths,
                            grid_blocks, path_lengths, unet_paths)

GRIDS = [(5, (3, 3)), (1, (1, 1)), (3, (1, 2)), (2, (3, 1)), (4, (2, 2))]


def restated(x, t, rows, down, up, on):
    "The paper's grid with functions only, column by column; `t` is a state dict, `on(kind, row, column)` says what is switched on"
    def norm(x, name):
        return F.batch_norm(x, t[name + ".running_mean"], t[name + ".running_var"], t[name + ".weight"], t[name + ".bias"])
    def conv(x, name, stride=1, transposed=False):
        w, b = t[name + ".weight"], t[name + ".bias"]
        return F.conv_transpose2d(x, w, b, stride, 1, stride - 1) if transposed else F.conv2d(x, w, b, stride, 1)
    def pre(x, name, stride=1, transposed=False):
        x = conv(F.relu(norm(x, f"{name}.0")), f"{name}.2", stride, transposed)
        return conv(F.relu(norm(x, f"{name}.3")), f"{name}.5", 1, transposed)
    x = norm(x, "input_norm")
    for i in (0, 3): x = F.relu(norm(conv(x, f"stem.{i}"), f"stem.{i + 1}"))
    column = [None] * rows  # the maps of the column before
    for c in range(down + up):
        new = [None] * rows
        for r in range(rows) if c < down else range(rows - 1, -1, -1):
            parts = [x] if (r, c) == (0, 0) else []
            if c and column[r] is not None:
                if on("stream", r, c): parts.append(column[r])
                if on("residual", r, c): parts.append(pre(column[r], f"units.residual_{r}_{c}", 1, c > down))
            if c < down and r and new[r - 1] is not None and on("down", r, c):
                parts.append(pre(new[r - 1], f"units.down_{r}_{c}", 2))
            if c >= down and r < rows - 1 and new[r + 1] is not None and on("up", r, c):
                parts.append(pre(new[r + 1], f"units.up_{r}_{c}", 2, True))
            if parts: new[r] = torch.stack(parts).sum(0)
        column = new
    x = F.relu(norm(conv(column[0], "tail.0", 1, True), "tail.1"))
    return norm(conv(x, "tail.3", 1, True), "tail.4")


def routes(on, end, start=(0, 0)):
    if end == start: return [[]]
    return [route + [b] for b in on if b.target == end for route in routes(on, b.source, start)]


@pytest.mark.parametrize("channels, classes, count", [(3, 19, 13_181_097), (3, 11, 13_177_737), (1, 2, 13_175_042)])
def test_parameters_of_the_paper(channels, classes, count):
    with torch.device("meta"): net = GridNet(classes, channels)
    tail = lambda k: 16 * k * 9 + k + k * k * 9 + k + 4 * k
    stem = lambda c: 2 * c + c * 16 * 9
    assert count_parameters(net) == count == 13_181_097 - tail(19) + tail(classes) - stem(3) + stem(channels)


def test_entry():
    entry = ENTRIES["gridnet"]
    with torch.device("meta"): net = entry.build(entry.info.classes, entry.info.in_channels)
    assert count_parameters(net) == entry.info.parameters and entry.info.deviations


def test_maps_of_the_paper():
    with torch.device("meta"): maps = GridNet(19).nodes(torch.rand(1, 3, 400, 400, device="meta"))
    assert {k: tuple(m.shape[1:]) for k, m in maps.items()} == {(r, c): (16 * 2**r, 400 // 2**r, 400 // 2**r) for r, c in product(range(5), range(6))}


@pytest.mark.parametrize("rows, columns", GRIDS)
@pytest.mark.parametrize("paths", PATHS)
def test_same_as_the_restatement(rows, columns, paths):
    net = scramble(GridNet(3, 2, width=3, rows=rows, columns=columns, paths=paths))
    x = torch.rand(2, 2, 64, 80, dtype=torch.float64)
    with torch.no_grad():
        want = restated(x, net.state_dict(), rows, *columns, lambda *b: Block(*b) in PATHS[paths](rows, columns))
        torch.testing.assert_close(net(x), want)


@pytest.mark.parametrize("seed", range(8))
def test_same_as_the_restatement_with_random_switches(seed):
    rng = torch.Generator().manual_seed(seed)
    on = {b for b in grid_blocks(4, (2, 3)) if torch.rand((), generator=rng) < 0.7} | {Block("stream", 0, c) for c in range(1, 5)}
    net = scramble(GridNet(3, 1, width=2, rows=4, columns=(2, 3)).switch(on))
    x = torch.rand(1, 1, 64, 72, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(x), restated(x, net.state_dict(), 4, 2, 3, lambda *b: b in on))


@pytest.mark.parametrize("paths", ["fcn", "unet", "frrn"])
def test_what_is_off_gets_no_gradient_and_may_be_anything(paths):
    net = scramble(GridNet(3, width=4, paths=paths))
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    out = net(x)
    out.square().sum().backward()
    for b in grid_blocks():
        if b.kind == "stream": continue
        grads = [p.grad for p in net.unit(b).parameters()]
        assert all(g is None for g in grads) if b in net.off else all(g is not None for g in grads) and any(g.any() for g in grads)
        if b in net.off: nn.init.normal_(net.unit(b)[2].weight, std=50)
    assert torch.equal(net(x), out)


def test_presets():
    assert fcn_paths() < unet_paths() < all_paths() and fcn_paths() - frrn_paths() == set()
    assert Counter(b.kind for b in fcn_paths()) == dict(down=4, up=4, stream=5, residual=5)
    assert unet_paths() - fcn_paths() == {Block("stream", r, c) for r in range(4) for c in range(1, 6)}
    assert Counter(b.kind for b in frrn_paths()) == dict(down=12, up=12, stream=10, residual=10)


@pytest.mark.parametrize("rows, columns", GRIDS)
@pytest.mark.parametrize("paths", PATHS)
def test_paths_counted_and_walked(rows, columns, paths):
    on, (d, u) = PATHS[paths](rows, columns), columns
    walked = Counter(sum(b.kind != "stream" for b in r) for r in routes(on, (0, d + u - 1)))
    assert path_lengths(on, rows, columns) == walked
    if paths == "all":
        assert walked.total() == 2**(d + u - 1) * sum(comb(k + d - 1, k) * comb(k + u - 1, k) for k in range(rows))


def test_without_residuals_the_input_still_arrives():
    net = GridNet(2, width=2).eval()
    net.switch(b for b in grid_blocks() if b.kind != "residual")
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    net(x).square().sum().backward()
    assert x.grad.abs().amax() > 0 and path_lengths(net.on).total() == 371
    assert all(p.grad is not None for b in net.on if b.kind != "stream" for p in net.unit(b).parameters())


def test_total_dropout():
    drop, x = TotalDropout(0.25), torch.randn(3, 2, 4, 4)
    seen = [drop(x) for _ in range(2000)]
    assert all(torch.equal(y, x) or not y.any() for y in seen)
    assert abs(sum(bool(y.any()) for y in seen) / 2000 - 0.75) < 0.04
    torch.testing.assert_close(torch.stack(seen).mean(0), 0.75 * x, rtol=0.06, atol=0)
    assert drop.eval()(x) is x and TotalDropout(0.0)(x) is x and not TotalDropout(1.0)(x).any()
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match="probability"): TotalDropout(p)


def test_only_residual_branches_are_dropped():
    net = GridNet(2)
    where = [n for n, m in net.named_modules() if isinstance(m, TotalDropout)]
    assert len(where) == 25 and all(n.startswith("units.residual_") for n in where)
    assert all(m.p == 0.1 for m in net.modules() if isinstance(m, TotalDropout))


def test_dropped_branches_are_switched_off_branches():
    "In train mode, with the statistics of the batch: the draws of one step name a sub-network, and the output is its output"
    torch.manual_seed(3)
    net = GridNet(3, width=2, rows=3, dropout=0.4).double().train()
    x, drawn = torch.rand(2, 3, 64, 64, dtype=torch.float64), {}
    for b in grid_blocks(3):
        if b.kind == "residual": net.unit(b)[-1].register_forward_hook(lambda m, i, o, b=b: drawn.__setitem__(b, bool(o.any())))
    out = net(x)
    kept, fixed = set(drawn.values()), GridNet(3, width=2, rows=3, dropout=0.0).double().train()
    assert kept == {True, False}
    fixed.load_state_dict(net.state_dict())
    torch.testing.assert_close(fixed.switch(b for b in net.on if drawn.get(b, True))(x), out)


def test_without_dropout_modes_differ_by_batch_norm_only():
    "Give eval mode exactly the statistics of the batch, and nothing is left of the difference"
    net, sizes = GridNet(3, width=2, dropout=0.0).double(), {}
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.momentum = 1.0
        m.register_forward_hook(lambda m, i, o: sizes.__setitem__(m, i[0].numel() / i[0].shape[1]))
    x = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    out = net.train()(x)
    for m in norms: m.running_var *= (sizes[m] - 1) / sizes[m]  # PyTorch keeps the unbiased variance
    torch.testing.assert_close(net.eval()(x), out)


@pytest.mark.parametrize("rows, size", [(5, (64, 64)), (5, (67, 93)), (3, (66, 101)), (6, (65, 97)), (1, (64, 71))])
def test_odd_sizes(rows, size):
    net = GridNet(4, width=2, rows=rows).eval()
    assert net.stride == 2**(rows - 1) and net(torch.rand(1, 3, *size)).shape == (1, 4, *size)


def test_padding_is_a_mirror():
    net = GridNet(2, width=2).eval()
    x = torch.rand(1, 3, 70, 90)
    big = F.pad(x, (0, 6, 0, 10), mode="reflect")
    torch.testing.assert_close(net(x), net(big)[..., :70, :90])


@pytest.mark.parametrize("kind, transposed, size", [("residual", False, (9, 7)), ("residual", True, (9, 7)), ("down", False, (5, 4)), ("up", True, (18, 14))])
def test_units(kind, transposed, size):
    unit, x = GridUnit(3, 5 if kind != "residual" else 3, kind, transposed), torch.randn(2, 3, 9, 7)
    y = x.clone()
    assert unit(x).shape[-2:] == size and torch.equal(x, y)
    assert [type(m).__name__ for m in unit][:3] == ["BatchNorm2d", "ReLU", "ConvTranspose2d" if transposed else "Conv2d"]


def test_no_relu_after_a_sum_and_norms_at_both_ends():
    net = scramble(GridNet(3, width=2))
    with torch.no_grad():
        assert all((m < 0).any() for (r, c), m in net.nodes(torch.rand(1, 3, 64, 64).double()).items() if (r, c) != (0, 0))
    assert isinstance(net.tail[-1], nn.BatchNorm2d) and isinstance(net.input_norm, nn.BatchNorm2d)
    first_transposed = {b.column for b in grid_blocks() if b.kind == "residual" and isinstance(net.unit(b)[2], nn.ConvTranspose2d)}
    assert first_transposed == {4, 5}


@pytest.mark.parametrize("options, says", [
    (dict(width=0), "width: found 0"), (dict(rows=2.0), "rows: found 2.0"), (dict(columns=(3, 0)), "columns: found 0"), (dict(columns=3), "two numbers"),
    (dict(columns=(1, 2, 3)), "two numbers"), (dict(dropout=2), "probability"), (dict(paths="segnet"), "all, fcn, unet, frrn")])
def test_refuses_options(options, says):
    with pytest.raises(ValueError, match=says): GridNet(5, **{"width": 2, **options})


@pytest.mark.parametrize("on, says", [([], "no path"), ([Block("down", 1, 0)], "no path"), ([Block("up", 4, 5)], "no block"), ([("stream", 0, 6)], "no block")])
def test_refuses_switches(on, says):
    net = GridNet(2, width=2)
    with pytest.raises(ValueError, match=says): net.switch(on)
    assert not net.off  # left as it was


def test_switching_back():
    net = GridNet(2, width=2, paths="unet").eval()
    x = torch.rand(1, 3, 64, 64)
    out = net(x)
    assert not torch.allclose(net.switch()(x), out) and net.off == set()
    torch.testing.assert_close(net.switch(tuple(b) for b in unet_paths())(x), out, rtol=0, atol=0)


def test_contract(): check_segmenter(lambda: GridNet(5, width=4, dropout=0.0))


def test_paths_are_in_the_checkpoint(tmp_path):
    from synseg.zoo import create_model, load_model, save_model
    net = create_model("gridnet", 3, width=2, rows=3, columns=(2, 1), paths="frrn").eval()
    again = load_model(save_model(net, tmp_path / "g.safetensors"))
    x = torch.rand(1, 3, 64, 64)
    assert again.on == net.on == frrn_paths(3, (2, 1))
    assert torch.equal(again(x), net(x))


def test_overfits_one_batch():
    net = GridNet(3, width=4, rows=3)
    x = torch.rand(2, 3, 64, 64)
    y = F.avg_pool2d(x, 9, 1, 4).argmax(1)
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(net(x), y)
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_papers_size_takes_a_step():
    net = GridNet(19)
    x, y = torch.rand(1, 3, 64, 64), torch.randint(19, (1, 64, 64))
    opt = torch.optim.Adam(net.parameters(), 0.01)
    before = F.cross_entropy(net(x), y)
    before.backward(); opt.step()
    assert torch.isfinite(F.cross_entropy(net(x), y))
    with torch.no_grad(): assert net.eval()(torch.rand(1, 3, 70, 99)).shape == (1, 19, 70, 99)


def test_drawing_shows_what_is_on():
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.text import Annotation
    fig, ax = plt.subplots()
    draw_grid(ax, GridNet(2, width=2, paths="fcn"), lambda b: dict(color="red") if b.kind == "up" else {})
    arrows = [a for a in ax.get_children() if isinstance(a, Annotation)]
    assert len(arrows) == len(grid_blocks()) and sum(a.arrow_patch.get_linewidth() > 2 for a in arrows) == len(fcn_paths())
    fig.canvas.draw()
    plt.close(fig)
