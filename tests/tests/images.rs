//! What images have in the same words as their containers: restrictions hold whoever has brought them.

use anyhow::{Context as _, Result, ensure};
use bollard::query_parameters::InspectContainerOptions;
use metadata_proxy_tests::{
    host::{Container, ContainerSpec, TestHost},
    stage::{Stage, commit, daemon_options, image_with, of_image, role_arn, with_config},
    talk::{Plan, ask, token, with_token},
};

const ROLE: &str = "metadata-proxy.role";
const ROLES: &str = "/latest/meta-data/iam/security-credentials/";
const POLICY: &str = r#"{"Version":"2012-10-17","Statement":[]}"#;

fn labelled(spec: ContainerSpec, labels: &[(&str, &str)]) -> ContainerSpec {
    labels.iter().fold(spec, |spec, (label, value)| spec.label(label, value))
}

/// With rules, and a base of roles.
async fn ruled(rules: &str) -> Result<Stage> {
    let host = TestHost::start().await?;
    let options = daemon_options().arg("--role-base").arg(role_arn(""));
    let options = with_config(&host, options, rules)?;
    Stage::on(host, options).await
}

/// The role list, by IMDSv2; the status where there is none.
async fn role(container: &Container) -> Result<String> {
    let token = token(container, "60").await?;
    let answer = ask(container, &[with_token(ROLES, &token)]).await?.pop().context("no answer")?;
    Ok(if answer.status == 200 { answer.body } else { answer.status.to_string() })
}

