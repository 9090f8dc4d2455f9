//! Collects samples by family, and makes the text.

use std::collections::BTreeMap;

use prometheus::{
    TextEncoder,
    proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType, Summary},
};

use super::families::{self, Family, Kind};

/// Samples by family.
#[derive(Default)]
pub(super) struct Families {
    samples: BTreeMap<&'static str, Vec<Metric>>,
}

impl Families {
    /// Adds a sample of a counter or gauge. `labels`: the values, in the order of the family's labels.
    pub fn add(&mut self, family: &Family, labels: &[&str], value: f64) {
        let mut metric = metric(family, labels);
        match family.kind {
            Kind::Counter => {
                let mut counter = Counter::default();
                counter.set_value(value);
                metric.set_counter(counter);
            }
            Kind::Gauge | Kind::Histogram | Kind::Summary => {
                let mut gauge = Gauge::default();
                gauge.set_value(value);
                metric.set_gauge(gauge);
            }
        }
        self.samples.entry(family.name).or_default().push(metric);
    }

    /// Adds a count.
    #[expect(clippy::cast_precision_loss, reason = "Prometheus' values are floating-point numbers")]
    pub fn count(&mut self, family: &Family, labels: &[&str], value: u64) {
        self.add(family, labels, value as f64);
    }

    /// Adds a yes or no.
    pub fn flag(&mut self, family: &Family, labels: &[&str], value: bool) {
        self.add(family, labels, f64::from(u8::from(value)));
    }

    /// Adds a time in seconds since the Unix epoch.
    #[expect(clippy::cast_precision_loss, reason = "a time in milliseconds has 41 bits")]
    pub fn time(&mut self, family: &Family, labels: &[&str], unix_ns: u64) {
        self.add(family, labels, (unix_ns / 1_000_000) as f64 / 1000.0);
    }

    /// Adds a summary without quantiles. `sum`: in seconds.
    pub fn summary(&mut self, family: &Family, labels: &[&str], count: u64, sum: f64) {
        let mut metric = metric(family, labels);
        let mut summary = Summary::default();
        summary.set_sample_count(count);
        summary.set_sample_sum(sum);
        metric.set_summary(summary);
        self.samples.entry(family.name).or_default().push(metric);
    }

    /// Adds what an instrument has collected.
    pub fn collected(&mut self, family: &Family, collected: Vec<MetricFamily>) {
        let metrics = collected.into_iter().flat_map(|mut family| family.take_metric());
        self.samples.entry(family.name).or_default().extend(metrics);
    }

    /// The text, with the families in the order of [`families::ALL`]. A family without samples is left out.
    pub fn into_text(mut self) -> Result<String, prometheus::Error> {
        let mut text = String::new();
        for family in families::ALL {
            let samples = self.samples.remove(family.name).unwrap_or_default();
            if samples.is_empty() {
                continue;
            }
            let mut proto = MetricFamily::default();
            proto.set_name(family.name.to_owned());
            proto.set_help(family.help.to_owned());
            proto.set_field_type(match family.kind {
                Kind::Counter => MetricType::COUNTER,
                Kind::Gauge => MetricType::GAUGE,
                Kind::Histogram => MetricType::HISTOGRAM,
                Kind::Summary => MetricType::SUMMARY,
            });
            proto.set_metric(samples);
            TextEncoder::new().encode_utf8(&[proto], &mut text)?;
        }
        Ok(text)
    }
}

fn metric(family: &Family, labels: &[&str]) -> Metric {
    debug_assert_eq!(family.labels.len(), labels.len(), "{}", family.name);
    let pair = |(name, value): (&&str, &&str)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value((*value).to_owned());
        pair
    };
    Metric::from_label(family.labels.iter().zip(labels).map(pair).collect())
}
