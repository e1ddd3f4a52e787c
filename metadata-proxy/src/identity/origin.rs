//! Whose word a label or a variable is: the starter's, or perhaps only the image's.
//!
//! The engine shows both among the container's own, and `docker commit` and Compose (`build.labels`) write a container's
//! labels into images, so what is equal in both may be anybody's.

use crate::containers::Container;

/// What the container's starter has surely said.
pub(super) fn label<'a>(container: &'a Container, name: &str) -> Option<&'a str> {
    container.labels.get(name).map(String::as_str)
}

/// What the image says, and the starter may have said in the same words.
pub(super) fn unclear_label<'a>(container: &'a Container, name: &str) -> Option<&'a str> {
    image_label(container, name).filter(|_| label(container, name).is_none())
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
        let from_image = Some(Given { labels: map(labels), env: map(env) });
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
        refused(&judged(&of_image(&[], &[("team", "x1")], &[]), &settings), "the rule at 1 matches by a label");
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
}
