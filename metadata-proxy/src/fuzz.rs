//! Whatever takes somebody else's bytes, for the fuzz targets in `metadata-proxy/fuzz`: no interface of anything else.
//!
//! Rules that take the inside to check stand here as assertions; what an outsider can see, there.

use std::{cell::RefCell, convert::Infallible, sync::OnceLock};

use bytes::Bytes;
use clap::Parser as _;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{
    cli::{Cli, Command, Run},
    config::Config,
    containers::{Container, Given, UserNamespace},
    credentials::RoleSession,
    identity::{self, Home, RoleArn, RoleSpec, Verdict},
    imds::{
        Action, Caller, Forward, IamRequest, Imds, Instance, InstanceSettings, PLAIN, Policy, Rest, TokenKey, View,
        iam::{self, CredentialDocument},
        response,
    },
    server::{self, Limits},
};

const ROLE: &str = "arn:aws:iam::123456789012:role/team/app-1";
const CALLER: Caller<'static> =
    Caller { id: "c0ffee", role: Some("app-1"), failed: false, require_token: false, view: &PLAIN };
/// Stands in every document of credentials, and nowhere else.
pub const SECRET: &str = "SECRET-OF-THE-CONTAINER";
/// What the real service would list, in whatever directory.
const LISTING: &str = "ami-id\ndynamic\niam/\niam-ecs-agent/\nidentity-credentials/\nmeta-data\ntags/\nuser-data\n";

/// Who asks, and what the operator shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    pub role: bool,
    pub token_required: bool,
    /// As much as an operator can; else the default.
    pub generous: bool,
    pub simulated: bool,
}

impl Setting {
    const PLAIN: Self = Self { role: true, token_required: false, generous: false, simulated: false };
    pub const ALL: [Self; 5] = [
        Self::PLAIN,
        Self { generous: true, ..Self::PLAIN },
        Self { role: false, generous: true, ..Self::PLAIN },
        Self { token_required: true, generous: true, ..Self::PLAIN },
        Self { simulated: true, ..Self::PLAIN },
    ];

    fn imds(self) -> Imds {
        let allow = if self.generous { vec!["**".to_owned()] } else { Vec::new() };
        let view = View::new(&allow, &[], self.generous).unwrap_or_else(|error| panic!("{error}"));
        let rest = if self.simulated {
            let instance = Instance::new(InstanceSettings::default()).unwrap_or_else(|error| panic!("{error}"));
            Rest::Simulated(instance, view)
        } else {
            Rest::Real(Policy::new(view))
        };
        Imds::new(TokenKey::new(&[7; 32]), rest, now())
    }

    fn caller(self) -> Caller<'static> {
        Caller { role: CALLER.role.filter(|_| self.role), require_token: self.token_required, ..CALLER }
    }
}

fn now() -> Timestamp {
    Timestamp::UNIX_EPOCH
}

/// What came of a connection.
#[derive(Debug)]
pub struct Exchange {
    pub answers: Vec<u8>,
    /// The paths that the real service was asked for.
    pub asked: Vec<String>,
    /// The targets for which credentials were handed out.
    pub handed_out: Vec<String>,
}

/// A connection of a container, over the server that containers get, to its end.
pub fn request(input: &[u8], setting: Setting) -> Exchange {
    thread_local! {
        static RUNTIME: tokio::runtime::Runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap_or_else(|error| panic!("no runtime: {error}"));
    }
    let (imds, seen) = (setting.imds(), Seen::default());
    let (mut client, server) = tokio::io::duplex(1 << 16);
    let service = service_fn(async |request: Request<Incoming>| {
        Ok::<_, Infallible>(answer(&imds, setting, request, &seen).await)
    });
    let mut answers = Vec::new();
    RUNTIME.with(|runtime| {
        runtime.block_on(async {
            let served = server::http(&Limits::default()).serve_connection(TokioIo::new(server), service);
            let asking = async {
                // It may be closed before all is sent.
                let _ = client.write_all(input).await;
                let _ = client.shutdown().await;
                let _ = client.read_to_end(&mut answers).await;
            };
            let _ = tokio::join!(async { drop(served.await) }, asking);
        });
    });
    let Seen { asked, handed_out } = seen;
    Exchange { answers, asked: asked.into_inner(), handed_out: handed_out.into_inner() }
}

