//! What the stand-in remembers, and how it answers.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use http_body_util::Full;
use jiff::Timestamp;

use super::{Fault, HOST_ACCESS_KEY_PREFIX, HOST_ROLE, Request, tree};
use crate::sts::roles::{base32, noise};
use crate::sts::wire::percent_decode;

const TOKEN: &str = "x-aws-ec2-metadata-token";
const TOKEN_TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";

const NOT_FOUND: &str = "<?xml version=\"1.0\" encoding=\"iso-8859-1\"?>
<!DOCTYPE html PUBLIC \"-//W3C//DTD XHTML 1.0 Transitional//EN\"
\t\"http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd\">
<html xmlns=\"http://www.w3.org/1999/xhtml\" xml:lang=\"en\" lang=\"en\">
 <head>
  <title>404 - Not Found</title>
 </head>
 <body>
  <h1>404 - Not Found</h1>
 </body>
</html>
";

/// An answer with its body still in the hand, so that it can be searched for secrets.
pub(super) struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    body: String,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) requests: Vec<Request>,
    /// Counted apart from `requests`, which can be cleared.
    serial: u64,
    tokens: Vec<(String, Instant)>,
    pub(super) require_token: bool,
    pub(super) fault: Option<Fault>,
    /// Instead of [`HOST_ACCESS_KEY`](super::HOST_ACCESS_KEY), and until when it is valid.
    pub(super) host_key: Option<(String, Timestamp)>,
}

impl State {
    /// Before anything can go wrong with it.
    pub(super) fn record(&mut self, head: &Parts, peer: SocketAddr) -> (u64, Option<Fault>) {
        self.serial += 1;
        self.requests.push(Request {
            number: self.serial,
            method: head.method.to_string(),
            target: head.uri.to_string(),
            headers: head.headers.clone(),
            peer,
            status: None,
            secret: false,
        });
        (self.serial, self.fault.clone())
    }

    pub(super) fn conclude(&mut self, number: u64, reply: Reply) -> Response<Full<Bytes>> {
        // Gone when somebody cleared the records in the meantime.
        if let Some(request) = self.requests.iter_mut().rev().find(|request| request.number == number) {
            request.status = Some(reply.status.as_u16());
            request.secret = reply.body.contains(HOST_ACCESS_KEY_PREFIX);
        }
        let mut response = Response::new(Full::new(Bytes::from(reply.body)));
        *response.status_mut() = reply.status;
        *response.headers_mut() = reply.headers;
        response
    }

    pub(super) fn serve(&mut self, head: &Parts) -> Reply {
        let path = canonical(head.uri.path());
        if let Some(version) = path.strip_suffix("/api/token") {
            return self.token(version, head);
        }
        let left = match self.time_left(&head.headers) {
            Ok(left) => left,
            Err(()) => return respond(StatusCode::UNAUTHORIZED, String::new()),
        };
        let mut document = tree::find(&path, Timestamp::now());
        if let Some((key, end)) = &self.host_key
            && path.ends_with(&format!("/iam/security-credentials/{HOST_ROLE}"))
        {
            document = Some(tree::credentials(key, Timestamp::now(), *end));
        }
        let mut reply = match (&head.method, document) {
            (&Method::GET | &Method::HEAD, Some(document)) => respond(StatusCode::OK, document),
            (&Method::GET | &Method::HEAD, None) => {
                let mut reply = respond(StatusCode::NOT_FOUND, NOT_FOUND.to_owned());
                reply.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html"));
                reply
            }
            _ => {
                let mut reply = respond(StatusCode::METHOD_NOT_ALLOWED, String::new());
                reply.headers.insert(header::ALLOW, HeaderValue::from_static("OPTIONS, GET, HEAD"));
                reply
            }
        };
        if let Some(left) = left {
            reply.headers.insert(TOKEN_TTL, HeaderValue::from(left.as_secs()));
        }
        reply
    }

    fn token(&mut self, version: &str, head: &Parts) -> Reply {
        if head.method != Method::PUT {
            let mut reply = respond(StatusCode::METHOD_NOT_ALLOWED, String::new());
            reply.headers.insert(header::ALLOW, HeaderValue::from_static("OPTIONS, PUT"));
            return reply;
        }
        if version != "latest" || head.headers.contains_key("x-forwarded-for") {
            return respond(StatusCode::FORBIDDEN, String::new());
        }
        let ttl = head.headers.get(TOKEN_TTL).and_then(|ttl| ttl.to_str().ok()).and_then(|ttl| ttl.parse::<u64>().ok());
        let Some(ttl) = ttl.filter(|ttl| (1..=21_600).contains(ttl)) else {
            return respond(StatusCode::BAD_REQUEST, String::new());
        };
        // 56 characters, as the real ones.
        let random = [noise(0), noise(1), noise(2)].map(|part| base32(part, 13)).concat();
        let token = format!("AQAAASIMULATED-{random}==");
        let now = Instant::now();
        self.tokens.retain(|(_, expiry)| *expiry > now);
        self.tokens.push((token.clone(), now + Duration::from_secs(ttl)));
        let mut reply = respond(StatusCode::OK, token);
        reply.headers.insert(TOKEN_TTL, HeaderValue::from(ttl));
        reply
    }

    /// How long the token of this request is still good for; a bad one is refused also where none is needed.
    fn time_left(&self, headers: &HeaderMap) -> Result<Option<Duration>, ()> {
        let Some(given) = headers.get(TOKEN) else {
            return if self.require_token { Err(()) } else { Ok(None) };
        };
        let known = self.tokens.iter().find(|(token, _)| token.as_bytes() == given.as_bytes());
        let left = known.and_then(|(_, expiry)| expiry.checked_duration_since(Instant::now()));
        left.map(Some).ok_or(())
    }
}

/// With the headers of the real service.
pub(super) fn respond(status: StatusCode, body: String) -> Reply {
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("none"));
    headers.insert(header::LAST_MODIFIED, HeaderValue::from_static("Thu, 01 Jan 2026 00:00:00 GMT"));
    headers.insert(header::SERVER, HeaderValue::from_static("EC2ws"));
    Reply { status, headers, body }
}

/// Follows every disguise of a path to the document that somebody could have meant.
pub fn canonical(path: &str) -> String {
    let decoded = percent_decode(&percent_decode(path)).replace('\\', "/");
    let mut segments = Vec::new();
    for segment in decoded.split('/') {
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop()),
            segment => segments.push(segment),
        }
    }
    segments.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_disguise_hides_a_path() {
        for path in [
            "/latest/meta-data/iam/",
            "//latest//meta-data/./iam",
            "/x/../latest/meta-data/%69am",
            "/latest%252fmeta-data\\iam",
        ] {
            assert_eq!(canonical(path), "latest/meta-data/iam", "{path}");
        }
    }
}
