//! JSON over HTTP/1.1 on a UNIX socket: how the other commands, and anybody's scripts, talk to a guest's process.
//!
//! | | | |
//! |---|---|---|
//! | `GET` | `/api/v1/ping` | [`types::Ping`] |
//! | `GET` | `/api/v1/status` | [`types::Status`] |
//! | `GET` | `/api/v1/jobs/last` | [`types::Job`], 404 before the first |
//! | `GET` | `/api/v1/events` | one [`types::Event`] per line, until the process ends |
//! | `GET` | `/api/v1/metrics` | Prometheus text |
//! | `GET` | `/api/v1/counters` | [`types::Counters`] |
//! | `GET` | `/api/v1/heat` | [`types::Heat`] |
//! | `PUT` | `/api/v1/resize` | [`types::ResizeRequest`]; 204 when the guest was asked |
//! | `GET` | `/api/v1/openapi.json` | all of this, for programs; `docs/openapi.json` is the same |
//! | `PUT` | `/api/v1/pause`, `resume`, `power-button`, `reboot`, `stop`, `unprotect`, `cancel` | 204 |
//! | `PUT` | `/api/v1/protect` | [`types::ProtectRequest`]; 204 when the shadow has answered |
//! | `PUT` | `/api/v1/migrate` | [`types::MigrateRequest`]; 202 and [`types::Accepted`] at once |
//! | `PUT` | `/api/v1/cut` | [`types::CutRequest`]; 202 and [`types::Accepted`] at once |
//! | `PUT` | `/api/v1/snapshot` | [`types::SnapshotRequest`]; 202 and [`types::Accepted`] at once |
//!
//! What is not carried out is answered with 400 (the request is wrong), 404, 405, 409 (refused; nothing changed), 413 or
//! 500 (tried, and failed) and [`types::ErrorAnswer`].

pub(crate) mod client;
pub(crate) mod metrics;
pub(crate) mod server;
pub(crate) mod types;

#[cfg(test)]
mod openapi;
#[cfg(test)]
mod tests;
