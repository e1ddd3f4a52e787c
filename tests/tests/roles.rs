//! Which role a container gets by what it was given, and what STS is asked for it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bollard::{models::ContainerConfig, query_parameters::CommitContainerOptionsBuilder};
use metadata_proxy_tests::{
    host::{Container, ContainerSpec},
    stage::{Stage, daemon_options, role_arn},
};

const ROLE_LABEL: &str = "metadata-proxy.role";
const ROLE_LIST: &str = "http://169.254.169.254/latest/meta-data/iam/security-credentials/";

fn idle(name: &str) -> ContainerSpec {
    ContainerSpec::on_host(name, ["/usr/bin/sleep", "600"])
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

/// An image that names a role for whoever starts it.
async fn image_with_a_role(stage: &Stage, name: &str, role: &str) -> Result<String> {
    let base = stage.run(idle("base")).await?;
    let changes = format!("LABEL {ROLE_LABEL}={0}\nENV IAM_ROLE={0}", role_arn(role));
    let options = CommitContainerOptionsBuilder::new().container(base.id()).repo(name).changes(&changes).build();
    let image = stage.docker().commit_container(options, ContainerConfig::default()).await.context("commit")?;
    base.remove().await?;
    Ok(image.id)
}

fn of_image(image: &str, name: &str) -> ContainerSpec {
    let mut spec = idle(name);
    // The test host's image needs its binds, which go by the name of the image.
    spec.binds = vec!["/usr:/usr:ro".into()];
    ContainerSpec { image: image.into(), ..spec }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_does_not_give_itself_a_role_unless_it_is_trusted() -> Result<()> {
    let options = || daemon_options().arg("--default-role").arg(role_arn("default"));
    let mut stage = Stage::start_with(options()).await?;
    let image = image_with_a_role(&stage, "mp/greedy", "admin").await?;
    let greedy = stage.run(of_image(&image, "greedy")).await?;
    assert_role(&greedy, "default").await?;
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
