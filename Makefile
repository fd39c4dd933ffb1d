# make demo: install, train on the embedded default, open the chat.    make test: install, lint, test.
# make pictures: the README's pictures, of the demo's page.    make soak: faults of every kind against the demo, for hours.
# make bench: both scripts at the real size of Gemma-2b, random weights, on the CPU.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test bench pictures soak
demo: .venv/demo
	$(BIN)/python train_memory_decoder.py --demo
	$(BIN)/python app.py --demo

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

bench: .venv/demo
	$(BIN)/python benchmarks/gemma_2b_shape.py --folder build/gemma_2b_shape

soak: .venv/dev .venv/demo
	$(BIN)/python benchmarks/soak.py

pictures: .venv/dev
	$(BIN)/python benchmarks/pictures.py

.venv/runtime: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "installing into .venv: one to several minutes; 2 GB, or more where torch comes with CUDA"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	@touch $@

.venv/demo: requirements-demo.txt .venv/runtime
	$(BIN)/python -m pip install -q --no-deps -r requirements-demo.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/runtime
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	@touch $@
