"The duel: who learns from what, exact resume of both, and plain training where the weight is 0"
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import same_state, two_processes
from test_train import At, Squares, small_net
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from synseg.adversarial import FORMS, Adversarial, Duel, bystander, known, one_hot, verdict_loss
from synseg.engine import Engine, OwnItems
from synseg.losses import CrossEntropyLoss
from synseg.runs import Run, train
from synseg.runstate import Diverged, Interrupted, load_state
from synseg.segmenter import ModelEntry, ModelInfo
from synseg.train import Learner
from synseg.unet import ValidUNet

ROOT = Path(__file__).resolve().parent.parent


class Critic(nn.Module):
    "Batch norm and dropout on purpose: both are what a careless step would leave changed. `kind`: image, cells or pixels"
    def __init__(self, classes=2, channels=3, kind="image", dropout=0.2):
        super().__init__()
        stride = 1 if kind == "pixels" else 2
        self.body = nn.Sequential(nn.Conv2d(classes + channels, 6, 3, stride, 1), nn.BatchNorm2d(6), nn.LeakyReLU(0.2),
                                  nn.Dropout2d(dropout), nn.Conv2d(6, 1, 3, stride, 1))
        self.kind = kind

    def forward(self, images, maps):
        z = self.body(torch.cat([images, maps], 1))
        return z.mean((2, 3)) if self.kind == "image" else z


def critic(**options):
    torch.manual_seed(1)
    return Critic(**options)


def duel(model=None, loss=None, optimizer=None, accumulate=1, precision="fp32", clip=None, **more):
    engine = Adversarial(model or small_net(), loss or CrossEntropyLoss(), optimizer or (lambda m: torch.optim.AdamW(m.parameters(), 3e-3)),
                         precision, accumulate, clip, critic=more.pop("critic", None) or critic(), **more)
    engine.begin()
    engine.model.train()
    return engine


def batch(n=3, seed=0):
    torch.manual_seed(seed)
    items = [Squares()[i] for i in range(n)]
    return torch.stack([i for i, _ in items]), torch.stack([y for _, y in items])


def copies(module): return {k: v.clone() for k, v in module.state_dict().items()}


def learner(out=None, engine=None, **changes):
    options = dict(batch_size=3, progress=False, out=out, valid=OwnItems(Squares(4), 1), ema=0.9, clip=1.0) | changes
    engine = engine or partial(Adversarial, critic=critic(), weight=0.1, warmup=2, critic_lr=1e-3)
    return Learner(small_net(), Squares(), engine=engine, **options)


# --- losses -------------------------------------------------------------------------------------------------------------

def test_losses_are_those_of_the_equations_and_stay_finite():
    z = torch.randn(5, 1, dtype=torch.float64)
    d = z.sigmoid()
    assert_close(verdict_loss(z, True), -d.log().mean())
    assert_close(verdict_loss(z, False), -(1 - d).log().mean())
    assert_close(verdict_loss(z, True, "focal"), -((1 - d)**2*d.log()).mean())
    assert_close(verdict_loss(z, False, "focal"), -(d**2*(1 - d).log()).mean())
    assert_close(verdict_loss(z, True, "least_squares"), (z - 1).square().mean())
    assert_close(verdict_loss(z, False, "least_squares"), z.square().mean())
    assert_close(verdict_loss(torch.zeros(3, 1), False), torch.tensor(2.0).log())
    for form in ("bce", "focal"):
        for real in (True, False):
            far = torch.tensor([[-1e4], [1e4]], requires_grad=True)
            loss = verdict_loss(far, real, form)
            loss.backward()
            assert_close(loss, torch.tensor(5e3)) and far.grad.isfinite().all()
            assert_close(far.grad.abs().max(), torch.tensor(0.5))


