//! Whole requests: from a head to what is done about it.

use http::Request;
use http::header::ALLOW;

use super::*;

const TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";
const TOKEN: &str = "x-aws-ec2-metadata-token";

const CALLER: Caller<'static> =
    Caller { id: "c0ffee", role: Some("app-1"), failed: false, require_token: false, view: &PLAIN };

const NO_ROLE: Caller<'static> = Caller { role: None, ..CALLER };

const STRICT: Caller<'static> = Caller { require_token: true, ..CALLER };

fn now() -> Timestamp {
    "2026-03-01T12:00:00Z".parse().unwrap()
}

fn imds() -> Imds {
    let policy = Policy::new(View::default());
    Imds::new(TokenKey::new(&[7; 32]), Rest::Real(policy), now())
}

/// As generous as an operator can be.
fn open_imds() -> Imds {
    let policy = Policy::new(View::new(&["**".into()], &[], true).unwrap());
    Imds::new(TokenKey::new(&[7; 32]), Rest::Real(policy), now())
}

fn offline() -> Imds {
    Imds::new(TokenKey::new(&[7; 32]), Rest::Nothing, now())
}

fn head(method: &str, target: &str, headers: &[(&str, &str)]) -> Parts {
    let mut request = Request::builder().method(method).uri(target);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap().into_parts().0
}

fn ask(imds: &Imds, caller: &Caller<'_>, method: &str, target: &str, headers: &[(&str, &str)]) -> Routed {
    imds.route(&head(method, target, headers), caller, now())
}

/// What is done about a GET: the body or the status of an answer, the question to ask, or the path to fetch.
fn get(imds: &Imds, caller: &Caller<'_>, target: &str) -> String {
    match ask(imds, caller, "GET", target, &[]).action {
        Action::Reply(response) if response.status() == 200 => String::from_utf8(response.body().to_vec()).unwrap(),
        Action::Reply(response) => response.status().as_str().into(),
        Action::Iam(request) => format!("{request:?}"),
        Action::Forward(forward) => {
            format!("{} {}", if forward.is_listing() { "list" } else { "fetch" }, forward.path())
        }
    }
}

#[track_caller]
fn reply(routed: Routed) -> Response {
    match routed.action {
        Action::Reply(response) => response,
        Action::Iam(_) | Action::Forward(_) => panic!("no reply of our own"),
    }
}

fn new_token(imds: &Imds, caller: &Caller<'_>, ttl: &str) -> String {
    let response = reply(ask(imds, caller, "PUT", "/latest/api/token", &[(TTL, ttl)]));
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()[TTL], *ttl);
    String::from_utf8(response.body().to_vec()).unwrap()
}

#[test]
fn iam_tree_is_the_containers_own() {
    for version in ["latest", "1.0", "2007-01-19", "2021-07-15", "//latest"] {
        for (path, expected) in [
            ("iam", "info\nsecurity-credentials/"),
            ("iam/", "info\nsecurity-credentials/"),
            ("iam/info", "Info"),
            ("iam/security-credentials", "RoleList"),
            ("iam/security-credentials/", "RoleList"),
            ("iam//security-credentials/?x=1", "RoleList"),
            ("iam/security-credentials/app-1", "Credentials"),
            ("iam/security-credentials/app-1/", "Credentials"),
            ("iam/security-credentials/app%2D1", "Credentials"),
            ("iam/security-credentials/App-1", "404"),
            ("iam/security-credentials/other", "404"),
            ("iam/security-credentials/app-1/x", "404"),
            ("iam/security-credentials-extended", "404"),
            ("iam/security-credentials-extended/", "404"),
            ("iam/other", "404"),
        ] {
            let target = format!("/{version}/meta-data/{path}");
            assert_eq!(get(&imds(), &CALLER, &target), expected, "{target}");
            assert_eq!(get(&offline(), &CALLER, &target), expected, "{target}");
            assert_eq!(get(&imds(), &NO_ROLE, &target), "404", "{target}");
        }
    }
}

