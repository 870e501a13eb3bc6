//! The process's end of the API socket.
#![allow(unused_qualifications, reason = "utoipa's macros name every schema by its path")]

use std::os::unix::net::UnixListener;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{DefaultBodyLimit, FromRequest, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use hyper::body::Frame;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use utoipa::openapi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::api::metrics;
use crate::api::types::{
    Accepted, Counters, CutRequest, ErrorAnswer, Event, Heat, HeatQuery, Job, MigrateRequest, Ping, ProtectRequest,
    ResizeRequest, ResumeRequest, SnapshotRequest, Status,
};
use crate::events;
use crate::limits;
use crate::vm::{Denied, Vm};

/// Lines of an event stream that wait for its client before it is made to miss some.
const LINES_AHEAD: usize = 16;

/// A server that answers until it is told to close.
#[derive(Debug)]
pub(crate) struct Server {
    closing: watch::Sender<bool>,
    serving: JoinHandle<()>,
}

impl Server {
    /// Answer at `listener`. Needs a tokio runtime.
    pub(crate) fn start(listener: UnixListener, vm: Arc<Vm>) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        let listener = Bounded {
            listener: tokio::net::UnixListener::from_std(listener)?,
            places: Arc::new(Semaphore::new(limits::API_CONNECTIONS)),
        };
        let (closing, mut closed) = watch::channel(false);
        let serving = tokio::spawn(async move {
            let closed = async move {
                let _ = closed.wait_for(|closed| *closed).await;
            };
            let serving = axum::serve(listener, router(vm)).with_graceful_shutdown(closed);
            if let Err(error) = serving.await {
                tracing::warn!(%error, "the API socket is not served any more");
            }
        });
        Ok(Self { closing, serving })
    }

    /// Take no more requests, and give clients a moment to read their answers.
    pub(crate) async fn close(self) {
        self.closing.send_replace(true);
        let _ = tokio::time::timeout(limits::API_LAST_WORDS, self.serving).await;
    }
}

/// The API and its description, which are one thing: a handler that is not described cannot be reached, and one that is
/// described is.
fn api() -> OpenApiRouter<Arc<Vm>> {
    let mut description = openapi::OpenApi::default();
    description.info = openapi::Info::builder()
        .title("Umbra")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "One guest's process, over HTTP/1.1 on its UNIX socket. Times are milliseconds, sizes are bytes, shares lie \
             between 0 and 1; the name says which.",
        ))
        .license(Some(openapi::LicenseBuilder::new().name("Apache-2.0").build()))
        .build();
    let methods = OpenApiRouter::new()
        .routes(routes!(ping))
        .routes(routes!(status))
        .routes(routes!(last_job))
        .routes(routes!(stream))
        .routes(routes!(show_metrics))
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(counters))
        .routes(routes!(heat))
        .routes(routes!(resize))
        .routes(routes!(power_button))
        .routes(routes!(reboot))
        .routes(routes!(stop))
        .routes(routes!(protect))
        .routes(routes!(unprotect))
        .routes(routes!(migrate))
        .routes(routes!(cut))
        .routes(routes!(snapshot))
        .routes(routes!(cancel));
    OpenApiRouter::with_openapi(description).nest("/api/v1", methods)
}

/// What `docs/openapi.json` holds, and `GET /api/v1/openapi.json` answers.
#[cfg(test)]
pub(crate) fn description() -> openapi::OpenApi {
    api().into_openapi()
}

fn router(vm: Arc<Vm>) -> Router {
    let (api, description) = api().split_for_parts();
    api.route(
        "/api/v1/openapi.json",
        get(async move || json(StatusCode::OK, &description)),
    )
    .method_not_allowed_fallback(async || {
        error(StatusCode::METHOD_NOT_ALLOWED, "the other method, GET or PUT, expected")
    })
    .layer(DefaultBodyLimit::max(limits::REQUEST_BYTES))
    .with_state(vm)
    .fallback(async |request: Request| error(StatusCode::NOT_FOUND, &format!("there is no {}", request.uri().path())))
}

/// Whether somebody is there, and who.
#[utoipa::path(get, path = "/ping", responses((status = OK, body = Ping)))]
async fn ping(State(vm): State<Arc<Vm>>) -> Response {
    json(StatusCode::OK, &vm.ping())
}

/// Where everything stands.
#[utoipa::path(get, path = "/status", responses((status = OK, body = Status)))]
async fn status(State(vm): State<Arc<Vm>>) -> Response {
    json(StatusCode::OK, &vm.status().await)
}

/// The latest long job, running or over.
#[utoipa::path(get, path = "/jobs/last", responses(
    (status = OK, body = Job),
    (status = NOT_FOUND, description = "No long job has been asked for yet", body = ErrorAnswer),
))]
async fn last_job(State(vm): State<Arc<Vm>>) -> Response {
    match vm.last_job() {
        Some(job) => json(StatusCode::OK, &job),
        None => error(StatusCode::NOT_FOUND, "no long job has been asked for yet"),
    }
}

