# The two commands of the README, and the habits of a developer. `make help` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
told = $$($(BIN)/python -m pip config list | sed -n "s/\\\\n/ /g; s/^[^=]*\.$(1)='\(.*\)'$$/\1/p" | head -1)
UV = UV_DEFAULT_INDEX="$(call told,index-url)" UV_INDEX="$(call told,extra-index-url)" UV_FIND_LINKS="$$(echo $(call told,find-links) | tr ' ' ,)" UV_SYSTEM_CERTS=1 $(BIN)/uv pip install --quiet --index-strategy unsafe-best-match --python $(BIN)/python
READY := .venv/.ready
DEMO := runs/demo

.PHONY: help demo test app docs docs-serve lessons pictures prepare readme clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}; say make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	@echo 'installing into .venv, which takes a minute or some'
	@{ $(PIP) -c constraints.txt uv && $(UV) -c constraints.txt -e '.[dev]'; } || { echo "uv (above) could not; pip takes longer"; $(PIP) -c constraints.txt -e '.[dev]'; } || { echo "pip could not either (above); if that is a version in constraints.txt that is not to be had any more, this helps: the newest ones that settings.ini allows, which nobody has tested together"; $(PIP) -e '.[dev]'; }  # uv is told where pip was told that packages lie
	@$(BIN)/python -m compileall -q -j 0 -x '/tests/|transformers/models/(?!_|[abct]|dinov2_w|siglip/|vit_mae)|diffusers/pipelines/[^_ops]|/ray/(data|llm|rllib|serve|train|tune)/' .venv >/dev/null || true  # on all cores; without packages' tests and what we never load (a third of it all); some packages bring templates that are no Python
	@touch $(READY)

demo: $(READY)  ## forget "Van Gogh" on the built-in sandbox: a verdict and an HTML report
	@mkdir -p $(DEMO)
	$(BIN)/papermill nbs/train_doco.ipynb $(DEMO)/train_doco.ipynb -p concept "Van Gogh" -p run_dir $(DEMO) -p resume True --log-output --no-progress-bar
	@$(BIN)/python -c 'import json; r = json.load(open("$(DEMO)/report.json")); print("\n" + r["verdict"] + "\n\nreport: $(CURDIR)/$(DEMO)/report.html")'

test: $(READY)  ## notebooks' own checks, then what crosses rooms
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

app: $(READY)  ## the explorer as a page without code, on http://127.0.0.1:8866
	$(BIN)/voila nbs/explore.ipynb --no-browser --port=8866 --Voila.ip=127.0.0.1

docs: $(READY)  ## the docs site, from the notebooks as they are, in _docs/html
	$(BIN)/python -c 'from unlearn_wb.docs_site import build; build()'

docs-serve: docs  ## and show it on http://127.0.0.1:8123
	$(BIN)/python -m http.server 8123 --bind 127.0.0.1 --directory _docs/html

lessons: $(READY)  ## run the literate notebooks and keep their outputs
	$(BIN)/jupyter nbconvert --log-level WARN --to notebook --execute --inplace nbs/lib/*.ipynb nbs/methods/*.ipynb nbs/howto/*.ipynb
	$(BIN)/python -c 'import sys; from unlearn_wb.docs_site import shrink_notebook; [shrink_notebook(p) for p in sys.argv[1:]]' nbs/*.ipynb nbs/lib/*.ipynb nbs/methods/*.ipynb nbs/howto/*.ipynb
	$(BIN)/nbdev_clean

pictures: demo  ## the pictures of the README, from the demo's run and the table of all methods
	@mkdir -p nbs/images
	cp $(DEMO)/images/grid-target.png nbs/images/before-after.png
	cp $(DEMO)/images/grid-linked.png nbs/images/starry-night.png
	$(BIN)/python -c 'from unlearn_wb.comeback import comeback_map, comeback_poster; from unlearn_wb.study import poster; poster("Snoopy", "data/results/sandbox").savefig("nbs/images/methods.webp", dpi=90); comeback_poster("Van Gogh").savefig("nbs/images/comeback.webp", dpi=90); comeback_map().savefig("nbs/images/comeback-map.webp", dpi=90)'
	SMALL_WORLD=sandbox UNLEARN_WB_NEEDS_BROWSER=1 $(BIN)/python -m pytest tests/browser/test_explore.py -k choose
	$(BIN)/python -c 'from PIL import Image; Image.open("tests/browser/screenshots/readme.png").convert("RGB").save("nbs/images/explorer.webp", quality=90, method=6)'

readme: $(READY)
	$(BIN)/jupyter nbconvert --log-level ERROR --to notebook --execute --inplace nbs/index.ipynb
	$(BIN)/nbdev_clean --fname nbs/index.ipynb
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown --TagRemovePreprocessor.remove_input_tags remove-input --output-dir . --output README nbs/index.ipynb

prepare: $(READY)  ## before a commit: library and README from the notebooks, clean, test
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(MAKE) readme test

clean:  ## forget the environment and all runs
	rm -rf .venv runs _proc _docs
