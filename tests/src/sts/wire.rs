//! The Query protocol: form in, XML out, and of the signature only the access key.

use std::collections::BTreeMap;

use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode, header};
use http_body_util::Full;

const NAMESPACE: &str = "https://sts.amazonaws.com/doc/2011-06-15/";

/// An error as STS words it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    pub(crate) code: &'static str,
    pub(crate) message: String,
}

impl Refusal {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into() }
    }
}

/// `application/x-www-form-urlencoded`, as every SDK sends it.
pub(crate) fn form(body: &[u8]) -> BTreeMap<String, String> {
    let body = String::from_utf8_lossy(body);
    body.split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (percent_decode(&key.replace('+', " ")), percent_decode(&value.replace('+', " ")))
        })
        .collect()
}

/// Decodes what is well formed and keeps the rest, so that nothing can hide behind a broken escape.
pub(crate) fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let escaped = (byte == b'%')
            .then(|| bytes.get(at + 1..at + 3))
            .flatten()
            .filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match escaped {
            Some(value) => {
                decoded.push(value);
                at += 3;
            }
            None => {
                decoded.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// The key id and the region in `Authorization: AWS4-HMAC-SHA256 Credential=KEY/DATE/REGION/sts/aws4_request, ...`.
pub(crate) fn signer(headers: &HeaderMap) -> Option<(String, String)> {
    let authorization = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (_, credential) = authorization.split_once("Credential=")?;
    let mut parts = credential.split('/');
    let (key, _date, region) = (parts.next()?, parts.next()?, parts.next()?);
    Some((key.to_owned(), region.to_owned()))
}

/// `<{action}Response><{action}Result>{result}</...>`; `result` is XML already.
pub(crate) fn answer(action: &str, result: &str, request_id: &str) -> Response<Full<Bytes>> {
    let body = format!(
        "<{action}Response xmlns=\"{NAMESPACE}\">\n  <{action}Result>\n{result}  </{action}Result>\n  \
         <ResponseMetadata>\n    <RequestId>{request_id}</RequestId>\n  </ResponseMetadata>\n\
         </{action}Response>\n"
    );
    xml(StatusCode::OK, body, request_id)
}

pub(crate) fn refuse(refusal: &Refusal, request_id: &str) -> Response<Full<Bytes>> {
    let kind = if refusal.status.is_server_error() { "Receiver" } else { "Sender" };
    let (code, message) = (refusal.code, escape(&refusal.message));
    let body = format!(
        "<ErrorResponse xmlns=\"{NAMESPACE}\">\n  <Error>\n    <Type>{kind}</Type>\n    \
         <Code>{code}</Code>\n    <Message>{message}</Message>\n  </Error>\n  \
         <RequestId>{request_id}</RequestId>\n</ErrorResponse>\n"
    );
    xml(refusal.status, body, request_id)
}

/// One element with its text, escaped.
pub(crate) fn element(name: &str, text: &str) -> String {
    format!("    <{name}>{}</{name}>\n", escape(text))
}

fn xml(status: StatusCode, body: String, request_id: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/xml"));
    if let Ok(id) = header::HeaderValue::from_str(request_id) {
        headers.insert("x-amzn-requestid", id);
    }
    response
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_is_decoded_and_broken_escapes_survive() {
        let form = form(b"Action=AssumeRole&RoleArn=arn%3Aaws%3Aiam%3A%3A1%3Arole%2Fa&x=a+b%2&y");
        assert_eq!(form["RoleArn"], "arn:aws:iam::1:role/a");
        assert_eq!(form["x"], "a b%2");
        assert_eq!(form["y"], "");
        assert_eq!(percent_decode("%25%zz%+1é%c3%a9"), "%%zz%+1éé");
    }

    #[test]
    fn the_access_key_is_the_first_part_of_the_credential() {
        let mut headers = HeaderMap::new();
        assert_eq!(signer(&headers), None);
        let value =
            "AWS4-HMAC-SHA256 Credential=ASIAX/20260101/eu-west-1/sts/aws4_request, SignedHeaders=host, Signature=0";
        headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        assert_eq!(signer(&headers), Some(("ASIAX".to_owned(), "eu-west-1".to_owned())));
    }
}
