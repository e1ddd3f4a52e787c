//! The fuzz targets: functions that take any bytes, and panic when a rule is broken.

use metadata_proxy::fuzz;
use metadata_proxy_tests::imds::canonical;

/// Takes any bytes.
pub type Target = fn(&[u8]);

/// By name, as in `cargo xtask fuzz`.
pub const TARGETS: [(&str, Target); 6] =
    [("request", request), ("path", path), ("token", token), ("role", role), ("options", options), ("config", config)];

/// From the bytes of a connection to those of its answers.
pub fn request(input: &[u8]) {
    for setting in fuzz::Setting::ALL {
        request_in(setting, input);
    }
}

fn request_in(setting: fuzz::Setting, input: &[u8]) {
    let exchange = fuzz::request(input, setting);
    let mut answers = exchange.answers.as_slice();
    let mut count = 0;
    while !answers.is_empty() {
        answers = one_answer(answers, input);
        count += 1;
    }
    // At least "GET / HTTP/1.0" for each, with two line ends.
    assert!(count <= input.len() / 16 + 1, "{count} answers to {:?}", String::from_utf8_lossy(input));
    for path in exchange.asked {
        assert!(!setting.simulated, "{path} is asked for");
        assert_harmless(&canonical(&path), &path);
        assert!(setting.generous || !reveals_host(&canonical(&path)), "{path} is asked for");
    }
    // Nowhere but in the documents for which they were asked, each by a spelling of its path.
    let secrets = exchange.answers.windows(fuzz::SECRET.len()).filter(|part| *part == fuzz::SECRET.as_bytes()).count();
    assert!(secrets <= exchange.handed_out.len(), "{setting:?}: {}", String::from_utf8_lossy(input));
    for target in exchange.handed_out {
        assert!(setting.role, "{target}");
        let path = canonical(target.split(['?', '#']).next().unwrap_or_default());
        assert_eq!(below_version(&path), "meta-data/iam/security-credentials/app-1", "{target}");
    }
}

/// Checks the first answer; what follows it.
fn one_answer<'a>(answers: &'a [u8], input: &[u8]) -> &'a [u8] {
    let say = || format!("{:?} to {:?}", String::from_utf8_lossy(answers), String::from_utf8_lossy(input));
    let end = answers.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or_else(|| panic!("no head: {}", say()));
    let head = std::str::from_utf8(&answers[..end]).unwrap_or_else(|_| panic!("no text: {}", say()));
    let body = &answers[end + 4..];
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).unwrap_or_default();
    assert!(["200", "400", "401", "403", "404", "405", "414", "431"].contains(&status), "{}", say());
    let header = |name: &str| lines.clone().find_map(|line| line.to_ascii_lowercase().strip_prefix(name)?.parse().ok());
    let announced: usize = header("content-length: ").unwrap_or_else(|| panic!("no length: {}", say()));
    // To a HEAD there is none of it, and then the next answer or the end follows.
    let length = if body.is_empty() || body.starts_with(b"HTTP/1.") { 0 } else { announced };
    assert!(body.len() >= length, "{}", say());
    body.get(length..).unwrap_or_default()
}

/// No spelling leads to what is denied: what any reading of a path would take for that is never asked for.
pub fn path(input: &[u8]) {
    let Ok(target) = std::str::from_utf8(input) else { return };
    let meant = canonical(target.split(['?', '#']).next().unwrap_or_default());
    for generous in [false, true] {
        let Some(path) = fuzz::forwarded(target, generous) else { continue };
        assert_harmless(&meant, target);
        assert_harmless(&canonical(&path), target);
        // One reading, and no other.
        assert_eq!(canonical(&path), path.trim_matches('/'), "{target:?} is sent on as {path:?}");
        assert_eq!(canonical(&path), meant, "{target:?} is sent on as {path:?}");
        if !generous {
            assert!(!reveals_host(&meant), "{target:?} is sent on as {path:?}");
        }
    }
}

fn below_version(canonical: &str) -> String {
    canonical.split_once('/').map_or("", |(_, below)| below).to_lowercase()
}

/// Credentials of the host or of others, which nobody can opt in to.
fn assert_harmless(canonical: &str, target: &str) {
    let below = below_version(canonical);
    let mut segments = below.split('/');
    let (top, entry) = (segments.next().unwrap_or_default(), segments.next().unwrap_or_default());
    assert!(["", "meta-data", "dynamic", "user-data"].contains(&top), "{target:?} leads to {canonical}");
    let secret = ["iam", "identity-credentials", "managed-ssh-keys"].contains(&entry) || entry.starts_with("iam-ecs-");
    assert!(!secret, "{target:?} leads to {canonical}");
}

/// What is hidden unless the operator opts in.
fn reveals_host(canonical: &str) -> bool {
    const HIDDEN: [&str; 10] = [
        "user-data",
        "dynamic/instance-identity/pkcs7",
        "dynamic/instance-identity/rsa2048",
        "dynamic/instance-identity/signature",
        "meta-data/ami-manifest-path",
        "meta-data/block-device-mapping",
        "meta-data/elastic-",
        "meta-data/product-codes",
        "meta-data/public-keys",
        "meta-data/tags",
    ];
    let below = below_version(canonical);
    HIDDEN.iter().any(|hidden| below.starts_with(hidden))
}

/// In a lifetime, up to the first `|`; behind it, what is changed of the token that is got for it: pairs of a place and
/// the bits to turn there.
pub fn token(input: &[u8]) {
    // It may be one that was given out in an earlier run, for the key is the same; so to another container.
    assert_ne!(fuzz::token(input, 0, true), Some(true), "{input:?}");
    let border = input.iter().position(|byte| *byte == b'|').unwrap_or(input.len());
    let (ttl, changes) = input.split_at(border);
    let seconds = std::str::from_utf8(ttl).ok().filter(|ttl| ttl.bytes().all(|byte| byte.is_ascii_digit()));
    let seconds = seconds.and_then(|ttl| ttl.parse::<i64>().ok()).filter(|seconds| (1..=21_600).contains(seconds));
    let token = fuzz::new_token(ttl);
    assert_eq!(token.is_some(), seconds.is_some(), "{:?}", String::from_utf8_lossy(ttl));
    let (Some(token), Some(seconds)) = (token, seconds) else { return };
    assert_eq!(token.len(), 56);
    for (later, good) in [(0, true), (seconds - 1, true), (seconds, false)] {
        assert_eq!(fuzz::token(&token, later, false), Some(good), "{seconds} s, after {later} s");
    }
    assert_eq!(fuzz::token(&token, 0, true), Some(false));
    let mut changed = token.clone();
    for change in changes.get(1..).unwrap_or_default().chunks_exact(2) {
        let at = usize::from(change[0]) % changed.len();
        changed[at] ^= change[1];
    }
    if changed != token {
        assert_ne!(fuzz::token(&changed, 0, false), Some(true), "{:?}", String::from_utf8_lossy(&changed));
    }
}

pub fn role(input: &[u8]) {
    if let Ok(text) = std::str::from_utf8(input) {
        fuzz::role(text);
    }
}

pub fn options(input: &[u8]) {
    if let Ok(text) = std::str::from_utf8(input) {
        fuzz::options(text);
    }
}

pub fn config(input: &[u8]) {
    if let Ok(text) = std::str::from_utf8(input) {
        fuzz::config(text);
    }
}