#[derive(Default)]
struct Seen {
    asked: RefCell<Vec<String>>,
    handed_out: RefCell<Vec<String>>,
}

async fn answer(imds: &Imds, setting: Setting, request: Request<Incoming>, seen: &Seen) -> http::Response<Full<Bytes>> {
    let (head, _body) = request.into_parts();
    let iam = async |request| {
        if request == IamRequest::Credentials {
            seen.handed_out.borrow_mut().push(head.uri.to_string());
        }
        let document = CredentialDocument {
            access_key_id: "ASIA",
            secret_access_key: SECRET,
            session_token: "token",
            last_updated: now(),
            expiration: now(),
        };
        iam::respond(request, ROLE, Ok(&document), now())
    };
    let forward = async |forward: Forward| {
        seen.asked.borrow_mut().push(forward.path().to_owned());
        let listed = forward.is_listing();
        let body = if listed { imds.filter_listing(&forward, LISTING) } else { "document".to_owned() };
        let length = body.len() as u64;
        response::forwarded(StatusCode::OK, HeaderMap::new(), Bytes::from(body), length, now())
    };
    let routed = imds.route(&head, &setting.caller(), now());
    let mut answer: http::Response<Bytes> = server::carry_out(routed, iam, forward).await;
    server::close_in_doubt(&head, &mut answer);
    answer.map(Full::new)
}

/// The path that the real service is asked for because of this target, under the default policy or the most generous.
pub fn forwarded(target: &str, generous: bool) -> Option<String> {
    let head = Request::get(target).body(()).ok()?.into_parts().0;
    match (Setting { generous, ..Setting::PLAIN }).imds().route(&head, &CALLER, now()).action {
        Action::Forward(forward) => Some(forward.path().to_owned()),
        Action::Reply(_) | Action::Iam(_) => None,
    }
}

/// Asks for a session token with this lifetime; the token.
pub fn new_token(ttl: &[u8]) -> Option<Vec<u8>> {
    let request = Request::put("/latest/api/token").header("x-aws-ec2-metadata-token-ttl-seconds", ttl);
    match Setting::PLAIN.imds().route(&request.body(()).ok()?.into_parts().0, &CALLER, now()).action {
        Action::Reply(answer) if answer.status() == StatusCode::OK => Some(answer.into_body().to_vec()),
        _ => None,
    }
}

/// Whether this is a good token after so many seconds, of the container that [`new_token`] gives them to or of `another`;
/// `None` if it can be no header at all.
pub fn token(token: &[u8], seconds_later: i64, another: bool) -> Option<bool> {
    let request = Request::get("/latest/meta-data/ami-id").header("x-aws-ec2-metadata-token", token);
    let later = Timestamp::from_second(seconds_later).ok()?;
    let id = if another { "another" } else { CALLER.id };
    let caller = Caller { id, require_token: true, ..CALLER };
    let routed = Setting::PLAIN.imds().route(&request.body(()).ok()?.into_parts().0, &caller, later);
    Some(routed.token_ttl.is_some())
}

/// A name of a role.
pub fn role(text: &str) {
    let Ok(spec) = text.parse::<RoleSpec>() else { return };
    let home = Home::of_caller("arn:aws-cn:sts::210987654321:assumed-role/host/i-1");
    let Ok(Some(arn)) = spec.resolve(None, home.as_ref()) else { return };
    assert_eq!(arn.as_str().parse::<RoleArn>().as_ref(), Ok(&arn), "{text:?} is {arn}");
    assert!(!arn.name().is_empty() && !arn.name().contains('/') && arn.as_str().is_ascii(), "{text:?} is {arn}");
    assert_eq!(spec.name(), arn.name(), "{text:?}");
    // Its list and its document are at paths of their own.
    let path = format!("/latest/meta-data/iam/security-credentials/{}", arn.name());
    assert!(path.parse::<http::Uri>().is_ok_and(|uri| uri.path() == path), "{path}");
}

