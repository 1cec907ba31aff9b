"SimGAN against its counts and a restatement with functions only; the buffer's shares and its exact resume"
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.data import TensorDataset

from conftest import scramble
from synseg.callbacks import Callback
from synseg.check import count_parameters, receptive_field
from synseg.core import seed_everything
from synseg.schedules import constant
from synseg.simgan import (CRITICS, GAZE, HAND, REFINERS, HistoryBuffer, LocalCritic, Refiner, SameConv2d, SameMaxPool2d, pad_same,
                           self_regularisation)
from synseg.train import Learner
from synseg.unpaired import Refining, Unpaired

ODD = [(35, 55), (1, 1), (7, 64), (33, 17)]


@pytest.mark.parametrize("entries", [REFINERS, CRITICS])
def test_counts(entries):
    for name, entry in entries.items():
        assert count_parameters(entry.build(entry.info.classes, entry.info.in_channels)) == entry.info.parameters
        assert entry.info.name == name and entry.info.deviations
    assert [e.info.parameters for e in REFINERS.values()] == [296_129, 4_018_625]
    assert [e.info.parameters for e in CRITICS.values()] == [75_906, 178_050]
    assert count_parameters(Refiner(3, 64, 5, 4)) == 659_331  # the study's


@pytest.mark.parametrize("size", ODD)
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_same_padding(size, kernel, stride):
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    conv = SameConv2d(3, 5, kernel, stride).double()
    cells = [-(-n // stride) for n in size]
    assert list(conv(x).shape[-2:]) == cells
    # restated: centre of cell i, by the definition of SAME on each axis
    left, top = (max((c - 1)*stride + kernel - n, 0)//2 for c, n in zip(reversed(cells), reversed(size)))
    wide = F.pad(x, (left, 3*kernel, top, 3*kernel))
    assert_close(conv(x), F.conv2d(wide, conv.weight, conv.bias, stride)[..., :cells[0], :cells[1]])
    low = F.pad(x - 5, (left, 3*kernel, top, 3*kernel), value=-torch.inf)
    assert_close(SameMaxPool2d(kernel, stride)(x - 5), F.max_pool2d(low, kernel, stride)[..., :cells[0], :cells[1]])


def test_an_even_window_sees_one_more_to_the_right():
    assert pad_same(torch.ones(1, 1, 5, 6), (4, 4)).shape == (1, 1, 8, 9)
    assert pad_same(torch.ones(1, 1, 1, 1), (4, 4)).nonzero().tolist() == [[0, 0, 1, 1]]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kernel,blocks,skip", [(3, 4, False), (4, 2, False), (7, 1, False), (4, 2, True)])
def test_refiner_restated(kernel, blocks, skip):
    net = scramble(Refiner(2, 5, blocks, kernel, skip), 0.1)
    p, x = dict(net.named_parameters()), torch.rand(2, 2, 11, 14, dtype=torch.float64)
    conv = lambda z, name: F.conv2d(z, p[name + ".weight"], p[name + ".bias"], padding="same")
    z = F.relu(conv(2*x - 1, "first"))
    for b in range(blocks): z = F.relu(z + conv(F.relu(conv(z, f"blocks.{b}.conv1")), f"blocks.{b}.conv2"))
    z = conv(z, "last") + (torch.logit(x.clamp(0.5/255, 1 - 0.5/255))/2 if skip else 0)  # atanh(2x - 1) = logit(x)/2
    assert_close(net(x), torch.sigmoid(2*z))  # (1 + tanh z)/2


def test_critic_restated():
    net = scramble(LocalCritic(GAZE, 1, 12), 0.2)
    w, x = list(net.parameters()), torch.rand(2, 1, 35, 55, dtype=torch.float64)
    z = F.relu(F.conv2d(F.pad(2*x - 1, (1, 1, 1, 1)), w[0], w[1], 2))  # 35x55 at stride 2: one on each side
    z = F.relu(F.conv2d(F.pad(z, (0, 1, 0, 1)), w[2], w[3], 2))        # 18x28: only right and below
    z = F.max_pool2d(z, 3, 1, 1)
    z = F.relu(F.conv2d(z, w[4], w[5], padding=1))
    z = F.conv2d(F.relu(F.conv2d(z, w[6], w[7])), w[8], w[9])
    assert_close(net(x), z)


@pytest.mark.parametrize("size", ODD)
@pytest.mark.parametrize("skip", [False, True])
def test_refiner_keeps_every_size_and_the_range(size, skip):
    x, net = torch.rand(2, 3, *size), Refiner(3, 4, 1, 4, skip)
    assert net(x).shape == x.shape and net(x).min() >= 0 and net(x).max() <= 1
    if skip: assert (net(x) - x).abs().max() <= 0.5/255 + 1e-6
    wild = scramble(net, 3.0)
    assert 0 <= wild(x.double()).min() and wild(x.double()).max() <= 1


def test_maps_and_fields():
    assert LocalCritic(GAZE, 1)(torch.rand(1, 1, 35, 55)).shape == (1, 2, 9, 14)
    assert LocalCritic(HAND, 1, 12)(torch.rand(1, 1, 224, 224)).shape == (1, 2, 7, 7)
    assert receptive_field(LocalCritic(GAZE, 1, 24), 65, 1, 16) == (23, 23)
    assert receptive_field(Refiner(1, 6, 4), 65, 1) == (19, 19)
    narrow = LocalCritic(GAZE, 3, 24)
    assert [m.out_channels for m in narrow if hasattr(m, "out_channels")] == [24, 16, 8, 8, 2]


def test_bad_input():
    for make in (lambda: Refiner(0), lambda: Refiner(3, width=True), lambda: LocalCritic(width=0), lambda: HistoryBuffer(0),
                 lambda: LocalCritic((("norm", 2, 1, 1),))):
        with pytest.raises(ValueError): make()
    for net in (Refiner(1, 2, 1), LocalCritic(GAZE, 1, 8)):
        with pytest.raises(ValueError, match="1 channels"): net(torch.rand(1, 3, 8, 8))
        with pytest.raises(ValueError, match="divide by 255"): net(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    x = torch.rand(2, 1, 4, 4)
    with pytest.raises(ValueError, match="one shape"): self_regularisation(x, x[..., 1:])
    with pytest.raises(ValueError, match="'mean' or 'sum'"): self_regularisation(x, x, reduction="max")
    with pytest.raises(ValueError, match="larger"): HistoryBuffer(3).exchange(torch.rand(8, 1, 2, 2))
    buffer = HistoryBuffer(3)
    buffer.exchange(x)
    with pytest.raises(ValueError, match="one size"): buffer.exchange(x[..., 1:])
    with pytest.raises(ValueError, match="buffer of 3"): HistoryBuffer(4).load_state_dict(buffer.state_dict())
    with pytest.raises(ValueError, match="no buffer"): HistoryBuffer(4).load_state_dict(None)


def test_a_rectified_critic_is_deaf_where_both_are_negative():
    net = LocalCritic(GAZE, 1, 8, final_relu=True)
    with torch.no_grad(): net[-2].bias.fill_(-100)
    x = torch.rand(1, 1, 16, 16, requires_grad=True)
    loss = F.cross_entropy(net(x), torch.zeros(1, 4, 4, dtype=torch.long))
    loss.backward()
    assert_close(loss, torch.tensor(2.0).log()) and not x.grad.any()
    assert not any(p.grad.any() for p in net.parameters())


def test_self_regularisation():
    x, y = torch.rand(3, 2, 4, 5), torch.rand(3, 2, 4, 5)
    assert_close(self_regularisation(x, y), F.l1_loss(x, y))
    assert_close(self_regularisation(x, y, 255, "sum"), F.l1_loss(255*x, 255*y, reduction="sum")/3)
    assert self_regularisation(x, x) == 0
    tint = x + torch.tensor([0.1, -0.2])[:, None, None]
    assert self_regularisation(tint, x, psi=lambda z: z.diff(dim=-1)) < 1e-6


@pytest.mark.parametrize("size,batch", [(4, 8), (10, 4), (7, 5), (9, 2), (5, 1)])
def test_buffer_shares(size, batch):
    buffer, half, last = HistoryBuffer(size), batch//2, None
    for step in range(20):
        new = torch.arange(step*batch, (step + 1)*batch).float().view(-1, 1, 1, 1)
        shown = buffer.exchange(new)
        current = torch.isin(shown, new).sum()
        assert shown.shape == new.shape and current == (batch if step == 0 and half else batch - (half if step else 0))
        assert buffer.count == min(size, (step + 1)*half)
        if not half: continue
        held, gave_way = buffer.state_dict()["images"], new[batch - half:]
        assert torch.isin(gave_way, held).all() and held.unique().numel() == buffer.count  # each picture once
        if last is not None:
            assert torch.isin(shown[batch - half:], last).all() and shown[batch - half:].unique().numel() == half
            if len(last) == size: assert torch.isin(last, held).sum() == size - half  # exactly half a batch replaced
        last = held


def test_buffer_goes_on_where_it_was():
    a, b = HistoryBuffer(6), HistoryBuffer(6)
    batches = torch.rand(9, 4, 1, 2, 3)
    for x in batches[:5]: a.exchange(x)
    state, rng = torch.utils._pytree.tree_map(lambda v: v, a.state_dict()), torch.get_rng_state()
    want = [a.exchange(x) for x in batches[5:]]
    b.load_state_dict(state)
    torch.set_rng_state(rng)
    assert all(torch.equal(w, b.exchange(x)) for w, x in zip(want, batches[5:]))
    assert torch.equal(a.state_dict()["images"], b.state_dict()["images"])
    fresh = HistoryBuffer(6)
    fresh.load_state_dict(HistoryBuffer(6).state_dict())
    assert fresh.count == 0


def test_what_is_shown_is_no_window_into_the_buffer():
    buffer = HistoryBuffer(2)
    for v in (0., 1.): shown = buffer.exchange(torch.full((4, 1, 1, 1), v))
    was = shown.clone()
    buffer.exchange(torch.full((4, 1, 1, 1), 2.))
    assert torch.equal(shown, was)


class Killed(Exception): pass

class At(Callback):
    def __init__(self, step): self.step = step
    def on_step(self, learner):
        if learner.progress.step == self.step: raise Killed


def learner(out, at=None):
    seed_everything(1)
    data = TensorDataset(torch.rand(24, 3, 17, 22))
    other = TensorDataset(torch.rand(10, 3, 17, 22)**2)
    seed_everything(2)
    engine = partial(Refining, critic=LocalCritic(GAZE, 3, 8), buffer=HistoryBuffer(5), pretrain=(2, 2), turns=(2, 1))
    return Learner(Refiner(3, 4, 1, 4), Unpaired(data, other), loss=self_regularisation, schedule=constant(), batch_size=4, out=out,
                   optimizer=lambda m: torch.optim.Adam(m.parameters(), 1e-2), save_every=3, precision="fp32", progress=False,
                   engine=engine, callbacks=[At(at)] if at else [])


def test_killed_and_resumed_is_as_if_nothing_had_happened(tmp_path):
    whole = learner(tmp_path/"whole").fit(4)
    with pytest.raises(Killed): learner(tmp_path/"killed", at=17).fit(4)
    resumed = learner(tmp_path/"killed").resume()
    assert resumed.progress.step == 15 and resumed.engine.buffer.count == 5
    resumed.fit(4)
    for part in ("model", "critic"):
        pairs = zip(getattr(whole.engine, part).state_dict().items(), getattr(resumed.engine, part).state_dict().items())
        assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    assert torch.equal(*(l.engine.buffer.state_dict()["images"] for l in (whole, resumed)))


def test_learns_one_batch_by_heart():
    x = F.interpolate(torch.rand(2, 3, 4, 4), (20, 26), mode="bilinear")
    net = Refiner(3, 16, 1)
    opt, losses = torch.optim.Adam(net.parameters(), 3e-3), []
    for _ in range(80):
        loss = self_regularisation(net(x), x)
        opt.zero_grad(), loss.backward(), opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]/4


def test_a_large_buffer_takes_no_room_before_it_is_filled():
    small, large = HistoryBuffer(10**4), HistoryBuffer(10**12)
    for _ in range(20):
        batch, state = torch.rand(6, 1, 2, 3), torch.get_rng_state()
        shown = large.exchange(batch)
        torch.set_rng_state(state)
        assert torch.equal(shown, small.exchange(batch))
    assert large.count == small.count == 60 <= len(large.images) <= 200
    fresh = HistoryBuffer(10**12)
    fresh.load_state_dict(large.state_dict())
    assert torch.equal(fresh.images, large.images[:60]) and fresh.exchange(torch.rand(6, 1, 2, 3)).shape == (6, 1, 2, 3)
