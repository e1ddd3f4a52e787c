//! The documents of a simulated instance, and the listings that follow from them.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};

use super::{HOST_ACCESS_KEY, HOST_ACCESS_KEY_PREFIX, HOST_INSTANCE, HOST_ROLE};

const ACCOUNT: &str = "111122223333";
const MAC: &str = "02:00:5e:00:53:01";

/// Every version prefix the real service has answered to.
const VERSIONS: [&str; 30] = [
    "1.0",
    "2007-01-19",
    "2007-03-01",
    "2007-08-29",
    "2007-10-10",
    "2007-12-15",
    "2008-02-01",
    "2008-09-01",
    "2009-04-04",
    "2011-01-01",
    "2011-05-01",
    "2012-01-12",
    "2014-02-25",
    "2014-11-05",
    "2015-10-20",
    "2016-04-19",
    "2016-06-30",
    "2016-09-02",
    "2018-03-28",
    "2018-08-17",
    "2018-09-24",
    "2019-10-01",
    "2020-10-27",
    "2021-01-03",
    "2021-03-23",
    "2021-07-15",
    "2022-07-09",
    "2022-09-24",
    "2024-04-11",
    "latest",
];

const META_DATA: &[(&str, &str)] = &[
    ("ami-id", "ami-0simulated0000000"),
    ("ami-launch-index", "0"),
    ("ami-manifest-path", "(unknown)"),
    ("block-device-mapping/ami", "/dev/xvda"),
    ("block-device-mapping/root", "/dev/xvda"),
    ("events/maintenance/history", "[]"),
    ("events/maintenance/scheduled", "[]"),
    ("hostname", "ip-10-0-0-10.eu-west-1.compute.internal"),
    ("instance-action", "none"),
    ("instance-id", HOST_INSTANCE),
    ("instance-life-cycle", "on-demand"),
    ("instance-type", "m7i.large"),
    ("local-hostname", "ip-10-0-0-10.eu-west-1.compute.internal"),
    ("local-ipv4", "10.0.0.10"),
    ("mac", MAC),
    ("managed-ssh-keys/active-keys/ec2-user", "ssh-ed25519 SIMULATED-HOST-SECRET"),
    ("managed-ssh-keys/signer-cert", "SIMULATED-HOST-SECRET"),
    ("metrics/vhostmd", "<?xml version=\"1.0\" encoding=\"UTF-8\"?>"),
    ("placement/availability-zone", "eu-west-1a"),
    ("placement/availability-zone-id", "euw1-az1"),
    ("placement/region", "eu-west-1"),
    ("product-codes", "simulated"),
    ("profile", "default-hvm"),
    ("public-hostname", "ec2-192-0-2-10.eu-west-1.compute.amazonaws.com"),
    ("public-ipv4", "192.0.2.10"),
    ("public-keys/0/openssh-key", "ssh-ed25519 SIMULATED host-key"),
    ("reservation-id", "r-0123456789abcdef0"),
    ("security-groups", "default"),
    ("services/domain", "amazonaws.com"),
    ("services/partition", "aws"),
    ("system", "nitro"),
    ("tags/instance/Name", "simulated-host"),
    ("tags/instance/secret-tag", "SIMULATED-HOST-SECRET"),
];

/// Below `network/interfaces/macs/<mac>/`.
const INTERFACE: &[(&str, &str)] = &[
    ("device-number", "0"),
    ("interface-id", "eni-0123456789abcdef0"),
    ("ipv4-associations/192.0.2.10", "10.0.0.10"),
    ("local-hostname", "ip-10-0-0-10.eu-west-1.compute.internal"),
    ("local-ipv4s", "10.0.0.10"),
    ("mac", MAC),
    ("owner-id", ACCOUNT),
    ("security-group-ids", "sg-0123456789abcdef0"),
    ("security-groups", "default"),
    ("subnet-id", "subnet-0123456789abcdef0"),
    ("subnet-ipv4-cidr-block", "10.0.0.0/24"),
    ("vpc-id", "vpc-0123456789abcdef0"),
    ("vpc-ipv4-cidr-block", "10.0.0.0/16"),
];

/// The body for a canonical path, without slashes at its ends: a document, or the listing of a directory.
pub(super) fn find(path: &str, now: Timestamp) -> Option<String> {
    if path.is_empty() {
        return Some(VERSIONS.join("\n"));
    }
    let (version, below) = path.split_once('/').unwrap_or((path, ""));
    if !VERSIONS.contains(&version) {
        return None;
    }
    let documents = documents(now);
    if let Some(document) = documents.get(below) {
        return Some(document.clone());
    }
    list(&documents, below)
}

fn list(documents: &BTreeMap<String, String>, directory: &str) -> Option<String> {
    match directory {
        // The real service lists these two levels in ways of its own.
        "" => return Some("dynamic\nmeta-data\nuser-data".to_owned()),
        "meta-data/public-keys" => return Some("0=simulated-key".to_owned()),
        _ => {}
    }
    let prefix = format!("{directory}/");
    let entries: BTreeSet<String> = documents
        .keys()
        .filter_map(|path| path.strip_prefix(&prefix))
        .map(|rest| match rest.split_once('/') {
            Some((name, _)) => format!("{name}/"),
            None => rest.to_owned(),
        })
        .collect();
    let entries: Vec<String> = entries.into_iter().collect();
    (!entries.is_empty()).then(|| entries.join("\n"))
}

