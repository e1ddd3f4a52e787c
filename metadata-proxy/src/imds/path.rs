//! From a request target to path segments, once, before anything is decided.
//!
//! Whatever is decided later is decided on these segments, and exactly these are sent upstream. A target with two
//! readings is refused rather than cleaned: the service behind us might choose the other reading.

use http::{StatusCode, Uri};
use percent_encoding::percent_decode_str;

/// The longest path that is looked at. Real ones stay below 300 bytes: an instance tag's key has at most 128.
const MAX_LENGTH: usize = 1024;

/// Why a request target is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PathError {
    /// Not a plain absolute path, or one with several readings.
    Malformed,
    TooLong,
}

impl PathError {
    pub(super) fn status(self) -> StatusCode {
        match self {
            Self::Malformed => StatusCode::BAD_REQUEST,
            Self::TooLong => StatusCode::URI_TOO_LONG,
        }
    }
}

/// A path with one reading only: decoded, without empty segments, dot segments or a query.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CanonicalPath {
    segments: Vec<String>,
    trailing_slash: bool,
}

impl CanonicalPath {
    pub(super) fn parse(target: &Uri) -> Result<Self, PathError> {
        // Absolute and authority form are for proxies, which we must not look like; `*` names no document.
        if target.scheme().is_some() || target.authority().is_some() {
            return Err(PathError::Malformed);
        }
        // The query is left behind here: no document of the service takes one, so none is passed on.
        let path = target.path();
        if path.len() > MAX_LENGTH {
            return Err(PathError::TooLong);
        }
        let relative = path.strip_prefix('/').ok_or(PathError::Malformed)?;
        let segments = relative
            .split('/')
            .filter(|raw| !raw.is_empty()) // `//` is real traffic: @aws-sdk/ec2-metadata-service
            .map(decode)
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self { trailing_slash: relative.ends_with('/') && !segments.is_empty(), segments })
    }

    pub(super) fn segments(&self) -> Vec<&str> {
        self.segments.iter().map(String::as_str).collect()
    }

    /// The path as it may stand in a request line; `None` if a segment is no name.
    pub(super) fn to_target(&self) -> Option<String> {
        if !self.segments.iter().all(|segment| is_name(segment)) {
            return None;
        }
        let slash = if self.trailing_slash { "/" } else { "" };
        Some(format!("/{}{slash}", self.segments.join("/")))
    }
}

/// Whether a segment consists only of characters that entries of the real service have: those of role names, instance
/// tag keys, MAC addresses. Names need no encoding, and leave nothing (`;params`, a second layer of encoding) for which
/// servers have differing readings.
pub(super) fn is_name(segment: &str) -> bool {
    let is_name_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~+=,:@".contains(&byte);
    !segment.is_empty() && segment.bytes().all(is_name_byte)
}

/// Whether a first path segment is a version of the service. Any date will do: new versions appear every year.
pub(super) fn is_version(segment: &str) -> bool {
    let is_date = || {
        segment.len() == 10
            && segment.bytes().enumerate().all(|(at, byte)| match at {
                4 | 7 => byte == b'-',
                _ => byte.is_ascii_digit(),
            })
    };
    matches!(segment, "latest" | "1.0") || is_date()
}

fn decode(raw: &str) -> Result<String, PathError> {
    if !is_well_encoded(raw) {
        return Err(PathError::Malformed);
    }
    let segment = percent_decode_str(raw).decode_utf8().map_err(|_| PathError::Malformed)?;
    // A decoded `%` could be decoded once more by the service, whereupon it could become anything.
    let ambiguous = |byte: u8| matches!(byte, b'/' | b'\\' | b'%') || !(b' '..=b'~').contains(&byte);
    let only_dots = segment.bytes().all(|byte| byte == b'.');
    if only_dots || segment.bytes().any(ambiguous) {
        return Err(PathError::Malformed);
    }
    Ok(segment.into_owned())
}

/// Whether each `%` begins a two-digit escape. The decoder itself lets broken ones pass as they are.
fn is_well_encoded(raw: &str) -> bool {
    raw.split('%').skip(1).all(|after| {
        let mut bytes = after.bytes();
        let mut is_hex = || bytes.next().is_some_and(|byte| byte.is_ascii_hexdigit());
        is_hex() && is_hex()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(target: &str) -> Result<CanonicalPath, PathError> {
        CanonicalPath::parse(&target.parse().unwrap())
    }

    #[test]
    fn equal_paths_have_one_spelling() {
        for (target, canonical) in [
            ("/", "/"),
            ("//", "/"),
            ("/latest", "/latest"),
            ("/latest/", "/latest/"),
            ("//latest///meta-data//", "/latest/meta-data/"),
            ("/latest/meta-data/ami-id?x=../iam", "/latest/meta-data/ami-id"),
            ("/latest/%6deta%2Ddata/ami-id", "/latest/meta-data/ami-id"),
            (
                "/latest/meta-data/network/interfaces/macs/02%3a29:96:8f:6a:2d/",
                "/latest/meta-data/network/interfaces/macs/02:29:96:8f:6a:2d/",
            ),
        ] {
            let path = parse(target).unwrap();
            assert_eq!(path.to_target().as_deref(), Some(canonical), "{target}");
        }
    }

    #[test]
    fn ambiguous_targets_are_refused() {
        for target in [
            "*",
            "http://169.254.169.254/latest/meta-data/",
            "http://169.254.169.254",
            "169.254.169.254:80",
            "/latest/../latest",
            "/latest/./meta-data",
            "/latest/%2e%2e/x",
            "/latest/.%2E/x",
            "/latest/.../x",
            "/latest/meta-data%2fiam",
            "/latest/meta-data%2Fiam",
            "/latest/meta-data\\iam",
            "/latest/meta-data%5ciam",
            "/latest/%",
            "/latest/%2",
            "/latest/%zz",
            "/latest/%+1",
            "/latest/%00",
            "/latest/%0a",
            "/latest/%7f",
            "/latest/%ff",
            "/latest/%c3%a9",
            "/latest/%25",
            "/latest/%252e%252e/x",
        ] {
            // The HTTP parser may refuse a target before us.
            if let Ok(uri) = target.parse::<Uri>() {
                assert_eq!(CanonicalPath::parse(&uri), Err(PathError::Malformed), "{target}");
            }
        }
    }

    #[test]
    fn overlong_paths_are_refused() {
        let longest = format!("/{}", "a".repeat(MAX_LENGTH - 1));
        assert!(parse(&longest).is_ok());
        assert_eq!(parse(&format!("{longest}a")), Err(PathError::TooLong));
        assert_eq!(PathError::TooLong.status(), 414);
    }

    #[test]
    fn segments_that_are_no_names_are_not_sent_on() {
        for target in ["/latest/a;b", "/latest/a%20b", "/latest/a%3fb", "/latest/a%23b", "/a&b", "/a*b"] {
            assert_eq!(parse(target).unwrap().to_target(), None, "{target}");
        }
    }

    #[test]
    fn versions_are_dates_and_two_names() {
        for version in ["latest", "1.0", "2007-01-19", "2024-04-11", "2031-12-31"] {
            assert!(is_version(version), "{version}");
        }
        for other in ["", "Latest", "1.1", "2007-01-1", "2007-01-190", "2007/01/19", "2oo7-01-19", "iam"] {
            assert!(!is_version(other), "{other}");
        }
    }
}
