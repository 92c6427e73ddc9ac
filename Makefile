# `make verify` only reads, `make fix` repairs what a tool can repair, the rest runs things.

.PHONY: verify fix test sim tree-full nemesis services reliability reliability-deaths reliability-holders reliability-flips \
	reliability-members reliability-histories reliability-healing bench examples run-cluster compose-test ci
.PHONY: fuzz overload golden

verify:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked
	buf lint proto
	cargo deny check licenses bans sources
	.ci/purity

fix:
	cargo clippy --workspace --all-targets --fix --allow-dirty --allow-staged
	cargo fmt --all

test:
	cargo test --workspace --locked

# Seeds of the deterministic simulation, from FROM on; each runs alone with CAIRN_SIM_SEED=...
SEEDS ?= 500
FROM ?= 0
sim:
	CAIRN_SIM_FROM=$(FROM) CAIRN_SIM_SEEDS=$(SEEDS) cargo test --profile sim --locked -p simulation --test simulation \
		-- --nocapture many_seeds

# Hostile bytes into every decoder: `make fuzz RUNS=1000000`. Debug builds, since they notice overflows.
RUNS ?= 1000000
fuzz:
	CAIRN_FUZZ_RUNS=$(RUNS) cargo test --workspace --locked -- --nocapture --test-threads=2 hostile | grep -E '^(fuzz|test) |dearest'

# Ten thousand connections, readers that do not read, senders without an end.
overload:
	cargo build --workspace --bins
	CAIRN_OVERLOAD_CONNECTIONS=10000 cargo test -p tests --test overload -- --nocapture --test-threads=1

# A set of data directories of a new format, beside those of the earlier ones: `make golden FORMAT=2`.
golden:
	CAIRN_GOLDEN_WRITE=$(FORMAT) cargo test -p tests --test upgrade data_of_every_format -- --nocapture

# 10,000 real files and one of 2 GiB through the whole life of a cluster, with times and memory.
tree-full:
	cargo build --release --workspace --bins
	CAIRN_TREE_BIG_BYTES=2147483648 cargo test --release -p tests --test tree -- --nocapture

# Faults of every kind over real processes for so many seconds; as root also cut cables and full disks.
# `make nemesis SECONDS=3600`; CAIRN_SEED=... repeats a schedule.
SECONDS ?= 600
nemesis: services
	CAIRN_NEMESIS_SECONDS=$(SECONDS) $(COUNTED) --test nemesis -- --nocapture

# Everything that docs/reliability.md counts over real processes, one after the other: some hours.
reliability: reliability-deaths reliability-holders reliability-flips reliability-members reliability-histories \
	reliability-healing
	$(MAKE) nemesis SECONDS=3600

COUNTED = cargo test --release -p tests
services:
	cargo build --release --workspace --bins

reliability-deaths: services
	CAIRN_FAILOVER_ROUNDS=200 $(COUNTED) --test failover -- --nocapture
reliability-holders: services
	CAIRN_HOLDERS=200 $(COUNTED) --test counted holders -- --nocapture
reliability-flips: services
	CAIRN_FLIPS=1000 $(COUNTED) --test counted flips -- --nocapture
reliability-members: services
	CAIRN_MEMBERSHIP_CHANGES=100 $(COUNTED) --test counted members -- --nocapture
reliability-histories: services
	CAIRN_HISTORIES=1000 $(COUNTED) --test linear real_processes -- --nocapture
reliability-healing: services
	CAIRN_HEAL_FILES=1000,10000 CAIRN_HEAL_MIB=10,100,1000 $(COUNTED) --test counted healing -- --nocapture

# Real services beside the limits of this machine, in one run: under 15 minutes, with QUICK=1 under two. The machine must
# be quiet. BENCH_FLAGS goes to the program, for example BENCH_FLAGS="--json figures.json --only small_write".
bench:
	cargo build --release -p bench -p dir-service -p file-service --bins
	$${CARGO_TARGET_DIR:-target}/release/bench $(if $(QUICK),--quick,--markdown docs/performance.md) $(BENCH_FLAGS)

examples:
	cargo run -q -p examples --example quickstart
	cargo run -q -p examples --example exclusive_lock
	cargo run -q -p examples --example survive_node_loss
	cargo run -q -p examples --example tree_sync

# A directory and three file servers in one process, data in ./cairn-data.
run-cluster:
	cargo run --release -p cli --bin cairn -- up

# The same as containers, tried and taken down again.
compose-test:
	deploy/compose-test.sh

ci:
	.ci/run