#[test]
fn everything_else_is_fetched_from_the_real_service() {
    for (target, expected) in [
        ("/", "list /"),
        ("//", "list /"),
        ("/latest", "list /latest"),
        ("/latest/", "list /latest/"),
        ("//latest//meta-data/", "list /latest/meta-data/"),
        ("/latest/dynamic/instance-identity/", "list /latest/dynamic/instance-identity/"),
        ("/latest/dynamic/instance-identity/document", "fetch /latest/dynamic/instance-identity/document"),
        ("/2009-04-04/meta-data/ami-id?x=y", "fetch /2009-04-04/meta-data/ami-id"),
        ("/latest/meta-data/placement/availability-zone/", "fetch /latest/meta-data/placement/availability-zone/"),
        ("/latest/meta-data/%70lacement/region", "fetch /latest/meta-data/placement/region"),
        ("/latest/meta-data/network/a;b", "404"),
        ("/latest/api", "404"),
        ("/favicon.ico", "404"),
    ] {
        assert_eq!(get(&imds(), &CALLER, target), expected, "{target}");
    }
}

#[test]
fn without_upstream_only_the_way_to_iam_is_there() {
    for (target, expected) in [
        ("/", listing::VERSIONS),
        ("/latest", "meta-data"),
        ("/latest/", "meta-data"),
        ("/1.0/meta-data", "iam/"),
        ("/latest/meta-data/", "iam/"),
        ("/latest/meta-data/ami-id", "404"),
        ("/latest/dynamic/", "404"),
        ("/latest/user-data", "404"),
        ("/nonsense/meta-data/", "404"),
    ] {
        assert_eq!(get(&offline(), &CALLER, target), expected, "{target}");
    }
    assert_eq!(get(&offline(), &NO_ROLE, "/latest/meta-data/"), "");
}

#[test]
fn a_wholly_denied_tree_still_leads_to_iam() {
    let policy = Policy::new(View::new(&[], &["**".into()], false).unwrap());
    let imds = Imds::new(TokenKey::new(&[7; 32]), Rest::Real(policy), now());
    assert_eq!(get(&imds, &CALLER, "/latest/"), "meta-data");
    assert_eq!(get(&imds, &CALLER, "/latest/meta-data/"), "iam/");
    assert_eq!(get(&imds, &CALLER, "/latest/meta-data/ami-id"), "404");
}

/// Turns a path into many that some server might take for the same.
fn spellings(path: &str) -> Vec<String> {
    let slash = path.rfind('/').unwrap_or(0);
    let (parent, name) = (&path[..slash], &path[slash + 1..]);
    let upper = path.to_uppercase();
    let first_escaped = format!("{parent}/%{:02x}{}", name.as_bytes()[0], &name[1..]);
    let twice_escaped = first_escaped.replace('%', "%25");
    let mut all = vec![
        path.to_owned(),
        upper,
        first_escaped,
        twice_escaped,
        path.replace('/', "//"),
        path.replace('/', "%2f"),
        path.replace('/', "%2F"),
        path.replace('/', "/%2F"),
        path.replace('/', "%5c"),
        path.replace('/', "\\"),
        path.replace('/', "/./"),
        path.replace('/', "/%2e/"),
        path.replace('/', "/;x/"),
        path.replace('/', ";x=1/"),
    ];
    // Out of a subtree that is passed on whole.
    for up in ["..", "%2e%2e", "%2E.", ".%2e", "..;", "..;x", "%2e%2e;", "%252e%252e", "..%00", "...", "..%20"] {
        all.push(format!("meta-data/network/{up}/{up}/{path}"));
    }
    for slash in ["%2f", "%2F", "%5c", "\\", "%252f", "%255c"] {
        all.push(format!("meta-data/network/..{slash}..{slash}{path}"));
        all.push(format!("meta-data/network{slash}..{slash}..{slash}{path}"));
    }
    for end in ["/", "//", ";", ";x=1", "?", "?x", "%20", "%00", "%0a", "%09", ".", "%23x", "%3fx"] {
        all.push(format!("{path}{end}"));
    }
    all
}

