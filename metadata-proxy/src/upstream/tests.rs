use std::{
    convert::Infallible,
    net::Ipv4Addr,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use futures_util::future::join_all;
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpListener,
    time::{advance, pause, resume},
};

use super::*;

/// A real service on this machine's loopback, that knows one token at a time.
#[derive(Default)]
struct Service {
    /// What it says to whoever wants a token; 0: the next token.
    refuses_tokens: AtomicUsize,
    tokens: AtomicUsize,
    /// Requests without a token.
    bare: AtomicUsize,
}

impl Service {
    async fn start() -> (Arc<Self>, Upstream) {
        let service = Arc::<Self>::default();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        let shared = Arc::clone(&service);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let service = Arc::clone(&shared);
                let answer = service_fn(move |request: Request<Incoming>| {
                    let service = Arc::clone(&service);
                    async move { Ok::<_, Infallible>(service.answer(&request)) }
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), answer));
            }
        });
        (service, Upstream::new(endpoint))
    }

    fn answer(&self, request: &Request<Incoming>) -> http::Response<Full<Bytes>> {
        let (status, body) = if request.method() == Method::PUT {
            match self.refuses_tokens.load(Relaxed) {
                0 => (200, format!("token-{}", self.tokens.fetch_add(1, Relaxed) + 1)),
                status => (status, String::new()),
            }
        } else {
            match request.headers().get(TOKEN) {
                Some(token) if *token == *format!("token-{}", self.tokens.load(Relaxed)) => (200, "here".to_owned()),
                Some(_) => (401, String::new()),
                None => {
                    self.bare.fetch_add(1, Relaxed);
                    (200, "without".to_owned())
                }
            }
        };
        let status = StatusCode::from_u16(status.try_into().unwrap()).unwrap();
        http::Response::builder().status(status).body(body.into()).unwrap()
    }

    /// How many tokens it has given, and how many requests came without one.
    fn seen(&self) -> (usize, usize) {
        (self.tokens.load(Relaxed), self.bare.load(Relaxed))
    }
}

async fn later(time: Duration) {
    pause();
    advance(time).await;
    resume();
}

async fn ask(upstream: &Upstream) -> Result<Bytes, Error> {
    match upstream.get("/latest/meta-data/local-ipv4", true, 1).await?.payload {
        Payload::Whole(body) => Ok(body),
        Payload::Stream(..) => panic!("not whole"),
    }
}

#[tokio::test]
async fn a_session_is_renewed_before_its_end_and_not_earlier() {
    let (service, upstream) = Service::start().await;
    assert_eq!(ask(&upstream).await.unwrap(), "here");
    later(TOKEN_TTL - TOKEN_MARGIN - Duration::from_secs(60)).await;
    assert_eq!(ask(&upstream).await.unwrap(), "here");
    assert_eq!(service.seen(), (1, 0));
    later(Duration::from_secs(61)).await;
    assert_eq!(ask(&upstream).await.unwrap(), "here");
    assert_eq!(service.seen(), (2, 0));
}

#[tokio::test]
async fn a_service_without_tokens_is_asked_for_one_again_after_a_while() {
    let (service, upstream) = Service::start().await;
    service.refuses_tokens.store(404, Relaxed);
    assert_eq!(ask(&upstream).await.unwrap(), "without");
    service.refuses_tokens.store(0, Relaxed);
    assert_eq!(ask(&upstream).await.unwrap(), "without");
    later(TOKEN_MARGIN + Duration::from_secs(1)).await;
    assert_eq!(ask(&upstream).await.unwrap(), "here");
    assert_eq!(service.seen(), (1, 2));
}

#[tokio::test]
async fn trouble_with_tokens_is_not_taken_for_their_absence() {
    let (service, upstream) = Service::start().await;
    service.refuses_tokens.store(503, Relaxed);
    let error = ask(&upstream).await.unwrap_err();
    assert_eq!(error.status(), StatusCode::BAD_GATEWAY);
    assert!(error.to_string().contains("503"), "{error}");
    service.refuses_tokens.store(0, Relaxed);
    assert_eq!(ask(&upstream).await.unwrap(), "here");
    assert_eq!(service.seen(), (1, 0));
}

#[tokio::test]
async fn a_token_that_was_withdrawn_is_replaced_once_for_all() {
    let (service, upstream) = Service::start().await;
    assert_eq!(ask(&upstream).await.unwrap(), "here");
    // As if somebody else had got the next one.
    service.tokens.store(7, Relaxed);
    for answer in join_all((0..20).map(|_| ask(&upstream))).await {
        assert_eq!(answer.unwrap(), "here");
    }
    assert_eq!(service.seen(), (8, 0));
}
