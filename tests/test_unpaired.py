"Unpaired training: whose turn it is and what it touches, exact resume of both networks and their buffers, CycleGAN's step restated"
import copy
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import same_state, two_processes
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from synseg.callbacks import Callback
from synseg.engine import num_classes_of
from synseg.scenes import Scenes
from synseg.schedules import constant
from synseg.train import Learner
from synseg.unpaired import Both, Cycle, Cycling, ImagePool, Refining, Unpaired, cells_loss

ROOT = Path(__file__).resolve().parent.parent
ROUGH = 0.2


class Speckled(Dataset):
    "Grey pictures with noise from the global generator: random unless someone seeds it"
    def __init__(self, n=8, level=0.3, size=(12, 17)):
        self.n, self.level, self.size = n, level, size

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return (self.level + i/100 + 0.1*torch.randn(3, *self.size)).clamp(0, 1), "a label, not taken"


class Half:
    "A stand-in for a history buffer: half of each batch are earlier pictures, all states in plain tensors"
    def __init__(self, size=6):
        self.size, self.kept = size, []

    def exchange(self, images):
        out, k = images.clone(), len(images)//2
        if len(self.kept) == self.size:
            out[:k] = torch.stack(self.kept[:k])
        self.kept = ([*images.clone()] + self.kept)[:self.size]
        return out

    def state_dict(self):
        return dict(kept=self.kept)

    def load_state_dict(self, state):
        self.kept = state["kept"]


class Repaint(nn.Module):
    "A refiner with all that could give a turn away: batch norm, dropout"
    def __init__(self, channels=3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(6, channels, 1))

    def forward(self, x):
        return (x + ROUGH*self.body(x)).clamp(0, 1)


def critic(out=2):
    return nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.BatchNorm2d(5), nn.LeakyReLU(0.2), nn.Dropout(0.1), nn.Conv2d(5, out, 3, padding=1))


def pictures(n=4):
    return torch.rand(n, 3, 12, 17), torch.rand(n, 3, 10, 14)


def refining(model=None, **more):
    torch.manual_seed(1)
    engine = Refining(model or Repaint(), nn.L1Loss(), lambda m: torch.optim.Adam(m.parameters(), 1e-2), "fp32", more.pop("accumulate", 1),
                      critic=critic(), **{**dict(pretrain=(2, 1), turns=(2, 1)), **more})
    engine.begin()
    return engine