#[test]
fn secrets_are_never_asked_for_in_any_spelling() {
    let secrets = [
        "meta-data/iam",
        "meta-data/iam/info",
        "meta-data/iam/security-credentials",
        "meta-data/iam/security-credentials/host-role",
        "meta-data/iam-ecs-agent/security-credentials/x",
        "meta-data/identity-credentials/ec2/security-credentials/ec2-instance",
        "meta-data/managed-ssh-keys/signer-cert",
    ];
    let denied_by_default = [
        "user-data",
        "dynamic/instance-identity/pkcs7",
        "meta-data/public-keys/0/openssh-key",
        "meta-data/tags/instance/Name",
    ];
    let mut tried = 0;
    let mut check = |imds: &Imds, path: &str| {
        for version in ["/latest", "/1.0", "/2007-01-19", "//latest", "/latest/meta-data/..", "/LATEST", ""] {
            for spelling in spellings(path) {
                let target = format!("{version}/{spelling}");
                // What the HTTP parser refuses does not come this far.
                let Ok(request) = Request::get(target.as_str()).body(()) else {
                    continue;
                };
                for caller in [CALLER, NO_ROLE] {
                    let routed = imds.route(&request.clone().into_parts().0, &caller, now());
                    if let Action::Forward(forward) = routed.action {
                        panic!("{target} fetches {}", forward.path());
                    }
                    tried += 1;
                }
            }
        }
    };
    for path in secrets {
        check(&imds(), path);
        check(&open_imds(), path);
    }
    for path in denied_by_default {
        check(&imds(), path);
    }
    assert!(tried > 8_000, "{tried}");
}

#[test]
fn ambiguous_targets_are_bad_requests() {
    for target in [
        "*",
        "http://169.254.169.254/latest/meta-data/ami-id",
        "/latest/meta-data/../user-data",
        "/latest/meta-data%2fiam/",
        "/latest/%zz",
    ] {
        assert_eq!(get(&imds(), &CALLER, target), "400", "{target}");
        assert_eq!(get(&imds(), &STRICT, target), "400", "{target}");
    }
    let routed = ask(&imds(), &CALLER, "CONNECT", "169.254.169.254:80", &[]);
    assert_eq!(reply(routed).status(), 400);
    assert_eq!(get(&imds(), &CALLER, &format!("/latest/{}", "a".repeat(2_000))), "414");
}

#[test]
fn token_requests_are_answered_as_the_reference_says() {
    let ttl = (TTL, "60");
    for (method, target, headers, status) in [
        ("PUT", "/latest/api/token", &[ttl][..], 200),
        ("PUT", "//latest//api/token", &[ttl], 200),
        ("PUT", "/latest/api/token/", &[ttl], 200),
        ("PUT", "/latest/api/token", &[ttl, (TOKEN, "stale")], 200),
        ("PUT", "/latest/api/token", &[], 400),
        ("PUT", "/latest/api/token", &[(TTL, "0")], 400),
        ("PUT", "/latest/api/token", &[(TTL, "21601")], 400),
        ("PUT", "/latest/api/token", &[(TTL, "soon")], 400),
        ("PUT", "/latest/api/token", &[ttl, ttl], 400),
        ("PUT", "/latest/api/token", &[ttl, ("x-forwarded-for", "10.0.0.1")], 403),
        ("PUT", "/latest/api/token", &[ttl, ("x-forwarded-for", "")], 403),
        ("PUT", "/2021-07-15/api/token", &[ttl], 403),
        ("PUT", "/1.0/api/token", &[ttl], 403),
        ("GET", "/latest/api/token", &[], 405),
        ("HEAD", "/latest/api/token", &[], 405),
        ("POST", "/latest/api/token", &[ttl], 405),
        ("DELETE", "/latest/api/token", &[], 405),
        ("OPTIONS", "/latest/api/token", &[], 200),
    ] {
        // The exchange is the same where tokens are required.
        for caller in [CALLER, STRICT] {
            let response = reply(ask(&imds(), &caller, method, target, headers));
            assert_eq!(response.status(), status, "{method} {target} {headers:?}");
            if status == 405 || method == "OPTIONS" {
                assert_eq!(response.headers()[ALLOW], "OPTIONS, PUT");
                assert!(response.body().is_empty());
            }
        }
    }
}

