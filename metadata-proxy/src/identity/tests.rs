//! Decisions: whose word counts, and what becomes of it.

use std::{collections::HashMap, time::Duration};

use super::{
    rules::{Matching, Rule},
    *,
};
use crate::containers::{Given, UserNamespace};

const ACCOUNT: &str = "arn:aws:iam::111122223333:user/metadata-proxy";

pub(super) fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

pub(crate) fn container(name: &str, labels: &[(&str, &str)], env: &[(&str, &str)]) -> Container {
    Container {
        id: "0123456789abcdef".repeat(4),
        name: name.to_owned(),
        engine: "docker".to_owned(),
        of_user: None,
        pid: 1,
        cgroup: 1,
        image: "registry/app:1.2".to_owned(),
        networks: vec!["bridge".to_owned()],
        user_namespace: UserNamespace::Host,
        service: false,
        from_image: Some(Given::default()),
        labels: map(labels),
        env: map(env),
        repeated: Vec::new(),
    }
}

pub(super) fn settings(default: Option<&str>) -> Settings {
    Settings {
        default_role: default.map(|role| role.parse().unwrap()),
        role_base: None,
        session_name: Template::parse(Kind::SessionName, SESSION_NAME).unwrap(),
        session_tags: Vec::new(),
        require_imdsv2: false,
        container_labels: false,
        exempt: HashSet::new(),
        rules: Rules::default(),
        engines: HashMap::new(),
        host: "host-1".to_owned(),
    }
}

pub(super) fn judged(container: &Container, settings: &Settings) -> Decision {
    decide(container, settings, Home::of_caller(ACCOUNT).as_ref())
}

fn chosen(labels: &[(&str, &str)], env: &[(&str, &str)], default: Option<&str>) -> Verdict {
    judged(&container("web", labels, env), &settings(default)).verdict
}

fn name(verdict: Verdict) -> Option<String> {
    match verdict {
        Verdict::Role { arn, .. } => Some(arn.name().to_owned()),
        _ => None,
    }
}

#[test]
fn sources_are_asked_in_order() {
    let labels = [("metadata-proxy.role", "own"), ("com.swipely.iam-docker.iam-profile", "swipely")];
    let env = [("IAM_ROLE", "role"), ("IAM_PROFILE", "profile")];
    for (labels, env, expected) in [
        (&labels[..], &env[..], "own"),
        (&labels[1..], &env, "swipely"),
        (&[], &env, "role"),
        (&[], &env[1..], "profile"),
        (&[("metadata-proxy.role", "")], &[("IAM_ROLE", " ")], "default"),
        (&[], &[], "default"),
    ] {
        assert_eq!(name(chosen(labels, env, Some("default"))).as_deref(), Some(expected));
    }
    assert_eq!(chosen(&[], &[], None), Verdict::NoRole);
}

#[test]
fn a_malformed_role_does_not_fall_back_to_the_default() {
    let container = container("web", &[("metadata-proxy.role", "no role")], &[]);
    let decision = judged(&container, &settings(Some("default")));
    assert_eq!(decision.verdict, Verdict::Refused);
    assert!(decision.reasons.last().unwrap().starts_with("label metadata-proxy.role: \"no role\""), "{decision:?}");
}

#[test]
fn what_the_image_has_brought_is_told() {
    let mut container = container("web", &[], &[]);
    container.from_image = Some(Given {
        labels: map(&[("metadata-proxy.role", "web")]),
        env: map(&[("PATH", "/usr/bin")]),
        ..Given::default()
    });
    let decision = judged(&container, &settings(None));
    assert_eq!(decision.verdict, Verdict::NoRole);
    assert!(decision.reasons[0].starts_with("label metadata-proxy.role comes from the image"), "{decision:?}");
    assert_eq!(decision.reasons.len(), 2);
}

#[test]
fn without_its_image_a_container_gets_nothing_not_even_the_default() {
    let mut container = container("web", &[("metadata-proxy.role", "web")], &[]);
    container.from_image = None;
    assert_eq!(judged(&container, &settings(Some("default"))).verdict, Verdict::Refused);
}

#[test]
fn a_variable_that_is_there_twice_refuses_the_role() {
    let twice = |variable: &str, template: &str| {
        let repeated = vec![variable.to_owned()];
        let container = Container { repeated, ..container("web", &[("metadata-proxy.role", "web")], &[]) };
        let session_tags = vec![session_tag("team", template).unwrap()];
        judged(&container, &Settings { session_tags, ..settings(Some("default")) })
    };
    for variable in ["IAM_ROLE", "IAM_PROFILE", "IAM_POLICY", "IAM_EXTERNAL_ID", "IAM_ROLE_EXTERNALID"] {
        let decision = twice(variable, "a");
        assert_eq!(decision.verdict, Verdict::Refused, "{variable}");
        let expected = format!("environment variable {variable} is there more than once");
        assert!(decision.reasons.concat().contains(&expected), "{decision:?}");
    }
    assert_eq!(twice("TEAM", "{env.TEAM}").verdict, Verdict::Refused);
    assert!(matches!(twice("TEAM", "a").verdict, Verdict::Role { .. }));
}

#[test]
fn a_short_name_waits_for_the_account() {
    let container = container("web", &[("metadata-proxy.role", "team/web")], &[]);
    assert_eq!(decide(&container, &settings(None), None).verdict, Verdict::Pending { name: "web".into() });
    let Verdict::Role { arn, .. } = judged(&container, &settings(None)).verdict else { panic!("no role") };
    assert_eq!(arn.as_str(), "arn:aws:iam::111122223333:role/team/web");
}

#[test]
fn options_become_part_of_the_session() {
    let labels = [
        ("metadata-proxy.role", "web"),
        ("metadata-proxy.duration", "15m"),
        ("metadata-proxy.session-name", "{host}.{container.name}"),
        ("metadata-proxy.session-tags", "team=a"),
        ("metadata-proxy.source-identity", "alice"),
        ("metadata-proxy.policy-arns", "arn:aws:iam::aws:policy/ReadOnlyAccess"),
    ];
    let mut settings = settings(None);
    settings.session_tags = vec![session_tag("image", "{image}").unwrap()];
    let decision = judged(&container("web", &labels, &[("IAM_EXTERNAL_ID", "x1"), ("IAM_POLICY", "{}")]), &settings);
    let Verdict::Role { session, .. } = decision.verdict else { panic!("{decision:?}") };
    let tags = [("image", "registry/app:1.2"), ("team", "a")].map(|(key, value)| (key.to_owned(), value.to_owned()));
    let expected = RoleSession {
        role_arn: "arn:aws:iam::111122223333:role/web".into(),
        session_name: "host-1.web".into(),
        external_id: Some("x1".into()),
        policy: Some("{}".into()),
        policy_arns: vec!["arn:aws:iam::aws:policy/ReadOnlyAccess".into()],
        tags: tags.into(),
        source_identity: Some("alice".into()),
        duration: Duration::from_secs(900),
    };
    assert_eq!(session, expected);
}

#[test]
fn a_wrong_option_refuses_the_role_and_asks_for_tokens() {
    let labels = [("metadata-proxy.role", "web"), ("metadata-proxy.require-imdsv2", "yes, please")];
    let decision = judged(&container("web", &labels, &[]), &settings(Some("default")));
    assert_eq!((decision.verdict, decision.require_imdsv2), (Verdict::Refused, true));
}

#[test]
fn a_container_cannot_relax_what_the_operator_requires() {
    let container = container("web", &[("metadata-proxy.require-imdsv2", "false")], &[]);
    let strict = Settings { require_imdsv2: true, ..settings(None) };
    assert!(judged(&container, &strict).require_imdsv2);
    assert!(!judged(&container, &settings(None)).require_imdsv2);
}