async fn assert_role(stage: &Stage, container: &Container, expected: &str) -> Result<()> {
    let role = role(container).await?;
    ensure!(role == expected, "{}: {role} instead of {expected}\n{}", container.name(), stage.daemon.log()?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn restrictions_that_a_committed_image_repeats_hold() -> Result<()> {
    let stage = Stage::start().await?;
    let restrictions = [
        ("metadata-proxy.policy", POLICY),
        ("metadata-proxy.duration", "15m"),
        ("metadata-proxy.require-imdsv2", "true"),
        ("metadata-proxy.upstream-deny", "meta-data/mac"),
    ];
    let before = stage.run(labelled(ContainerSpec::resident("before"), &restrictions)).await?;
    let image = commit(&stage, &before, "mp/committed", "LABEL by=commit").await?;
    let job = stage.run(labelled(of_image(&image, "job"), &restrictions).label(ROLE, &role_arn("job"))).await?;

    assert_role(&stage, &job, "job").await?;
    ensure!(ask(&job, &[Plan::get(ROLES)]).await?[0].status == 401, "it is answered without a session token");
    let token = token(&job, "60").await?;
    ensure!(ask(&job, &[with_token("/latest/meta-data/mac", &token)]).await?[0].status == 404, "it sees the path");
    let calls = stage.sts.calls();
    let call = calls.iter().find(|call| call.parameters.get("RoleArn") == Some(&role_arn("job"))).context("no call")?;
    let asked = |name: &str| call.parameters.get(name).map(String::as_str);
    ensure!((asked("Policy"), asked("DurationSeconds")) == (Some(POLICY), Some("900")), "{:?}", call.parameters);

    // One that nobody can tell the meaning of refuses the role, and says why.
    let external = [("metadata-proxy.external-id", "x1")];
    let before = stage.run(labelled(ContainerSpec::resident("external"), &external)).await?;
    let image = commit(&stage, &before, "mp/external", "LABEL by=commit").await?;
    let unclear = stage.run(labelled(of_image(&image, "unclear"), &external).label(ROLE, &role_arn("unclear"))).await?;
    assert_role(&stage, &unclear, "404").await?;
    ensure!(stage.sts.assume_role_calls(&role_arn("unclear")) == 0, "STS was asked");
    let log = stage.daemon.log()?;
    ensure!(log.contains("label metadata-proxy.external-id is the image's, too"), "{log}");
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_that_denies_holds_where_the_image_repeats_the_label() -> Result<()> {
    const RULES: &str = "[[rule]]\nlabel = { team = 'untrusted' }\ndeny = true\n\n\
        [[rule]]\nlabel = { team = 'few' }\nallow = ['few']\n\n[[rule]]\nname = '*'\nallow = ['*']\n";
    let stage = ruled(RULES).await?;
    for (team, alone) in [("untrusted", "404"), ("few", "404"), ("other", "web")] {
        let image = image_with(&stage, &format!("mp/{team}"), &format!("LABEL team={team}")).await?;
        let repeated = [(ROLE, "web"), ("team", team)];
        let repeated = stage.run(labelled(of_image(&image, &format!("{team}-repeated")), &repeated)).await?;
        assert_role(&stage, &repeated, alone).await?;
        let silent = stage.run(of_image(&image, &format!("{team}-silent")).label(ROLE, "web")).await?;
        assert_role(&stage, &silent, alone).await?;
    }
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_compose_has_built_is_of_its_project_when_compose_starts_it() -> Result<()> {
    const RULES: &str = "[session-tags]\nproject = '{compose.project}'\n\n\
        [[rule]]\ncompose-project = 'untrusted'\ndeny = true\n\n\
        [[rule]]\ncompose-project = 'shop'\nallow = ['shop']\n\n[[rule]]\nname = '*'\nallow = ['other']\n";
    let stage = ruled(RULES).await?;
    for (project, asked, composed, by_hand) in
        [("shop", "shop", "shop", "404"), ("shop", "other", "404", "other"), ("untrusted", "other", "404", "404")]
    {
        // The labels that `docker compose build` gives, and those of `docker compose up` beside them.
        let built = [
            ("com.docker.compose.project", project),
            ("com.docker.compose.service", "web"),
            ("com.docker.compose.version", "2.40.0"),
        ];
        let changes: Vec<_> = built.iter().map(|(label, value)| format!("LABEL {label}={value}")).collect();
        let name = format!("{project}-{asked}");
        let image = image_with(&stage, &format!("mp/{name}"), &changes.join("\n")).await?;
        let spec = labelled(of_image(&image, &name), &built).label(ROLE, asked);
        let container = stage.run(spec.label("com.docker.compose.config-hash", "0123abcd")).await?;
        assert_role(&stage, &container, composed).await?;
        let by = stage.run(of_image(&image, &format!("{name}-by-hand")).label(ROLE, asked)).await?;
        assert_role(&stage, &by, by_hand).await?;
    }
    let calls = stage.sts.calls();
    let tag = |role: &str| {
        let call = calls.iter().find(|call| call.parameters.get("RoleArn") == Some(&role_arn(role)))?;
        call.parameters.get("Tags.member.1.Value").map(String::as_str)
    };
    ensure!((tag("shop"), tag("other")) == (Some("shop"), Some("")), "{calls:#?}");
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_updater_does_not_give_a_container_the_role_that_an_old_image_names() -> Result<()> {
    let stage = Stage::start().await?;
    let admin = role_arn("admin");
    let old = image_with(&stage, "mp/app:1", &format!("ENV IAM_ROLE={admin}\nENV VERSION=1")).await?;
    let new = image_with(&stage, "mp/app:2", "ENV VERSION=2").await?;
    let before = stage.run(of_image(&old, "app")).await?;
    assert_role(&stage, &before, "404").await?;
    // As Portainer recreates it: the old one's configuration as the engine shows it, and the new image.
    let shown = stage.docker().inspect_container(before.id(), None::<InspectContainerOptions>).await?;
    let shown = shown.config.and_then(|config| config.env).context("no environment")?;
    ensure!(shown.contains(&format!("IAM_ROLE={admin}")), "{shown:?}");
    before.remove().await?;
    let spec = shown.iter().filter_map(|variable| variable.split_once('='));
    let spec = spec.fold(of_image(&new, "app"), |spec, (name, value)| spec.env(name, value));
    let after = stage.run(spec).await?;
    assert_role(&stage, &after, "404").await?;
    ensure!(stage.sts.assume_role_calls(&admin) == 0, "the old image's role was assumed");
    // Who says it by a label has said it.
    after.remove().await?;
    let told = stage.run(of_image(&new, "app").label(ROLE, &role_arn("web"))).await?;
    assert_role(&stage, &told, "web").await?;
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_names_no_architecture_is_as_any_other() -> Result<()> {
    // As some tools build them.
    const STRIP: &str = "set -e; mkdir \"$1\"; cd \"$1\"; docker save mp/base | tar -x; \
        sed -i 's/\"architecture\":\"[a-z0-9]*\",//' *.json; sed -i 's#mp/base#mp/unnamed#' manifest.json; \
        rm -f repositories; tar -c * | docker load; docker image inspect --format '[{{.Architecture}}]' mp/unnamed";
    let stage = Stage::start().await?;
    let admin = role_arn("admin");
    image_with(&stage, "mp/base", &format!("ENV IAM_ROLE={admin}")).await?;
    let mut command = stage.command("sh");
    command.env("DOCKER_HOST", format!("unix://{}", stage.engine().socket().display()));
    let output = command.args(["-c", STRIP, "sh"]).arg(stage.directory().join("image")).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success() && said.trim_end().ends_with("[]"), "{said}{output:?}");
    let web = stage.run(of_image("mp/unnamed", "web").label(ROLE, &role_arn("web"))).await?;
    assert_role(&stage, &web, "web").await?;
    let silent = stage.run(of_image("mp/unnamed", "silent")).await?;
    assert_role(&stage, &silent, "404").await?;
    ensure!(stage.sts.assume_role_calls(&admin) == 0, "the image's role was assumed");
    stage.assert_no_leak()
}
