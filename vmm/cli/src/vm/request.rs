//! What clients ask for, read into values that cannot be wrong. What is wrong is named.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use umbra_core::source::{CutOptions, SwitchoverOptions};
use umbra_node::ProtectConfig;
use umbra_quic::{Fingerprint, Identity, PathSpec, Peers};
use umbra_units::Bytes;

use super::Denied;
use crate::api::types::{Compression, CutRequest, MigrateRequest, ProtectRequest, Verify};
use crate::limits;

/// What `protect` asks for, checked.
pub(super) struct Wanted {
    pub(super) paths: Vec<PathSpec>,
    pub(super) peers: Peers,
    pub(super) identity: Arc<Identity>,
    pub(super) config: ProtectConfig,
}

impl Wanted {
    pub(super) fn read(request: &ProtectRequest, own: &Arc<Identity>) -> Result<Self, Denied> {
        let bad = |field: &str, text: String| Denied::Malformed(format!("{field}: {text}"));
        within("to", request.to.len(), limits::PATHS)?;
        within("peers", request.peers.len(), limits::PEERS)?;
        let path = |text: &String| text.parse::<PathSpec>().map_err(|error| bad("to", error.to_string()));
        let mut peers = Peers::none();
        for peer in &request.peers {
            peers = peers.and(
                peer.parse::<Fingerprint>()
                    .map_err(|error| bad("peers", error.to_string()))?,
            );
        }
        let load = |dir: &PathBuf| Identity::load(dir).map_err(|error| bad("identity", error.to_string()));
        let identity = request.identity.as_ref().map(load).transpose()?;
        let mut config = ProtectConfig::default();
        if let Some(bytes) = request.cache_bytes {
            config.cache = Bytes(bytes);
        }
        if let Some(span) = span("harvest_ms", request.harvest_ms)? {
            config.source.harvest_every = span;
            config.source.harvest_idle = config.source.harvest_idle.max(span);
        }
        if let Some(Compression(compression)) = request.compression {
            config.encode.compression = compression;
        }
        if let Some(threads) = request.encode_threads {
            let (least, most) = limits::ENCODE_THREADS.into_inner();
            if !limits::ENCODE_THREADS.contains(&threads) {
                let text = format!("expected {least} to {most}, got {threads}");
                return Err(bad("encode_threads", text));
            }
            config.encode.threads = usize::from(threads);
        }
        if let Some(percent) = request.encode_cpu_percent {
            let (least, most) = limits::ENCODE_CPU_PERCENT.into_inner();
            if !limits::ENCODE_CPU_PERCENT.contains(&percent) {
                let text = format!("expected {least} to {most}, got {percent}");
                return Err(bad("encode_cpu_percent", text));
            }
            config.encode.cores = Some(f64::from(percent) / 100.0);
        }
        if let Some(order) = request.order {
            config.source.order = order.into();
        }
        if request.pause_promise_ms == Some(0.0) {
            config.source.pause_promise = Duration::ZERO;
        } else if let Some(promise) = span("pause_promise_ms", request.pause_promise_ms)? {
            config.source.pause_promise = promise;
        }
        Ok(Self {
            paths: request.to.iter().map(path).collect::<Result<_, _>>()?,
            peers,
            identity: identity.map_or_else(|| Arc::clone(own), Arc::new),
            config,
        })
    }
}

/// What `cut` asks for, checked.
pub(super) fn cut(request: &CutRequest) -> Result<CutOptions, Denied> {
    let default = CutOptions::default();
    Ok(CutOptions {
        settle: span("settle_ms", request.settle_ms)?.unwrap_or(default.settle),
        timeout: span("timeout_ms", request.timeout_ms)?.unwrap_or(default.timeout),
        urgent: request.urgent,
        capture: request.capture.map(Into::into),
        audit: request.verify == Some(Verify::Full),
    })
}

fn within(field: &str, got: usize, most: usize) -> Result<(), Denied> {
    if (1..=most).contains(&got) {
        return Ok(());
    }
    Err(Denied::Malformed(format!("{field}: expected 1 to {most}, got {got}")))
}

/// Milliseconds from a request, if they are there.
fn span(field: &str, given: Option<f64>) -> Result<Option<Duration>, Denied> {
    /// A day: nobody waits longer for anything here.
    const MOST: f64 = 86_400_000.0;
    match given {
        None => Ok(None),
        Some(given) if (0.001..=MOST).contains(&given) => Ok(Some(Duration::from_secs_f64(given / 1e3))),
        Some(given) => Err(Denied::Malformed(format!(
            "{field}: expected 0.001 to {MOST} ms, got {given}"
        ))),
    }
}

/// What `migrate` asks for, checked.
pub(super) fn options(request: &MigrateRequest) -> Result<SwitchoverOptions, Denied> {
    let usual = SwitchoverOptions::default();
    Ok(SwitchoverOptions {
        downtime_limit: span("downtime_limit_ms", request.downtime_limit_ms)?.unwrap_or(usual.downtime_limit),
        timeout: span("timeout_ms", request.timeout_ms)?.unwrap_or(usual.timeout),
        pause_limit: span("pause_limit_ms", request.pause_limit_ms)?.unwrap_or(usual.pause_limit),
        audit: request.verify == Some(Verify::Full),
    })
}
