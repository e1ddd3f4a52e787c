//! Where the daemon's own credentials come from.

use aws_credential_types::credential_feature::AwsCredentialFeature;

/// What the SDK has noted about credentials, the way that it went in its order.
pub(super) fn in_words(noted: Option<&Vec<AwsCredentialFeature>>) -> String {
    let known = noted.into_iter().flatten().filter_map(word).collect::<Vec<_>>();
    if known.is_empty() { "a source that the SDK does not name".to_owned() } else { known.join(", ") }
}

fn word(feature: &AwsCredentialFeature) -> Option<&'static str> {
    use AwsCredentialFeature as From;
    Some(match feature {
        From::CredentialsEnvVars => "the environment (AWS_ACCESS_KEY_ID)",
        From::CredentialsEnvVarsStsWebIdToken => "a web identity token (AWS_WEB_IDENTITY_TOKEN_FILE)",
        From::CredentialsStsAssumeRole => "an assumed role",
        From::CredentialsStsAssumeRoleWebId => "a role assumed by a web identity",
        From::CredentialsProfile => "a profile's keys",
        From::CredentialsProfileSourceProfile => "a profile's source_profile",
        From::CredentialsProfileNamedProvider => "a profile's credential_source",
        From::CredentialsProfileStsWebIdToken => "a profile's web identity token",
        From::CredentialsProfileSso | From::CredentialsSso => "IAM Identity Center (SSO)",
        From::CredentialsProfileLogin | From::CredentialsLogin => "a login session",
        From::CredentialsProfileProcess | From::CredentialsProcess => "a credential_process",
        From::CredentialsHttp => "the container's endpoint (AWS_CONTAINER_CREDENTIALS_*)",
        From::CredentialsImds => "the instance's own role",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_is_told_in_its_order_without_what_says_nothing() {
        let noted = vec![
            AwsCredentialFeature::ResolvedAccountId,
            AwsCredentialFeature::CredentialsProfileSourceProfile,
            AwsCredentialFeature::CredentialsStsAssumeRole,
        ];
        assert_eq!(in_words(Some(&noted)), "a profile's source_profile, an assumed role");
        assert_eq!(in_words(None), "a source that the SDK does not name");
    }
}
