"Where real data may lie, and the small things that every test file shares"
import os
import signal
from pathlib import Path

import pytest
import torch

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
