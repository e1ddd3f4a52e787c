//! What of the real service may be shown to containers. Everything that is not listed here is denied, so that an entry
//! which a later version of the service adds is not passed on before somebody has looked at it.
//!
//! Paths are those below the version, which makes no difference: old versions hold the same secrets.

use super::glob::{GlobError, Pattern};

/// Holds credentials of the host, or roles of other containers. Nobody can opt in.
const NEVER: &[&str] = &[
    "meta-data/iam/**", // the container's own tree is not from upstream
    "meta-data/iam-ecs-*/**",
    "meta-data/identity-credentials/**",
    "meta-data/managed-ssh-keys/**",
];

/// Reveals the host or lets a container speak in its name; shown where the operator says so.
const OPTIONAL: &[&str] = &[
    USER_DATA,
    "dynamic/instance-identity/pkcs7",
    "dynamic/instance-identity/rsa2048",
    "dynamic/instance-identity/signature",
    "meta-data/ami-manifest-path",
    "meta-data/block-device-mapping/**",
    "meta-data/elastic-*/**",
    "meta-data/product-codes",
    "meta-data/public-keys/**",
    "meta-data/tags/instance/**",
];

const USER_DATA: &str = "user-data";

const ALLOWED: &[&str] = &[
    "dynamic/fws/**",
    "dynamic/instance-identity/document",
    "meta-data/ami-id",
    "meta-data/ami-launch-index",
    "meta-data/ancestor-ami-ids",
    "meta-data/autoscaling/target-lifecycle-state",
    "meta-data/events/**",
    "meta-data/hibernation/**",
    "meta-data/hostname",
    "meta-data/instance-action",
    "meta-data/instance-id",
    "meta-data/instance-life-cycle",
    "meta-data/instance-type",
    "meta-data/ipv6",
    "meta-data/kernel-id",
    "meta-data/local-hostname",
    "meta-data/local-ipv4",
    "meta-data/mac",
    "meta-data/metrics/**",
    "meta-data/network/**",
    "meta-data/placement/**",
    "meta-data/profile",
    "meta-data/public-hostname",
    "meta-data/public-ipv4",
    "meta-data/ramdisk-id",
    "meta-data/reservation-id",
    "meta-data/security-groups",
    "meta-data/services/**",
    "meta-data/spot/instance-action",
    "meta-data/spot/termination-time",
    "meta-data/system",
];

/// The directories at the top, one of which each pattern has to begin with.
const TOP: &[&str] = &["dynamic/**", "meta-data/**", "user-data"];

/// Why the operator's part of the policy is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PolicyError {
    #[error("upstream.{list}: `{pattern}` is no path pattern: {reason}")]
    Glob { list: &'static str, pattern: String, reason: GlobError },
    #[error("upstream.allow: `{pattern}` can not be allowed: it holds credentials of the host")]
    Never { pattern: String },
    #[error(
        "upstream.allow: `{pattern}` matches nothing that can be allowed; these can: {}",
        OPTIONAL.join(", ")
    )]
    NothingToAllow { pattern: String },
    #[error(
        "upstream.deny: `{pattern}` matches nothing: paths begin with `meta-data/` or `dynamic/`, or are `user-data`"
    )]
    NothingToDeny { pattern: String },
}

/// What becomes of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Not shown, and absent from its parent's listing.
    Denied,
    /// Passed on as it is.
    Open,
    /// A directory, not all of which may be seen: passed on, and its listing filtered.
    Filtered,
}

/// What somebody shows of what is hidden by default, and hides of what is shown: the operator to all containers, or a
/// container to itself. What anybody hides is hidden.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct View {
    opted_in: Vec<Pattern>,
    denied: Vec<Pattern>,
}

/// Who has no wishes.
pub(crate) static PLAIN: View = View { opted_in: Vec::new(), denied: Vec::new() };

impl View {
    /// Path patterns in `allow` opt in to what is denied by default, `user_data` to the user data; `deny` takes away, and
    /// wins.
    pub(crate) fn new(allow: &[String], deny: &[String], user_data: bool) -> Result<Self, PolicyError> {
        let mut view = Self::default();
        if user_data {
            view.opted_in.push(Pattern::known(USER_DATA));
        }
        for text in allow {
            let pattern = of_operator("allow", text, text)?;
            check_allow(&pattern, text)?;
            view.opted_in.push(pattern);
        }
        let top: Vec<_> = known(TOP);
        for text in deny {
            // Without case, like the paths that are compared with it.
            let pattern = of_operator("deny", text, &text.to_ascii_lowercase())?;
            if !top.iter().any(|top| top.overlaps(&pattern)) {
                let pattern = text.clone();
                return Err(PolicyError::NothingToDeny { pattern });
            }
            view.denied.push(pattern);
        }
        Ok(view)
    }

    /// Nothing at all.
    pub(crate) fn closed() -> Self {
        Self { opted_in: Vec::new(), denied: vec![Pattern::everything()] }
    }

    /// Whether it hides a path below the version, in whatever case that is written.
    pub(super) fn hides(&self, path: &[&str]) -> bool {
        let lowered: Vec<_> = path.iter().map(|name| name.to_ascii_lowercase()).collect();
        any_covers(&self.denied, &lowered.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Whether it shows more than the default does.
    pub(crate) fn widens(&self) -> bool {
        !self.opted_in.is_empty()
    }
}

/// The rules of this program together with those of the operator.
#[derive(Debug)]
pub(crate) struct Policy {
    never: Vec<Pattern>,
    allowed: Vec<Pattern>,
    optional: Vec<Pattern>,
    operator: View,
}

impl Policy {
    pub(crate) fn new(operator: View) -> Self {
        Self { never: known(NEVER), allowed: known(ALLOWED), optional: known(OPTIONAL), operator }
    }

    /// Decides on a path below the version, in canonical segments, for somebody with wishes of its own.
    ///
    /// `never` is a second lock: the lists of what can be shown do not hold any of it either.
    pub(super) fn access(&self, path: &[&str], own: &View) -> Access {
        let views = [&self.operator, own];
        // Upstream might be less exact about case than the real service. What is denied is denied in every spelling.
        let lowered: Vec<_> = path.iter().map(|name| name.to_ascii_lowercase()).collect();
        let lowered: Vec<_> = lowered.iter().map(String::as_str).collect();
        if any_covers(&self.never, &lowered) || views.iter().any(|view| view.hides(path)) {
            return Access::Denied;
        }
        let opted_in = any_covers(&self.optional, path) && views.iter().any(|view| any_covers(&view.opted_in, path));
        if any_covers(&self.allowed, path) || opted_in {
            let partly_denied = views.iter().any(|view| any_below(&view.denied, &lowered));
            return if partly_denied { Access::Filtered } else { Access::Open };
        }
        let leads_to = |patterns: &[_]| any_covers(patterns, path) || any_below(patterns, path);
        let leads_to_opted_in = leads_to(&self.optional) && views.iter().any(|view| leads_to(&view.opted_in));
        if any_below(&self.allowed, path) || leads_to_opted_in {
            return Access::Filtered;
        }
        Access::Denied
    }
}

fn known(texts: &[&str]) -> Vec<Pattern> {
    texts.iter().copied().map(Pattern::known).collect()
}

fn check_allow(pattern: &Pattern, text: &str) -> Result<(), PolicyError> {
    if any_covers(&known(NEVER), &pattern.segments()) {
        return Err(PolicyError::Never { pattern: text.to_owned() });
    }
    if !known(OPTIONAL).iter().chain(&known(ALLOWED)).any(|known| known.overlaps(pattern)) {
        return Err(PolicyError::NothingToAllow { pattern: text.to_owned() });
    }
    Ok(())
}

fn of_operator(list: &'static str, text: &str, spelling: &str) -> Result<Pattern, PolicyError> {
    Pattern::of_operator(spelling).map_err(|reason| PolicyError::Glob { list, pattern: text.to_owned(), reason })
}

fn any_covers(patterns: &[Pattern], path: &[&str]) -> bool {
    patterns.iter().any(|pattern| pattern.covers(path))
}

fn any_below(patterns: &[Pattern], path: &[&str]) -> bool {
    patterns.iter().any(|pattern| pattern.is_below(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(allow: &[&str], deny: &[&str]) -> Result<Policy, PolicyError> {
        let owned = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
        View::new(&owned(allow), &owned(deny), false).map(Policy::new)
    }

    fn access(policy: &Policy, path: &str) -> Access {
        let segments: Vec<_> = path.split('/').filter(|name| !name.is_empty()).collect();
        policy.access(&segments, &PLAIN)
    }

    #[track_caller]
    fn assert_access(policy: &Policy, expected: Access, paths: &[&str]) {
        for path in paths {
            assert_eq!(access(policy, path), expected, "{path}");
        }
    }

    const SECRETS: &[&str] = &[
        "meta-data/iam",
        "meta-data/iam/info",
        "meta-data/iam/security-credentials/host",
        "meta-data/IAM/security-credentials/host",
        "meta-data/iam-ecs-agent/security-credentials/x",
        "meta-data/identity-credentials/ec2/security-credentials/ec2-instance",
        "meta-data/Identity-Credentials/ec2/info",
        "meta-data/managed-ssh-keys/signer-cert",
    ];

    #[test]
    fn defaults_are_those_of_the_reference() {
        let policy = policy(&[], &[]).unwrap();
        assert_access(&policy, Access::Denied, SECRETS);
        assert_access(
            &policy,
            Access::Denied,
            &[
                "user-data",
                "dynamic/instance-identity/pkcs7",
                "dynamic/instance-identity/signature",
                "dynamic/instance-identity/rsa2048",
                "meta-data/public-keys",
                "meta-data/public-keys/0/openssh-key",
                "meta-data/tags",
                "meta-data/tags/instance/Name",
                "meta-data/block-device-mapping/ami",
                "meta-data/ami-manifest-path",
                "meta-data/product-codes",
                "meta-data/elastic-gpus/associations/x",
                "meta-data/elastic-inference",
                "meta-data/something-new",
                "meta-data/ami-id/below",
                "meta-data/AMI-ID",
                "dynamic/something-new",
                "something-new",
                "api",
            ],
        );
        assert_access(
            &policy,
            Access::Open,
            &[
                "meta-data/ami-id",
                "meta-data/instance-life-cycle",
                "meta-data/placement/availability-zone",
                "meta-data/network/interfaces/macs/02:29:96:8f:6a:2d/vpc-id",
                "meta-data/events/recommendations/rebalance",
                "meta-data/spot/instance-action",
                "dynamic/instance-identity/document",
                "dynamic/fws/instance-monitoring",
            ],
        );
        assert_access(
            &policy,
            Access::Filtered,
            &["", "meta-data", "dynamic", "dynamic/instance-identity", "meta-data/spot"],
        );
    }

    #[test]
    fn opting_in_shows_entries_and_the_way_to_them() {
        let policy = policy(&["meta-data/tags/instance/Name", "meta-data/public-keys"], &[]).unwrap();
        assert_access(&policy, Access::Filtered, &["meta-data/tags", "meta-data/tags/instance"]);
        assert_access(&policy, Access::Open, &["meta-data/tags/instance/Name"]);
        assert_access(&policy, Access::Open, &["meta-data/public-keys/0/openssh-key"]);
        assert_access(&policy, Access::Denied, &["meta-data/tags/instance/Other", "user-data"]);
    }

    #[test]
    fn user_data_is_a_switch_of_its_own() {
        let policy = Policy::new(View::new(&[], &[], true).unwrap());
        assert_access(&policy, Access::Open, &["user-data"]);
        assert_access(&policy, Access::Denied, &["meta-data/tags", "user-data/x"]);
    }

    #[test]
    fn credentials_and_the_unknown_stay_denied_whatever_is_allowed() {
        let policy = policy(&["**", "meta-data/**", "meta-data/i*", "dynamic"], &[]).unwrap();
        assert_access(&policy, Access::Denied, SECRETS);
        assert_access(&policy, Access::Denied, &["meta-data/something-new", "something-new"]);
        assert_access(&policy, Access::Open, &["meta-data/product-codes"]);
    }

    #[test]
    fn nothing_that_can_be_shown_holds_credentials() {
        for shown in OPTIONAL.iter().chain(ALLOWED).copied().map(Pattern::known) {
            for never in NEVER.iter().copied().map(Pattern::known) {
                assert!(!shown.overlaps(&never), "{shown:?} {never:?}");
            }
        }
    }

    #[test]
    fn denying_wins_and_has_no_case() {
        let policy = policy(
            &["meta-data/tags"],
            &["meta-data/tags/instance/Secret*", "meta-data/placement/region", "meta-data/spot"],
        )
        .unwrap();
        assert_access(
            &policy,
            Access::Denied,
            &[
                "meta-data/tags/instance/SecretKey",
                "meta-data/tags/instance/secretkey",
                "meta-data/placement/REGION",
                "meta-data/spot",
                "meta-data/spot/instance-action",
            ],
        );
        assert_access(&policy, Access::Filtered, &["meta-data/placement", "meta-data/tags/instance"]);
        assert_access(&policy, Access::Open, &["meta-data/placement/group-name"]);
    }

    #[test]
    fn a_container_opts_in_for_itself_and_never_beyond_the_operators_denial() {
        let policy = policy(&[], &["meta-data/tags/instance/secret"]).unwrap();
        let own = View::new(&["meta-data/tags".into()], &["meta-data/placement".into()], true).unwrap();
        let access = |path: &str| policy.access(&path.split('/').collect::<Vec<_>>(), &own);
        for (path, expected) in [
            ("user-data", Access::Open),
            ("meta-data/tags/instance/Name", Access::Open),
            ("meta-data/tags/instance", Access::Filtered),
            ("meta-data/tags/instance/secret", Access::Denied),
            ("meta-data/placement/region", Access::Denied),
            ("meta-data/public-keys", Access::Denied),
            ("meta-data/iam/info", Access::Denied),
        ] {
            assert_eq!(access(path), expected, "{path}");
        }
        assert!(own.widens() && !View::new(&[], &["meta-data/mac".into()], false).unwrap().widens());
        for path in [&[][..], &["meta-data"], &["meta-data", "mac"], &["dynamic"]] {
            assert_eq!(policy.access(path, &View::closed()), Access::Denied, "{path:?}");
        }
    }

    #[test]
    fn allowing_what_can_not_be_allowed_is_an_error_that_says_so() {
        for (pattern, message) in [
            ("meta-data/iam", "holds credentials of the host"),
            ("meta-data/iam/info", "holds credentials of the host"),
            ("meta-data/iam-ecs-*/**", "holds credentials of the host"),
            ("meta-data/identity-credentials/**", "holds credentials of the host"),
            ("meta-data/managed-ssh-keys/", "holds credentials of the host"),
            ("meta-data/something-new", "matches nothing that can be allowed"),
            ("tags/instance", "matches nothing that can be allowed"),
            ("/meta-data/tags", "is no path pattern: it begins with `/`"),
        ] {
            let error = policy(&[pattern], &[]).unwrap_err().to_string();
            assert!(error.starts_with(&format!("upstream.allow: `{pattern}`")), "{error}");
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn denying_nothing_is_an_error() {
        let error = policy(&[], &["placement/region"]).unwrap_err().to_string();
        assert!(error.starts_with("upstream.deny: `placement/region` matches nothing"), "{error}");
        let error = policy(&[], &["meta-data/**/x"]).unwrap_err().to_string();
        assert!(error.starts_with("upstream.deny: `meta-data/**/x` is no path pattern"), "{error}");
    }
}
