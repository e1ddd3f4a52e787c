//! As much of S3 as a client needs to fetch one object: **a stand-in**, whose only object says who has asked for it.
//!
//! For clients that speak nothing else: the access key in a signature is what they show of their identity.

use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode, header};
use http_body_util::Full;
use jiff::Timestamp;

use super::wire::Refusal;

const NAMESPACE: &str = "http://s3.amazonaws.com/doc/2006-03-01/";
const ETAG: &str = "00000000000000000000000000000000";

/// Whether this is a request of S3: STS is asked at the root.
pub(super) fn is_one(method: &Method, path: &str) -> bool {
    matches!(*method, Method::GET | Method::HEAD) && path != "/"
}

/// Where the bucket is, which some ask first.
pub(super) fn location() -> Response<Full<Bytes>> {
    let body = format!("<LocationConstraint xmlns=\"{NAMESPACE}\">eu-west-1</LocationConstraint>");
    Response::new(Full::new(Bytes::from(body)))
}

/// What is in the bucket: the one object.
pub(super) fn list(arn: &str, access_key: &str) -> Response<Full<Bytes>> {
    let size = text(arn, access_key).len();
    let body = format!(
        "<ListBucketResult xmlns=\"{NAMESPACE}\"><Name>bucket</Name><Prefix></Prefix><MaxKeys>1000</MaxKeys>\
         <IsTruncated>false</IsTruncated><Contents><Key>whoami</Key><LastModified>2026-01-01T00:00:00.000Z\
         </LastModified><ETag>&quot;{ETAG}&quot;</ETag><Size>{size}</Size><StorageClass>STANDARD</StorageClass>\
         </Contents></ListBucketResult>"
    );
    Response::new(Full::new(Bytes::from(body)))
}

fn text(arn: &str, access_key: &str) -> String {
    format!("{arn}\n{access_key}\n")
}

/// The object, whatever its name: the ARN and the access key of who has signed, one on each line.
pub(super) fn object(arn: &str, access_key: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text(arn, access_key))));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    if let Ok(tag) = HeaderValue::from_str(&format!("\"{ETAG}\"")) {
        headers.insert(header::ETAG, tag);
    }
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    let now = Timestamp::now().strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
    if let Ok(now) = HeaderValue::from_str(&now) {
        headers.insert(header::LAST_MODIFIED, now);
    }
    response
}

pub(super) fn refuse(refusal: &Refusal) -> Response<Full<Bytes>> {
    let (code, message) = (refusal.code, &refusal.message);
    let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>{message}</Message></Error>");
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = StatusCode::FORBIDDEN;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/xml"));
    response
}
