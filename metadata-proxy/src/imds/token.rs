//! IMDSv2 session tokens.
//!
//! A token is not stored anywhere: it carries the time and the lifetime of its issue, authenticated together with the id
//! of the container that asked for it. So a restarted daemon with the same key still takes it, and no container can use
//! another's.
//!
//! ```text
//! issued, microseconds since the epoch (8) | lifetime, seconds (2) | HMAC-SHA-256 (32)   = 42 bytes = 56 characters
//! ```
//!
//! There is nothing secret in a token, so it is authenticated and not encrypted; that needs neither a nonce nor a source
//! of random numbers.

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::HeaderMap;
use http::header::{HeaderName, HeaderValue};
use jiff::Timestamp;

use super::response::TOKEN_TTL;

/// A session token presented by a client.
const TOKEN: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token");

/// Keeps these tags apart from anything else that may be derived from the same key.
const DOMAIN: &[u8] = b"metadata-proxy session token 1";

const MICROSECONDS: i64 = 1_000_000;

/// How far a token may come from the future, in case the clock was set back a little since its issue. A clock set back
/// further must not prolong tokens.
const CLOCK_SKEW: i64 = 60 * MICROSECONDS;

type Claims = [u8; 10];

/// How long a client wants to use a token: 1 second to 6 hours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ttl(u16);

impl Ttl {
    const MAX: u16 = 21_600;

    /// The lifetime asked for, if there is exactly one and it is within the bounds.
    pub(super) fn requested(headers: &HeaderMap) -> Option<Self> {
        let value = single(headers, &TOKEN_TTL)?.to_str().ok()?;
        if !value.bytes().all(|byte| byte.is_ascii_digit()) {
            return None; // `parse` would take a sign
        }
        let seconds = value.parse().ok()?;
        (1..=Self::MAX).contains(&seconds).then_some(Self(seconds))
    }

    pub(super) fn seconds(self) -> u32 {
        self.0.into()
    }
}

/// What a request says about its session.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Session {
    /// No token was presented.
    None,
    /// A valid token was presented; so many seconds are left of it, at least one.
    Valid { remaining: u32 },
    /// What was presented is no valid token of this container.
    Invalid,
}

/// The key that authenticates tokens. It is wiped when dropped, and cannot be printed.
pub(crate) struct TokenKey(hmac::Key);

impl TokenKey {
    /// A key from 32 random bytes, which should outlive a restart of the daemon.
    pub(crate) fn new(key: &[u8; 32]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, key))
    }

    /// A token for one container.
    pub(super) fn issue(&self, container: &str, ttl: Ttl, now: Timestamp) -> String {
        let [a, b, c, d, e, f, g, h] = now.as_microsecond().to_be_bytes();
        let [i, j] = ttl.0.to_be_bytes();
        let claims = [a, b, c, d, e, f, g, h, i, j];
        let tag = hmac::sign(&self.0, &signed_text(&claims, container));
        URL_SAFE_NO_PAD.encode([&claims, tag.as_ref()].concat())
    }

    /// Looks for a token of the container among the headers. Two tokens are no token.
    pub(super) fn session(&self, headers: &HeaderMap, container: &str, now: Timestamp) -> Session {
        if !headers.contains_key(TOKEN) {
            return Session::None;
        }
        single(headers, &TOKEN)
            .and_then(|token| self.remaining(token.as_bytes(), container, now))
            .map_or(Session::Invalid, |remaining| Session::Valid { remaining })
    }

    fn remaining(&self, token: &[u8], container: &str, now: Timestamp) -> Option<u32> {
        if token.len() != 56 {
            return None;
        }
        let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
        let (claims, tag) = bytes.split_first_chunk::<10>()?;
        // Compares in constant time.
        hmac::verify(&self.0, &signed_text(claims, container), tag).ok()?;

        let [a, b, c, d, e, f, g, h, i, j] = *claims;
        let age = now.as_microsecond().saturating_sub(i64::from_be_bytes([a, b, c, d, e, f, g, h]));
        if age < -CLOCK_SKEW {
            return None;
        }
        let whole_seconds = age.max(0) / MICROSECONDS;
        let remaining = i64::from(u16::from_be_bytes([i, j])) - whole_seconds;
        u32::try_from(remaining).ok().filter(|&left| left > 0)
    }
}

fn signed_text(claims: &Claims, container: &str) -> Vec<u8> {
    // Unambiguous without separators: only the last part has a length of its own.
    [DOMAIN, claims, container.as_bytes()].concat()
}

fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a HeaderValue> {
    let mut values = headers.get_all(name).iter();
    values.next().filter(|_| values.next().is_none())
}

