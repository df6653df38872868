# `make run` opens the workbench, `make test` checks the whole project. Nothing else is needed on a fresh machine
# than make and Python 3.10 or newer: both first set up .venv, and cost nothing there when nothing changed.
#
#   make run PYTHON=python3.12      use this interpreter to create .venv
#   make test PIP_FLAGS=            show what pip does

PYTHON    ?= python3
PIP_FLAGS ?= --quiet
VENV      := .venv
PY        := $(VENV)/bin/python
PIP       := $(PY) -m pip install --disable-pip-version-check $(PIP_FLAGS)

# The kernels bring their own threads; OpenMP's would fight them (and each other, with two test workers).
TEST_ENV  := env -u HF_HUB_OFFLINE OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE

.PHONY: run test test-browser
.DELETE_ON_ERROR:

run: $(VENV)/.ready-to-run
	@$(PY) app.py --demo

test: $(VENV)/.ready-to-test
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(TEST_ENV) $(PY) -m pytest -n 2 --dist worksteal --ignore tests/browser
	@echo "Not run: the tests in a real browser (make test-browser; needs Chromium)."

# The workbench in a real Chromium: apt-get install chromium, or CHROMIUM=/path/to/it.
test-browser: $(VENV)/.ready-to-test
	$(TEST_ENV) $(PY) -m pytest tests/browser

# One pip command for all: asked for alone, some packages would pull a torch outside of our range.
$(VENV)/.ready-to-run: requirements.txt $(PY)
	@echo "Setting up $(VENV): torch is large, so this can take some minutes the first time ..."
	@$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.ready-to-test: requirements.txt requirements-dev.txt $(PY)
	@echo "Setting up $(VENV) with what the tests need: some minutes the first time ..."
	@$(PIP) -r requirements.txt -r requirements-dev.txt
	@touch $@ $(VENV)/.ready-to-run

$(PY):
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "Amalgam needs Python 3.10 or newer, and there is no '$(PYTHON)' here."; \
	  echo "Install it, or name one:  make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Amalgam needs Python 3.10 or newer; '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1)."; \
	  echo "Name a newer one:  make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@"$(PYTHON)" -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }
