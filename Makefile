# Every target sets up .venv itself when it is missing or setup.py has changed. PYTHON names the interpreter; without it the newest of
# Python 3.11 to 3.13 that there is.
BIN := .venv/bin

.PHONY: quickstart test test-fast lint bench format chaos fuzz parity versions pythons python serving study-smoke

quickstart: .venv/.installed-train-plot  ## a trained MoE becomes a distilled dense model, in out/quickstart
	launch/quickstart_cpu.sh

test: .venv/.installed-dev  ## all tests, in two processes
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-fast: .venv/.installed-dev  ## between edits, under two minutes: the tests of one process that take no seconds; says which should be marked slow
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile -m 'not distributed and not slow' --durations=10 --durations-min=2

chaos: .venv/.installed-dev  ## every stage killed at random moments and in every phase, ranks that hang, full disks, damage; all resumed
	MOE2DENSE_KILLS=20 OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=20 tests/surgery/test_kills.py tests/trainer/test_resume.py \
	    tests/trainer/test_faults.py tests/trainer/test_surroundings.py tests/trainer/test_nonfinite.py tests/test_security.py \
	    tests/launch/elastic_kills.py

fuzz: .venv/.installed-dev  ## table: every tensor of every family's tiny checkpoint absent, of another shape or type, NaN or doubled; hours (EVERY=40: a part)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.cases.fuzz every=$(or $(EVERY),1)

versions: .venv/.installed-dev  ## the trainer's parity and checkpoint tests against other versions of Megatron-Core, unpacked in out/versions
	launch/versions.sh

pythons:  ## the two commands under every interpreter there is, and runs that change between them, in out/pythons
	launch/pythons.sh

parity: .venv/.installed-dev  ## table: every layout of the trainer against stock transformers in one process
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.trainer.parity

study-smoke: .venv/.installed-dev  ## every arm of the study at tiny length, in out/study_smoke
	rm -rf out/study_smoke && mkdir -p out/study_smoke && cp docs/study.md out/study_smoke/
	OUT=out/study_smoke REPORT=out/study_smoke/study.md SEEDS=0 PROCESSES=1 \
	    PRETRAIN_SETTINGS="data.path=examples/pico_moe/tokens/distill train.steps=2 data.validation_sequences=32" \
	    SAMPLE_SETTINGS="data.sequences=16" EVAL_SETTINGS="perplexity.data.sequences=8" TASK_SETTINGS="questions=16" \
	    studies/study_pico.sh train.steps=2 data.validation_sequences=16 teacher.check.loss_bound=null

serving: .venv/.installed-dev  ## table: every family's tiny dense result and the quickstart's in vLLM and llama.cpp, into docs/serving.md; about an hour
	launch/serving.sh

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/shellcheck -x launch/*.sh launch/*.slurm studies/*.sh studies/beyond/*.sh .ci/run
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed-dev  ## one line a figure: name value unit goal
	@set -e; for script in benchmarks/*.py; do OMP_NUM_THREADS=1 $(BIN)/python "$$script"; done

python:
	@PYTHON='$(PYTHON)' launch/venv.sh

# --no-compile: bytecode of the few modules that are imported is made then, not that of all 12,000 files.
# A GPU machine's own torch build goes in first (docs/operations.md); one that is already there is kept.
.venv/.torch: | python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install -q --no-compile torch==2.13.0
	touch $@

.venv/.installed-train-plot: setup.py .venv/.torch
	$(BIN)/python -m pip install -q --no-compile -e '.[train,plot]'
	touch $@

.venv/.installed-dev: setup.py .venv/.torch
	$(BIN)/python -m pip install -q --no-compile -e '.[train,plot,eval,dev]'
	touch $@ .venv/.installed-train-plot
