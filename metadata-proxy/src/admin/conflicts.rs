//! What in a container's environment keeps AWS SDKs from asking the metadata service, or has them take something else
//! first. Names only: values may be secrets.
//!
//! Source: AWS SDKs and Tools Reference Guide, "Credential provider chain" and "IMDS credential provider".

use crate::containers::Container;

const FIRST: &str = "SDKs take it before they ask the metadata service";

/// Each is a variable, and what it does.
const VARIABLES: [(&str, &str); 8] = [
    ("AWS_ACCESS_KEY_ID", FIRST),
    ("AWS_WEB_IDENTITY_TOKEN_FILE", FIRST),
    ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", FIRST),
    ("AWS_CONTAINER_CREDENTIALS_FULL_URI", FIRST),
    ("AWS_PROFILE", "SDKs take what that profile says before they ask the metadata service"),
    ("AWS_EC2_METADATA_DISABLED", "SDKs do not ask the metadata service"),
    ("AWS_EC2_METADATA_V1_DISABLED", "SDKs that cannot get a session token do not ask without one"),
    ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "SDKs ask elsewhere"),
];
const ADDRESSES: [&str; 2] = ["169.254.169.254", "[fd00:ec2::254]"];

/// One line for each.
pub(super) fn of(container: &Container) -> Vec<String> {
    // What the image brings, the process has as well.
    let image = container.from_image.as_ref().map(|image| &image.env);
    let value = |name: &str| container.env.get(name).or_else(|| image?.get(name)).map(String::as_str);
    let mut found: Vec<_> = VARIABLES
        .iter()
        .filter(|(name, _)| value(name).is_some_and(|value| hinders(name, value)) || container.repeats(name))
        .map(|(name, what)| format!("environment variable {name}: {what}"))
        .collect();
    let proxies =
        ["http_proxy", "HTTP_PROXY"].into_iter().find(|name| value(name).is_some_and(|proxy| !proxy.is_empty()));
    let spared = ["no_proxy", "NO_PROXY"].into_iter().filter_map(value).any(spares);
    if let Some(name) = proxies.filter(|_| !spared) {
        found.push(format!(
            "environment variable {name}: some SDKs ask by this proxy; NO_PROXY=169.254.169.254 spares us"
        ));
    }
    found
}

fn hinders(name: &str, value: &str) -> bool {
    match name {
        _ if value.is_empty() => false,
        "AWS_EC2_METADATA_DISABLED" | "AWS_EC2_METADATA_V1_DISABLED" => value.eq_ignore_ascii_case("true"),
        "AWS_EC2_METADATA_SERVICE_ENDPOINT" => !ADDRESSES.iter().any(|address| value.contains(address)),
        _ => true,
    }
}

fn spares(list: &str) -> bool {
    list.split(',').map(str::trim).any(|host| host == "*" || host == ADDRESSES[0] || host == "169.254.0.0/16")
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::{containers::Given, identity::tests::container};

    fn names(own: &[(&str, &str)], image: &[(&str, &str)]) -> Vec<String> {
        let env: HashMap<_, _> = image.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let from_image = Some(Given { env, ..Given::default() });
        let lines = of(&Container { from_image, ..container("web", &[], own) });
        lines.iter().map(|line| line.split([' ', ':']).nth(2).unwrap().to_owned()).collect()
    }

    #[test]
    fn what_hinders_is_named_and_no_value_told() {
        assert!(names(&[("PATH", "/bin"), ("AWS_REGION", "eu-west-1")], &[]).is_empty());
        assert_eq!(names(&[("AWS_ACCESS_KEY_ID", "AKIASECRET")], &[]), ["AWS_ACCESS_KEY_ID"]);
        assert_eq!(names(&[], &[("AWS_PROFILE", "dev")]), ["AWS_PROFILE"]);
        let lines = of(&container("web", &[], &[("AWS_ACCESS_KEY_ID", "AKIASECRET")]));
        assert!(!lines.concat().contains("AKIASECRET"));
        for (name, harmless, hindering) in [
            ("AWS_EC2_METADATA_DISABLED", "false", "TRUE"),
            ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://[fd00:ec2::254]", "http://10.0.0.1"),
            ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "", "/creds"),
            ("HTTP_PROXY", "", "http://proxy:3128"),
        ] {
            assert!(names(&[(name, harmless)], &[]).is_empty(), "{name}={harmless}");
            assert_eq!(names(&[(name, hindering)], &[]), [name]);
        }
        let spared = [("http_proxy", "http://proxy:3128"), ("NO_PROXY", "localhost, 169.254.169.254")];
        assert!(names(&spared, &[]).is_empty());
    }
}
