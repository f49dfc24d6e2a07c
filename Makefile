# make demo   a whole cluster in one process, one volume exported over NBD, until Ctrl-C
# make test   format, lints, rules of the tree, all tests (installs the foreign clients that tests use, if root)
# make build && sudo make install    binaries, systemd units, example configuration; DESTDIR= for a package, PREFIX= elsewhere
CARGO ?= cargo
# Tests that start real processes: each has a cluster of its own, so they run one at a time (RUST_TEST_THREADS).
PROCESS_TESTS = -p spline-conformance -p spline-fault -p spline-e2e
ROUNDS ?= 30
# Of the random schedule of faults in make soak.
SOAK_SECONDS ?= 1800
CASES ?= 20000
FUZZ_SECONDS ?= 600
FUZZ_TOOLCHAIN ?= nightly
FUZZ_TARGETS = nbd link ring wire wal virtqueue vhost_user inflight
TOOLS = nbdinfo:libnbd-bin nbdcopy:libnbd-bin qemu-img:qemu-utils qemu-io:qemu-utils fio:fio nbdkit:nbdkit \
	qemu-system-x86_64:qemu-system-x86 qemu-storage-daemon:qemu-system-common \
	mmdebstrap:mmdebstrap depmod:kmod mkfs.ext4:e2fsprogs python3:python3 systemd-nspawn:systemd-container

DESTDIR ?=
PREFIX ?= /usr
# What is installed: a release build, unless another directory is named.
BIN_DIR ?= $${CARGO_TARGET_DIR:-target}/release
BINARIES = spline spline-mds spline-chunkserver spline-gateway spline-nebd
UNITS = spline-gateway.socket spline-gateway.service spline-nebd@.service spline-chunkserver@.service spline-mds.service spline.target
# Relative to /etc/spline: never overwritten, never removed.
CONFIGS = gateway.toml mds.toml chunkserver/disk0.toml.example nebd/guest0.toml.example

.PHONY: demo check test bench soak fuzz fuzz-tools fmt tools cargo build install uninstall

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

# The fault and conformance tests again, with more rounds and larger images, on optimised binaries. The random schedule of
# faults says its seed; SPLINE_SEED=... repeats it.
soak: cargo tools
	$(CARGO) build --release --workspace --bins --locked
	SPLINE_ROUNDS=$(ROUNDS) SPLINE_SOAK_SECONDS=$(SOAK_SECONDS) RUST_TEST_THREADS=1 $(CARGO) test --release --locked $(PROCESS_TESTS)

bench: cargo tools
	$(CARGO) build --release --workspace --bins --locked
	$${CARGO_TARGET_DIR:-target}/release/spline-bench $(BENCH)

build: cargo
	$(CARGO) build --release --workspace --bins --locked

# Builds nothing, so that root needs no compiler. A binary that runs is replaced, not written to: what runs goes on with the old
# one. Nothing is started or restarted; what to do next is said, unless the files go into a package.
install:
	@for name in $(BINARIES); do test -x $(BIN_DIR)/$$name || { echo "no $(BIN_DIR)/$$name: run make build first"; exit 1; }; done
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/systemd/system $(DESTDIR)$(PREFIX)/lib/sysusers.d \
		$(DESTDIR)$(PREFIX)/lib/tmpfiles.d $(DESTDIR)$(PREFIX)/share/doc/spline $(DESTDIR)/etc/spline/chunkserver $(DESTDIR)/etc/spline/nebd
	for name in $(BINARIES); do \
		install -m 755 $(BIN_DIR)/$$name $(DESTDIR)$(PREFIX)/bin/.$$name.new && \
			mv -f $(DESTDIR)$(PREFIX)/bin/.$$name.new $(DESTDIR)$(PREFIX)/bin/$$name || exit 1; \
	done
	for unit in $(UNITS); do \
		sed 's,/usr/,$(PREFIX)/,' systemd/$$unit >$(DESTDIR)$(PREFIX)/lib/systemd/system/$$unit || exit 1; \
	done
	install -m 644 systemd/sysusers.conf $(DESTDIR)$(PREFIX)/lib/sysusers.d/spline.conf
	install -m 644 systemd/tmpfiles.conf $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/spline.conf
	install -m 644 docs/upgrade.md $(DESTDIR)$(PREFIX)/share/doc/spline/upgrade.md
	for name in $(CONFIGS); do \
		test -e $(DESTDIR)/etc/spline/$$name || install -m 644 systemd/config/$$name $(DESTDIR)/etc/spline/$$name || exit 1; \
	done
	@test -n "$(DESTDIR)" || echo "installed; next: systemd-sysusers && systemd-tmpfiles --create && systemctl daemon-reload, then see docs/upgrade.md"

# Leaves the configuration, the data and the users.
uninstall:
	rm -f $(foreach name,$(BINARIES),$(DESTDIR)$(PREFIX)/bin/$(name)) \
		$(foreach unit,$(UNITS),$(DESTDIR)$(PREFIX)/lib/systemd/system/$(unit)) \
		$(DESTDIR)$(PREFIX)/lib/sysusers.d/spline.conf $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/spline.conf
	rm -rf $(DESTDIR)$(PREFIX)/share/doc/spline

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
	@PATH=$$PATH:/usr/sbin:/sbin; for round in 1 2 3; do \
		hash -r; missing=""; \
		for tool in $(TOOLS); do command -v $${tool%%:*} >/dev/null || missing="$$missing $${tool##*:}"; done; \
		missing=$$(echo $$missing | tr ' ' '\n' | sort -u | tr '\n' ' '); \
		[ -n "$${missing% }" ] || exit 0; \
		[ "$$(id -u)" = 0 ] && [ $$round -lt 3 ] || { echo "tests need these packages: sudo apt-get install $$missing"; exit 1; }; \
		apt-get install -y --no-install-recommends $$missing || { apt-get update && apt-get install -y --no-install-recommends $$missing; } || exit 1; \
	done