@pytest.mark.parametrize("form", FORMS)
def test_void_counts_by_its_share(form):
    mask = torch.rand(2, 16, 20) > 0.5
    z = torch.randn(2, 1, 16, 20)
    each = FORMS[form](z, 1.0)[:, 0]
    assert_close(verdict_loss(z, True, form, mask), each[mask].mean())
    mask[0, :8] = mask[:, :, 10:] = False  # whole cells of the map below, and half of what is left of image 1 stays
    mask[1, :, :10] = True
    mask[0, 8:, :5], mask[0, 8:, 5:] = True, False
    z = torch.randn(2, 1, 2, 2)
    share = torch.tensor([[[0, 0], [0.5, 0]], [[1, 0], [1, 0]]])
    assert_close(verdict_loss(z, False, form, mask), (FORMS[form](z, -1.0)[:, 0]*share).sum()/2.5)
    z = torch.randn(2, 1)
    mask[0] = False
    assert_close(verdict_loss(z, True, form, mask), FORMS[form](z[1:], 1.0).mean())
    for shape in [(2, 1), (2, 1, 2, 2), (2, 1, 16, 20)]:
        z = torch.randn(shape, requires_grad=True)
        nothing = verdict_loss(z, True, form, torch.zeros_like(mask))
        nothing.backward()
        assert nothing == 0 and not z.grad.any()


def test_truths_hide_void_and_answers_too():
    labels, probs = torch.randint(0, 4, (2, 9, 7)), torch.rand(2, 4, 9, 7)
    maps = one_hot(labels, probs)
    assert torch.equal(maps, F.one_hot(labels, 4).permute(0, 3, 1, 2).float())
    labels[:, 2] = 255
    assert torch.equal(one_hot(labels, probs)[:, :, 3:], maps[:, :, 3:]) and not one_hot(labels, probs)[:, :, 2].any()
    assert torch.equal(known(probs, labels)[:, :, 3:], probs[:, :, 3:]) and not known(probs, labels)[:, :, 2].any()


# --- who learns ---------------------------------------------------------------------------------------------------------

def test_bystander_passes_gradients_and_keeps_out():
    for net in (critic(dropout=0.0), nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 1, 3))):
        inputs = (torch.rand(2, 3, 9, 11), torch.rand(2, 2, 9, 11)) if isinstance(net, Critic) else (torch.rand(2, 2, 9, 11),)
        for x in inputs: x.requires_grad_()
        before = copies(net)
        judged = bystander(net)(*inputs)
        judged.sum().backward()
        assert all(p.grad is None for p in net.parameters()) and same_state(before, copies(net))
        aside = [x.grad.clone() for x in inputs]
        for x in inputs: x.grad = None
        itself = net(*inputs)
        itself.sum().backward()
        assert torch.equal(judged, itself) and all(torch.equal(a, x.grad) for a, x in zip(aside, inputs))
        assert not same_state(before, copies(net)) or not isinstance(net, Critic)  # a plain forward does leave its mark


@pytest.mark.parametrize("kind", ["image", "cells", "pixels"])
@pytest.mark.parametrize("form", FORMS)
def test_each_step_leaves_the_other_network_alone(kind, form):
    engine = duel(critic=critic(kind=kind), weight=0.5, form=form, critic_updates=2)
    model, other, at_critic = copies(engine.model), copies(engine.critic), {}
    learn = engine.critic_step

    def watched(*args):
        if not at_critic:
            assert same_state(other, copies(engine.critic)), "a step of the model touched the critic"
            assert not same_state(model, copies(engine.model)) and all(p.grad is None for p in engine.critic.parameters())
            at_critic.update(copies(engine.model))
        learn(*args)
    engine.critic_step = watched
    engine.step(1.0, *batch())
    assert same_state(at_critic, copies(engine.model)), "a step of the critic touched the model"
    assert all(p.grad is None for p in engine.model.parameters()) and not same_state(other, copies(engine.critic))
    assert engine.updates == 1 and set(engine.report()) == {"supervised", "adversarial", "critic_real", "critic_fake"}


