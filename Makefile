# Two commands: `make quickstart` and `make test`. Both set up everything in .venv first.
PYTHON ?= python3.11
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses=4 --dist=loadgroup

.PHONY: quickstart test lint format coverage docs lock clean

quickstart: .venv/ready
	@echo "1. The model that comes with the package reconstructs photographs it has never seen, from early to late layers."
	$(BIN)/python experiments/gallery.py checkpoints=imagenette-small data=photos data.crops_per_photo=1 num_pictures=3 output=outputs/shipped
	@echo
	@echo "2. Train one: a ControlNet for one layer, on the same prior."
	$(BIN)/python train.py experiment=quickstart
	@echo
	@echo "Look at outputs/shipped/gallery.png and outputs/quickstart/reconstructions.png. Then try, after 'source .venv/bin/activate':"
	@echo "  python evaluate.py checkpoint=outputs/quickstart images='path/*.jpg' num_samples=4"
	@echo "  python train.py resume=outputs/quickstart trainer.max_steps=2000"
	@echo "  python train.py data=folder data.root=PATH   # PATH/train/CLASS/*.jpg, PATH/val/CLASS/*.jpg"

test: lint
	$(PYTEST) --durations=10

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

coverage: .venv/ready
	$(PYTEST) --cov=featinv --cov-report=term-missing

docs: .venv/ready
	$(BIN)/mkdocs build --quiet --strict

lock: .venv/ready
	$(BIN)/pip freeze --exclude-editable | grep -E '^[A-Za-z0-9_.-]+==' | grep -vE '^(nvidia|cuda|triton)' > requirements.lock

clean:
	rm -rf .venv

.venv/ready: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@
