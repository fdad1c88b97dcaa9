# The door to everything. `make demo` and `make test` set up what they need themselves.

CARGO ?= cargo
# What needs root and real kernel objects; `make test PRIVILEGED=no` leaves it out on purpose.
PRIVILEGED ?= yes

.PHONY: help demo build test test-vm test-vm-short test-churn test-crash test-kills fuzz test-cache test-images test-repeat bench lint setup setup-tests install uninstall clean

help:
	@echo "make demo      see Hostler work: builds an image, boots it, kills builders, cleans up (< 20 min)"
	@echo "make test      run every test (root for the privileged ones; PRIVILEGED=no leaves them out)"
	@echo "make test-vm   everything that needs root, in a virtual machine; TESTS=TEXT: only tests so named"
	@echo "make test-vm-short  in one, only what cannot be tested elsewhere"
	@echo "make test-churn 100,000 detaches against a process that binds the same device at full speed"
	@echo "make test-cache 200 kills of a cache that is being filled, 1 GiB to 8 clients, 10 GiB to one (needs 11 GiB)"
	@echo "make test-repeat each example built three times: from the archive, the cache, and with no network (hours without KVM)"
	@echo "make test-images  whole images: twice the same bytes, debian-installer, cloud-init (about 40 min)"
	@echo "make test-crash hostlerd killed at 1,000 points, each kernel call failing, 10,000 leases (about 40 min)"
	@echo "make test-kills a build killed at 200 random moments; KILLS=N (about 40 min)"
	@echo "make fuzz      what parses what others write, fed with rubbish; SECONDS=60 for each of the six (nightly Rust)"
	@echo "make bench     what Hostler costs, against goals, as a table (root; a quiet machine; about 15 min)"
	@echo "make lint      formatting, clippy with warnings denied, dependencies, units, scripts"
	@echo "make build     both programs, optimised: target/release/hostler, target/release/hostlerd"
	@echo "make install   both programs, units and configuration into DESTDIR (default /)"

build:
	$(CARGO) build --release --locked --bin hostler --bin hostlerd

demo:
	@tests/setup.sh run
	@$(MAKE) --no-print-directory build
	@tests/demo.sh target/release

setup:
	@tests/setup.sh run

setup-tests:
	@tests/setup.sh test

# The test targets of hostler-tests run the programs, so these are built first.
test: setup-tests
	$(CARGO) build --locked --workspace --bins
	$(CARGO) test --locked --workspace --exclude hostler-tests
	$(CARGO) test --locked --package hostler-tests --test unprivileged
ifeq ($(PRIVILEGED),yes)
	$(CARGO) test --locked --package hostler-tests --test privileged
	$(CARGO) test --locked --package hostler-tests --test builds
else
	@echo "PRIVILEGED=no: the privileged tests were left out on purpose"
endif

# What needs root, on Debian's own kernel under systemd, in a virtual machine that is thrown away; the
# programs optimised, since most machines have to emulate it. tests/vm.sh tells of TESTS, NOT_YET,
# SUITES, APPEND and IMAGE.
target = $(or $(CARGO_TARGET_DIR),target)
test-vm:
	@tests/setup.sh test
	$(CARGO) build --release --locked --bin hostler --bin hostlerd --bin hostler-vm
	@TESTS='$(TESTS)' NOT_YET='$(NOT_YET)' SUITES='$(SUITES)' APPEND='$(APPEND)' IMAGE='$(IMAGE)' \
		tests/vm.sh full $(target)/release

# Only what no other tests cover, with the programs that `make test` runs.
test-vm-short:
	@tests/setup.sh test
	$(CARGO) build --locked --workspace --bins
	@TESTS='$(TESTS)' NOT_YET='$(NOT_YET)' SUITES='$(SUITES)' APPEND='$(APPEND)' IMAGE='$(IMAGE)' \
		tests/vm.sh short $(target)/debug

# Another process binds a loop device to something else at full speed (about 10 min).
test-churn: setup-tests
	HOSTLER_TESTS_CHURN=100000 $(CARGO) test --locked --release --package hostler-tests --test privileged -- churn --nocapture

# What `make test` does in small (about 5 min).
test-cache: setup-tests
	HOSTLER_TESTS_KILLS=200 HOSTLER_TESTS_MEBIBYTES=1024 HOSTLER_TESTS_HUGE_MEBIBYTES=10300 \
		$(CARGO) test --locked --package hostler-runner --test cache -- \
		--test-threads 1 --nocapture kills:: together::