#[test]
fn a_valid_token_is_echoed_with_what_is_left_of_it() {
    let token = new_token(&imds(), &CALLER, "300");
    let at = now() + jiff::SignedDuration::from_secs(100);
    for target in ["/latest/meta-data/iam/", "/latest/meta-data/ami-id", "/nonsense"] {
        let routed = imds().route(&head("GET", target, &[(TOKEN, &token)]), &CALLER, at);
        assert_eq!(routed.token_ttl, Some(200), "{target}");
    }
    let mut headers = HeaderMap::new();
    response::echo_token_ttl(&mut headers, 200);
    assert_eq!(headers[TTL], "200");
}

#[test]
fn where_a_token_is_required_nothing_is_said_without_one() {
    let token = new_token(&imds(), &STRICT, "300");
    for target in ["/", "/latest/", "/latest/meta-data/iam/", "/nonsense", "/latest/api"] {
        let response = reply(ask(&imds(), &STRICT, "GET", target, &[]));
        assert_eq!(response.status(), 401, "{target}");
        assert_eq!(response.headers()["content-length"], "0");
        assert_eq!(response.headers()["content-type"], "text/plain");
        let routed = ask(&imds(), &STRICT, "GET", target, &[(TOKEN, &token)]);
        assert_eq!(routed.token_ttl, Some(300), "{target}");
    }
}

#[test]
fn a_bad_token_is_refused_also_where_none_is_required() {
    let foreign = new_token(&imds(), &Caller { id: "other", ..CALLER }, "300");
    let good = new_token(&imds(), &CALLER, "300");
    let expired = new_token(&imds(), &CALLER, "1");
    let later = now() + jiff::SignedDuration::from_secs(1);
    for headers in [
        &[(TOKEN, "nonsense")][..],
        &[(TOKEN, "")],
        &[(TOKEN, &foreign)],
        &[(TOKEN, &expired)],
        &[(TOKEN, &good), (TOKEN, &good)],
    ] {
        let routed = imds().route(&head("GET", "/latest/", headers), &CALLER, later);
        assert_eq!(reply(routed).status(), 401, "{headers:?}");
    }
}

#[test]
fn other_methods_are_not_allowed() {
    for method in ["PUT", "POST", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"] {
        let response = reply(ask(&imds(), &CALLER, method, "/latest/meta-data/iam/", &[]));
        assert_eq!(response.status(), 405, "{method}");
        assert_eq!(response.headers()[ALLOW], "GET, HEAD");
    }
}

#[test]
fn head_is_routed_like_get() {
    let response = reply(ask(&imds(), &CALLER, "HEAD", "/latest/meta-data/iam/", &[]));
    assert_eq!(response.headers()["content-length"], "26");
    let routed = ask(&imds(), &CALLER, "HEAD", "/latest/meta-data/ami-id", &[]);
    assert!(matches!(routed.action, Action::Forward(_)));
}

#[test]
fn listings_of_the_real_service_are_filtered_for_the_caller() {
    for (caller, expected) in [(CALLER, "ami-id\niam/"), (NO_ROLE, "ami-id")] {
        for target in ["/latest/meta-data", "/2007-01-19/meta-data/"] {
            let Action::Forward(forward) = ask(&imds(), &caller, "GET", target, &[]).action else {
                panic!("{target} is not fetched");
            };
            let upstream = "ami-id\niam/\nidentity-credentials/\ntags/";
            assert_eq!(imds().filter_listing(&forward, upstream), expected);
        }
    }
}

fn simulated(settings: &str) -> Imds {
    let instance = Instance::new(toml::from_str(settings).unwrap()).unwrap();
    Imds::new(TokenKey::new(&[7; 32]), Rest::Simulated(instance, View::default()), now())
}

