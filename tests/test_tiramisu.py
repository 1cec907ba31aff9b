"FC-DenseNet against the paper's tables, an independent restatement, and its memory-saving twin"
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from synseg.blocks import DenseBlock, DenseLayer
from synseg.check import check_segmenter, count_parameters, trace
from synseg.tiramisu import (ENTRIES, BatchStatisticsNorm, FCDenseNet, LeanDenseBlock, TransitionDown, TransitionUp,
                             fc_densenet56, fc_densenet67, fc_densenet103, frozen_statistics, he_uniform, recomputed)
from synseg.zoo import create_model, load_model, model_options, save_model

HUNDRED = (4, 5, 7, 10, 12, 15, 12, 10, 7, 5, 4)
TINY = dict(width=5, growth=3)


def restated(x, state, layers, statistics):
    "Table 2 with functions and lists of maps only; `statistics`: the batch's own, or the running ones"
    half, D = len(layers) // 2, state

    def norm(x, name):
        mean, var = D[name + ".running_mean"], D[name + ".running_var"]
        if statistics: mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        a = D[name + ".weight"] / (var + 1e-4).sqrt()
        return (x - mean[:, None, None]) * a[:, None, None] + D[name + ".bias"][:, None, None]

    def layer(maps, name):
        return F.conv2d(F.relu(norm(torch.cat(maps, 1), name + ".0")), D[name + ".2.weight"], D[name + ".2.bias"], padding=1)

    def block(maps, n, name):
        "All maps the block has seen, and those it has made"
        made = []
        for i in range(n): made.append(layer(maps + made, f"{name}.{i}"))
        return maps + made, made

    maps, skips = [F.conv2d(x, D["first.weight"], D["first.bias"], padding=1)], []
    for i, n in enumerate(layers[:half]):
        maps, _ = block(maps, n, f"down.{i}")
        skips.append(maps)
        z = F.relu(norm(torch.cat(maps, 1), f"pool.{i}.0"))
        z = torch.einsum("oi,nihw->nohw", D[f"pool.{i}.2.weight"][..., 0, 0], z) + D[f"pool.{i}.2.bias"][:, None, None]
        maps = [F.max_pool2d(z, 2)]
    maps, made = block(maps, layers[half], "bottom")
    for i, n in enumerate(layers[half + 1:]):
        skip = skips.pop()
        z = F.conv_transpose2d(torch.cat(made, 1), D[f"grow.{i}.up.weight"], D[f"grow.{i}.up.bias"], stride=2)
        h, w = skip[0].shape[-2:]
        maps, made = block([z[..., :h, :w], *skip], n, f"up.{i}")
    return F.conv2d(torch.cat(maps, 1), D["score.weight"], D["score.bias"])


def shaken(net):
    "Random weights, shifts, scales and statistics, in double precision"
    with torch.no_grad():
        for name, t in net.state_dict().items():
            if "running_var" in name: t.uniform_(0.5, 2)
            elif t.is_floating_point() and t.ndim == 1: t.normal_(1 if name.endswith("0.weight") else 0, 0.3)
    return net.double()


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (97, 70)])
@pytest.mark.parametrize("layers", [(2, 3, 1, 2, 1), (1,) * 11])
def test_same_as_the_restatement(layers, size, statistics):
    torch.manual_seed(0)
    net = shaken(FCDenseNet(4, 2, layers, width=5, growth=3, batch_statistics=statistics)).eval()
    x = torch.rand(2, 2, *size, dtype=torch.float64)
    with torch.no_grad(): torch.testing.assert_close(net(x), restated((x - 0.5) / 0.25, net.state_dict(), layers, statistics))


def test_train_mode_is_the_restatement_with_batch_statistics():
    torch.manual_seed(0)
    net = shaken(fc_densenet56(3, dropout=0.0, **TINY)).train()
    x = torch.rand(2, 3, 65, 64, dtype=torch.float64)
    with torch.no_grad(): torch.testing.assert_close(net(x), restated((x - 0.5) / 0.25, net.state_dict(), (4,) * 11, True))


@pytest.mark.parametrize("build, count, with_statistics, convolutions", [
    (fc_densenet56, 1_376_795, 1_397_963, 56), (fc_densenet67, 3_463_243, 3_502_923, 67), (fc_densenet103, 9_322_091, 9_425_163, 103)])