/// What happens, from now on until the process ends: one JSON object per line.
#[utoipa::path(get, path = "/events", responses(
    (status = OK, body = Event, content_type = "application/x-ndjson"),
))]
async fn stream(State(vm): State<Arc<Vm>>) -> Response {
    follow(&vm)
}

/// The status as Prometheus text.
#[utoipa::path(get, path = "/metrics", responses((status = OK, body = String, content_type = "text/plain")))]
async fn show_metrics(State(vm): State<Arc<Vm>>) -> Response {
    let text = metrics::text(&vm.status().await, &vm.counters().unwrap_or_default());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

/// Stop the guest's vCPUs. Twice is as good as once.
#[utoipa::path(put, path = "/pause", responses(Done))]
async fn pause(State(vm): State<Arc<Vm>>) -> Response {
    done(vm.pause().await)
}

/// Let the guest's vCPUs run.
#[utoipa::path(put, path = "/resume", request_body = Option<ResumeRequest>, responses(Done))]
async fn resume(State(vm): State<Arc<Vm>>, body: Wish<ResumeRequest>) -> Response {
    done(vm.resume(body.0.peer_is_dead).await)
}

/// What the guest's vCPUs have done.
#[utoipa::path(get, path = "/counters", responses(
    (status = OK, body = Counters),
    (status = CONFLICT, description = "The guest is not here", body = ErrorAnswer),
))]
async fn counters(State(vm): State<Arc<Vm>>) -> Response {
    match vm.counters() {
        Ok(counters) => json(StatusCode::OK, &counters),
        Err(denied) => deny(&denied),
    }
}

/// Which of the guest's memory is written how often. Known while a shadow follows it.
#[utoipa::path(get, path = "/heat", params(HeatQuery), responses(
    (status = OK, body = Heat),
    (status = BAD_REQUEST, description = "More regions than may be asked for", body = ErrorAnswer),
    (status = CONFLICT, description = "No shadow follows the guest", body = ErrorAnswer),
))]
async fn heat(State(vm): State<Arc<Vm>>, query: Result<Query<HeatQuery>, QueryRejection>) -> Response {
    let Ok(Query(query)) = query else {
        return error(StatusCode::BAD_REQUEST, "regions: a number expected");
    };
    match vm.heat(query.regions).await {
        Ok(heat) => json(StatusCode::OK, &heat),
        Err(denied) => deny(&denied),
    }
}

/// Ask the guest to leave memory to its balloon, or take some back.
#[utoipa::path(put, path = "/resize", request_body = ResizeRequest, responses(Done))]
async fn resize(State(vm): State<Arc<Vm>>, body: Wish<ResizeRequest>) -> Response {
    done(vm.resize(body.0).await)
}

/// Press the guest's power button: it is asked to shut down in its own order.
#[utoipa::path(put, path = "/power-button", responses(Done))]
async fn power_button(State(vm): State<Arc<Vm>>) -> Response {
    done(vm.power_button().await)
}

/// Reset the guest at once, as the button on a case does; it boots again.
#[utoipa::path(put, path = "/reboot", responses(Done))]
async fn reboot(State(vm): State<Arc<Vm>>) -> Response {
    done(vm.reboot().await)
}

/// End the guest and its process.
#[utoipa::path(put, path = "/stop", responses(Done))]
async fn stop(State(vm): State<Arc<Vm>>) -> Response {
    done(vm.stop("by its operator"))
}

/// Start keeping a shadow of the guest. Answered when the shadow has.
#[utoipa::path(put, path = "/protect", request_body = ProtectRequest, responses(Done))]
async fn protect(State(vm): State<Arc<Vm>>, body: Wish<ProtectRequest>) -> Response {
    done(vm.protect(body.0).await)
}

/// Stop keeping a shadow. The guest stays where it is.
#[utoipa::path(put, path = "/unprotect", responses(Done))]
async fn unprotect(State(vm): State<Arc<Vm>>) -> Response {
    done(vm.unprotect().await)
}

/// Move the guest to its shadow. Answered at once; the job goes on.
#[utoipa::path(put, path = "/migrate", request_body = Option<MigrateRequest>, responses(Started))]
async fn migrate(State(vm): State<Arc<Vm>>, body: Wish<MigrateRequest>) -> Response {
    started(vm.migrate(&body.0))
}

/// Have the shadow commit an epoch: a consistent state of the guest, which runs on. Answered at once; the job goes on.
#[utoipa::path(put, path = "/cut", request_body = Option<CutRequest>, responses(Started))]
async fn cut(State(vm): State<Arc<Vm>>, body: Wish<CutRequest>) -> Response {
    started(vm.cut(&body.0))
}

/// Take back a switchover that has not reached its commit point.
#[utoipa::path(put, path = "/cancel", responses(Done))]
async fn cancel(State(vm): State<Arc<Vm>>) -> Response {
    done(vm.cancel().await)
}