# Real guests; RECIPES="FILE…" takes only some, CACHE=DIR keeps what was downloaded.
test-repeat:
	@tests/setup.sh repeat
	@$(MAKE) --no-print-directory build
	@CACHE='$(CACHE)' tests/repeat.sh $(target)/release $(RECIPES)

# One after the other: each has the host's processors to itself.
test-images: setup-tests
	$(CARGO) build --locked --workspace --bins
	$(CARGO) test --locked --package hostler-tests --test images -- --test-threads 1 --nocapture

# hostlerd is killed at 1,000 random points, each kernel call fails in each way, 10,000 leases, 500 at once
# (about 40 min). HOSTLER_TESTS_SEED=N repeats the points of a run.
test-crash: setup-tests
	$(CARGO) build --release --locked --bin hostler --bin hostlerd
	HOSTLER_TESTS_CRASHES=1000 HOSTLER_TESTS_FAULTS=1 HOSTLER_TESTS_LEASES=10000 HOSTLER_TESTS_AT_ONCE=500 \
		$(CARGO) test --locked --release --package hostler-tests --test privileged -- crashes --nocapture

# An ordinary user's build is killed at that many random moments (about 40 min on a quiet machine).
KILLS ?= 200
test-kills: setup-tests
	$(CARGO) build --locked --workspace --bins
	HOSTLER_TESTS_BUILD_KILLS=$(KILLS) $(CARGO) test --locked --package hostler-tests --test builds -- moments --nocapture

# Feeds what parses others' bytes with rubbish, that many seconds for each target; new finds go into
# fuzz/target/corpus, crashes into fuzz/artifacts. TARGETS="frames console" takes only some.
SECONDS ?= 60
TARGETS ?= frames messages configuration recipe mountinfo console
fuzz:
	@tests/setup.sh fuzz
	@cd fuzz && for target in $(TARGETS); do \
		mkdir -p target/corpus/$$target && \
		$(CARGO) +nightly fuzz run $$target target/corpus/$$target corpus/$$target -- -max_total_time=$(SECONDS) -max_len=8192 -timeout=10 \
			-print_final_stats=1 || exit 1; \
	done

# What Hostler costs against what the same would cost otherwise, as a table, on a quiet machine.
# OUT=FILE says where the table goes too; BENCH="--only reclaim,burst" measures less, --help tells more.
OUT ?= target/bench.md
bench:
	@tests/setup.sh bench
	@$(MAKE) --no-print-directory build
	$(CARGO) bench --locked --package hostler-tests --bench goals -- --output "$(abspath $(OUT))" $(BENCH)

lint:
	@tests/setup.sh lint
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- --deny warnings
	$(CARGO) clippy --locked --package hostler-tests --test guest -- --deny warnings
	$(CARGO) deny --offline check bans licenses sources
	tests/lint.sh

prefix ?= /usr
install: build
	install -D -m 0755 target/release/hostlerd $(DESTDIR)$(prefix)/bin/hostlerd
	install -D -m 0755 target/release/hostler $(DESTDIR)$(prefix)/bin/hostler
	install -D -m 0644 systemd/hostlerd.service $(DESTDIR)$(prefix)/lib/systemd/system/hostlerd.service
	install -D -m 0644 systemd/hostlerd.socket $(DESTDIR)$(prefix)/lib/systemd/system/hostlerd.socket
	install -D -m 0644 systemd/hostler.sysusers $(DESTDIR)$(prefix)/lib/sysusers.d/hostler.conf
	install -D -m 0644 systemd/hostler.tmpfiles $(DESTDIR)$(prefix)/lib/tmpfiles.d/hostler.conf
	test -e $(DESTDIR)/etc/hostler/hostlerd.toml || \
		install -D -m 0644 systemd/hostlerd.toml $(DESTDIR)/etc/hostler/hostlerd.toml

# The configuration and what the daemon and the builds keep stay.
uninstall:
	rm -f $(DESTDIR)$(prefix)/bin/hostlerd $(DESTDIR)$(prefix)/bin/hostler
	rm -f $(DESTDIR)$(prefix)/lib/systemd/system/hostlerd.service $(DESTDIR)$(prefix)/lib/systemd/system/hostlerd.socket
	rm -f $(DESTDIR)$(prefix)/lib/sysusers.d/hostler.conf $(DESTDIR)$(prefix)/lib/tmpfiles.d/hostler.conf

clean:
	$(CARGO) clean
