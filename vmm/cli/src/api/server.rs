//! The process's end of the API socket.

use std::os::unix::net::UnixListener;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, FromRequest, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use bytes::Bytes;
use hyper::body::Frame;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinHandle;

use crate::api::metrics;
use crate::api::types::{Accepted, ErrorAnswer, MigrateRequest, ProtectRequest, ResumeRequest};
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

fn router(vm: Arc<Vm>) -> Router {
    let api = Router::new()
        .route(
            "/ping",
            get(async |State(vm): State<Arc<Vm>>| json(StatusCode::OK, &vm.ping())),
        )
        .route(
            "/status",
            get(async |State(vm): State<Arc<Vm>>| json(StatusCode::OK, &vm.status().await)),
        )
        .route("/jobs/last", get(last_job))
        .route("/events", get(async |State(vm): State<Arc<Vm>>| stream(&vm)))
        .route("/metrics", get(show_metrics))
        .route("/pause", put(async |State(vm): State<Arc<Vm>>| done(vm.pause().await)))
        .route("/resume", put(resume))
        .route(
            "/stop",
            put(async |State(vm): State<Arc<Vm>>| done(vm.stop("by its operator"))),
        )
        .route(
            "/power-button",
            put(async |State(vm): State<Arc<Vm>>| done(vm.power_button().await)),
        )
        .route(
            "/reboot",
            put(async |State(vm): State<Arc<Vm>>| done(vm.reboot().await)),
        )
        .route("/protect", put(protect))
        .route(
            "/unprotect",
            put(async |State(vm): State<Arc<Vm>>| done(vm.unprotect().await)),
        )
        .route("/migrate", put(migrate))
        .route(
            "/cancel",
            put(async |State(vm): State<Arc<Vm>>| done(vm.cancel().await)),
        )
        .method_not_allowed_fallback(async || {
            error(StatusCode::METHOD_NOT_ALLOWED, "the other method, GET or PUT, expected")
        })
        .layer(DefaultBodyLimit::max(limits::REQUEST_BYTES))
        .with_state(vm);
    Router::new().nest("/api/v1", api).fallback(async |request: Request| {
        error(StatusCode::NOT_FOUND, &format!("there is no {}", request.uri().path()))
    })
}

async fn last_job(State(vm): State<Arc<Vm>>) -> Response {
    match vm.last_job() {
        Some(job) => json(StatusCode::OK, &job),
        None => error(StatusCode::NOT_FOUND, "no long job has been asked for yet"),
    }
}

async fn show_metrics(State(vm): State<Arc<Vm>>) -> Response {
    let text = metrics::text(&vm.status().await);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

async fn resume(State(vm): State<Arc<Vm>>, body: Wish<ResumeRequest>) -> Response {
    done(vm.resume(body.0.peer_is_dead).await)
}

async fn protect(State(vm): State<Arc<Vm>>, body: Wish<ProtectRequest>) -> Response {
    done(vm.protect(body.0).await)
}

async fn migrate(State(vm): State<Arc<Vm>>, body: Wish<MigrateRequest>) -> Response {
    match vm.migrate(&body.0) {
        Ok(job) => json(StatusCode::ACCEPTED, &Accepted { job }),
        Err(denied) => deny(&denied),
    }
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
fn stream(vm: &Vm) -> Response {
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
