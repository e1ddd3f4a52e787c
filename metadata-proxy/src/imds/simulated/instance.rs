//! The documents of a private instance in a default VPC, consistent with each other.
//!
//! What only AWS could sign (`dynamic/instance-identity/{pkcs7,rsa2048,signature}`) is not there, and no public address:
//! an instance without one has no such entry either.

use std::collections::BTreeMap;

use super::{BadInstance, Settings};

const ADDRESS: &str = "10.0.0.10";
const MAC: &str = "02:00:00:00:00:01";
/// Of everything that has an id: plainly none of AWS's, and of the right form.
const ID: &str = "00000000000000001";
/// When the instance was started: the same on every machine.
const STARTED: &str = "2026-01-01T00:00:00Z";

pub(super) fn documents(settings: &Settings) -> Result<BTreeMap<String, String>, BadInstance> {
    let facts = Facts::new(settings)?;
    let mut documents = BTreeMap::new();
    for (path, document) in meta_data(&facts) {
        documents.insert(format!("meta-data/{path}"), document);
    }
    for (path, document) in interface(&facts) {
        documents.insert(format!("meta-data/network/interfaces/macs/{MAC}/{path}"), document);
    }
    documents.insert("dynamic/fws/instance-monitoring".to_owned(), "disabled".to_owned());
    documents.insert("dynamic/instance-identity/document".to_owned(), identity(&facts));
    Ok(documents)
}

/// The settings with their defaults.
struct Facts {
    instance_id: String,
    region: String,
    zone: String,
    account: String,
    instance_type: String,
    ami_id: String,
    hostname: String,
}

impl Facts {
    fn new(settings: &Settings) -> Result<Self, BadInstance> {
        let word = |value: &str| value.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.');
        let id = |prefix: &'static str| {
            move |value: &str| value.strip_prefix(prefix).is_some_and(|id| !id.is_empty() && word(id))
        };
        let region = setting("region", &settings.region, "us-east-1", "a region, such as eu-west-1", is_region)?;
        let first_zone = format!("{region}a");
        let in_region = |zone: &str| zone.strip_prefix(&region).is_some_and(|rest| !rest.is_empty() && word(rest));
        let account = |value: &str| value.len() == 12 && value.bytes().all(|byte| byte.is_ascii_digit());
        let of_type = |value: &str| word(value) && value.contains('.');
        let suffix = if region == "us-east-1" { "ec2.internal".into() } else { format!("{region}.compute.internal") };
        Ok(Self {
            instance_id: setting("instance-id", &settings.instance_id, &format!("i-{ID}"), "i-...", id("i-"))?,
            zone: setting("zone", &settings.zone, &first_zone, "a zone of the region, such as eu-west-1a", in_region)?,
            account: setting("account", &settings.account, "123456789012", "12 digits", account)?,
            instance_type: setting("instance-type", &settings.instance_type, "m7i.large", "FAMILY.SIZE", of_type)?,
            ami_id: setting("ami-id", &settings.ami_id, &format!("ami-{ID}"), "ami-...", id("ami-"))?,
            hostname: format!("ip-{}.{suffix}", ADDRESS.replace('.', "-")),
            region,
        })
    }
}

fn setting(
    name: &'static str,
    given: &Option<String>,
    default: &str,
    expected: &'static str,
    is_good: impl Fn(&str) -> bool,
) -> Result<String, BadInstance> {
    let value = given.as_deref().filter(|value| !value.is_empty()).unwrap_or(default).to_owned();
    // Also what keeps quotes out of the JSON.
    if is_good(&value) { Ok(value) } else { Err(BadInstance::Setting { setting: name, value, expected }) }
}

fn meta_data(facts: &Facts) -> Vec<(&'static str, String)> {
    let (partition, domain) = partition(&facts.region);
    let own = |text: &str| text.to_owned();
    vec![
        ("ami-id", own(&facts.ami_id)),
        ("ami-launch-index", own("0")),
        ("ami-manifest-path", own("(unknown)")),
        ("block-device-mapping/ami", own("/dev/xvda")),
        ("block-device-mapping/root", own("/dev/xvda")),
        ("events/maintenance/history", own("[]")),
        ("events/maintenance/scheduled", own("[]")),
        ("hibernation/configured", own("false")),
        ("hostname", own(&facts.hostname)),
        ("instance-action", own("none")),
        ("instance-id", own(&facts.instance_id)),
        ("instance-life-cycle", own("on-demand")),
        ("instance-type", own(&facts.instance_type)),
        ("local-hostname", own(&facts.hostname)),
        ("local-ipv4", own(ADDRESS)),
        ("mac", own(MAC)),
        ("metrics/vhostmd", own("<?xml version=\"1.0\" encoding=\"UTF-8\"?>")),
        ("placement/availability-zone", own(&facts.zone)),
        ("placement/availability-zone-id", zone_id(&facts.region, &facts.zone)),
        ("placement/region", own(&facts.region)),
        ("profile", own("default-hvm")),
        ("reservation-id", format!("r-{ID}")),
        ("security-groups", own("default")),
        ("services/domain", own(domain)),
        ("services/partition", own(partition)),
        ("system", own("nitro")),
    ]
}