def test_counts(build, count, with_statistics, convolutions):
    with torch.device("meta"): net = build(11)
    statistics = sum(b.numel() for n, b in net.named_buffers() if n.endswith(("running_mean", "running_var")))
    assert (count_parameters(net), count_parameters(net) + statistics) == (count, with_statistics)
    assert sum(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in net.modules()) == convolutions
    assert ENTRIES[build.__name__].info.parameters == count and ENTRIES[build.__name__].info.deviations


def test_counts_do_not_depend_on_the_options_that_change_no_weight():
    with torch.device("meta"):
        assert {count_parameters(fc_densenet67(11, batch_statistics=a, checkpoint=b)) for a in (0, 1) for b in (0, 1)} == {3_463_243}
        assert count_parameters(fc_densenet56(11, keep_input=True)) == 46_966_715


def test_layer_table():
    with torch.device("meta"): net = fc_densenet103(11)
    rows = {r.module: r for d in (1, 2) for r in trace(net, torch.rand(1, 3, 224, 224, device="meta"), depth=d)}
    names = [*(f"down.{i}" for i in range(5)), "bottom", *(f"up.{i}" for i in range(5))]
    assert rows["first"].output == (1, 48, 224, 224) and rows["score"].output == (1, 11, 224, 224)
    assert [rows[n].inputs[1] + k * 16 for n, k in zip(names, HUNDRED)] == [112, 192, 304, 464, 656, 896, 1088, 816, 576, 384, 256]
    assert [rows[n].output[1] for n in names[5:]] == [16 * k for k in HUNDRED[5:10]] + [256]  # new maps only, the last its stack
    assert [rows[n].output[-1] for n in names] == [224, 112, 56, 28, 14, 7, 14, 28, 56, 112, 224]
    assert [rows[f"grow.{i}"].output[1] for i in range(5)] == [16 * k + s for k, s in zip(HUNDRED[5:10], (656, 464, 304, 192, 112))]


@pytest.mark.parametrize("options", [{}, dict(batch_statistics=True)])
def test_width_scales_all(options):
    with torch.device("meta"): a, b = fc_densenet67(11, width=24, **options), fc_densenet67(11, width=24, growth=8, **options)
    assert [p.shape for p in a.parameters()] == [p.shape for p in b.parameters()]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("block", [DenseBlock, LeanDenseBlock])
def test_dense_block_is_the_loop_over_stacks(block, keep):
    torch.manual_seed(0)
    made, x = block(5, 4, 3, keep_input=keep).eval(), torch.randn(2, 5, 6, 7)
    stack = x
    for layer in made: stack = torch.cat([stack, layer(stack)], 1)
    torch.testing.assert_close(made(x), stack if keep else stack[:, 5:], rtol=0, atol=0)
    assert made.out_channels == made(x).shape[1] == 12 + 5 * keep


def test_every_layer_reads_all_before_it():
    torch.manual_seed(0)
    net, x, seen = DenseBlock(4, 6, 2, dropout=0).eval(), torch.randn(1, 4, 5, 5), {}
    for j, layer in enumerate(net): layer.register_forward_pre_hook(lambda m, args, j=j: seen.__setitem__(j, args[0].detach()))
    with torch.no_grad(): net(x)
    for j, layer in enumerate(net):
        z = seen[j].clone().requires_grad_()
        layer(z).abs().sum().backward()
        assert z.shape[1] == 4 + 2 * j and (z.grad.abs().amax((0, 2, 3)) > 0).all()
    for i in range(6):  # a change of layer i's output reaches every later one and no earlier one
        handle, later = net[i].register_forward_hook(lambda m, a, out: out + 1), {}
        hooks = [layer.register_forward_hook(lambda m, a, out, j=j: later.__setitem__(j, out)) for j, layer in enumerate(net)]
        with torch.no_grad(): net(x)
        handle.remove()
        changed = dict(later)
        with torch.no_grad(): net(x)
        assert [j for j in range(6) if j != i and not torch.equal(changed[j], later[j])] == list(range(i + 1, 6))
        for h in hooks: h.remove()


def step(net, x, bf16=False):
    "Loss, gradients, buffers and the state of the generator after one step in train mode"
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16): z = net.train()(x)
    z.float().square().mean().backward()
    return [z.detach(), *(p.grad for p in net.parameters()), *net.buffers(), torch.get_rng_state()]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("options", [{}, dict(batch_statistics=True), dict(keep_input=True), dict(dropout=0.0)])
