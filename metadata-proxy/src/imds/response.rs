//! Every answer that the daemon gives in its own name is built here, so that headers, types and lengths cannot drift apart.
//!
//! Headers stand in the order in which the real service sends them. Answers to HEAD are built like those to GET, body
//! included: the server drops the body and keeps `Content-Length`.

use bytes::Bytes;
use http::header::{
    ACCEPT_RANGES, ALLOW, CONTENT_LENGTH, CONTENT_TYPE, DATE, HeaderMap, HeaderName, HeaderValue, LAST_MODIFIED, SERVER,
};
use http::{StatusCode, response};
use jiff::Timestamp;

/// A complete answer: nothing is left to fetch or to stream.
///
/// Its `Debug` shows the body, which may be a token or credentials: never log one.
pub(crate) type Response = response::Response<Bytes>;

/// On the token request: the lifetime asked for. On answers: what is left of it.
pub(super) const TOKEN_TTL: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token-ttl-seconds");

const TEXT: HeaderValue = HeaderValue::from_static("text/plain");
const OCTETS: HeaderValue = HeaderValue::from_static("application/octet-stream");
const HTML: HeaderValue = HeaderValue::from_static("text/html");

/// A document or a listing: 200, `text/plain`.
pub(super) fn document(body: String, modified: Timestamp, now: Timestamp) -> Response {
    content(TEXT, body, modified, now)
}

/// A document that could be anything, as user-data is.
pub(super) fn octets(body: String, modified: Timestamp, now: Timestamp) -> Response {
    content(OCTETS, body, modified, now)
}

fn content(kind: HeaderValue, body: String, modified: Timestamp, now: Timestamp) -> Response {
    let mut headers = HeaderMap::with_capacity(8);
    headers.insert(CONTENT_TYPE, kind);
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("none"));
    insert_time(&mut headers, LAST_MODIFIED, modified);
    finish(StatusCode::OK, headers, body.into(), now)
}

/// A session token. SDKs read its lifetime from the header: without it some fail and others fall back to v1.
pub(super) fn token(token: String, ttl: u32, now: Timestamp) -> Response {
    let mut headers = HeaderMap::with_capacity(8);
    echo_token_ttl(&mut headers, ttl);
    headers.insert(CONTENT_TYPE, TEXT);
    finish(StatusCode::OK, headers, token.into(), now)
}

/// The real service's XHTML page for an error, with the status as its only text.
pub(crate) fn page(status: StatusCode, now: Timestamp) -> Response {
    let title = format!("{} - {}", status.as_str(), status.canonical_reason().unwrap_or("Error"));
    // The odd indentation of the second line is recorded: it makes the 404 page 339 bytes long.
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"iso-8859-1\"?>\n\
         <!DOCTYPE html PUBLIC \"-//W3C//DTD XHTML 1.0 Transitional//EN\"\n\
         \t\t \"http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd\">\n\
         <html xmlns=\"http://www.w3.org/1999/xhtml\" xml:lang=\"en\" lang=\"en\">\n \
         <head>\n  <title>{title}</title>\n </head>\n \
         <body>\n  <h1>{title}</h1>\n </body>\n</html>\n"
    );
    let mut headers = HeaderMap::with_capacity(8);
    headers.insert(CONTENT_TYPE, HTML);
    finish(status, headers, body.into(), now)
}

/// There is nothing here, or nothing that this caller may know of.
pub(crate) fn not_found(now: Timestamp) -> Response {
    page(StatusCode::NOT_FOUND, now)
}

/// An answer without a body, such as 401 for a token and 5xx for trouble of our own.
pub(crate) fn empty(status: StatusCode, now: Timestamp) -> Response {
    let mut headers = HeaderMap::with_capacity(8);
    headers.insert(CONTENT_TYPE, TEXT);
    finish(status, headers, Bytes::new(), now)
}

