# Two commands set everything up on a machine that has Python 3.11 or newer:
#   make demo   install into .venv, and show what the model that comes along can do
#   make test   install the test extra into .venv; lint, types, tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Options for pytest: files are shared out over workers, the longest first (tests/conftest.py). One test:
# make test PYTEST="tests/checkpoint/test_keys.py -x"
PYTEST ?= -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: reference demo test nano nano-card soak clients ray browser lint docs bench footprint full-size solvers bench-training aot plans plan-fit plan-check clean
.DELETE_ON_ERROR:

# Stamps: installation is skipped until pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

# What the model that comes along sees, hears, watches and says.
demo: $(VENV)/.installed
	$(BIN)/omni-jax demo --out out/demo

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site under site/; `$(BIN)/mkdocs serve` shows it while it is edited.
docs: $(VENV)/.installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # --quiet would hide the warnings from --strict

test: lint docs
	$(BIN)/python -m pytest $(PYTEST)

# The server for an hour, under clients that come, cancel, stall and go.
soak: $(VENV)/.installed-test
	OMNI_JAX_SOAK=3600 $(BIN)/python -m pytest tests/infer/serve/test_soak.py -s

# Other people's clients against the server, each in an environment of its own; node and npm must be there.
clients: $(VENV)/.installed-test
	$(BIN)/python -m tests.clients

# Two replicas under Ray Serve, one of which is killed under load.
$(VENV)-ray/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-ray
	$(VENV)-ray/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[ray]' openai websockets \
	  psutil pyyaml
	@touch $@

ray: $(VENV)-ray/.installed
	$(VENV)-ray/bin/python -m tests.ray_replicas

# The page in a browser, which must be there; npm fetches axe-core.
CHROMIUM ?= /usr/bin/chromium
browser: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check playwright
	npm install --prefix out/browser --no-audit --no-fund axe-core
	$(BIN)/python -m tests.browser --chromium $(CHROMIUM)

reference: $(VENV)/.installed
	$(BIN)/python -m omni_jax.cli.reference docs/reference.md

# The figures of docs/performance.md. bench takes the better part of an hour where the CPU has no bf16 instructions;
# footprint first makes a random 3B checkpoint (11 GB under out/).
bench: $(VENV)/.installed-test
	$(BIN)/omni-jax bench

out/3b/config.json: | $(VENV)/.installed
	$(BIN)/omni-jax init out/3b --preset 3b

footprint: $(VENV)/.installed-test out/3b/config.json
	$(BIN)/omni-jax footprint --model out/3b

solvers: $(VENV)/.installed out/3b/config.json
	$(BIN)/omni-jax solvers --model out/3b

# The figures of docs/checkpoints.md: needs 40 GB of disk, 12 GiB of memory and 5 to 15 minutes, by the disk.
full-size: $(VENV)/.installed-test out/3b/config.json
	$(BIN)/python -m tests.full_size out/3b

# Nano: data, every part, and the checkpoint in out/nano/release. Runs that stop go on. Debian's flite, espeak-ng and npm
# must be there.
nano: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[nano]'
	$(BIN)/python -m omni_jax.train.nano

# What it can do on held-out data, into its model card. The recipe's data must be there, which `make nano` begins with.
nano-card: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[nano,nano-card]'
	$(BIN)/python -m omni_jax.train.nano.card --card omni_jax/nano/README.md

# The speed in docs/training.md.
bench-training: $(VENV)/.installed-test
	$(BIN)/python -m tests.training_speed

# docs/pods-tables.md: what the compilers of TPUs and of an H100 say. An environment of its own, since jax looks for a
# GPU where the latter's compiler is installed.
$(VENV)-aot/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-aot
	$(VENV)-aot/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[aot,aot-gpu]'
	@touch $@

AOT := 3b,v5e:1x1 3b,v5e:2x4 3b,v6e:2x4 3b,h100 7b,v5e:2x4 7b,v6e:1x1
aot: $(VENV)-aot/.installed
	@mkdir -p out
	{ printf '# What the compilers say\n\nWritten by `make aot`; [pods.md](pods.md) explains it.\n'; \
	  for run in $(AOT); do \
	    printf '\n    omni-jax aot --preset %s --topology %s\n\n' $${run%,*} $${run#*,}; \
	    JAX_PLATFORMS=cpu $(VENV)-aot/bin/omni-jax aot --preset $${run%,*} --topology $${run#*,} \
	      --keep out/compiled || exit 1; \
	  done; } > out/pods-tables.md
	mv out/pods-tables.md docs/pods-tables.md

# docs/training-plans.md: what the compilers say of a step of each run in configs/.
PLANS := v5e-8=v5e:2x4 v5e-64=v5e:8x8 v6e-8=v6e:2x4 h100-8=h100:8
plans: $(VENV)/.installed-test $(VENV)-aot/.installed
	@mkdir -p out
	{ for run in full.py:3b full.py:7b lora.py:3b lora.py:7b talker.py:3b; do for plan in $(PLANS); do \
	    case $$run,$$plan in talker*,v5e-8=*) ;; talker*) continue ;; esac; \
	    case $$plan in h100*) bin=$(VENV)-aot/bin ;; *) bin=$(BIN) ;; esac; \
	    JAX_PLATFORMS=cpu $$bin/omni-jax finetune --config configs/$$run,$${plan%=*} --plan $${plan#*=} || exit 1; \
	  done; done; \
	  $(BIN)/omni-jax finetune --config configs/full.py:3b,v5e-64 --set mesh=fsdp=16 --set data.batch=16 \
	    --plan v5e:4x4; } > out/plans.jsonl
	$(BIN)/python -m omni_jax.train.plans < out/plans.jsonl > out/training-plans.md
	mv out/training-plans.md docs/training-plans.md

# Of omni-jax plan: the coefficients in omni_jax/runtime/memory_model.py, and the table of docs/plan.md. The TPU compiler must be
# installed; each compiles some dozens of programs at first, and goes on where it was cut off.
plan-fit: $(VENV)/.installed-test
	$(BIN)/python -m tests.plan_fit fit --keep out/compiled

plan-check: $(VENV)/.installed-test
	$(BIN)/python -m tests.plan_fit check --keep out/compiled

clean:
	rm -rf out build dist *.egg-info src/*.egg-info site .pytest_cache .mypy_cache .ruff_cache
