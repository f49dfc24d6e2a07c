//! Counters, gauges and latencies of the metadata server, all named `spline_mds_*`.
//!
//! Called by [`crate::machine`] (applies), [`crate::service`] (requests) and [`crate::cluster`] (gauges, on its tick).

use crate::command::Outcome;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use spline_process::metrics::latency_histogram;
use std::time::Duration;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    method: &'static str,
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Method {
    method: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Applied {
    command: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: &'static str,
}

/// What applying counts.
#[derive(Clone, Debug)]
pub struct ApplyMetrics {
    commands: Family<Applied, Counter>,
    seconds: Histogram,
}

impl ApplyMetrics {
    /// A command was applied.
    pub fn applied(&self, command: &'static str, outcome: &Outcome) {
        let outcome = outcome.as_ref().map_or_else(|refusal| refusal.kind.name(), |_| "done");
        self.commands.get_or_create(&Applied { command, outcome }).inc();
    }

    /// A batch is durable in the tables.
    pub fn batch(&self, took: Duration) {
        self.seconds.observe(took.as_secs_f64());
    }
}

/// All metrics of a metadata server.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// What applying counts.
    pub apply: ApplyMetrics,
    requests: Family<Request, Counter>,
    request_seconds: Family<Method, Histogram>,
    operators_started: Family<Method, Counter>,
    volumes: Gauge,
    deletions: Gauge,
    sessions: Gauge,
    operators: Gauge,
    chunkservers: Family<State, Gauge>,
    copysets: Family<State, Gauge>,
}

/// Values of the gauges at one moment.
#[derive(Clone, Debug, Default)]
pub struct Levels {
    /// Volumes.
    pub volumes: usize,
    /// Deleted volumes whose chunks are not all removed.
    pub deletions: usize,
    /// Sessions with a live lease.
    pub sessions: usize,
    /// Replacements and transfers in flight.
    pub operators: usize,
    /// Chunkservers by state.
    pub chunkservers: Vec<(&'static str, usize)>,
    /// Copysets by state.
    pub copysets: Vec<(&'static str, usize)>,
}

impl Metrics {
    /// Registers everything.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            apply: ApplyMetrics { commands: Family::default(), seconds: latency_histogram() },
            requests: Family::default(),
            request_seconds: Family::new_with_constructor(latency_histogram),
            operators_started: Family::default(),
            volumes: Gauge::default(),
            deletions: Gauge::default(),
            sessions: Gauge::default(),
            operators: Gauge::default(),
            chunkservers: Family::default(),
            copysets: Family::default(),
        };
        let mds = registry.sub_registry_with_prefix("spline_mds");
        let m = metrics.clone();
        mds.register("commands", "Commands applied, by kind and outcome", m.apply.commands);
        mds.register("apply_seconds", "Time to apply a batch and write its rows", m.apply.seconds);
        mds.register("requests", "Requests served, by method and status", m.requests);
        mds.register("request_seconds", "Time to serve a request", m.request_seconds);
        mds.register("operators_started", "Operators started, by kind", m.operators_started);
        mds.register("volumes", "Volumes", m.volumes);
        mds.register("deletions", "Deleted volumes whose chunks are not all removed", m.deletions);
        mds.register("sessions", "Sessions with a live lease", m.sessions);
        mds.register("operators", "Operators in flight", m.operators);
        mds.register("chunkservers", "Chunkservers, by state", m.chunkservers);
        mds.register("copysets", "Copysets, by state", m.copysets);
        metrics
    }

    /// A request was served.
    pub fn request(&self, method: &'static str, code: &'static str, took: Duration) {
        self.requests.get_or_create(&Request { method, code }).inc();
        self.request_seconds.get_or_create(&Method { method }).observe(took.as_secs_f64());
    }

    /// An operator was started.
    pub fn operator(&self, method: &'static str) {
        self.operators_started.get_or_create(&Method { method }).inc();
    }

    /// Sets the gauges.
    pub fn set(&self, levels: &Levels) {
        self.volumes.set(levels.volumes as i64);
        self.deletions.set(levels.deletions as i64);
        self.sessions.set(levels.sessions as i64);
        self.operators.set(levels.operators as i64);
        for (state, count) in &levels.chunkservers {
            self.chunkservers.get_or_create(&State { state }).set(*count as i64);
        }
        for (state, count) in &levels.copysets {
            self.copysets.get_or_create(&State { state }).set(*count as i64);
        }
    }
}