/// How something that is done by the time it is answered is answered.
#[derive(utoipa::IntoResponses)]
#[expect(dead_code, reason = "a description; `done` and `deny` are what it describes")]
enum Done {
    /// Done
    #[response(status = NO_CONTENT)]
    Carried,
    /// The request is wrong
    #[response(status = BAD_REQUEST)]
    Malformed(#[to_schema] ErrorAnswer),
    /// Refused; nothing has changed
    #[response(status = CONFLICT)]
    Refused(#[to_schema] ErrorAnswer),
    /// Tried, and failed
    #[response(status = INTERNAL_SERVER_ERROR)]
    Failed(#[to_schema] ErrorAnswer),
}

/// How something that takes long is answered.
#[derive(utoipa::IntoResponses)]
#[expect(dead_code, reason = "a description; `started` and `deny` are what it describes")]
enum Started {
    /// It goes on: see the job and its events
    #[response(status = ACCEPTED)]
    Accepted(#[to_schema] Accepted),
    /// The request is wrong
    #[response(status = BAD_REQUEST)]
    Malformed(#[to_schema] ErrorAnswer),
    /// Refused; nothing has changed
    #[response(status = CONFLICT)]
    Refused(#[to_schema] ErrorAnswer),
    /// Tried, and failed
    #[response(status = INTERNAL_SERVER_ERROR)]
    Failed(#[to_schema] ErrorAnswer),
}

/// Keep the guest in a folder. Answered at once; the job goes on.
#[utoipa::path(put, path = "/snapshot", request_body = SnapshotRequest, responses(Started))]
async fn snapshot(State(vm): State<Arc<Vm>>, body: Wish<SnapshotRequest>) -> Response {
    started(vm.snapshot(body.0))
}

/// A request's body; an empty one is `{}`.
struct Wish<T>(T);

impl<T: serde::de::DeserializeOwned, S: Send + Sync> FromRequest<S> for Wish<T> {
    type Rejection = Response;

    async fn from_request(request: Request, state: &S) -> Result<Self, Response> {
        let body = Bytes::from_request(request, state).await.map_err(|rejection| {
            let what = format!(
                "request body: expected at most {} bytes: {rejection}",
                limits::REQUEST_BYTES
            );
            error(rejection.status(), &what)
        })?;
        let body = if body.is_empty() { &b"{}"[..] } else { &body };
        let wish = serde_json::from_slice(body);
        wish.map(Self)
            .map_err(|wrong| error(StatusCode::BAD_REQUEST, &format!("request body: {wrong}")))
    }
}

fn done(result: Result<(), Denied>) -> Response {
    match result {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(denied) => deny(&denied),
    }
}

fn started(result: Result<u64, Denied>) -> Response {
    match result {
        Ok(job) => json(StatusCode::ACCEPTED, &Accepted { job }),
        Err(denied) => deny(&denied),
    }
}

fn deny(denied: &Denied) -> Response {
    let status = match denied {
        Denied::Malformed(_) => StatusCode::BAD_REQUEST,
        Denied::Refused(_) => StatusCode::CONFLICT,
        Denied::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
    };
    error(status, &denied.to_string())
}

fn error(status: StatusCode, text: &str) -> Response {
    json(status, &ErrorAnswer { error: text.to_owned() })
}

fn json(status: StatusCode, body: &impl serde::Serialize) -> Response {
    let body = serde_json::to_vec(body).expect("the API's types are plain data");
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// The events from now on. The answer's head is sent only when nothing can be missed any more.
fn follow(vm: &Vm) -> Response {
    let mut listening = vm.events().listen();
    let (lines, body) = mpsc::channel(LINES_AHEAD);
    tokio::spawn(async move {
        while let Some(event) = listening.next().await {
            if lines.send(Bytes::from(events::line(&event))).await.is_err() {
                return; // the client left
            }
        }
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::new(Lines(body))).into_response()
}

/// A body of lines as they come.
struct Lines(mpsc::Receiver<Bytes>);

impl hyper::body::Body for Lines {
    type Data = Bytes;
    type Error = core::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.0
            .poll_recv(context)
            .map(|line| line.map(|line| Ok(Frame::data(line))))
    }
}

/// A listener with so many places; who comes later waits in the kernel's queue until somebody leaves.
struct Bounded {
    listener: tokio::net::UnixListener,
    places: Arc<Semaphore>,
}

/// A connection and its place.
struct Placed {
    stream: UnixStream,
    _place: OwnedSemaphorePermit,
}

impl axum::serve::Listener for Bounded {
    type Io = Placed;
    type Addr = ();

    async fn accept(&mut self) -> (Placed, ()) {
        let place = Arc::clone(&self.places).acquire_owned().await.expect("never closed");
        let (stream, _) = axum::serve::Listener::accept(&mut self.listener).await;
        (Placed { stream, _place: place }, ())
    }

    fn local_addr(&self) -> std::io::Result<()> {
        Ok(())
    }
}

impl AsyncRead for Placed {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Placed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
