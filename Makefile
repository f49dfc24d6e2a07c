# make demo runs the main job, make test passes the tests; both install what they lack (apt when root).
CARGO ?= cargo

.PHONY: demo test bench soak fuzz fmt

fmt:
	$(CARGO) fmt --all

test:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(CARGO) test --workspace --locked
