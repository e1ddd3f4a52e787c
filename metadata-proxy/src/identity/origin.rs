//! Whose word a label or a variable is: the starter's, or perhaps only the image's.
//!
//! The engine shows both among the container's own, and `docker commit` and Compose (`build.labels`) write a container's
//! labels into images, so what is equal in both may be anybody's.

use crate::containers::Container;

/// Labels that one program gives to all containers that it starts, by a mark that is another for each of them. An image has
/// them from a build or a commit, and the same values do not tell against that program.
struct Starter {
    mark: &'static str,
    labels: &'static [&'static str],
    /// No image has the mark unless by `docker commit`.
    builds: bool,
}

const STARTERS: [Starter; 2] = [
    // Compose labels images that it builds with the first three, and containers with the hash as well
    // (docker/compose, pkg/compose/build.go and create.go).
    Starter {
        mark: "com.docker.compose.config-hash",
        labels: &["com.docker.compose.project", "com.docker.compose.service", "com.docker.compose.version"],
        builds: true,
    },
    // The ECS agent gives each task an ARN of its own.
    Starter {
        mark: "com.amazonaws.ecs.task-arn",
        labels: &[
            "com.amazonaws.ecs.cluster",
            "com.amazonaws.ecs.container-name",
            "com.amazonaws.ecs.task-definition-family",
            "com.amazonaws.ecs.task-definition-version",
        ],
        builds: false,
    },
];

fn starter(label: &str) -> Option<&'static Starter> {
    STARTERS.iter().find(|starter| starter.labels.contains(&label))
}

/// What the container's starter has surely said.
pub(super) fn label<'a>(container: &'a Container, name: &str) -> Option<&'a str> {
    let own = container.labels.get(name).map(String::as_str);
    let started = || starter(name).is_some_and(|starter| container.labels.contains_key(starter.mark));
    own.or_else(|| image_label(container, name).filter(|_| started()))
}

/// What the image says, and the starter may have said in the same words.
pub(super) fn unclear_label<'a>(container: &'a Container, name: &str) -> Option<&'a str> {
    let built = |starter: &Starter| starter.builds && image_label(container, starter.mark).is_none();
    let clear = label(container, name).is_some() || starter(name).is_some_and(built);
    image_label(container, name).filter(|_| !clear)
}

pub(super) fn image_label<'a>(container: &'a Container, name: &str) -> Option<&'a str> {
    container.from_image.as_ref()?.labels.get(name).map(String::as_str)
}