#[test]
fn what_the_operator_or_the_caller_hides_of_a_simulated_instance_is_hidden() {
    let deny = |pattern: &str| View::new(&[], &[pattern.to_owned()], false).unwrap();
    let instance = || Instance::new(toml::from_str("user-data = 'x'\ntags = { Name = 'y' }").unwrap()).unwrap();
    let imds = |view| Imds::new(TokenKey::new(&[7; 32]), Rest::Simulated(instance(), view), now());
    let (own, closed) = (deny("meta-data/tags"), View::closed());
    let caller = Caller { view: &own, ..CALLER };
    for (imds, caller) in [(imds(deny("meta-data/tags")), CALLER), (imds(View::default()), caller)] {
        assert_eq!(get(&imds, &caller, "/latest/meta-data/tags/instance/Name"), "404");
        assert_eq!(get(&imds, &caller, "/latest/meta-data/TAGS/instance/"), "404");
        let listing = get(&imds, &caller, "/latest/meta-data/");
        assert!(!listing.contains("tags") && listing.contains("\niam/\n"), "{listing}");
        assert_eq!(get(&imds, &caller, "/latest/user-data"), "x");
    }
    let caller = Caller { view: &closed, ..CALLER };
    for (target, expected) in [
        ("/latest/", "meta-data"),
        ("/latest/meta-data/", "iam/"),
        ("/latest/meta-data/ami-id", "404"),
        ("/latest/user-data", "404"),
        ("/latest/meta-data/iam/security-credentials/", "RoleList"),
    ] {
        assert_eq!(get(&imds(View::default()), &caller, target), expected, "{target}");
    }
    let all_of_it = imds(deny("meta-data"));
    assert_eq!(get(&all_of_it, &CALLER, "/latest/"), "dynamic\nmeta-data\nuser-data");
    assert_eq!(get(&all_of_it, &CALLER, "/latest/meta-data/"), "iam/");
}

#[test]
fn no_listing_leads_to_a_role_without_credentials() {
    let refused = Caller { failed: true, ..CALLER };
    for imds in [simulated(""), imds()] {
        assert_eq!(get(&imds, &refused, "/latest/meta-data/iam/"), "404");
        // Asked for, it is tried again.
        assert_eq!(get(&imds, &refused, "/latest/meta-data/iam/security-credentials/"), "RoleList");
    }
    assert!(!get(&simulated(""), &refused, "/latest/meta-data/").contains("iam"));
}

#[test]
fn a_simulated_instance_answers_for_itself_in_every_version_and_spelling() {
    let imds = simulated("instance-id = 'i-0abc'\nuser-data = 'x'\n");
    for target in [
        "/latest/meta-data/instance-id",
        "/latest/meta-data/instance-id/",
        "/1.0/meta-data/instance-id",
        "/2031-01-01/meta-data/instance-id",
        "//latest//meta-data/%69nstance-id?x=y",
    ] {
        assert_eq!(get(&imds, &CALLER, target), "i-0abc", "{target}");
    }
    assert_eq!(get(&imds, &CALLER, "/"), listing::VERSIONS);
    assert_eq!(get(&imds, &CALLER, "/latest/"), "dynamic\nmeta-data\nuser-data");
    assert_eq!(get(&imds, &CALLER, "/newest/meta-data/instance-id"), "404");
    assert_eq!(get(&imds, &CALLER, "/latest/meta-data/nothing"), "404");
    let user_data = reply(ask(&imds, &CALLER, "GET", "/latest/user-data", &[]));
    assert_eq!(user_data.headers()["content-type"], "application/octet-stream");
    assert_eq!(user_data.body().as_ref(), b"x");
}

#[test]
fn the_iam_tree_of_a_simulated_instance_is_the_containers_own() {
    let imds = simulated("");
    assert_eq!(get(&imds, &CALLER, "/latest/meta-data/iam/security-credentials/"), "RoleList");
    assert_eq!(get(&imds, &NO_ROLE, "/latest/meta-data/iam/"), "404");
    assert!(get(&imds, &CALLER, "/latest/meta-data/").contains("\niam/\n"));
    assert!(!get(&imds, &NO_ROLE, "/latest/meta-data/").contains("iam"));
    assert_eq!(get(&imds, &STRICT, "/latest/meta-data/"), "401");
}

#[test]
fn only_what_lists_credentials_waits_for_them() {
    let lists = |target: &str| lists_credentials(&target.parse().unwrap());
    for target in ["/latest/meta-data", "/latest//meta-data/?x", "/1.0/meta-data/iam/", "/latest/%6deta-data/iam"] {
        assert!(lists(target), "{target}");
    }
    for target in ["/", "/latest/", "/latest/meta-data/instance-id", "/latest/meta-data/iam/info", "/latest/%zz/iam"] {
        assert!(!lists(target), "{target}");
    }
}
