//! A command's end of the API socket.

use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::api::types::{ErrorAnswer, Event};
use crate::exit::{Code, Failure};
use crate::limits;

/// Talks to the process at one socket.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    socket: PathBuf,
}

impl Client {
    /// For the process at `socket`.
    pub(crate) fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// `GET path`.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        let answer = self.ask(Method::GET, path, Bytes::new()).await?;
        self.read(answer).await
    }

    /// `GET path`, as it comes.
    pub(crate) async fn get_bytes(&self, path: &str) -> Result<Bytes, Failure> {
        let answer = self.ask(Method::GET, path, Bytes::new()).await?;
        self.collect(answer).await
    }

    /// `PUT path` where there is nothing to read but whether it was done.
    pub(crate) async fn put(&self, path: &str, body: &impl Serialize) -> Result<(), Failure> {
        let answer = self.ask(Method::PUT, path, to_bytes(body)).await?;
        self.collect(answer).await.map(drop)
    }

    /// `PUT path` that answers something.
    pub(crate) async fn put_for<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, Failure> {
        let answer = self.ask(Method::PUT, path, to_bytes(body)).await?;
        self.read(answer).await
    }

    /// Everything that happens from now on.
    pub(crate) async fn events(&self) -> Result<EventStream, Failure> {
        let answer = self.ask(Method::GET, "events", Bytes::new()).await?;
        Ok(EventStream {
            body: answer.into_body(),
            rest: BytesMut::new(),
        })
    }

    async fn ask(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, Failure> {
        let silent = |error: &dyn core::fmt::Display| {
            Failure::new(
                Code::NoAnswer,
                format!("nobody answers at {}: {error}", self.socket.display()),
            )
        };
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|error| silent(&error))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| silent(&error))?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(format!("/api/v1/{path}"))
            .header(hyper::header::HOST, "umbra")
            .header(hyper::header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(Failure::failed)?;
        let answer = sender.send_request(request).await.map_err(|error| silent(&error))?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let status = answer.status();
        let bytes = Limited::new(answer.into_body(), limits::ANSWER_BYTES)
            .collect()
            .await
            .map_err(Failure::failed)?;
        let text = serde_json::from_slice::<ErrorAnswer>(&bytes.to_bytes()).map(|answer| answer.error);
        let code = if status == hyper::StatusCode::BAD_REQUEST {
            Code::BadArguments
        } else {
            Code::Failure
        };
        Err(Failure::new(
            code,
            text.unwrap_or_else(|_| format!("the process answered {status}")),
        ))
    }

    async fn collect(&self, answer: Response<Incoming>) -> Result<Bytes, Failure> {
        let on = Failure::on(format!("{}: reading the answer", self.socket.display()));
        let body = Limited::new(answer.into_body(), limits::ANSWER_BYTES).collect().await;
        Ok(body.map_err(on)?.to_bytes())
    }

    async fn read<T: DeserializeOwned>(&self, answer: Response<Incoming>) -> Result<T, Failure> {
        let bytes = self.collect(answer).await?;
        let on = Failure::on(format!(
            "{}: the answer is not what was expected",
            self.socket.display()
        ));
        serde_json::from_slice(&bytes).map_err(on)
    }
}

fn to_bytes(body: &impl Serialize) -> Bytes {
    serde_json::to_vec(body).expect("the API's types are plain data").into()
}

/// Events as they come.
#[derive(Debug)]
pub(crate) struct EventStream {
    body: Incoming,
    /// What came behind the last whole line.
    rest: BytesMut,
}

impl EventStream {
    /// The next event; `None` when the process has ended. Cancel safe.
    pub(crate) async fn next(&mut self) -> Result<Option<Event>, Failure> {
        let Some(line) = self.next_line().await? else {
            return Ok(None);
        };
        let event = serde_json::from_slice(&line).map_err(Failure::on("the event stream"))?;
        Ok(Some(event))
    }

    /// The same as it was written.
    pub(crate) async fn next_line(&mut self) -> Result<Option<Bytes>, Failure> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let mut line = self.rest.split_to(end + 1);
                line.truncate(end);
                return Ok(Some(line.freeze()));
            }
            if self.rest.len() > limits::EVENT_LINE_BYTES {
                return Err(Failure::failed("the event stream: a line is too long"));
            }
            match self.body.frame().await {
                // A process that is gone ends its stream in the middle of a chunk: for a listener, both are the end.
                None | Some(Err(_)) => return Ok(None),
                Some(Ok(frame)) => {
                    if let Some(bytes) = frame.data_ref() {
                        self.rest.extend_from_slice(bytes);
                    }
                }
            }
        }
    }
}
