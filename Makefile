PYTHON ?= python3
BIN := .venv/bin
PORT ?= 8377

.PHONY: install simd system demo test test-slow lint clean

# One virtual environment; built again when what it is made of changes.
.venv/installed: pyproject.toml constraints.txt
	@echo "installing into .venv: a few minutes, most of them torch and DALI"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

install: .venv/installed

# Pillow-SIMD in Pillow's place: views on the CPU at 2 × the speed. Only for pictures you trust: 12.1.1 has holes that Pillow 13
# closed, one of them in the JPEG decoder. `touch pyproject.toml && make install` puts Pillow back. Needs a C compiler and the
# headers of libjpeg and zlib.
simd: install
	$(BIN)/pip uninstall --quiet --yes pillow
	CC="cc -mavx2" $(BIN)/pip install --quiet --force-reinstall --no-deps --no-binary pillow-simd pillow-simd==12.1.1.post0
	$(BIN)/python -c 'import PIL; assert "post" in PIL.__version__; print("Pillow-SIMD", PIL.__version__)'

# Debian packages for the page tests; tests that need them say so when they are skipped.
system:
	apt-get update --quiet=2
	apt-get install --quiet=2 --yes --no-install-recommends chromium fonts-dejavu-core

demo: install
	$(BIN)/python -m tools.demo demo --port $(PORT)

test: install
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check
	$(BIN)/pyright

clean:
	rm -rf demo build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