def test_checkpointed_is_plain_bit_for_bit(options, bf16):
    torch.manual_seed(0)
    plain, lean = (FCDenseNet(4, 3, (3, 2, 4, 2, 3), width=5, growth=3, checkpoint=c, **options) for c in (False, True))
    lean.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 66, 71)
    for _ in range(2):  # the second step starts from the statistics of the first
        a, b = step(plain, x, bf16), step(lean, x, bf16)
        assert len(a) == len(b) and all(map(torch.equal, a, b))
    assert {int(m.num_batches_tracked) for m in lean.modules() if isinstance(m, nn.BatchNorm2d)} == {2}
    with torch.no_grad(): assert torch.equal(plain.eval()(x), lean.eval()(x))


def test_eval_gradients_of_the_checkpointed_twin():
    torch.manual_seed(0)
    plain, lean = (fc_densenet56(4, checkpoint=c, **TINY).eval() for c in (False, True))
    lean.load_state_dict(plain.state_dict())
    x, grads = torch.rand(1, 3, 64, 64), []
    for net in (plain, lean):
        z = x.clone().requires_grad_()
        net(z).square().mean().backward()
        grads.append(z.grad)
    assert torch.equal(*grads)


def test_unguarded_checkpoints_count_a_batch_twice(monkeypatch):
    "The trap that frozen_statistics is for"
    from contextlib import nullcontext
    monkeypatch.setattr("synseg.tiramisu.frozen_statistics", lambda module: nullcontext())
    net, x = LeanDenseBlock(4, 3, 2), torch.rand(2, 4, 8, 8, requires_grad=True)
    net.train()(x).sum().backward()
    assert net[0][0].num_batches_tracked == 2


def test_frozen_statistics_restores_after_an_error():
    norm = nn.BatchNorm2d(3)
    before = dict(norm.named_buffers())
    with pytest.raises(KeyError), frozen_statistics(norm):
        norm(torch.rand(2, 3, 4, 4))
        raise KeyError
    after = dict(norm.named_buffers())
    assert all(after[k] is before[k] for k in before) and not norm.running_mean.any() and norm.num_batches_tracked == 0


def test_recomputed_keeps_only_the_maps():
    def kept(run):
        pieces = {}
        def pack(t):
            pieces[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): out = run()
        return out, sum(pieces.values())
    layer, maps = DenseLayer(12, 4), [torch.rand(1, 6, 16, 16, requires_grad=True) for _ in range(2)]
    out, size = kept(lambda: recomputed(layer, *maps))
    assert size == 2 * 6 * 16 * 16 * 4
    _, plain = kept(lambda: layer(torch.cat(maps, 1)))
    assert plain > 1.9 * size  # the stack, and what ReLU made of it
    with torch.no_grad(): assert not recomputed(layer, *maps).requires_grad
    blocks = {lean: [kept(lambda: (LeanDenseBlock if lean else DenseBlock)(8, n, 4)(torch.rand(1, 8, 32, 32, requires_grad=True)))[1]
                     for n in (4, 8, 12)] for lean in (False, True)}
    bend = lambda y: (y[2] - 2 * y[1] + y[0]) / (y[2] - y[0])
    assert bend(blocks[False]) > 0.2 and abs(bend(blocks[True])) < 0.02  # the square of the layers, or the layers