/// Below `network/interfaces/macs/<mac>/`.
fn interface(facts: &Facts) -> Vec<(&'static str, String)> {
    let own = |text: &str| text.to_owned();
    vec![
        ("device-number", own("0")),
        ("interface-id", format!("eni-{ID}")),
        ("local-hostname", own(&facts.hostname)),
        ("local-ipv4s", own(ADDRESS)),
        ("mac", own(MAC)),
        ("owner-id", own(&facts.account)),
        ("security-group-ids", format!("sg-{ID}")),
        ("security-groups", own("default")),
        ("subnet-id", format!("subnet-{ID}")),
        ("subnet-ipv4-cidr-block", own("10.0.0.0/24")),
        ("vpc-id", format!("vpc-{ID}")),
        ("vpc-ipv4-cidr-block", own("10.0.0.0/16")),
        ("vpc-ipv4-cidr-blocks", own("10.0.0.0/16")),
    ]
}

/// In the real service's form: sorted, ` : ` between key and value, `null` where there is nothing to say.
fn identity(facts: &Facts) -> String {
    let text = |value: &str| format!("\"{value}\"");
    let null = || "null".to_owned();
    let entries = [
        ("accountId", text(&facts.account)),
        ("architecture", text(architecture(&facts.instance_type))),
        ("availabilityZone", text(&facts.zone)),
        ("billingProducts", null()),
        ("devpayProductCodes", null()),
        ("marketplaceProductCodes", null()),
        ("imageId", text(&facts.ami_id)),
        ("instanceId", text(&facts.instance_id)),
        ("instanceType", text(&facts.instance_type)),
        ("kernelId", null()),
        ("pendingTime", text(STARTED)),
        ("privateIp", text(ADDRESS)),
        ("ramdiskId", null()),
        ("region", text(&facts.region)),
        ("version", text("2017-09-30")),
    ];
    let lines: Vec<String> = entries.iter().map(|(key, value)| format!("  \"{key}\" : {value}")).collect();
    format!("{{\n{}\n}}", lines.join(",\n"))
}

/// `eu-west-1`: at least two words, and a number at the end.
fn is_region(value: &str) -> bool {
    let words: Vec<&str> = value.split('-').collect();
    let is_word = |word: &&str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_lowercase());
    let is_number = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
    words.split_last().is_some_and(|(number, words)| words.len() >= 2 && words.iter().all(is_word) && is_number(number))
}

/// The partition of a region, and the domain of its services.
fn partition(region: &str) -> (&'static str, &'static str) {
    match region.split('-').next().unwrap_or_default() {
        "cn" => ("aws-cn", "amazonaws.com.cn"),
        "eusc" => ("aws-eusc", "amazonaws.eu"),
        _ if region.starts_with("us-gov-") => ("aws-us-gov", "amazonaws.com"),
        _ if region.starts_with("us-isob-") => ("aws-iso-b", "sc2s.sgov.gov"),
        _ if region.starts_with("us-iso-") => ("aws-iso", "c2s.ic.gov"),
        _ => ("aws", "amazonaws.com"),
    }
}

/// `euw1-az1` for `eu-west-1a`. Which zone has which id differs by account; here the first has the first.
fn zone_id(region: &str, zone: &str) -> String {
    let mut words = region.split('-');
    let begin = words.next().unwrap_or_default();
    let short = words.map(|word| match word {
        "northeast" => "ne",
        "northwest" => "nw",
        "southeast" => "se",
        "southwest" => "sw",
        number if number.starts_with(|c: char| c.is_ascii_digit()) => number,
        _ => word.get(..1).unwrap_or_default(),
    });
    let letter = zone.bytes().last().filter(u8::is_ascii_lowercase).unwrap_or(b'a');
    format!("{begin}{}-az{}", short.collect::<String>(), letter - b'a' + 1)
}

