//! Which role a container gets by what it was given, and what STS is asked for it.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bollard::query_parameters::RemoveImageOptionsBuilder;
use metadata_proxy_tests::{
    host::{Container, ContainerSpec, TestHost, program},
    stage::{Stage, daemon_options, image_with_a_role, of_image, role_arn},
};

const ROLE_LABEL: &str = "metadata-proxy.role";
const ROLE_LIST: &str = "http://169.254.169.254/latest/meta-data/iam/security-credentials/";

fn idle(name: &str) -> ContainerSpec {
    ContainerSpec::resident(name)
}

/// Status and body of the role list, once it is something other than "not now".
async fn role_list(container: &Container) -> Result<(u16, String)> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let answer = role_list_now(container).await?;
        if answer.0 != 503 || Instant::now() > deadline {
            return Ok(answer);
        }
    }
}

async fn role_list_now(container: &Container) -> Result<(u16, String)> {
    let curl = ["/usr/bin/curl", "-sS", "--max-time", "20", "-w", "\n%{http_code}", ROLE_LIST];
    let output = container.exec(curl).await?.success()?;
    let (body, status) = output.rsplit_once('\n').context("no status")?;
    Ok((status.parse()?, body.to_owned()))
}

async fn assert_role(container: &Container, role: &str) -> Result<()> {
    let answer = role_list(container).await?;
    ensure!(answer == (200, role.to_owned()), "{}: {answer:?} instead of {role}", container.name());
    Ok(())
}

/// What is gone cannot be asked what it had brought.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_whose_image_is_gone_gets_no_role_and_neither_the_default() -> Result<()> {
    let host = TestHost::start().await?;
    let image = image_with_a_role(&host, "mp/gone", "admin").await?;
    let orphan = host.run(of_image(&image, "orphan")).await?;
    let labelled = host.run(of_image(&image, "labelled").label(ROLE_LABEL, &role_arn("web"))).await?;
    // The engine removes no image of a running container.
    for container in [&orphan, &labelled] {
        container.stop().await?;
    }
    let force = RemoveImageOptionsBuilder::new().force(true).build();
    host.docker().remove_image(&image, Some(force), None).await.context("remove the image")?;
    for container in [&orphan, &labelled] {
        container.start().await?;
    }
    let stage = Stage::on(host, daemon_options().arg("--default-role").arg(role_arn("default"))).await?;
    for container in [&orphan, &labelled] {
        let (status, body) = role_list(container).await?;
        ensure!(status == 404, "{}: {status} {body}", container.name());
    }
    let log = stage.daemon.log()?;
    ensure!(log.matches("cannot be inspected, so nobody can tell").count() == 2, "{log}");
    ensure!(stage.sts.calls().iter().all(|call| call.action != "AssumeRole"), "STS was asked");
    // Others get theirs.
    let other = stage.run(idle("other")).await?;
    assert_role(&other, "default").await?;
    stage.assert_no_leak()
}

