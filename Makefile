# make demo   a whole cluster in one process, one volume exported over NBD, until Ctrl-C
# make test   format, lints, rules of the tree, all tests (installs the foreign clients that tests use, if root)
CARGO ?= cargo
# Tests that start real processes: each has a cluster of its own, so they run one at a time (RUST_TEST_THREADS).
PROCESS_TESTS = -p spline-conformance -p spline-fault -p spline-e2e
ROUNDS ?= 20
CASES ?= 20000
TOOLS = nbdinfo:libnbd-bin nbdcopy:libnbd-bin qemu-img:qemu-utils qemu-io:qemu-utils fio:fio nbdkit:nbdkit

.PHONY: demo check test bench soak fuzz fmt tools cargo

demo: cargo
	$(CARGO) build --release --locked -p spline -p spline-nebd
	exec $${CARGO_TARGET_DIR:-target}/release/spline dev $(DEV)

# As demo, but writes, reads back, verifies and stops.
check:
	$(MAKE) demo DEV=--check

# Always the whole workspace, so that every dependency is compiled once, with one set of features.
test: cargo tools
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(CARGO) build --workspace --bins --locked
	RUST_TEST_THREADS=1 $(CARGO) test --workspace --locked

# The fault and conformance tests again, with more rounds and larger images, on optimised binaries.
soak: cargo tools
	$(CARGO) build --release --workspace --bins --locked
	SPLINE_ROUNDS=$(ROUNDS) RUST_TEST_THREADS=1 $(CARGO) test --release --locked $(PROCESS_TESTS)

bench: cargo tools
	$(CARGO) build --release --workspace --bins --locked
	$${CARGO_TARGET_DIR:-target}/release/spline-bench $(BENCH)

# Every parser of foreign bytes, with many more generated inputs than make test gives it.
fuzz: cargo
	PROPTEST_CASES=$(CASES) $(CARGO) test --release --locked -p spline-link -p spline-wire -p spline-nebd -p spline-process

fmt:
	$(CARGO) fmt --all

cargo:
	@command -v $(CARGO) >/dev/null || { echo "cargo is missing: install Rust from https://rustup.rs"; exit 1; }

# Installs the foreign clients that are missing; without root says how.
tools:
	@missing=""; \
	for tool in $(TOOLS); do command -v $${tool%%:*} >/dev/null || missing="$$missing $${tool##*:}"; done; \
	missing=$$(echo $$missing | tr ' ' '\n' | sort -u | tr '\n' ' '); \
	if [ -n "$${missing% }" ]; then \
		if [ "$$(id -u)" = 0 ]; then apt-get install -y --no-install-recommends $$missing || { apt-get update && apt-get install -y --no-install-recommends $$missing; }; \
		else echo "tests need these packages: sudo apt-get install $$missing"; exit 1; fi; \
	fi