/// AWS's own processors have a `g` behind the generation: `m7g`, `c6gn`. Before that there was `a1`.
fn architecture(instance_type: &str) -> &'static str {
    let family = instance_type.split('.').next().unwrap_or_default();
    let attributes = family.trim_start_matches(|c: char| !c.is_ascii_digit());
    if family == "a1" || attributes.contains('g') { "arm64" } else { "x86_64" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents_of(text: &str) -> BTreeMap<String, String> {
        documents(&toml::from_str(text).unwrap()).unwrap()
    }

    #[test]
    fn defaults_are_the_same_everywhere() {
        let documents = documents_of("");
        for (path, expected) in [
            ("meta-data/instance-id", "i-00000000000000001"),
            ("meta-data/placement/region", "us-east-1"),
            ("meta-data/placement/availability-zone", "us-east-1a"),
            ("meta-data/hostname", "ip-10-0-0-10.ec2.internal"),
            ("meta-data/services/domain", "amazonaws.com"),
        ] {
            assert_eq!(documents[path], expected, "{path}");
        }
        assert_eq!(documents, documents_of("instance-id = ''"));
    }

    #[test]
    fn the_identity_document_says_what_the_tree_says() {
        let documents = documents_of(
            "instance-id = 'i-0abc'\nregion = 'cn-north-1'\nzone = 'cn-north-1b'\naccount = '210987654321'\n\
             instance-type = 't4g.micro'\nami-id = 'ami-0def'\n",
        );
        let identity = &documents["dynamic/instance-identity/document"];
        let interface = format!("meta-data/network/interfaces/macs/{}", documents["meta-data/mac"]);
        for (key, path) in [
            ("accountId", format!("{interface}/owner-id")),
            ("availabilityZone", "meta-data/placement/availability-zone".into()),
            ("imageId", "meta-data/ami-id".into()),
            ("instanceId", "meta-data/instance-id".into()),
            ("instanceType", "meta-data/instance-type".into()),
            ("privateIp", "meta-data/local-ipv4".into()),
            ("region", "meta-data/placement/region".into()),
        ] {
            let line = format!("  \"{key}\" : \"{}\"", documents[&path]);
            assert!(identity.lines().any(|known| known.trim_end_matches(',') == line), "{line} in {identity}");
        }
        assert!(identity.contains("\"architecture\" : \"arm64\""));
        assert_eq!(documents["meta-data/hostname"], "ip-10-0-0-10.cn-north-1.compute.internal");
        assert_eq!(documents["meta-data/services/partition"], "aws-cn");
        assert_eq!(documents["meta-data/placement/availability-zone-id"], "cnn1-az2");
    }

    #[test]
    fn zones_have_the_ids_that_aws_gives_them() {
        for (region, zone, id) in [
            ("us-east-1", "us-east-1a", "use1-az1"),
            ("ap-southeast-2", "ap-southeast-2c", "apse2-az3"),
            ("ap-northeast-1", "ap-northeast-1a", "apne1-az1"),
            ("us-gov-west-1", "us-gov-west-1b", "usgw1-az2"),
            ("eu-central-1", "eu-central-1a", "euc1-az1"),
        ] {
            assert_eq!(zone_id(region, zone), id);
        }
    }

    #[test]
    fn partitions_follow_from_the_region() {
        for (region, expected) in [
            ("eu-west-1", "aws"),
            ("us-gov-east-1", "aws-us-gov"),
            ("us-iso-east-1", "aws-iso"),
            ("us-isob-east-1", "aws-iso-b"),
            ("eusc-de-east-1", "aws-eusc"),
        ] {
            assert_eq!(partition(region).0, expected, "{region}");
        }
    }

    #[test]
    fn architectures_follow_from_the_instance_type() {
        for (instance_type, expected) in
            [("m7i.large", "x86_64"), ("m7g.large", "arm64"), ("g4dn.xlarge", "x86_64"), ("c6gn.large", "arm64")]
        {
            assert_eq!(architecture(instance_type), expected, "{instance_type}");
        }
    }

    #[test]
    fn bad_settings_say_what_is_expected() {
        for (text, expected) in [
            ("instance-id = 'laptop'", "instance-id = \"laptop\": expected i-..."),
            ("region = 'Ireland'", "region = \"Ireland\": expected a region, such as eu-west-1"),
            ("zone = 'eu-west-1a'", "zone = \"eu-west-1a\": expected a zone of the region"),
            ("account = '12345'", "account = \"12345\": expected 12 digits"),
            ("instance-type = 'big'", "expected FAMILY.SIZE"),
            ("ami-id = 'ami-\"'", "expected ami-..."),
        ] {
            let error = documents(&toml::from_str(text).unwrap()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
