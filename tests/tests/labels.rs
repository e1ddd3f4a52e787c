//! What a container's labels change for it over the wire.

use anyhow::Result;
use metadata_proxy_tests::{
    host::{Container, ContainerSpec},
    stage::{Stage, daemon_options, role_arn},
    talk::{Answer, Plan, ask, token, with_token},
};

async fn resident(stage: &Stage, name: &str, labels: &[(&str, &str)]) -> Result<Container> {
    let spec = ContainerSpec::resident(name).label("metadata-proxy.role", &role_arn(name));
    stage.run(labels.iter().fold(spec, |spec, (label, value)| spec.label(label, value))).await
}

/// Status and body.
fn said(answer: &Answer) -> (u16, &str) {
    (answer.status, &answer.body)
}

const ROLES: &str = "/latest/meta-data/iam/security-credentials/";

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_requires_imdsv2_is_answered_with_a_token_only() -> Result<()> {
    let stage = Stage::start().await?;
    let strict = resident(&stage, "strict", &[("metadata-proxy.require-imdsv2", "true")]).await?;
    let other = resident(&stage, "other", &[("metadata-proxy.require-imdsv2", "false")]).await?;
    let paths = ["/", ROLES, "/latest/meta-data/iam/security-credentials/strict", "/latest/meta-data/ami-id", "/no"];
    for answer in ask(&strict, &paths.map(Plan::get)).await? {
        let headers = answer.headers.into_iter().filter(|(name, _)| name != "Date");
        let mut headers: Vec<String> = headers.map(|(name, value)| format!("{name}: {value}")).collect();
        headers.sort_unstable();
        let expected = ["Content-Length: 0", "Content-Type: text/plain", "Server: EC2ws"];
        assert_eq!((answer.status, headers.as_slice(), &*answer.body), (401, &expected.map(str::to_owned)[..], ""));
    }
    assert!(stage.imds.requests().is_empty());
    let token = token(&strict, "60").await?;
    assert_eq!(token.len(), 56);
    assert_eq!(said(&ask(&strict, &[with_token(ROLES, &token)]).await?[0]), (200, "strict"));
    assert_eq!(said(&ask(&other, &[Plan::get(ROLES)]).await?[0]), (200, "other"));
    // A bad token is refused also where none is needed.
    assert_eq!(said(&ask(&other, &[with_token(ROLES, &token)]).await?[0]), (401, ""));
    Ok(())
}

const USER_DATA: &str = "/latest/user-data";
const NAME: &str = "/latest/meta-data/tags/instance/Name";
const SECRET_TAG: &str = "/latest/meta-data/tags/instance/secret-tag";
const MAC: &str = "/latest/meta-data/mac";
const HOST_ROLE: &str = "/latest/meta-data/iam/security-credentials/simulated-host-role";

async fn statuses(container: &Container) -> Result<Vec<u16>> {
    let answers = ask(container, &[USER_DATA, NAME, SECRET_TAG, MAC, HOST_ROLE, ROLES].map(Plan::get)).await?;
    Ok(answers.iter().map(|answer| answer.status).collect())
}

const WISHES: [(&str, &str); 3] = [
    ("metadata-proxy.allow-user-data", "true"),
    ("metadata-proxy.upstream-allow", "meta-data/tags/instance/**"),
    ("metadata-proxy.upstream-deny", "meta-data/mac"),
];

#[tokio::test(flavor = "multi_thread")]
async fn where_the_operator_permits_it_labels_show_and_hide_for_that_container_only() -> Result<()> {
    let stage = Stage::configured(
        daemon_options(),
        "[upstream]\ncontainer-labels = true\ndeny = ['meta-data/tags/instance/secret-tag']\n",
    )
    .await?;
    let (web, other) = tokio::try_join!(resident(&stage, "web", &WISHES), resident(&stage, "other", &[]))?;
    assert_eq!(statuses(&web).await?, [200, 200, 404, 404, 404, 200]);
    assert_eq!(statuses(&other).await?, [404, 404, 404, 200, 404, 200]);
    for (container, entries) in [(&web, ["tags/", "iam/"]), (&other, ["mac", "iam/"])] {
        let answers = ask(container, &["/latest/meta-data/", "/latest/"].map(Plan::get)).await?;
        let listed: Vec<&str> = answers[0].body.lines().collect();
        assert!(entries.iter().all(|entry| listed.contains(entry)), "{}: {listed:?}", container.name());
        assert_eq!(listed.contains(&"tags/"), !listed.contains(&"mac"), "{}: {listed:?}", container.name());
        assert_eq!(answers[1].body.contains("user-data"), container.name() == "web");
    }
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn without_that_a_label_that_shows_more_refuses_the_role_and_one_that_hides_does_not() -> Result<()> {
    let stage = Stage::start().await?;
    let greedy = resident(&stage, "greedy", &WISHES[..1]).await?;
    let modest = resident(&stage, "modest", &WISHES[2..]).await?;
    assert_eq!(statuses(&greedy).await?, [401; 6]);
    assert_eq!(statuses(&modest).await?, [404, 404, 404, 404, 404, 200]);
    let log = stage.daemon.log()?;
    assert!(log.contains("does not permit them (container-labels = true in [upstream])"), "{log}");
    assert_eq!(stage.sts.assume_role_calls(&role_arn("greedy")), 0);
    assert!(stage.imds.requests().is_empty(), "{:#?}", stage.imds.requests());
    Ok(())
}