def frozen(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def moved(module, before):
    return any(not torch.equal(v, before[k]) for k, v in module.state_dict().items())


# --- whose turn

def test_turns_and_what_they_touch():
    engine, (x, y) = refining(buffer=Half()), pictures()
    want = ["first refiner"]*2 + ["first critic"] + ["refiner", "refiner", "critic"]*2
    for turn in want:
        assert engine.turn() == turn
        model, judge = frozen(engine.model), frozen(engine.critic)
        engine.step(1.0, x, y)
        assert moved(engine.model, model) == ("refiner" in turn) and moved(engine.critic, judge) == ("critic" in turn)
    assert set(engine.report()) == {"first", "regular", "adversarial", "critic_real", "critic_refined"}
    assert engine.report() == {}


def test_a_turn_lasts_for_all_accumulated_batches():
    engine, (x, y) = refining(accumulate=2, pretrain=(0, 0)), pictures()
    turns = []
    for _ in range(12):
        turns.append(engine.turn())
        engine.step(1.0, x, y)
    assert turns == (["refiner"]*4 + ["critic"]*2)*2 and engine.updates == 6
    steps = {engine.optimizer.state[p]["step"].item() for p in engine.model.parameters()}
    assert steps == {4.0}


def test_a_check_that_raises_changes_nothing():
    def refuse(loss): raise ArithmeticError("no")
    for pretrain, turns in (((0, 0), (1, 0)), ((0, 0), (0, 1)), ((1, 0), (1, 1))):
        engine, (x, y) = refining(pretrain=pretrain, turns=turns, buffer=Half()), pictures()
        before = frozen(engine.critic), {n: p.detach().clone() for n, p in engine.model.named_parameters()}
        with pytest.raises(ArithmeticError):
            engine.step(1.0, x, y, check=refuse)
        assert not moved(engine.critic, before[0]) and engine.updates == 0 and engine.buffer.kept == []
        assert all(torch.equal(p, before[1][n]) for n, p in engine.model.named_parameters())


def test_without_alpha_it_is_self_regularisation_alone():
    net = Repaint().eval()
    alone, (x, y) = copy.deepcopy(net).to(memory_format=torch.channels_last), pictures()
    engine = refining(net, alpha=0, beta=3.0, pretrain=(0, 0), turns=(2, 1))
    opt = torch.optim.Adam(alone.parameters(), 1e-2)
    for i in range(6):
        if engine.turn() == "refiner":
            (3.0*F.l1_loss(alone(x), x)).backward()
            opt.step()
            opt.zero_grad()
        engine.step(1.0, x, y)
    for p, q in zip(engine.model.parameters(), alone.parameters()):
        assert torch.equal(p, q)


def test_pretraining_takes_its_own_loss():
    seen = []
    def first(refined, synthetic):
        seen.append(1)
        return F.mse_loss(refined, synthetic)
    engine, (x, y) = refining(first_loss=first, pretrain=(2, 0)), pictures()
    for _ in range(5):
        engine.step(1.0, x, y)
    assert len(seen) == 2


def test_verdicts_over_cells():
    z = torch.randn(3, 2, 4, 5)
    p = z.double().softmax(1)
    torch.testing.assert_close(cells_loss(z, True).double(), -p[:, 1].log().mean())
    torch.testing.assert_close(cells_loss(z, False).double(), -p[:, 0].log().mean())
    torch.testing.assert_close(cells_loss(z, False, "sum").double(), -p[:, 0].log().sum((1, 2)).mean())
    with pytest.raises(ValueError, match="channel 0 real"):
        cells_loss(z[:, :1], True)


@pytest.mark.parametrize("wrong", [dict(pretrain=(-1, 0)), dict(turns=(0, 0)), dict(alpha=-1.0), dict(reduction="max")])
def test_bad_settings(wrong):
    with pytest.raises(ValueError):
        refining(**wrong)


def test_the_learners_own_loss_is_refused():
    with pytest.raises(ValueError, match="L1Loss"):
        Learner(Repaint(), Unpaired(Speckled(), Speckled()), class_weights=None, engine=partial(Refining, critic=critic()))


# --- data

def test_partners_depend_on_seed_epoch_and_index():
    data = Unpaired(Speckled(8), Speckled(50, 0.6, (9, 10)), seed=3)
    data.set_epoch(2)
    torch.manual_seed(0)
    first = [data[i] for i in range(8)]
    partners = [data.partner(i) for i in range(8)]
    torch.manual_seed(9)
    data[0]
    again = [data[i] for i in reversed(range(8))][::-1]
    assert all(torch.equal(a, b) for p, q in zip(first, again) for a, b in zip(p, q))
    assert first[0][0].shape == (3, 12, 17) and first[0][1].shape == (3, 9, 10)
    data.set_epoch(3)
    assert [data.partner(i) for i in range(8)] != partners and not torch.equal(data[0][0], first[0][0])
    assert [Unpaired(Speckled(8), Speckled(50), 4).partner(i) for i in range(8)] != partners
    assert data.partner(-1) == data.partner(7)
    with pytest.raises(IndexError):
        data[8]
    with pytest.raises(ValueError, match="empty"):
        Unpaired(Speckled(), Speckled(0))


def test_all_real_images_get_their_turn():
    data, seen = Unpaired(Scenes(16), Scenes(7)), []
    for epoch in range(6):
        data.set_epoch(epoch)
        seen += [data.partner(i) for i in range(16)]
    assert set(seen) == set(range(7))


def test_no_label_space_and_bare_tensors():
    assert num_classes_of(Unpaired(Scenes(2), Scenes(2)), nn.Identity()) is None
    bare = torch.rand(3, 3, 4, 4)
    a, b = Unpaired(bare, TensorDataset(bare))[1]
    assert torch.equal(a, bare[1]) and b.shape == (3, 4, 4)


def test_inner_augmentation_hears_of_the_epoch():
    class Told(Speckled):
        epoch = 0
        def set_epoch(self, e): self.epoch = e
    a, b = Told(), Told()
    Unpaired(a, b).set_epoch(5)
    assert (a.epoch, b.epoch) == (5, 5)


@pytest.mark.parametrize("pair,message", [
    ((torch.rand(1, 3, 4, 4)*255, torch.rand(1, 3, 4, 4)), "synthetic images"),
    ((torch.rand(1, 3, 4, 4), torch.full((1, 3, 4, 4), float("nan"))), "real images"),
    ((torch.rand(1, 3, 4, 4), torch.rand(1, 1, 4, 4)), "1; expected as many"),
    ((torch.rand(1, 3, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)), "uint8")])
def test_first_batch_is_looked_at(pair, message):
    with pytest.raises(ValueError, match=message):
        refining().check_first(None, [], None, *pair)


# --- pool

def test_pool_returns_what_came_until_full_then_swaps_half():
    pool, total = ImagePool(50), 2000
    new = torch.arange(50.0).view(50, 1, 1, 1)
    assert torch.equal(pool.exchange(new), new) and len(pool) == 50
    swapped = 0
    for k in range(total):
        inside = {float(p) for p in pool.pictures}
        came = torch.full((1, 1, 1, 1), 100.0 + k)
        out = pool.exchange(came)
        after = {float(p) for p in pool.pictures}
        assert len(pool) == 50
        if float(out) == 100 + k:
            assert after == inside
        else:
            swapped += 1
            assert float(out) in inside and after == inside - {float(out)} | {100.0 + k}
    assert abs(swapped/total - 0.5) < 0.04
    bare = ImagePool(0)
    assert torch.equal(bare.exchange(new), new) and len(bare) == 0
    with pytest.raises(ValueError):
        ImagePool(-1)
    with pytest.raises(ValueError):
        ImagePool(3).load_state_dict(pool.state_dict())


# --- CycleGAN

def cycling(**more):
    torch.manual_seed(2)
    engine = Cycling(Cycle(Repaint(), Repaint()), nn.L1Loss(), more.pop("optimizer", lambda m: torch.optim.Adam(m.parameters())), "fp32",
                     more.pop("accumulate", 1), critic=Both(critic(1), critic(1)), **{**dict(pool=5), **more})
    engine.begin()
    for m in (*engine.model.modules(), *engine.critic.modules()):
        if isinstance(m, nn.Dropout): m.p = 0.0
    return engine


@pytest.mark.parametrize("identity", [0.5, 0.0])
def test_cyclegan_against_its_equations(identity):
    sgd = partial(torch.optim.SGD, lr=0.1)  # Adam would make something of the rounding in a bias before batch norm
    engine = cycling(identity=identity, cycle=7.0, optimizer=lambda m: sgd(m.parameters()), critic_optimizer=sgd)
    g, f = copy.deepcopy(engine.model.there), copy.deepcopy(engine.model.back)
    dy, dx = copy.deepcopy(engine.critic.there), copy.deepcopy(engine.critic.back)
    og, od = sgd([*g.parameters(), *f.parameters()]), [sgd(d.parameters()) for d in (dy, dx)]
    one = lambda z: (z - 1).square().mean()
    for step in range(3):
        x, y = torch.rand(1, 3, 12, 17), torch.rand(1, 3, 12, 17)  # pools of five are not full before three steps
        fake_y, fake_x = g(x), f(y)
        loss = one(dy(fake_y)) + one(dx(fake_x)) + 7*((f(fake_y) - x).abs().mean() + (g(fake_x) - y).abs().mean())
        if identity: loss = loss + 7*identity*((g(y) - y).abs().mean() + (f(x) - x).abs().mean())
        og.zero_grad()
        loss.backward()
        og.step()
        for d, opt, real, fake in ((dy, od[0], y, fake_y), (dx, od[1], x, fake_x)):
            opt.zero_grad()
            (0.5*(one(d(real)) + d(fake.detach()).square().mean())).backward()
            opt.step()
        torch.testing.assert_close(engine.step(1.0, x, y), loss.detach(), rtol=1e-5, atol=1e-6)
    for ours, theirs in ((engine.model.there, g), (engine.model.back, f), (engine.critic.there, dy), (engine.critic.back, dx)):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert set(engine.report()) == {"adversarial", "cycle", "critic_real", "critic_fake"} | ({"identity"} if identity else set())


def test_cycle_loss_is_zero_for_identity():
    engine = Cycling(Cycle(nn.Identity(), nn.Conv2d(3, 3, 1)), nn.L1Loss(), lambda m: torch.optim.Adam(m.parameters()), "fp32",
                     critic=Both(critic(1), critic(1)))
    with torch.no_grad():
        engine.model.back.weight.copy_(torch.eye(3)[..., None, None])
        engine.model.back.bias.zero_()
    engine.begin()
    engine.step(1.0, *pictures())
    found = engine.report()
    assert found["cycle"] == found["identity"] == 0


def test_the_papers_adam_for_the_critics():
    group = cycling().critic_optimizer.param_groups[0]
    assert group["lr"] == 2e-4 and group["betas"] == (0.5, 0.999)


def test_cyclegan_accumulates():
    engine, (x, y) = cycling(accumulate=2), pictures(1)
    model, judge = frozen(engine.model), frozen(engine.critic)
    weights = lambda module, old: any(not torch.equal(p, old[n]) for n, p in module.named_parameters())
    engine.step(1.0, x, y)
    assert not weights(engine.model, model) and not weights(engine.critic, judge) and engine.updates == 0
    engine.step(1.0, x, y)
    assert weights(engine.model, model) and weights(engine.critic, judge) and engine.updates == 1


def test_cyclegan_wants_two_of_each():
    with pytest.raises(ValueError, match="Cycle"):
        Cycling(Repaint(), nn.L1Loss(), critic=critic(1))


# --- exact resume

class Stop(Callback):
    def __init__(self, step): self.step = step
    def on_step(self, learner):
        if learner.progress.step == self.step: raise RuntimeError("power failure")


def learner(kind, out=None, **more):
    torch.manual_seed(4)
    parts = (partial(Refining, critic=critic(), buffer=Half(), pretrain=(3, 2), turns=(2, 1)) if kind == "refining" else
             partial(Cycling, critic=Both(critic(1), critic(1)), pool=4))
    model = Repaint() if kind == "refining" else Cycle(Repaint(), Repaint())
    return Learner(model, Unpaired(Speckled(8), Speckled(5, 0.6), 1), loss=nn.L1Loss(), schedule=constant(), batch_size=2, lr=1e-3, ema=0.9,
                   seed=1, out=out, save_every=1, progress=False, engine=parts, precision="fp32", **more)


@pytest.mark.parametrize("kind", ["refining", "cycling"])
@pytest.mark.parametrize("at", [2, 4, 7, 10])
def test_resume_is_exact(kind, at, tmp_path):
    want = learner(kind).fit(3)
    with pytest.raises(RuntimeError, match="power failure"):
        learner(kind, tmp_path, callbacks=[Stop(at)]).fit(3)
    again = learner(kind, tmp_path).resume().fit(3)
    a, b = want.state(), again.state()
    for name in ("model", "ema", "optimizer", "critic", "critic_optimizer", "updates", "sums", "buffers", "rng", "rows"):
        assert same_state(a[name], b[name]), name
    assert again.engine.updates == 12


def test_resume_wants_the_same_run(tmp_path):
    learner("cycling", tmp_path).fit(1)
    with pytest.raises(ValueError, match="pool was 4"):
        other = learner("cycling", tmp_path)
        other.config["pool"] = 3
        other.resume()
    state = learner("cycling").state()
    with pytest.raises(ValueError, match="no buffer"):
        learner("cycling").engine.load_state({k: v for k, v in state.items() if k != "buffers"})


TWO = """
import sys
sys.path.insert(0, {tests!r})
from test_unpaired import *
import torch.distributed
for kind in ("refining", "cycling"):
    run = learner(kind, accumulate=2).fit(6)
    for net in (run.model, run.engine.critic):
        for name, p in net.named_parameters():
            found = run.engine.gather(p.detach())
            assert run.engine.world == 2 and torch.equal(*found), name + " drifted apart"
    state = run.state()
    assert len(state["buffers"]) == 2 and not same_state(*state["buffers"])
    before = run.engine.buffers
    run.engine.load_state(state)
    assert same_state({{k: b.state_dict() for k, b in before.items()}}, state["buffers"][run.engine.rank])
    sys.stdout.write(f"[fine {{run.engine.updates}}]")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_processes_stay_together(tmp_path):
    "Batch norm in all networks, whose buffers a data-parallel wrapper writes before each forward; a buffer for each process"
    assert two_processes(tmp_path/"two.py", TWO.format(tests=str(ROOT/"tests"))).count("fine") == 4
