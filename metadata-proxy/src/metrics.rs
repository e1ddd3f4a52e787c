//! What is counted and exported, in one place.

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _, text},
    metrics::{MetricType, counter::ConstCounter, counter::Counter, family::Family, gauge::ConstGauge},
    registry::{Registry, Unit},
};

use crate::{containers, interceptor::Interceptor, listeners::Listeners, strangers::Strangers, workload::Workload};

/// What the server counts.
#[derive(Debug, Default, Clone)]
pub(crate) struct Metrics {
    requests: Family<Answered, Counter>,
    refused: Family<Refused, Counter>,
    audit_lost: Counter,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    /// Whose request it was.
    caller: &'static str,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Refused {
    reason: &'static str,
}

impl Metrics {
    pub(crate) fn answered(&self, caller: &'static str, status: http::StatusCode) {
        self.requests.get_or_create(&Answered { caller, status: status.as_u16() }).inc();
    }

    pub(crate) fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&Refused { reason }).inc();
    }

    /// For the audit log to count what it loses.
    pub(crate) fn audit_lost(&self) -> Counter {
        self.audit_lost.clone()
    }

    /// Everything there is to scrape.
    pub(crate) fn registry(&self, parts: Parts) -> Registry {
        let mut registry = Registry::with_prefix("metadata_proxy");
        registry.register("requests", "Requests answered, by caller and status", self.requests.clone());
        let help = "Connections and requests refused for a limit of their container, by the limit";
        registry.register("refused", help, self.refused.clone());
        let lost = self.audit_lost.clone();
        registry.register("audit_records_lost", "Hand-outs that the audit log lacks", lost);
        registry.register_collector(Box::new(parts));
        registry
    }
}

/// What is asked for its numbers at each scrape.
pub(crate) struct Parts {
    pub(crate) interceptor: Arc<Interceptor>,
    pub(crate) listeners: Arc<Listeners>,
    pub(crate) containers: Arc<containers::Registry<Workload>>,
    pub(crate) strangers: Arc<Strangers>,
}

impl fmt::Debug for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Parts")
    }
}

type OfEngine = (&'static str, &'static str, fn(usize, bool) -> i64);

const ENGINES: [OfEngine; 2] = [
    ("engine_up", "Whether the engine's events are followed", |_, in_sight| i64::from(in_sight)),
    ("engine_containers", "Running containers that are known, by engine", |containers, _| {
        i64::try_from(containers).unwrap_or(i64::MAX)
    }),
];

impl Collector for Parts {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (cgroups, published) = (self.interceptor.cgroups().len(), self.interceptor.listeners().len());
        for (name, help, value) in [
            ("containers", "Running containers that are known", self.containers.all().len()),
            ("strangers", "Cgroups that have asked and are of no known container", self.strangers.all().len()),
            ("listeners", "Listeners open in network namespaces", self.listeners.count()),
            ("bpf_cgroups", "Entries of the BPF map CGROUPS", cgroups),
            ("bpf_nested", "Entries of the BPF map NESTED", self.interceptor.nested_cgroups()),
            ("bpf_listeners", "Entries of the BPF map LISTENERS", published),
        ] {
            let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            gauge.encode(encoder.encode_descriptor(name, help, None::<&Unit>, gauge.metric_type())?)?;
        }
        for (name, help, of) in ENGINES {
            let mut metric = encoder.encode_descriptor(name, help, None::<&Unit>, MetricType::Gauge)?;
            for (engine, containers, in_sight) in self.containers.engines() {
                metric.encode_family(&[("engine", engine)])?.encode_gauge(&of(containers, in_sight))?;
            }
        }
        let help = "Listeners of namespaces without a known container, closed to make room for others";
        let evicted = ConstCounter::new(self.listeners.evicted());
        evicted.encode(encoder.encode_descriptor(
            "listeners_evicted",
            help,
            None::<&Unit>,
            evicted.metric_type(),
        )?)?;
        for (counter, value) in self.interceptor.counters() {
            let metric = ConstCounter::new(value);
            let name = format!("bpf_{}", snake(&format!("{counter:?}")));
            let help = "Events in the BPF programs since they were first attached";
            metric.encode(encoder.encode_descriptor(&name, help, None::<&Unit>, metric.metric_type())?)?;
        }
        Ok(())
    }
}

/// `WantedLost` -> `wanted_lost`
fn snake(name: &str) -> String {
    let mut snake = String::new();
    for letter in name.chars() {
        if letter.is_ascii_uppercase() && !snake.is_empty() {
            snake.push('_');
        }
        snake.push(letter.to_ascii_lowercase());
    }
    snake
}

/// The text format of Prometheus.
pub(crate) fn encode(registry: &Registry) -> String {
    let mut text = String::new();
    // Writing to a string does not fail, and neither does reading a number.
    let _ = text::encode(&mut text, registry);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_have_names_as_prometheus_wants_them() {
        assert_eq!(snake("WantedLost"), "wanted_lost");
        assert_eq!(snake("Held"), "held");
    }

    #[test]
    fn what_is_counted_is_exported() {
        let metrics = Metrics::default();
        metrics.answered("container", http::StatusCode::OK);
        let mut registry = Registry::with_prefix("metadata_proxy");
        registry.register("requests", "help", metrics.requests.clone());
        let text = encode(&registry);
        assert!(text.contains("metadata_proxy_requests_total{caller=\"container\",status=\"200\"} 1"), "{text}");
    }
}