fn documents(now: Timestamp) -> BTreeMap<String, String> {
    let mut documents = BTreeMap::new();
    for (path, document) in META_DATA {
        documents.insert(format!("meta-data/{path}"), (*document).to_owned());
    }
    for (path, document) in INTERFACE {
        documents.insert(format!("meta-data/network/interfaces/macs/{MAC}/{path}"), (*document).to_owned());
    }
    let secret = |number: u32| format!("{HOST_ACCESS_KEY_PREFIX}{number:06}");
    let written = time(now);
    let end = now.saturating_add(SignedDuration::from_hours(6)).unwrap_or(now);
    for (path, document) in [
        ("meta-data/iam/info".to_owned(), info(&written)),
        (format!("meta-data/iam/security-credentials/{HOST_ROLE}"), credentials(HOST_ACCESS_KEY, now, end)),
        ("meta-data/iam-ecs-0123456789abcdef/info".to_owned(), info(&written)),
        (
            "meta-data/iam-ecs-0123456789abcdef/security-credentials/simulated-task-role".to_owned(),
            credentials(&secret(2), now, end),
        ),
        (
            "meta-data/identity-credentials/ec2/info".to_owned(),
            format!(
                "{{\n  \"Code\" : \"Success\",\n  \"LastUpdated\" : \"{written}\",\n  \"AccountId\" : \"{ACCOUNT}\"\n}}"
            ),
        ),
        (
            "meta-data/identity-credentials/ec2/security-credentials/ec2-instance".to_owned(),
            credentials(&secret(3), now, end),
        ),
        ("dynamic/fws/instance-monitoring".to_owned(), "disabled".to_owned()),
        ("dynamic/instance-identity/document".to_owned(), identity(&written)),
        ("dynamic/instance-identity/pkcs7".to_owned(), "SIMULATED-HOST-SIGNATURE-PKCS7".to_owned()),
        ("dynamic/instance-identity/rsa2048".to_owned(), "SIMULATED-HOST-SIGNATURE-RSA2048".to_owned()),
        ("dynamic/instance-identity/signature".to_owned(), "SIMULATED-HOST-SIGNATURE".to_owned()),
        ("user-data".to_owned(), "#!/bin/sh\n# SIMULATED-HOST-SECRET: user data of the host\n".to_owned()),
    ] {
        documents.insert(path, document);
    }
    documents
}

pub(super) fn credentials(access_key: &str, now: Timestamp, end: Timestamp) -> String {
    let (written, expiration) = (time(now), time(end));
    format!(
        "{{\n  \"Code\" : \"Success\",\n  \"LastUpdated\" : \"{written}\",\n  \"Type\" : \"AWS-HMAC\",\n  \
         \"AccessKeyId\" : \"{access_key}\",\n  \"SecretAccessKey\" : \"SIMULATED-HOST-SECRET/must/not/leak/0000\",\n  \
         \"Token\" : \"SIMULATED-HOST-SECRET//must+not+leak==\",\n  \"Expiration\" : \"{expiration}\"\n}}"
    )
}

fn info(written: &str) -> String {
    format!(
        "{{\n  \"Code\" : \"Success\",\n  \"LastUpdated\" : \"{written}\",\n  \
         \"InstanceProfileArn\" : \"arn:aws:iam::{ACCOUNT}:instance-profile/{HOST_ROLE}\",\n  \
         \"InstanceProfileId\" : \"AIPASIMULATEDHOST000\"\n}}"
    )
}

fn identity(written: &str) -> String {
    format!(
        "{{\n  \"accountId\" : \"{ACCOUNT}\",\n  \"architecture\" : \"x86_64\",\n  \
         \"availabilityZone\" : \"eu-west-1a\",\n  \"imageId\" : \"ami-0simulated0000000\",\n  \
         \"instanceId\" : \"{HOST_INSTANCE}\",\n  \"instanceType\" : \"m7i.large\",\n  \
         \"pendingTime\" : \"{written}\",\n  \"privateIp\" : \"10.0.0.10\",\n  \
         \"region\" : \"eu-west-1\",\n  \"version\" : \"2017-09-30\"\n}}"
    )
}

fn time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_list_their_entries_as_the_real_service_does() {
        let find = |path| find(path, Timestamp::UNIX_EPOCH);
        assert_eq!(find("latest/meta-data/iam").as_deref(), Some("info\nsecurity-credentials/"));
        assert_eq!(find("1.0/meta-data/iam/security-credentials").as_deref(), Some(HOST_ROLE));
        assert_eq!(find("latest/dynamic/instance-identity").as_deref(), Some("document\npkcs7\nrsa2048\nsignature"));
        assert_eq!(find("latest").as_deref(), Some("dynamic\nmeta-data\nuser-data"));
        assert_eq!(find("latest/meta-data/network/interfaces/macs"), Some(format!("{MAC}/")));
        assert!(find("").is_some_and(|versions| versions.ends_with("\nlatest")));
        for missing in ["2031-01-01", "latest/meta-data/iam/security-credentials-extended", "latest/meta-data/ami"] {
            assert_eq!(find(missing), None, "{missing}");
        }
    }
}
