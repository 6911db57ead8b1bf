# One recipe per thing a person wants to do; CI runs the same ones.
# On a fresh machine `make demo` and `make test` install what they need (Debian package names) and go.

SHELL := /bin/bash
CARGO ?= cargo
PROFILE ?= release
NAME ?= demo
CLUSTERS ?= 500
SEED ?= $(shell date +%s)

.PHONY: all build demo test check fmt lint unit netns e2e conformance fuzz bench deps deps-test clean help

all: build

help: ## show the recipes
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

deps: ## install what building and running needs
	@tools/deps build run

deps-test: ## install what the tests need beyond that
	@tools/deps build run test

build: deps ## build the binary (target/release/portolan)
	$(CARGO) build --locked --profile $(PROFILE) -p portolan

demo: build ## start a standalone cluster and follow a request along the whole path
	@examples/demo.sh target/$(PROFILE)/portolan $(NAME)

check: deps fmt lint unit ## format, clippy, documentation, unit tests

fmt:
	$(CARGO) fmt --all --check

lint:
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps --document-private-items

unit: ## tests beside the code
	$(CARGO) test --locked --workspace --lib --bins

netns: deps-test ## tests in network namespaces, with real kernel rules and pods
	$(CARGO) test --locked --workspace --exclude portolan --test it

e2e: deps-test ## real kubectl, curl and dig against the real binary
	$(CARGO) test --locked -p portolan --test e2e

conformance: deps-test ## the recorded behaviour of upstream Kubernetes, replayed against the binary
	$(CARGO) test --locked -p portolan --test conformance

test: deps-test fmt ## everything that CI runs
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(CARGO) test --locked --workspace

fuzz: deps-test ## random clusters and packets: kernel against evaluator (CLUSTERS=500; SEED=N repeats a run)
	@echo "first seed $(SEED), $(CLUSTERS) clusters"
	PORTOLAN_ORACLE=$(CLUSTERS) PORTOLAN_ORACLE_SEED=$(SEED) $(CARGO) test --locked -p portolan-dataplane --test it -- \
		--nocapture oracle::the_kernel_and_the_evaluator_agree hostile::no_input_breaks_the_rules

bench: deps-test ## speed and memory, as ratios against a peer in the same run; results go to benches/
	$(CARGO) build --locked --profile release -p portolan
	benches/run.sh target/release/portolan

clean: ## remove what was built
	$(CARGO) clean
