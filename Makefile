# make demo   a whole cluster in one process, one volume exported over NBD, until Ctrl-C
# make test   format, lints, rules of the tree, all tests (installs the foreign clients that tests use, if root)
CARGO ?= cargo
BINARIES = -p spline -p spline-mds -p spline-chunkserver -p spline-gateway -p spline-nebd
# Tests that start real processes run one at a time: each has a cluster of its own, and disks to share.
PROCESS_TESTS = -p spline-conformance -p spline-fault -p spline-e2e
ROUNDS ?= 20
CASES ?= 20000
TOOLS = nbdinfo:libnbd-bin nbdcopy:libnbd-bin qemu-img:qemu-utils qemu-io:qemu-utils fio:fio nbdkit:nbdkit

.PHONY: demo check test bench soak fuzz fmt binaries tools cargo

demo: cargo
	$(CARGO) build --release --locked -p spline -p spline-nebd
	exec $${CARGO_TARGET_DIR:-target}/release/spline dev $(DEV)

# As demo, but writes, reads back, verifies and stops.
check:
	$(MAKE) demo DEV=--check

test: cargo tools
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(CARGO) test --locked -p spline-tidy
	$(MAKE) binaries
	$(CARGO) test --workspace --locked --exclude spline-tidy --exclude spline-conformance --exclude spline-fault --exclude spline-e2e
	$(CARGO) test --locked $(PROCESS_TESTS) -- --test-threads=1

# The fault and conformance tests again, with more rounds and larger images, on optimised binaries.
soak: cargo tools
	$(CARGO) build --release --locked $(BINARIES)
	SPLINE_ROUNDS=$(ROUNDS) $(CARGO) test --release --locked $(PROCESS_TESTS) -- --test-threads=1

bench: cargo tools
	$(CARGO) build --release --locked $(BINARIES)
	$(CARGO) run --release --locked -p spline-bench

# Every parser of foreign bytes, with many more generated inputs than make test gives it.
fuzz: cargo
	PROPTEST_CASES=$(CASES) $(CARGO) test --release --locked -p spline-link -p spline-wire -p spline-nebd -p spline-process

fmt:
	$(CARGO) fmt --all

binaries:
	$(CARGO) build --locked $(BINARIES)

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