def test_a_step_is_that_of_the_equations():
    "Against a restatement: one graph for each network, logarithms of probabilities, plain SGD"
    sgd = lambda m: torch.optim.SGD(m.parameters(), 0.1)
    engine = duel(small_net(dropout=0.0).double(), optimizer=sgd, critic=critic(dropout=0.0).double(), weight=0.3,
                  critic_optimizer=lambda p: torch.optim.SGD(p, 0.2))
    s, d, (x, y) = small_net(dropout=0.0).double(), critic(dropout=0.0).double(), batch()
    x = x.double()
    # the engine's logits are float32 between the networks: so are these
    p = s(x).float().softmax(1)*(y != 255)[:, None]
    frozen = critic(dropout=0.0).double()
    ce = F.cross_entropy(s(x).float(), y, ignore_index=255)
    (ce - 0.3*frozen(x, p).float().sigmoid().log().mean()).backward()
    truth = F.one_hot(y.masked_fill(y == 255, 0), 2).permute(0, 3, 1, 2)*(y != 255)[:, None]
    loss = -d(x, truth.float()).float().sigmoid().log().mean()
    (loss - (1 - d(x, p.detach()).float().sigmoid()).log().mean()).backward()
    engine.step(0.5, x, y)
    with torch.no_grad():
        for net, ours, rate in ((s, engine.model, 0.05), (d, engine.critic, 0.1)):
            for a, b in zip(net.parameters(), ours.parameters()): assert_close(a - rate*a.grad, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("updates", [1, 2])
def test_accumulated_batches_are_one_for_the_critic_too(updates):
    "Without batch norm and dropout two batches of 3 are one of 6; both networks and the warm-up count updates, not batches"
    def plain():
        torch.manual_seed(3)
        net = Critic(dropout=0.0)
        net.body[1] = nn.Identity()
        return net
    def model():
        torch.manual_seed(2)
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    sgd = dict(optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1), critic_optimizer=lambda p: torch.optim.SGD(p, 0.1))
    images, labels = batch(6)
    one = duel(model(), critic=plain(), weight=0.5, warmup=1, critic_updates=updates, **sgd)
    two = duel(model(), critic=plain(), weight=0.5, warmup=1, critic_updates=updates, accumulate=2, **sgd)
    for i in range(2):
        one.begin()
        one.step(1.0, images, labels)
        two.begin()
        before = copies(two.critic)
        two.step(1.0, images[:3], labels[:3])
        assert not two.updated and same_state(before, copies(two.critic)) and two.updates == i
        two.step(1.0, images[3:], labels[3:])
        assert two.updates == one.updates == i + 1 and not two._seen
    for a, b in zip([*one.model.parameters(), *one.critic.parameters()], [*two.model.parameters(), *two.critic.parameters()]):
        assert_close(a, b)


def test_nothing_labelled_teaches_nothing():
    for kind in ("image", "cells", "pixels"):
        engine = duel(critic=critic(kind=kind), weight=0.5, critic_optimizer=lambda p: torch.optim.SGD(p, 0.1),
                      optimizer=lambda m: torch.optim.SGD(m.parameters(), 0.1))
        model, other = ([p.detach().clone() for p in n.parameters()] for n in (engine.model, engine.critic))
        images, labels = batch()
        engine.step(1.0, images, torch.full_like(labels, 255))
        assert same_state(model, [p.detach() for p in engine.model.parameters()])
        assert same_state(other, [p.detach() for p in engine.critic.parameters()])
        assert set(engine.report().values()) == {0.0}


def test_a_model_without_padding_is_judged_where_it_answers():
    engine = duel(ValidUNet(2, width=2, depth=1, norm=True), critic=critic(kind="pixels"), weight=0.5)
    engine.step(1.0, torch.rand(2, 3, 76, 78), torch.randint(0, 2, (2, 76, 78)))
    assert engine.report()["adversarial"] > 0


def test_bfloat16_keeps_losses_in_float32():
    engine = duel(critic=critic(kind="pixels"), weight=0.5, precision="bf16")
    assert engine.bf16 and engine.judge(engine.critic, torch.rand(2, 3, 9, 9), torch.rand(2, 2, 9, 9)).dtype == torch.float32
    assert engine.step(1.0, *batch()).dtype == torch.float32
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in engine.critic.parameters())


def test_clipped_critics_take_short_steps():
    lengths = []
    for clip in (None, 1e-3):
        engine = duel(weight=0.5, clip=clip, critic_optimizer=lambda p: torch.optim.SGD(p, 1.0))
        before = [p.detach().clone() for p in engine.critic.parameters()]
        engine.step(1.0, *batch())
        lengths.append(sum((p - q).square().sum() for p, q in zip(engine.critic.parameters(), before)).sqrt())
    assert lengths[1] < 1.01e-3 < lengths[0]


# --- runs ---------------------------------------------------------------------------------------------------------------

def same_model(a, b):
    parts = ("model", "ema", "optimizer", "rng", "progress")
    return all(same_state(a.state()[p], b.state()[p]) for p in parts)