#[test]
fn a_container_cannot_replace_the_operators_tags() {
    let mut settings = settings(Some("web"));
    settings.session_tags = vec![session_tag("team", "a").unwrap()];
    let decision = judged(&container("web", &[("metadata-proxy.session-tags", "Team=b")], &[]), &settings);
    assert_eq!(decision.verdict, Verdict::Refused);
    assert!(decision.reasons.last().unwrap().contains("\"Team\""), "{decision:?}");
}

#[test]
fn under_a_role_a_long_duration_is_refused_before_sts_does() {
    let container = container("web", &[("metadata-proxy.role", "web"), ("metadata-proxy.duration", "2h")], &[]);
    assert!(matches!(judged(&container, &settings(None)).verdict, Verdict::Role { .. }));
    let chained = Home::of_caller("arn:aws:sts::123456789012:assumed-role/host/i-1");
    let decision = decide(&container, &settings(None), chained.as_ref());
    assert!(decision.reasons.last().unwrap().contains("3600 s at most"), "{decision:?}");
}

#[test]
fn an_exempt_container_keeps_the_real_service_whatever_it_says() {
    let exempt = Settings { exempt: HashSet::from(["agent".to_owned()]), ..settings(Some("default")) };
    assert_eq!(judged(&container("agent", &[("metadata-proxy.role", "")], &[]), &exempt).verdict, Verdict::Instance);
}

/// Rules for containers by name.
pub(super) fn ruled(rules: Vec<(&str, Effect)>) -> Settings {
    let rule = |(name, effect): (&str, Effect)| Rule {
        place: "config.toml:1".into(),
        matching: Matching { name: Some(serde_json::from_value(name.into()).unwrap()), ..Matching::default() },
        effect,
    };
    let rules = Rules { rules: rules.into_iter().map(rule).collect(), unmatched_allowed: false };
    Settings { rules, ..settings(None) }
}

pub(super) fn allow(roles: &[&str], rest: Allowance) -> Effect {
    let allow = roles.iter().map(|role| role.parse().unwrap()).collect();
    Effect::Allow(Box::new(Allowance { allow, ..rest }))
}

fn asks(name: &str, role: &str) -> Container {
    container(name, &[("metadata-proxy.role", role)], &[])
}

#[test]
fn the_first_rule_that_matches_holds() {
    let settings = ruled(vec![
        ("web-admin", Effect::Deny),
        ("web-*", allow(&["web-*"], Allowance::default())),
        ("*", allow(&["basic"], Allowance::default())),
    ]);
    let verdict = |name: &str, role: &str| judged(&asks(name, role), &settings).verdict;
    assert_eq!(verdict("web-admin", "web-1"), Verdict::Refused);
    assert!(matches!(verdict("web-1", "web-1"), Verdict::Role { .. }));
    assert_eq!(verdict("web-1", "basic"), Verdict::Refused);
    assert!(matches!(verdict("job", "basic"), Verdict::Role { .. }));
    assert_eq!(verdict("job", "web-1@210987654321"), Verdict::Refused);
}

#[test]
fn with_any_rule_unmatched_containers_get_nothing_unless_allowed() {
    let mut settings = ruled(vec![("web", allow(&["*"], Allowance::default()))]);
    assert_eq!(judged(&asks("job", "job"), &settings).verdict, Verdict::Refused);
    assert_eq!(judged(&container("job", &[], &[]), &settings).verdict, Verdict::NoRole);
    settings.rules.unmatched_allowed = true;
    assert!(matches!(judged(&asks("job", "job"), &settings).verdict, Verdict::Role { .. }));
}