fn explain(stage: &Stage, name: &str) -> Result<String> {
    let program = program()?;
    let output = stage.command(program).args(["explain", name]).output()?;
    Ok(String::from_utf8(output.stdout)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_does_not_give_itself_a_role_unless_it_is_trusted() -> Result<()> {
    let options = || daemon_options().arg("--default-role").arg(role_arn("default"));
    let mut stage = Stage::start_with(options()).await?;
    let image = image_with_a_role(&stage, "mp/greedy", "admin").await?;
    let greedy = stage.run(of_image(&image, "greedy")).await?;
    assert_role(&greedy, "default").await?;
    let explained = explain(&stage, "greedy")?;
    for source in [format!("label {ROLE_LABEL}"), "environment variable IAM_ROLE".to_owned()] {
        ensure!(explained.contains(&format!("looked at    {source}: from the image, does not count")), "{explained}");
    }
    // What the starter says counts, also over what the image says.
    let labelled = stage.run(of_image(&image, "labelled").label(ROLE_LABEL, &role_arn("web"))).await?;
    assert_role(&labelled, "web").await?;
    let by_variable = stage.run(of_image(&image, "by-variable").env("IAM_ROLE", &role_arn("job"))).await?;
    assert_role(&by_variable, "job").await?;
    ensure!(stage.sts.assume_role_calls(&role_arn("admin")) == 0, "the image's role was assumed");

    stage.replace_daemon(options().env("METADATA_PROXY_TRUST_IMAGE_METADATA", "true")).await?;
    assert_role(&greedy, "admin").await?;
    assert_role(&labelled, "web").await?;
    stage.replace_daemon(options().arg("--trust-image-metadata")).await?;
    assert_role(&greedy, "admin").await?;
    let file = stage.directory().join("trust.toml");
    std::fs::write(&file, "trust-image-metadata = true\n")?;
    stage.replace_daemon(options().arg("--config").arg(file.display().to_string())).await?;
    assert_role(&greedy, "admin").await?;
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_variable_given_twice_names_no_role() -> Result<()> {
    let stage = Stage::start_with(daemon_options().arg("--default-role").arg(role_arn("default"))).await?;
    let twice = stage.run(idle("twice").env("IAM_ROLE", &role_arn("one")).env("IAM_ROLE", &role_arn("two"))).await?;
    let (status, body) = role_list(&twice).await?;
    ensure!(status == 404, "{status} {body}");
    ensure!(stage.sts.calls().iter().all(|call| call.action != "AssumeRole"), "STS was asked");
    let explained = explain(&stage, "twice")?;
    ensure!(explained.contains("environment variable IAM_ROLE is there more than once"), "{explained}");
    stage.assert_no_leak()
}

/// What STS was asked for in the one AssumeRole of a role.
async fn asked(stage: &Stage, arn: &str) -> Result<BTreeMap<String, String>> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let calls = stage.sts.calls();
        let mut calls = calls.iter().filter(|call| call.parameters.get("RoleArn").is_some_and(|role| role == arn));
        if let Some(call) = calls.next() {
            ensure!(calls.next().is_none(), "{arn} was assumed more than once");
            return Ok(call.parameters.clone());
        }
        ensure!(Instant::now() < deadline, "{arn} was not assumed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn short_names_are_roles_of_the_daemons_account_or_of_the_base() -> Result<()> {
    let mut stage = Stage::start().await?;
    // The account of the daemon's own keys.
    for (name, role, arn) in [
        ("plain", "plain", "arn:aws:iam::111122223333:role/plain"),
        ("path", "team/with-path", "arn:aws:iam::111122223333:role/team/with-path"),
        ("other", "other@210987654321", "arn:aws:iam::210987654321:role/other"),
    ] {
        let container = stage.run(idle(name).label(ROLE_LABEL, role)).await?;
        assert_role(&container, arn.rsplit('/').next().unwrap_or_default()).await?;
        asked(&stage, arn).await?;
    }
    let base = daemon_options().arg("--role-base").arg("arn:aws:iam::123456789012:role/containers/");
    stage.replace_daemon(base.arg("--default-role").arg("team/default")).await?;
    asked(&stage, "arn:aws:iam::123456789012:role/containers/plain").await?;
    asked(&stage, "arn:aws:iam::210987654321:role/containers/other").await?;
    let nameless = stage.run(idle("nameless")).await?;
    assert_role(&nameless, "default").await?;
    asked(&stage, "arn:aws:iam::123456789012:role/containers/team/default").await?;
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_name_is_not_available_until_the_account_is_known_and_then_by_itself() -> Result<()> {
    let mut stage = Stage::start().await?;
    stage.sts.stop_listening()?;
    stage.replace_daemon(daemon_options()).await?;
    let short = stage.run(idle("short").label(ROLE_LABEL, "web")).await?;
    let answer = role_list_now(&short).await?;
    ensure!(answer == (503, String::new()), "{answer:?}");
    stage.sts.listen_again()?;
    let deadline = Instant::now() + Duration::from_secs(20);
    while role_list_now(&short).await?.0 == 503 {
        ensure!(Instant::now() < deadline, "the account does not become known");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_role(&short, "web").await?;
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn options_of_a_container_reach_sts() -> Result<()> {
    let stage =
        Stage::start_with(daemon_options().env("METADATA_PROXY_SESSION_NAME", "{container.name}@{host}")).await?;
    let policy = r#"{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"s3:Get*","Resource":"*"}]}"#;
    let spec = idle("shop_web")
        .label(ROLE_LABEL, &role_arn("web"))
        .label("com.docker.compose.project", "shop")
        .label("metadata-proxy.policy-arns", "arn:aws:iam::aws:policy/ReadOnlyAccess")
        .label("metadata-proxy.duration", "15m")
        .label("metadata-proxy.session-name", "{compose.project}.{container.id:12}")
        .label("metadata-proxy.session-tags", "project={compose.project}, image={image}")
        .label("metadata-proxy.source-identity", "alice")
        .env("IAM_EXTERNAL_ID", "external:1")
        .env("IAM_POLICY", policy);
    let web = stage.run(spec).await?;
    assert_role(&web, "web").await?;
    let asked_for = asked(&stage, &role_arn("web")).await?;
    let id = &web.id()[..12];
    for (parameter, value) in [
        ("ExternalId", "external:1"),
        ("Policy", policy),
        ("PolicyArns.member.1.arn", "arn:aws:iam::aws:policy/ReadOnlyAccess"),
        ("DurationSeconds", "900"),
        ("RoleSessionName", &format!("shop.{id}")),
        ("Tags.member.1.Key", "project"),
        ("Tags.member.1.Value", "shop"),
        ("Tags.member.2.Value", "mp/host"),
        ("SourceIdentity", "alice"),
    ] {
        ensure!(asked_for.get(parameter).is_some_and(|asked| asked == value), "{parameter}: {asked_for:#?}");
    }
    // One that gives no session name has the operator's.
    stage.run(idle("job").label(ROLE_LABEL, &role_arn("job"))).await?;
    let asked_for = asked(&stage, &role_arn("job")).await?;
    ensure!(asked_for["RoleSessionName"].starts_with("job@"), "{asked_for:#?}");
    ensure!(!asked_for.contains_key("Policy") && !asked_for.contains_key("ExternalId"), "{asked_for:#?}");
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_option_refuses_the_role_before_sts_is_asked() -> Result<()> {
    let mut stage = Stage::start_with(daemon_options().arg("--default-role").arg(role_arn("default"))).await?;
    for (at, (option, value, rule)) in [
        ("external-id", "x", "2 to 1224"),
        ("policy", "{", "JSON object"),
        ("policy-arns", "ReadOnlyAccess", "arn:PARTITION:iam::ACCOUNT:policy/NAME"),
        ("duration", "60", "900 to 43200"),
        ("session-name", "a/b", "the character '/'"),
        ("session-tags", "team", "KEY=VALUE"),
        ("source-identity", "x", "2 to 64"),
        ("require-imdsv2", "perhaps", "true or false"),
        ("polcy", "{}", "no such option"),
    ]
    .into_iter()
    .enumerate()
    {
        let label = format!("metadata-proxy.{option}");
        let name = format!("wrong-{at}");
        let container = stage.run(idle(&name).label(ROLE_LABEL, &role_arn("web")).label(&label, value)).await?;
        let script = format!(
            "token=$(curl -sS -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' http://169.254.169.254/latest/api/token)
             curl -sS -o /dev/null -w '%{{http_code}}' -H \"X-aws-ec2-metadata-token: $token\" {ROLE_LIST}"
        );
        let status = container.exec(["/usr/bin/sh", "-c", &script]).await?.success()?;
        ensure!(status == "404", "{option}: {status}");
        let told =
            |log: &str| log.lines().any(|line| [name.as_str(), &label, rule].iter().all(|word| line.contains(word)));
        stage.daemon.wait_for(&format!("{label}: {rule}"), Duration::from_secs(20), told).await?;
    }
    ensure!(stage.sts.assume_role_calls(&role_arn("web")) == 0, "STS was asked");
    ensure!(stage.sts.assume_role_calls(&role_arn("default")) == 0, "STS was asked for the default");
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_may_require_session_tokens_of_itself() -> Result<()> {
    let stage = Stage::start().await?;
    let spec = idle("strict").label(ROLE_LABEL, &role_arn("web")).label("metadata-proxy.require-imdsv2", "true");
    let strict = stage.run(spec).await?;
    ensure!(role_list(&strict).await?.0 == 401, "IMDSv1 is answered");
    let relaxed = stage.run(idle("relaxed").label(ROLE_LABEL, &role_arn("web"))).await?;
    assert_role(&relaxed, "web").await
}