def test_weight_zero_is_plain_training_bit_for_bit(tmp_path):
    "Although the critic learns, draws random numbers of its own and leaves batch norm's buffers changed"
    plain, against = learner(engine=Engine).fit(2), learner(engine=partial(Adversarial, critic=critic(), weight=0.0)).fit(2)
    assert same_model(plain, against)
    assert {"supervised", "critic_real", "critic_fake"} <= set(against.history[0]) and "adversarial" not in against.history[0]
    assert against.history[0]["supervised"] == against.history[0]["loss"]
    keys = set(plain.history[0]) - {"seconds", "images_per_second"}
    assert [{k: row[k] for k in keys} for row in plain.history] == [{k: row[k] for k in keys} for row in against.history]
    assert not same_state(copies(critic()), copies(against.engine.critic))
    assert not same_model(plain, learner(engine=partial(Adversarial, critic=critic(), weight=0.1)).fit(2))


def test_warmup_is_plain_training_until_it_ends():
    snapshots = {}
    for name, engine in dict(plain=Engine, warm=partial(Adversarial, critic=critic(), weight=0.5, warmup=3)).items():
        snapshots[name] = []
        take = [At(i, lambda l, name=name: snapshots[name].append(copies(l.model))) for i in (3, 4)]
        learner(engine=engine, callbacks=take, valid=None).fit(1)
    assert same_state(snapshots["plain"][0], snapshots["warm"][0]) and not same_state(snapshots["plain"][1], snapshots["warm"][1])


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_adversarial import *
learner({out!r}, save_every=2, callbacks=[At(9, lambda l: os.kill(os.getpid(), signal.SIGKILL))]).fit(3)
"""


def test_killed_and_resumed_ends_in_the_same_bits(tmp_path):
    "Both networks, both optimisers, the figures of the epoch that was cut, and the critic's dropout"
    whole = learner(tmp_path/"whole", save_every=2).fit(3)
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS=str(torch.get_num_threads()), ACCELERATE_USE_CPU="true")
    code = SCRIPT.format(tests=str(ROOT/"tests"), out=str(tmp_path/"cut"))
    killed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    saved = load_state(tmp_path/"cut")
    assert saved["updates"] == 8 and saved["sums"]["critic_real"][1] == 2  # two updates into the second epoch
    torch.manual_seed(99)
    resumed = learner(tmp_path/"cut", save_every=2).resume().fit(3)
    for part, value in whole.state().items(): assert same_state(value, resumed.state()[part]), part
    rows = [[json.loads(line) for line in open(tmp_path/run/"metrics.jsonl")] for run in ("whole", "cut")]
    assert len(rows[0]) == 3 and same_state(*rows) and rows[0][2]["adversarial"] > 0


def test_fit_one_resume_and_fit_two_is_fit_two(tmp_path):
    steady = dict(schedule=lambda share: 1.0)  # a schedule follows the share of the run that is done: this one is the same for both
    whole = learner(tmp_path/"whole", **steady).fit(2)
    learner(tmp_path/"parts", **steady).fit(1)
    torch.manual_seed(99)
    resumed = learner(tmp_path/"parts", **steady).resume().fit(2)
    for part in ("model", "ema", "optimizer", "critic", "critic_optimizer", "updates", "rng"):
        assert same_state(whole.state()[part], resumed.state()[part]), part
    assert same_state(whole.history[1]["critic_fake"], resumed.history[1]["critic_fake"])


@pytest.mark.parametrize("settings", [dict(accumulate=2), dict(accumulate=1, ema=0.0, clip=None)])
def test_one_epoch_then_another_is_two(tmp_path, settings):
    engine = lambda: partial(Adversarial, critic=critic(kind="pixels"), weight=0.1, critic_updates=2, form="focal")
    whole = learner(tmp_path/"whole", engine(), **settings).fit(2)
    stop = At(whole.progress.step//2, lambda l: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted): learner(tmp_path/"cut", engine(), callbacks=[stop], **settings).fit(2)
    resumed = learner(tmp_path/"cut", engine(), **settings).resume().fit(2)
    for part, value in whole.state().items(): assert same_state(value, resumed.state()[part]), part


def test_a_run_of_another_critic_is_refused(tmp_path):
    learner(tmp_path/"run").fit(1)
    with pytest.raises(ValueError, match="weight was 0.1 and is 0.2"):
        learner(tmp_path/"run", partial(Adversarial, critic=critic(), weight=0.2, warmup=2)).resume()
    with pytest.raises(ValueError, match="another critic"):
        learner(tmp_path/"run", partial(Adversarial, critic=Critic(channels=2), weight=0.1, warmup=2)).resume()
    learner(tmp_path/"plain", Engine).fit(1)
    with pytest.raises(ValueError, match="without one"): learner(tmp_path/"plain").resume()


def test_a_critic_that_diverges_stops_the_run():
    with pytest.raises(Diverged, match="loss is nan"):
        bad = critic()
        nn.init.constant_(bad.body[0].weight, float("nan"))
        learner(engine=partial(Adversarial, critic=bad, weight=0.0)).fit(1)


def test_settings_that_cannot_work_are_said():
    for settings, match in [(dict(weight=-1), "weight is -1"), (dict(warmup=-1), "warmup is -1"), (dict(form="hinge"), "bce, focal"),
                            (dict(weight=float("nan")), "weight is nan"), (dict(critic_updates=-1), "critic_updates")]:
        with pytest.raises(ValueError, match=match): duel(**settings)
    assert issubclass(Adversarial, Duel) and duel().settings["truth"] == "one_hot"


def test_a_recorded_run_against_a_critic(tmp_path, monkeypatch):
    "Run.adversary: by name, resumed from run.json alone, and plain where the weight is 0"
    import synseg.discriminators as discriminators
    entry = ModelEntry(lambda num_classes, in_channels=3, **o: Critic(num_classes, in_channels, **o),
                       ModelInfo("tiny", "a test", 2026, None, 11, 3, 0, None))
    monkeypatch.setitem(discriminators.DISCRIMINATORS, "tiny", entry)
    tiny = dict(images=8, size=(64, 64), epochs=2, options=dict(width=4), precision="fp32", ema=0.9)
    versus = lambda weight: dict(name="tiny", weight=weight, critic_lr=1e-3, truth="one_hot", options=dict(kind="cells"))
    whole = train(Run(**tiny, adversary=versus(0.1)), tmp_path/"whole", progress=False)
    stop = At(3, lambda l: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted): train(Run(**tiny, adversary=versus(0.1)), tmp_path/"cut", progress=False, callbacks=[stop])
    resumed = train(Run(), tmp_path/"cut", resume=True, progress=False)
    for part, value in whole.state().items(): assert same_state(value, resumed.state()[part]), part
    assert whole.history[-1]["adversarial"] > 0 and isinstance(whole.engine, Adversarial)
    plain = train(Run(**tiny), tmp_path/"plain", progress=False)
    assert same_model(plain, train(Run(**tiny, adversary=versus(0.0)), tmp_path/"zero", progress=False))


TWO = """
import sys
sys.path.insert(0, {tests!r})
from test_adversarial import *
import torch.distributed
run = learner(None, partial(Adversarial, critic=critic(kind="cells"), weight=0.1), accumulate=2, ema=0.0).fit(2)
for net in (run.model, run.engine.critic):
    for name, p in net.named_parameters():
        found = run.engine.gather(p.detach())
        assert run.engine.world == 2 and torch.equal(*found), name + " drifted apart"
sys.stdout.write(f"[fine {{run.engine.updates}}]")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_processes_stay_together(tmp_path):
    "Batch norm in the critic too, whose buffers a data-parallel wrapper writes before each forward"
    assert two_processes(tmp_path/"two.py", TWO.format(tests=str(ROOT/"tests"))).count("fine") == 2


def test_a_loop_left_in_mid_epoch_does_not_reach_into_the_next():
    "Accelerate keeps the loader of an abandoned loop as the current one; at that loader's end every batch would update"
    from torch.utils.data import TensorDataset

    from synseg.schedules import EpochSampler
    data = TensorDataset(torch.rand(4, 3, 8, 8), torch.zeros(4, 8, 8).long())
    engine = lambda accumulate: Engine(nn.Conv2d(3, 2, 1), nn.CrossEntropyLoss(), lambda m: torch.optim.SGD(m.parameters(), 0.1), "fp32", accumulate)
    left = iter(engine(1).loader(data, 2, EpochSampler(4, 0)))
    for _ in range(2): next(left)
    other, updates = engine(2), []
    other.begin()
    for _ in range(4):
        other.step(1.0, *data[:2])
        updates.append(other.updated)
    assert updates == [False, True]*2
