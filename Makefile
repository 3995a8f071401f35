# Everything runs in .venv, made on first use from the pinned versions in constraints.txt.
PYTHON ?= python3
# DVC runs `python`: let that be the one in .venv.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# setuptools warns of every editable installation.
PIP := PYTHONWARNINGS=ignore python -m pip install --quiet

.PHONY: repro test bench folds compare lock clean

repro: .venv/installed
	dvc repro
	@python -m stages.scores.evaluation metrics

test: .venv/installed-test
	ruff check .
	ruff format --check .
	mypy
	pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# Every picture a test picture, in experiments of DVC; a stopped one goes on: make folds ARGS="--folds 5"
folds: .venv/installed
	@python -m stages.folds $(ARGS)

# All experiments, the lowest validation log-loss first: make compare ARGS=--csv
compare: .venv/installed
	@python -m stages.compare $(ARGS)

# Against a tutorial's loop: make bench ARGS="--data photos --weights weights.pth"; against it and scikit-learn, on many
# sets: make bench ARGS="--sets folder --weights weights.pth"
bench: .venv/installed
	@python tests/bench/bench.py $(ARGS)

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "Installing the pinned packages: several GB, a few minutes ..."
	$(PIP) --upgrade "pip>=24"
	$(PIP) --constraint constraints.txt --editable .
	python -m stages.charts .dvc/plots.html && dvc config --local plots.html_template plots.html
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) --constraint constraints.txt --editable ".[test]"
	touch $@

# Renews the pinned versions, for every platform at once.
lock:
	uv pip compile --universal --all-extras --quiet --no-header --no-annotate pyproject.toml --output-file constraints.txt

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