pub(super) fn image_variable<'a>(container: &'a Container, name: &str) -> Option<&'a str> {
    container.from_image.as_ref()?.env.get(name).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::*;
    use crate::{
        containers::Given,
        credentials::RoleSession,
        identity::{
            Decision, Glob, Settings, Verdict,
            rules::{Allowance, Effect, Matching, Rule, Rules},
            session_tag,
            tests::{allow, container, judged, map, settings},
        },
    };

    const ROLE: (&str, &str) = ("metadata-proxy.role", "web");

    /// A container that asks for a role, of an image with these labels and variables in the same words as its own.
    fn of_image(own: &[(&str, &str)], labels: &[(&str, &str)], env: &[(&str, &str)]) -> Container {
        let own: Vec<_> = own.iter().copied().chain([ROLE]).collect();
        let from_image = Some(Given { labels: map(labels), env: map(env), repeated: Vec::new() });
        Container { from_image, ..container("web", &own, &[]) }
    }

    fn session(decision: Decision) -> RoleSession {
        match decision.verdict {
            Verdict::Role { session, .. } => session,
            _ => panic!("{decision:?}"),
        }
    }

    fn refused(decision: &Decision, word: &str) {
        assert_eq!(decision.verdict, Verdict::Refused, "{decision:?}");
        assert!(decision.reasons.last().unwrap().contains(word), "{decision:?}");
    }

    const ARN: &str = "arn:aws:iam::aws:policy/ReadOnlyAccess";

    #[test]
    fn what_only_takes_away_counts_from_the_image_too() {
        let plain = session(judged(&of_image(&[], &[], &[]), &settings(None)));
        assert_eq!((plain.policy, plain.duration.as_secs()), (None, 3600));
        let restricted = |labels, env| session(judged(&of_image(&[], labels, env), &settings(None)));
        assert_eq!(restricted(&[("metadata-proxy.policy", "{}")], &[]).policy.as_deref(), Some("{}"));
        assert_eq!(restricted(&[], &[("IAM_POLICY", "{}")]).policy.as_deref(), Some("{}"));
        assert_eq!(restricted(&[("metadata-proxy.policy-arns", ARN)], &[]).policy_arns, [ARN]);
        assert_eq!(restricted(&[("metadata-proxy.duration", "15m")], &[]).duration, Duration::from_secs(900));
        // That would be more.
        assert_eq!(restricted(&[("metadata-proxy.duration", "2h")], &[]).duration, Duration::from_secs(3600));
        let strict = judged(&of_image(&[], &[("metadata-proxy.require-imdsv2", "true")], &[]), &settings(None));
        assert!(strict.require_imdsv2);
        let (denies, plain) = (&[("metadata-proxy.upstream-deny", "meta-data/mac")], &[]);
        let [denies, plain] =
            [&denies[..], plain].map(|labels| judged(&of_image(&[], labels, &[]), &settings(None)).view);
        assert_ne!(denies, plain);
    }

    #[test]
    fn what_shows_more_counts_from_the_starter_only() {
        let wide = [("metadata-proxy.allow-user-data", "true"), ("metadata-proxy.upstream-allow", "meta-data/tags/**")];
        let settings = Settings { container_labels: true, ..settings(None) };
        let [of_image, plain] = [&wide[..], &[]].map(|labels| judged(&of_image(&[], labels, &[]), &settings));
        assert_eq!((&of_image.verdict, &of_image.view), (&plain.verdict, &plain.view));
        assert!(!of_image.view.widens() && judged(&container("web", &wide, &[]), &settings).view.widens());
    }

    #[test]
    fn a_wrong_restriction_refuses_the_role_also_from_the_image() {
        for labels in [("metadata-proxy.policy", ""), ("metadata-proxy.duration", "1s"), ("metadata-proxy.polcy", "{}")]
        {
            refused(&judged(&of_image(&[], &[labels], &[]), &settings(None)), labels.0);
        }
    }

    #[test]
    fn policies_of_the_image_do_not_widen_others() {
        let (policy, arns) = (("metadata-proxy.policy", "{}"), ("metadata-proxy.policy-arns", ARN));
        for (own, labels, env) in [
            (&[policy][..], &[arns][..], &[][..]),
            (&[arns], &[policy], &[]),
            (&[arns], &[], &[("IAM_POLICY", "{}")]),
            (&[], &[policy, arns], &[]),
            (&[], &[("metadata-proxy.policy", "{ }")], &[("IAM_POLICY", "{}")]),
        ] {
            refused(&judged(&of_image(own, labels, env), &settings(None)), "what any of several policies allows");
        }
        // The rule's is not joined with it, as with any other.
        let forced = Allowance { policy: Some("{}".into()), ..Allowance::default() };
        let rule = Rule { place: "1".into(), matching: Matching::default(), effect: allow(&["web"], forced) };
        let ruled = Settings { rules: Rules { rules: vec![rule], unmatched_allowed: false }, ..settings(None) };
        refused(&judged(&of_image(&[], &[policy], &[]), &ruled), "so does the rule");
    }

    #[test]
    fn what_is_neither_grant_nor_restriction_refuses_the_role() {
        let labels = [
            ("metadata-proxy.external-id", "x1"),
            ("metadata-proxy.session-name", "job"),
            ("metadata-proxy.session-tags", "team=a"),
            ("metadata-proxy.source-identity", "alice"),
        ];
        for label in labels {
            refused(&judged(&of_image(&[], &[label], &[]), &settings(None)), label.0);
            // Of who wants no role nothing is withheld.
            let mut idle = of_image(&[], &[label], &[]);
            idle.labels.clear();
            let decision = judged(&idle, &settings(None));
            assert_eq!((decision.verdict, decision.require_imdsv2), (Verdict::NoRole, false));
            refused(&judged(&idle, &settings(Some("default"))), label.0);
        }
        for variable in ["IAM_EXTERNAL_ID", "IAM_ROLE_EXTERNALID"] {
            refused(&judged(&of_image(&[], &[], &[(variable, "x1")]), &settings(None)), variable);
            // A label goes before variables, whoever has said these.
            let own = [("metadata-proxy.external-id", "x2")];
            let decision = judged(&of_image(&own, &[], &[(variable, "x1")]), &settings(None));
            assert_eq!(session(decision).external_id.as_deref(), Some("x2"));
        }
    }

    /// Of labels: those of the first rule, whose effect is this; any role is allowed behind it.
    fn before_all(label: &str, effect: Effect) -> Settings {
        let label = BTreeMap::from([(label.to_owned(), serde_json::from_value::<Glob>("x*".into()).unwrap())]);
        let first = Rule { place: "1".into(), matching: Matching { label, ..Matching::default() }, effect };
        let all =
            Rule { place: "2".into(), matching: Matching::default(), effect: allow(&["web"], Allowance::default()) };
        Settings { rules: Rules { rules: vec![first, all], unmatched_allowed: false }, ..settings(None) }
    }

    #[test]
    fn a_rule_that_denies_matches_labels_of_the_image() {
        let settings = before_all("team", Effect::Deny);
        refused(&judged(&of_image(&[], &[("team", "x1")], &[]), &settings), "denies it any role");
        refused(&judged(&of_image(&[("team", "x1")], &[], &[]), &settings), "denies it any role");
        session(judged(&of_image(&[], &[("team", "y")], &[]), &settings));
        // The starter has said something else.
        session(judged(&of_image(&[("team", "y")], &[], &[]), &settings));
    }

    #[test]
    fn a_rule_that_allows_does_not_match_labels_of_the_image_and_is_not_passed_over() {
        let settings = before_all("team", allow(&["basic", "web"], Allowance::default()));
        refused(&judged(&of_image(&[], &[("team", "x1")], &[]), &settings), "the rule at 1 matches in part");
        session(judged(&of_image(&[("team", "x1")], &[], &[]), &settings));
        session(judged(&of_image(&[], &[("team", "y")], &[]), &settings));
    }

    #[test]
    fn a_tag_of_which_nobody_can_tell_who_has_said_it_refuses_the_role() {
        for (template, labels, env) in [
            ("{label.team}", &[("team", "x")][..], &[][..]),
            ("{env.TEAM}", &[], &[("TEAM", "x")]),
            ("{ecs.family}", &[("com.amazonaws.ecs.task-definition-family", "x")], &[]),
        ] {
            let tagged = Settings { session_tags: vec![session_tag("team", template).unwrap()], ..settings(None) };
            refused(&judged(&of_image(&[], labels, env), &tagged), "session tag \"team\": ");
            assert_eq!(session(judged(&of_image(&[], &[], &[]), &tagged)).tags[0].1, "");
        }
    }

    const COMPOSE: [(&str, &str); 2] = [("com.docker.compose.project", "x"), ("com.docker.compose.service", "web")];
    const HASH: (&str, &str) = ("com.docker.compose.config-hash", "0123abcd");
    const ECS: [(&str, &str); 2] =
        [("com.amazonaws.ecs.cluster", "x"), ("com.amazonaws.ecs.task-definition-family", "web")];
    const TASK: (&str, &str) = ("com.amazonaws.ecs.task-arn", "arn:aws:ecs:eu-west-1:123456789012:task/x/0123abcd");

    #[test]
    fn labels_that_an_image_has_of_compose_or_ecs_are_the_containers_when_these_start_it() {
        for (labels, mark) in [(COMPOSE, HASH), (ECS, TASK)] {
            let [(first, _), (second, _)] = labels;
            let started = of_image(&[mark], &labels, &[]);
            assert_eq!((label(&started, first), label(&started, second)), (Some("x"), Some("web")));
            assert_eq!(unclear_label(&started, first), None);
            // Committed with its mark, and started by something else; nobody can tell by what.
            let committed = of_image(&[], &[labels[0], labels[1], mark], &[]);
            assert_eq!((label(&committed, first), unclear_label(&committed, first)), (None, Some("x")));
            // The mark of one tells nothing of the other's.
            let other = if mark == HASH { TASK } else { HASH };
            assert_eq!(label(&of_image(&[other], &labels, &[]), first), None);
        }
        // Compose labels what it builds, so without its mark they are the image's alone.
        let built = of_image(&[], &COMPOSE, &[]);
        assert_eq!((label(&built, COMPOSE[0].0), unclear_label(&built, COMPOSE[0].0)), (None, None));
        // An image cannot have Compose vouch for what that does not always say.
        let greedy =
            of_image(&[HASH], &[("com.docker.compose.x", "y"), ("metadata-proxy.allow-user-data", "true")], &[]);
        assert_eq!(label(&greedy, "com.docker.compose.x"), None);
        assert_eq!(label(&greedy, "metadata-proxy.allow-user-data"), None);
    }

    #[test]
    fn a_project_of_compose_is_denied_and_allowed_as_its_containers_are_started() {
        let of = |project: &str| Matching {
            compose_project: Some(serde_json::from_value::<Glob>(project.into()).unwrap()),
            ..Matching::default()
        };
        let ruled = |effect| {
            let first = Rule { place: "1".into(), matching: of("x"), effect };
            let all = Rule {
                place: "2".into(),
                matching: Matching::default(),
                effect: allow(&["web"], Allowance::default()),
            };
            Settings { rules: Rules { rules: vec![first, all], unmatched_allowed: false }, ..settings(None) }
        };
        let basic = || allow(&["basic"], Allowance::default());
        refused(&judged(&of_image(&[HASH], &COMPOSE, &[]), &ruled(Effect::Deny)), "denies it any role");
        refused(&judged(&of_image(&[], &COMPOSE, &[]), &ruled(Effect::Deny)), "denies it any role");
        refused(&judged(&of_image(&[HASH], &COMPOSE, &[]), &ruled(basic())), "does not allow role");
        refused(&judged(&of_image(&[], &[COMPOSE[0], HASH], &[]), &ruled(basic())), "nobody can tell");
        session(judged(&of_image(&[], &COMPOSE, &[]), &ruled(basic())));
        let tagged = Settings { session_tags: vec![session_tag("a", "{compose.project}").unwrap()], ..settings(None) };
        assert_eq!(session(judged(&of_image(&[HASH], &COMPOSE, &[]), &tagged)).tags[0].1, "x");
        assert_eq!(session(judged(&of_image(&[], &COMPOSE, &[]), &tagged)).tags[0].1, "");
    }
}
