"Where real data may lie, and the small things that every test file shares"
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

SHARED = Path(os.environ.get("SYNSEG_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

# A test run started in the background inherits "ignore Ctrl-C", and so would the runs that it starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data_root():
    "`data_root(name)`: the folder of a real data set, or a visible skip where it is not at hand"
    def find(name):
        folder = SHARED / name
        if not folder.exists():
            pytest.skip(f"real data not at hand: set SYNSEG_DATA to a folder that holds {name}/")
        return folder
    return find


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def cells(path, kind=None):
    "The cells of a notebook, all or those of one kind"
    found = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    return [c for c in found if kind in (None, c["cell_type"])]


def text(cell):
    return "".join(cell["source"])


def scramble(net, std=0.2):
    "Random weights (`std` a number or a function of the parameter), scales and running statistics, in double precision"
    for p in net.parameters(): nn.init.normal_(p, std=std(p) if callable(std) else std)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
    return net.double().eval()


def accuracy_by_heart(net, steps, lr=3e-3):
    "Share of pixels right after training a network of two classes on two images with a bright stripe each"
    torch.manual_seed(0)
    x, y = torch.rand(2, 3, 64, 64) * 0.2, torch.zeros(2, 64, 64, dtype=torch.long)
    x[0, :, :40] += 0.7
    x[1, :, :, 24:] += 0.7
    y[x.mean(1) > 0.5] = 1
    optimiser = torch.optim.Adam(net.parameters(), lr)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(net(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return (net(x).argmax(1) == y).float().mean()


def same_state(a, b):
    "Bit for bit, through nested dictionaries and lists; clocks excepted"
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        clocks = {"seconds", "images_per_second"}
        return a.keys() == b.keys() and all(k in clocks or same_state(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_state(x, y) for x, y in zip(a, b))
    return a == b


def two_processes(script, text):
    "What `text`, written to `script`, prints when two processes on the CPU run it side by side"
    root = Path(__file__).resolve().parents[1]
    script.write_text(text)
    env = dict(os.environ, PYTHONPATH=str(root), OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