def test_batch_statistics():
    torch.manual_seed(0)
    running = shaken(fc_densenet56(4, **TINY)).float().eval()
    own = fc_densenet56(4, batch_statistics=True, **TINY).eval()
    own.load_state_dict(running.state_dict())
    x = torch.rand(3, 3, 64, 80)
    before = [b.clone() for b in own.buffers()]
    with torch.no_grad():
        assert (own(x[:1]) - running(x[:1])).abs().max() > 0.01  # a batch of one is not the running statistics
        assert (own(x)[:1] - own(x[:1])).abs().max() > 1e-3      # nor what it is in company
        torch.testing.assert_close(running(x)[:1], running(x[:1]), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(own(x[[2, 0, 1]]), own(x)[[2, 0, 1]], rtol=1e-3, atol=1e-4)  # the order does not matter
    assert all(map(torch.equal, before, own.buffers()))


def test_batch_statistics_norm_trains_as_the_plain_one():
    torch.manual_seed(0)
    a, b, x = BatchStatisticsNorm(3), nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    assert torch.equal(a.train()(x), b.train()(x)) and torch.equal(a.running_var, b.running_var)
    torch.testing.assert_close(a.eval()(x), b.train()(x))


@pytest.mark.parametrize("layer, fan", [(nn.Conv2d(32, 90, 3), 288), (nn.Conv2d(700, 40, 1), 700), (nn.ConvTranspose2d(60, 64, 3, stride=2), 576)])
def test_he_uniform(layer, fan):
    torch.manual_seed(0)
    he_uniform(nn.Sequential(layer))
    bound = math.sqrt(6 / fan)
    assert bound * 0.99 < layer.weight.max() <= bound and -bound * 0.99 > layer.weight.min() >= -bound
    assert abs(layer.weight.var().item() * fan / 2 - 1) < 0.04 and abs(layer.weight.mean().item()) < 0.02 * bound and not layer.bias.any()


@pytest.mark.parametrize("size", [(45, 44), (2, 3), (31, 64)])
def test_transitions(size):
    skip, pool, grow = torch.rand(1, 4, *size), TransitionDown(4), TransitionUp(4)
    small = pool(skip)
    assert small.shape == (1, 4, size[0] // 2, size[1] // 2) and [type(m) for m in pool] == [nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.Dropout, nn.MaxPool2d]
    up = grow(small, skip)
    assert grow.up(small).shape[-2:] == tuple(2 * n + 1 for n in small.shape[-2:])
    assert torch.equal(up[:, 4:], skip) and torch.equal(up[:, :4], grow.up(small)[..., :size[0], :size[1]])


@pytest.mark.parametrize("build", [lambda: fc_densenet56(5, **TINY), lambda: fc_densenet103(5, width=4, growth=1, checkpoint=True),
                                   lambda: FCDenseNet(5, 3, (2, 1, 2), width=6, growth=4, keep_input=True)])
def test_contract(build): check_segmenter(build, sizes=((64, 64), (67, 93)))


@pytest.mark.parametrize("height", [64, 65, 79, 95, 96, 127])
def test_any_size(height):
    net = fc_densenet56(3, width=3, growth=1).eval()
    with torch.no_grad(): assert net(torch.rand(1, 3, height, 191 - height)).shape == (1, 3, height, 191 - height)


@pytest.mark.parametrize("make, says", [
    (lambda: FCDenseNet(5, 3, (4, 4)), "odd number"), (lambda: fc_densenet56(5, width=0), "at least 1"), (lambda: FCDenseNet(5, 3, (4, 0, 4)), "layers"),
    (lambda: fc_densenet56(5, growth=0), "growth"), (lambda: fc_densenet67(0), "num_classes"), (lambda: fc_densenet56(5, dropout=1.5), "dropout"),
    (lambda: fc_densenet56(5, **TINY)(torch.rand(1, 3, 32, 64)), "64x64")])
def test_refuses(make, says):
    with pytest.raises(ValueError, match=says): make()


def test_zoo(tmp_path):
    options = dict(width=4, growth=2, batch_statistics=True, checkpoint=True)
    assert model_options("fc_densenet103")["width"] == 48 and {*options} <= {*model_options("fc_densenet103")}
    net = create_model("fc_densenet103", 5, **options).eval()
    other = load_model(save_model(net, tmp_path / "net.safetensors"))
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad(): assert torch.equal(net(x), other(x))


def test_overfits_two_images():
    torch.manual_seed(0)
    net = fc_densenet56(3, width=8, growth=4, dropout=0.0)
    x = torch.rand(2, 3, 64, 64)
    y = (F.avg_pool2d(x, 9, 1, 4).mean(1) * 40).long() % 3
    opt, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(25):
        loss = F.cross_entropy(net.train()(x), y)
        opt.zero_grad(); loss.backward(); opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_the_papers_size_takes_a_step():
    torch.manual_seed(0)
    net = fc_densenet103(11, checkpoint=True)
    x, y = torch.rand(1, 3, 64, 64), torch.randint(11, (1, 64, 64))
    opt = torch.optim.RMSprop(net.parameters(), 1e-3, alpha=0.9, eps=1e-3, weight_decay=2e-4)
    before = [p.detach().clone() for p in net.parameters()]
    loss = F.cross_entropy(net.train()(x), y)
    loss.backward(); opt.step()
    assert loss.isfinite() and all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(net.parameters(), before))