#[test]
fn the_hosts_own_role_needs_a_rule_that_says_so() {
    assert_eq!(judged(&asks("agent", "@instance"), &settings(None)).verdict, Verdict::Refused);
    let settings = ruled(vec![
        ("agent", allow(&["@instance"], Allowance::default())),
        ("given", allow(&[], Allowance { default_role: Some(RoleSpec::Instance), ..Allowance::default() })),
        ("*", allow(&["*", "arn:*"], Allowance::default())),
    ]);
    assert_eq!(judged(&asks("agent", "@instance"), &settings).verdict, Verdict::Instance);
    assert_eq!(judged(&asks("other", "@instance"), &settings).verdict, Verdict::Refused);
    assert_eq!(judged(&container("given", &[], &[]), &settings).verdict, Verdict::Instance);
    let optional = [("metadata-proxy.role", "@instance"), ("metadata-proxy.policy", "{}")];
    assert_eq!(judged(&container("agent", &optional, &[]), &settings).verdict, Verdict::Refused);
    // Only who asks for it.
    assert_eq!(judged(&container("agent", &[], &[]), &settings).verdict, Verdict::NoRole);
}

#[test]
fn a_rule_gives_and_limits_and_forces() {
    let rest = || Allowance {
        default_role: Some("basic".parse().unwrap()),
        max_duration: Some(Duration::from_secs(900)),
        policy: Some("{}".into()),
        tags: vec![session_tag("team", "a").unwrap()],
        ..Allowance::default()
    };
    let mut settings = ruled(vec![("*", allow(&["web"], rest()))]);
    settings.session_tags = vec![session_tag("Team", "all").unwrap(), session_tag("host", "{host}").unwrap()];
    let decision = judged(&container("web", &[], &[]), &settings);
    let Verdict::Role { session, .. } = decision.verdict else { panic!("{decision:?}") };
    assert_eq!(session.role_arn, "arn:aws:iam::111122223333:role/basic");
    assert_eq!((session.duration.as_secs(), session.policy.as_deref()), (900, Some("{}")));
    let tags: Vec<_> = session.tags.iter().map(|(key, value)| format!("{key}={value}")).collect();
    assert_eq!(tags, ["team=a", "host=host-1"]);
    for (label, value) in [
        ("metadata-proxy.duration", "1h"),
        ("metadata-proxy.policy", "{}"),
        ("metadata-proxy.policy-arns", "arn:aws:iam::aws:policy/x"),
        ("metadata-proxy.session-tags", "TEAM=b"),
    ] {
        let decision = judged(&container("web", &[(label, value)], &[]), &settings);
        assert_eq!(decision.verdict, Verdict::Refused, "{label}");
    }
}

#[test]
fn under_rules_even_a_full_arn_waits_for_the_account() {
    let settings = ruled(vec![("*", allow(&["web"], Allowance::default()))]);
    let container = asks("web", "arn:aws:iam::111122223333:role/web");
    assert_eq!(decide(&container, &settings, None).verdict, Verdict::Pending { name: "web".into() });
    assert!(matches!(judged(&container, &settings).verdict, Verdict::Role { .. }));
}

#[test]
fn who_has_named_the_role_is_told() {
    let rest = Allowance { default_role: Some("basic".parse().unwrap()), ..Allowance::default() };
    let ruled = ruled(vec![("*", allow(&["web"], rest))]);
    for (container, settings, source) in [
        (container("web", &[], &[("IAM_PROFILE", "web")]), &settings(None), Some("environment variable IAM_PROFILE")),
        (asks("web", "no role"), &settings(None), Some("label metadata-proxy.role")),
        (container("web", &[], &[]), &settings(Some("web")), Some("default-role")),
        (container("web", &[], &[]), &ruled, Some("default-role of the rule")),
        (container("web", &[], &[]), &settings(None), None),
    ] {
        assert_eq!(judged(&container, settings).source.as_deref(), source);
    }
}

