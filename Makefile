# Two commands do everything on a machine that has Python, pip, make and git:
#   make course    execute the course on the embedded scenes, say where the results are
#   make test      every test: sync, lint, notebooks, pytest
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
FLAGS  ?=

.PHONY: help course test outputs sync lint notebooks unit wheel site browser seconds readme clean

help:
	@sed -n '1,4p' Makefile
	@echo "  make outputs   re-execute notebooks with a clean kernel and store their outputs (NB=nbs/x.ipynb FLAGS='slow')"
	@echo "  make sync lint notebooks unit    the parts of make test, one by one"
	@echo "  make wheel     build wheel and sdist, install the wheel into a second environment, use it"
	@echo "  make site      render the website where quarto is installed"
	@echo "  make browser   open every page in Chromium and say what a reader would stumble over"
	@echo "  make seconds   record what each chapter costs (after make course)"

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

$(VENV)/.course: $(VENV)/.made settings.ini setup.py
	$(BIN)/python -m pip install --quiet --progress-bar off -e ".[course]"
	@touch $@

$(VENV)/.dev: $(VENV)/.made settings.ini setup.py
	@echo "Installing (a minute or two: PyTorch is large) ..."
	$(BIN)/python -m pip install --quiet --progress-bar off -e ".[dev]"
	@$(BIN)/python -m pip install --quiet --progress-bar off "pydensecrf2>=1.1" >/dev/null 2>&1 || \
	  echo "pydensecrf2 could not be installed (it needs a C++ compiler, and fails on Python 3.13): the tests that compare with it are skipped."
	@touch $@

course: $(VENV)/.course
	$(BIN)/python tools/course.py

test: $(VENV)/.dev sync lint notebooks unit

outputs: $(VENV)/.dev
	$(BIN)/python tools/outputs.py --flags "$(FLAGS)" $(NB)

sync: $(VENV)/.dev
	$(BIN)/python tools/sync.py

lint: $(VENV)/.dev
	$(BIN)/ruff check synseg tests tools setup.py

# One thread to a process: two workers with two threads each would fight over two cores, and a neighbour makes both wait.
# What chapters write for a while goes to a folder that is removed here: worker processes end without tidying up.
notebooks: $(VENV)/.dev
	tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && \
	TMPDIR=$$tmp OMP_NUM_THREADS=1 TQDM_DISABLE=1 MPLBACKEND=agg $(BIN)/nbdev_test --timing --do_print

unit: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# Before the environment for development is filled, where both begin: each holds PyTorch, and the wheel's is removed again.
wheel: $(VENV)/.made
	$(BIN)/python -m pip install --quiet --progress-bar off "build>=1.2"
	PYTHON=$(BIN)/python sh tools/wheel.sh

readme: $(VENV)/.dev
	$(BIN)/python tools/readme.py

site: $(VENV)/.dev
	$(BIN)/python tools/pages.py

# Pages of _docs where make site has been there, else plain ones; axe-core comes from npm into a cache outside the repository
browser: $(VENV)/.dev
	@test -n "$(AXE)" -o -d $(HOME)/.cache/synseg/node_modules/axe-core || npm install --silent --no-fund --no-audit --prefix $(HOME)/.cache/synseg axe-core@4 || true
	$(BIN)/python tools/browser.py $(PAGES)

# After make course; or make notebooks | tee test.log, then make seconds LOG=test.log
seconds: $(VENV)/.dev
	$(BIN)/python tools/seconds.py $(LOG)

clean:
	rm -rf build dist _proc _docs course-out *.egg-info
