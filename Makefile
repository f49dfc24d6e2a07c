# make demo   a whole cluster in one process, one volume exported over NBD, until Ctrl-C
# make test   format, lints, rules of the tree, all tests (installs the foreign clients that tests use, if root)
CARGO ?= cargo
# Tests that start real processes: each has a cluster of its own, so they run one at a time (RUST_TEST_THREADS).
PROCESS_TESTS = -p spline-conformance -p spline-fault -p spline-e2e
ROUNDS ?= 20
CASES ?= 20000
FUZZ_SECONDS ?= 600
FUZZ_TOOLCHAIN ?= nightly
FUZZ_TARGETS = nbd link wire wal virtqueue vhost_user inflight
TOOLS = nbdinfo:libnbd-bin nbdcopy:libnbd-bin qemu-img:qemu-utils qemu-io:qemu-utils fio:fio nbdkit:nbdkit \
	qemu-system-x86_64:qemu-system-x86 qemu-storage-daemon:qemu-system-common \
	mmdebstrap:mmdebstrap python3:python3

.PHONY: demo check test bench soak fuzz fuzz-tools fmt tools cargo

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

# Every parser of foreign bytes: each target of tests/fuzz under libFuzzer for FUZZ_SECONDS, starting from its seeds and from
# what earlier runs found, then the property tests with many more cases than make test gives them. An input that breaks
# something is kept in tests/fuzz/artifacts and ends the run.
fuzz: cargo fuzz-tools
	for target in $(FUZZ_TARGETS); do \
		mkdir -p tests/fuzz/corpus/$$target; \
		$(CARGO) +$(FUZZ_TOOLCHAIN) fuzz run --fuzz-dir tests/fuzz $$target tests/fuzz/corpus/$$target tests/fuzz/seeds/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -timeout=20 -print_final_stats=1 || exit 1; \
	done
	PROPTEST_CASES=$(CASES) $(CARGO) test --release --locked -p spline-link -p spline-wire -p spline-nebd -p spline-process

# libFuzzer needs a nightly compiler.
fuzz-tools:
	@$(CARGO) +$(FUZZ_TOOLCHAIN) --version >/dev/null 2>&1 || rustup toolchain install $(FUZZ_TOOLCHAIN) --profile minimal || \
		{ echo "fuzzing needs a nightly compiler: rustup toolchain install $(FUZZ_TOOLCHAIN)"; exit 1; }
	@$(CARGO) fuzz --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-fuzz || \
		{ echo "fuzzing needs cargo-fuzz: cargo install --locked cargo-fuzz"; exit 1; }

fmt:
	$(CARGO) fmt --all

cargo:
	@command -v $(CARGO) >/dev/null || { echo "cargo is missing: install Rust from https://rustup.rs"; exit 1; }

# Installs the foreign clients that are missing; without root says how. Twice if need be: packages of another source that
# the new ones can not stand beside are removed by the first installation.
tools:
	@for round in 1 2 3; do \
		hash -r; missing=""; \
		for tool in $(TOOLS); do command -v $${tool%%:*} >/dev/null || missing="$$missing $${tool##*:}"; done; \
		missing=$$(echo $$missing | tr ' ' '\n' | sort -u | tr '\n' ' '); \
		[ -n "$${missing% }" ] || exit 0; \
		[ "$$(id -u)" = 0 ] && [ $$round -lt 3 ] || { echo "tests need these packages: sudo apt-get install $$missing"; exit 1; }; \
		apt-get install -y --no-install-recommends $$missing || { apt-get update && apt-get install -y --no-install-recommends $$missing; } || exit 1; \
	done