#[cfg(test)]
mod tests {
    use jiff::ToSpan as _;

    use super::*;

    const CONTAINER: &str = "c0ffee";

    fn key() -> TokenKey {
        TokenKey::new(&[7; 32])
    }

    fn now() -> Timestamp {
        "2026-03-01T12:00:00.6Z".parse().unwrap()
    }

    fn headers(name: &HeaderName, values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(name.clone(), value.parse().unwrap());
        }
        headers
    }

    fn session(token: &str, container: &str, at: Timestamp) -> Session {
        key().session(&headers(&TOKEN, &[token]), container, at)
    }

    #[test]
    fn tokens_are_56_characters_of_url_safe_base64() {
        for ttl in [1, 300, Ttl::MAX] {
            let token = key().issue(CONTAINER, Ttl(ttl), now());
            assert_eq!(token.len(), 56);
            assert!(token.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)));
        }
    }

    #[test]
    fn lifetime_is_honoured_to_the_second() {
        let token = key().issue(CONTAINER, Ttl(300), now());
        let after = |ms: i64| session(&token, CONTAINER, now() + ms.milliseconds());
        assert_eq!(after(0), Session::Valid { remaining: 300 });
        assert_eq!(after(999), Session::Valid { remaining: 300 });
        assert_eq!(after(1_000), Session::Valid { remaining: 299 });
        assert_eq!(after(299_999), Session::Valid { remaining: 1 });
        assert_eq!(after(300_000), Session::Invalid);
        assert_eq!(after(86_400_000), Session::Invalid);
    }

    #[test]
    fn setting_the_clock_back_does_not_prolong_a_token() {
        let token = key().issue(CONTAINER, Ttl(300), now());
        assert_eq!(session(&token, CONTAINER, now() - 30.seconds()), Session::Valid { remaining: 300 });
        assert_eq!(session(&token, CONTAINER, now() - 61.seconds()), Session::Invalid);
    }

    #[test]
    fn another_container_or_key_refuses_a_token() {
        let token = key().issue(CONTAINER, Ttl(300), now());
        for other in ["", "c0ffe", "c0ffee0", "badcafe"] {
            assert_eq!(session(&token, other, now()), Session::Invalid);
        }
        let other = TokenKey::new(&[8; 32]);
        assert_eq!(other.session(&headers(&TOKEN, &[&token]), CONTAINER, now()), Session::Invalid);
    }

    #[test]
    fn a_restarted_daemon_accepts_a_token() {
        let token = key().issue(CONTAINER, Ttl(300), now());
        assert_eq!(session(&token, CONTAINER, now()), Session::Valid { remaining: 300 });
    }

    #[test]
    fn every_changed_character_is_noticed() {
        let token = key().issue(CONTAINER, Ttl(300), now());
        for at in 0..token.len() {
            let with = if &token[at..=at] == "A" { "B" } else { "A" };
            let mut changed = token.clone();
            changed.replace_range(at..=at, with);
            assert_eq!(session(&changed, CONTAINER, now()), Session::Invalid, "{at}");
        }
    }

    #[test]
    fn what_is_no_token_is_invalid() {
        let token = key().issue(CONTAINER, Ttl(300), now());
        let cut = &token[..55];
        let long = format!("{token}A");
        let padded = format!("{}==", &token[..54]);
        for text in ["", "x", cut, &long, &padded, &" ".repeat(56), &"+".repeat(56)] {
            assert_eq!(session(text, CONTAINER, now()), Session::Invalid, "{text}");
        }
        let twice = headers(&TOKEN, &[&token, &token]);
        assert_eq!(key().session(&twice, CONTAINER, now()), Session::Invalid);
        let none = HeaderMap::new();
        assert_eq!(key().session(&none, CONTAINER, now()), Session::None);
    }

    #[test]
    fn lifetimes_outside_the_bounds_are_refused() {
        for (values, seconds) in [
            (&["1"][..], Some(1)),
            (&["21600"], Some(21_600)),
            (&["0300"], Some(300)),
            (&[], None),
            (&[""], None),
            (&["0"], None),
            (&["21601"], None),
            (&["65536"], None),
            (&["99999999999999999999"], None),
            (&["-1"], None),
            (&["+1"], None),
            (&["1.5"], None),
            (&["six"], None),
            (&["1 "], None),
            (&["60", "60"], None),
        ] {
            let ttl = Ttl::requested(&headers(&TOKEN_TTL, values));
            assert_eq!(ttl.map(Ttl::seconds), seconds, "{values:?}");
        }
    }
}