/// Labels and variables of a container, one a line: `label=value`, `$VARIABLE=value`. What comes of it is something that
/// STS takes (AWS STS API Reference, AssumeRole).
pub fn options(text: &str) {
    let Verdict::Role { session, .. } = decision(text, &settings("")).verdict else { return };
    let RoleSession { session_name, external_id, policy, policy_arns, tags, source_identity, duration, .. } = session;
    let plain = |text: &str| text.chars().all(|c| c.is_ascii_alphanumeric() || "_+=,.@-".contains(c));
    let within = |text: &str, least, most| (least..=most).contains(&text.chars().count());
    assert!(within(&session_name, 2, 64) && plain(&session_name), "{session_name:?}");
    assert!(external_id.is_none_or(|id| within(&id, 2, 1224)));
    assert!(source_identity.is_none_or(|id| within(&id, 2, 64) && plain(&id)));
    assert!(policy.is_none_or(|policy| within(&policy, 2, 2048)));
    assert!(policy_arns.len() <= 10 && policy_arns.iter().all(|arn| within(arn, 20, 2048)));
    assert!((900..=43_200).contains(&duration.as_secs()), "{duration:?}");
    assert!(tags.len() <= 50);
    let in_tag = |text: &str| text.chars().all(|c| c.is_alphanumeric() || " _.:/=+-@".contains(c));
    for (key, value) in &tags {
        assert!(within(key, 1, 128) && within(value, 0, 256) && in_tag(key) && in_tag(value), "{key:?} {value:?}");
        assert!(!key.to_lowercase().starts_with("aws:"), "{key:?}");
    }
}

fn decision(labels: &str, settings: &identity::Settings) -> identity::Decision {
    let mut container = Container {
        id: "0123456789abcdef".repeat(4),
        name: "web".to_owned(),
        engine: "docker".to_owned(),
        of_user: None,
        pid: 1,
        cgroup: 1,
        image: "registry/app:1.2".to_owned(),
        networks: vec!["bridge".to_owned()],
        user_namespace: UserNamespace::Host,
        service: false,
        from_image: Some(Given::default()),
        labels: [("metadata-proxy.role".to_owned(), ROLE.to_owned())].into(),
        env: [].into(),
        repeated: Vec::new(),
    };
    for (name, value) in labels.lines().filter_map(|line| line.split_once('=')) {
        match name.strip_prefix('$') {
            Some(variable) => container.env.insert(variable.to_owned(), value.to_owned()),
            None => container.labels.insert(name.to_owned(), value.to_owned()),
        };
    }
    let decision = identity::decide(&container, settings, Home::of_caller("arn:aws:iam::123456789012:user/x").as_ref());
    assert!(!decision.reasons.is_empty() || decision.verdict == Verdict::Instance, "{labels:?}: no reason");
    decision
}

fn settings(file: &str) -> identity::Settings {
    Config::with_file(run(), "fuzz.toml", file).unwrap_or_else(|error| panic!("{error}")).identity
}

/// A configuration file: right, or wrong with one line that says where.
pub fn config(text: &str) {
    match Config::with_file(run(), "fuzz.toml", text) {
        // What it says is put to use.
        Ok(config) => drop(decision("team=web", &config.identity)),
        Err(error) => {
            let error = error.to_string();
            assert!(error.contains("fuzz.toml") && error.lines().count() == 1, "{error:?}");
        }
    }
}

/// Nothing from the environment.
fn run() -> Run {
    static RUN: OnceLock<Run> = OnceLock::new();
    let parse = || match Cli::try_parse_from(["metadata-proxy", "run"]).map(|cli| cli.command) {
        Ok(Command::Run(run)) => run,
        _ => panic!("`run` is no command"),
    };
    RUN.get_or_init(parse).clone()
}
