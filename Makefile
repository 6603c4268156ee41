# make demo   the main job: CHARM and what it is measured against on drawn phantoms, from install to report
# make test   all tests, on the newest packages, but for the longest
# make test-kaggle  the same on the packages of Kaggle's image (TESTS="tests/nn tests/data" for some of them)
# make test-long  the longest tests, and all tests on the packages of Kaggle's image (half an hour)
# make notebooks  charm.ipynb anew, which is stored with its outputs
# make explore  finished runs as a web page of this machine (RUNS=runs/nih64 for some of them)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-kaggle test-long explore nih64 regime64 parts64 judged64 longtail64 two_path64 memaug64 benchmarks parameters notebooks lint lab clean

$(VENV)/.installed: requirements.txt pyproject.toml kaggle_setup/constraints-latest.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed; say PYTHON=...')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about two minutes, 6 GB)"
	$(PIP) install -q -c kaggle_setup/constraints-latest.txt -r requirements.txt
	$(PIP) install -q -c kaggle_setup/constraints-latest.txt -e '.[test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m charmlib phantom data/phantoms
	$(BIN)/python -m charmlib grid run params/grid_demo.yaml --out runs/demo --workers 2
	$(BIN)/python benchmarks/demo_check.py runs/demo

test: $(VENV)/.installed
	$(BIN)/ruff check .
	CHARM_CONSTRAINTS=kaggle_setup/constraints-latest.txt $(BIN)/python -m pytest

KAGGLE_VENV ?= .venv-kaggle
KAGGLE_BIN := $(KAGGLE_VENV)/bin
# Modules are compiled when first imported: the tests need few of torch's, and the install takes 105 s instead of 150.
$(KAGGLE_VENV)/.installed: requirements.txt pyproject.toml kaggle_setup/constraints-kaggle.txt
	test -x $(KAGGLE_BIN)/python || $(PYTHON) -m venv $(KAGGLE_VENV)
	@echo "installing Kaggle's packages into $(KAGGLE_VENV) (about two minutes, 8 GB)"
	$(KAGGLE_BIN)/python -m pip --disable-pip-version-check install -q --no-compile \
		-c kaggle_setup/constraints-kaggle.txt -r requirements.txt -e '.[suite]'
	touch $@

TESTS ?= tests
test-kaggle: $(KAGGLE_VENV)/.installed
	CHARM_CONSTRAINTS=kaggle_setup/constraints-kaggle.txt $(KAGGLE_BIN)/python -m pytest $(TESTS)

test-long: $(VENV)/.installed test-kaggle
	CHARM_CONSTRAINTS=kaggle_setup/constraints-latest.txt $(BIN)/python -m pytest -m long

SHARED ?= ../shared
nih64: $(VENV)/.installed
	$(BIN)/python -m charmlib grid run params/grid_nih64.yaml --out runs/nih64 \
		-p data_root=$(SHARED)/nih64 -p weights=$(SHARED)/weights/mobilenet_v2_imagenet1001.pt
	$(BIN)/python benchmarks/keep_results.py runs/nih64 benchmarks/results/nih64

# the comparisons of docs/protocol.md; each goes on where it was stopped
REAL := -p data_root=$(SHARED)/nih64 -p weights=$(SHARED)/weights/mobilenet_v2_imagenet1001.pt
runs/explore64/explore.txt: $(VENV)/.installed
	$(BIN)/python -m benchmarks.explore $(SHARED)/nih64 runs/explore64

regime64: runs/explore64/explore.txt
	set -e; for part in 1 2; do $(BIN)/python -m charmlib grid run params/grid_nih64_regime$$part.yaml --out runs/regime64_$$part --workers 2 \
		$(REAL) -p split=runs/explore64; cp runs/regime64_$$part/leaderboard.csv benchmarks/results/nih64_regime$$part.csv; done

SEEDS ?= [85, 1, 2]
parts64: $(VENV)/.installed
	$(BIN)/python -m charmlib grid run params/grid_nih64_parts.yaml --out runs/nih64_parts --workers 2 \
		$(REAL) -p never_test=benchmarks/explore64.txt -p "seed=$(SEEDS)"
	set -e; for run in runs/nih64_parts/*_seed=*; do $(BIN)/python -m charmlib baselines $$run; done
	$(BIN)/python -m benchmarks.keep_parts runs/nih64_parts benchmarks/results/nih64_parts

judged64: $(VENV)/.installed
	$(BIN)/python -m charmlib grid run params/grid_nih64_judged.yaml --out runs/nih64_judged --workers 2 \
		$(REAL) -p never_test=benchmarks/explore64.txt
	$(BIN)/python -m benchmarks.keep_parts runs/nih64_judged benchmarks/results/nih64_parts

longtail64 two_path64: %64: runs/explore64/explore.txt
	$(BIN)/python -m charmlib grid run params/grid_nih64_$*.yaml --out runs/$*64 --workers 2 $(REAL) -p split=$(or $(SPLIT),runs/explore64)
	$(BIN)/python -m benchmarks.keep_screening runs/$*64 benchmarks/results/nih64_$*.csv

memaug64: $(VENV)/.installed
	$(BIN)/python -m charmlib grid run params/grid_nih64_memaug.yaml --out runs/nih64_memaug --workers 2 \
		-p data_root=$(SHARED)/nih64 -p weights=$(SHARED)/weights/mobilenet_v2_imagenet1001.pt
	$(BIN)/python benchmarks/keep_memaug.py runs/nih64_memaug benchmarks/results/nih64_memaug

# what the README says of speed and survival, as files in benchmarks/results (40 minutes on two cores, which should be idle)
benchmarks: $(VENV)/.installed
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.chaos
	$(BIN)/python -m benchmarks.loader $(SHARED)/nih_full
	$(BIN)/python -m benchmarks.open_cache $(SHARED)
	$(BIN)/python -m benchmarks.step $(SHARED)/nih_full
	$(BIN)/python -m benchmarks.costs

RUNS ?= runs
explore: $(VENV)/.installed
	$(PIP) install -q -c kaggle_setup/constraints-latest.txt -e '.[explore]'
	$(BIN)/python -m charmlib explore $(RUNS)

# brings the notebooks' parameters cells up to date after a change of charmlib/param_rows.py
parameters: $(VENV)/.installed
	$(BIN)/python -m charmlib params --write notebooks/prepare.ipynb --write notebooks/train.ipynb \
		--write notebooks/test.ipynb

# runs charm.ipynb, which is stored with its outputs, after a change of what it shows
notebooks: $(VENV)/.installed
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False notebooks/charm.ipynb

lint: $(VENV)/.installed
	$(BIN)/ruff check --fix .

lab: $(VENV)/.installed
	$(PIP) install -q -c kaggle_setup/constraints-latest.txt -e '.[lab]'
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf runs/demo data/phantoms