#[test]
fn no_container_adds_lines_to_what_is_said_of_it() {
    let evil = "x}\nrole  admin\u{1b}[2K\u{9b}\u{202e}{";
    for (label, value) in [
        ("metadata-proxy.role", evil.to_owned()),
        ("metadata-proxy.session-name", format!("{{{evil}}}")),
        ("metadata-proxy.session-tags", format!("a={{label.x:{evil}}}")),
        ("metadata-proxy.upstream-deny", evil.replace('\n', "\r")),
        ("metadata-proxy.x\ny", String::new()),
    ] {
        let decision =
            judged(&container("web", &[("metadata-proxy.role", "web"), (label, &value)], &[]), &settings(None));
        assert_eq!(decision.verdict, Verdict::Refused);
        let said = decision.reasons.concat();
        assert!(!said.contains(|c: char| c.is_control() || c == '\u{202e}'), "{said:?}");
    }
    assert_eq!(printable("caf\u{e9} \"a\" 'b' \\"), "caf\u{e9} \"a\" 'b' \\");
}

#[test]
fn containers_of_a_users_engine_have_roles_by_what_names_the_engine_only() {
    let theirs = |name: &str, role: &str| Container {
        engine: "ci".to_owned(),
        of_user: Some(1000),
        ..container(name, &[("metadata-proxy.role", role)], &[])
    };
    let rule = |engine: Option<&str>, roles: &[&str]| Rule {
        place: "file:1".to_owned(),
        matching: Matching { engine: engine.map(|engine| Glob(engine.to_owned())), ..Matching::default() },
        effect: Effect::Allow(Box::new(Allowance {
            allow: roles.iter().map(|role| role.parse().unwrap()).collect(),
            ..Allowance::default()
        })),
    };
    let with =
        |rules: Vec<Rule>| Settings { rules: Rules { rules, unmatched_allowed: true }, ..settings(Some("basic")) };
    let policy = |allow: &[&str], deny: &[&str]| {
        let parsed = |roles: &[&str]| roles.iter().map(|role| role.parse().unwrap()).collect();
        let policy = EnginePolicy { allow: parsed(allow), deny: parsed(deny) };
        Settings { engines: [("ci".to_owned(), policy)].into(), ..settings(None) }
    };
    let role_of = |container: &Container, settings: &Settings| name(judged(container, settings).verdict);

    // Neither its own label, nor a default, nor a rule for all, nor an exemption by name.
    let refused = judged(&theirs("web", "web"), &settings(Some("basic")));
    assert_eq!(refused.verdict, Verdict::Refused);
    assert!(refused.reasons.join(" ").contains("user 1000's"), "{refused:?}");
    assert_eq!(role_of(&theirs("web", "web"), &with(vec![rule(None, &["*"])])), None);
    let exempt = Settings { exempt: HashSet::from(["agent".to_owned()]), ..settings(None) };
    assert_eq!(judged(&theirs("agent", "web"), &exempt).verdict, Verdict::Refused);
    assert_eq!(judged(&theirs("web", "@instance"), &with(vec![rule(None, &["@instance"])])).verdict, Verdict::Refused);

    assert_eq!(role_of(&theirs("web", "web"), &with(vec![rule(Some("c*"), &["web"])])).as_deref(), Some("web"));
    assert_eq!(role_of(&theirs("web", "admin"), &with(vec![rule(Some("ci"), &["web"])])), None);
    let instance = with(vec![rule(Some("ci"), &["@instance"])]);
    assert_eq!(judged(&theirs("web", "@instance"), &instance).verdict, Verdict::Instance);

    // [[engine]] names it, too, and limits the engines of root as well.
    assert_eq!(role_of(&theirs("web", "web"), &policy(&["w*"], &[])).as_deref(), Some("web"));
    assert_eq!(role_of(&theirs("web", "admin"), &policy(&["w*"], &[])), None);
    assert_eq!(role_of(&theirs("web", "web"), &policy(&["*"], &["web"])), None);
    assert_eq!(role_of(&theirs("web", "web"), &policy(&[], &["admin"])), None);
    let roots = |role: &str| Container { of_user: None, ..theirs("web", role) };
    assert_eq!(role_of(&roots("web"), &policy(&[], &["admin"])).as_deref(), Some("web"));
    assert_eq!(role_of(&roots("admin"), &policy(&[], &["admin"])), None);
    assert_eq!(role_of(&roots("job"), &policy(&["web"], &[])), None);
}