/// The methods of a resource: 405 for any other, 200 for a client that asks with OPTIONS.
pub(super) fn allow(status: StatusCode, methods: &'static str, now: Timestamp) -> Response {
    let mut headers = HeaderMap::with_capacity(8);
    headers.insert(ALLOW, HeaderValue::from_static(methods));
    headers.insert(CONTENT_TYPE, TEXT);
    finish(status, headers, Bytes::new(), now)
}

/// What the real service has answered, under our own `Date` and `Server`.
pub(crate) fn forwarded<B>(
    status: StatusCode,
    headers: HeaderMap,
    body: B,
    length: u64,
    now: Timestamp,
) -> response::Response<B> {
    with_length(status, headers, body, length, now)
}

/// Tells a client what is left of the token that it presented. Belongs on every answer to a valid token, whether it
/// comes from here or from upstream.
pub(crate) fn echo_token_ttl(headers: &mut HeaderMap, ttl: u32) {
    headers.insert(TOKEN_TTL, HeaderValue::from(ttl));
}

fn finish(status: StatusCode, headers: HeaderMap, body: Bytes, now: Timestamp) -> Response {
    let length = body.len() as u64;
    with_length(status, headers, body, length, now)
}

fn with_length<B>(
    status: StatusCode,
    mut headers: HeaderMap,
    body: B,
    length: u64,
    now: Timestamp,
) -> response::Response<B> {
    headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    insert_time(&mut headers, DATE, now);
    headers.insert(SERVER, HeaderValue::from_static("EC2ws"));
    let mut response = response::Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    response
}

fn insert_time(headers: &mut HeaderMap, name: HeaderName, time: Timestamp) {
    let text = time.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
    if let Ok(value) = HeaderValue::try_from(text) {
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Timestamp {
        "2022-02-13T13:37:57.9Z".parse().unwrap()
    }

    fn lines(response: &Response) -> Vec<String> {
        let headers = response.headers().iter();
        headers.map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect()
    }

    #[test]
    fn document_headers_are_those_of_the_real_service() {
        let modified = "2022-02-13T13:17:17Z".parse().unwrap();
        let response = document("info\nsecurity-credentials/".into(), modified, now());
        assert_eq!(response.status(), 200);
        assert_eq!(
            lines(&response),
            [
                "content-type: text/plain",
                "accept-ranges: none",
                "last-modified: Sun, 13 Feb 2022 13:17:17 GMT",
                "content-length: 26",
                "date: Sun, 13 Feb 2022 13:37:57 GMT",
                "server: EC2ws",
            ]
        );
    }

    #[test]
    fn not_found_page_has_the_recorded_length() {
        let response = not_found(now());
        assert_eq!(response.status(), 404);
        assert_eq!(response.headers()[CONTENT_TYPE], "text/html");
        assert_eq!(response.headers()[CONTENT_LENGTH], "339");
        assert_eq!(response.body().len(), 339);
        let body = str::from_utf8(response.body()).unwrap();
        assert!(body.contains("\n <head>\n  <title>404 - Not Found</title>\n </head>\n <body>\n"));
        assert!(body.contains("EN\"\n\t\t \"http://www.w3.org/"));
    }

    #[test]
    fn unauthorized_is_empty_and_plain() {
        let response = empty(StatusCode::UNAUTHORIZED, now());
        assert_eq!(
            lines(&response),
            ["content-type: text/plain", "content-length: 0", "date: Sun, 13 Feb 2022 13:37:57 GMT", "server: EC2ws",]
        );
    }

    #[test]
    fn token_carries_its_lifetime() {
        let response = token("abc".into(), 21_600, now());
        assert_eq!(response.headers()[TOKEN_TTL], "21600");
        assert_eq!(response.headers()[CONTENT_TYPE], "text/plain");
        assert_eq!(response.headers()[CONTENT_LENGTH], "3");
    }

    #[test]
    fn method_not_allowed_names_the_methods() {
        let response = allow(StatusCode::METHOD_NOT_ALLOWED, "OPTIONS, PUT", now());
        assert_eq!(response.status(), 405);
        assert_eq!(response.headers()[ALLOW], "OPTIONS, PUT");
        assert!(response.body().is_empty());
    }
}
