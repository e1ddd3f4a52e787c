//! Docker has written down what its containers are before its API tells: at boot, and as it is started anew.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bollard::models::{RestartPolicy, RestartPolicyNameEnum};
use metadata_proxy_tests::{
    host::{ContainerSpec, Network, SLOW_RUNTIME},
    stage::{Stage, daemon_options, image_with_a_role, of_image, role_arn},
};

const ROLE: &str = "metadata-proxy.role";
#[tokio::test(flavor = "multi_thread")]
async fn containers_are_known_from_dockers_files_while_its_api_does_not_answer() -> Result<()> {
    let mut stage = Stage::start().await?;
    let own = |name: &str| ContainerSpec::resident(name).label(ROLE, &role_arn(name));
    let (web, on_host) = (stage.run(own("web")).await?, stage.run(own("agent").network(Network::Host)).await?);
    let image = image_with_a_role(&stage.host, "brings", "brought").await?;
    let brought = stage.run(of_image(&image, "brought")).await?;
    let (broken, theirs) = (stage.run(own("broken")).await?, stage.run(own("theirs")).await?);
    let mut pids = Vec::new();
    for container in [&web, &on_host, &brought, &broken, &theirs] {
        pids.push(container.pid().await?);
    }
    let before = stage.sts.assume_role_calls(&role_arn("web"));
    stage.daemon.terminate(Duration::from_secs(15)).await?;
    // As after a boot: nothing is known from before, and the socket is where Docker has it.
    let prepare = format!(
        "chown 1000 /run/engine/data/containers/{}/config.v2.json && rm /run/metadata-proxy/containers.json && ln -s {} /run/docker.sock && mkdir -p /var/lib/docker &&
         mount --bind /run/engine/data /var/lib/docker",
        theirs.id(),
        stage.engine().socket().display()
    );
    ensure!(stage.command("sh").args(["-c", &prepare]).status()?.success(), "{prepare}");
    stage.engine().spoil(broken.id())?;
    stage.engine().hang().await?;
    stage.daemon = stage.host.daemon(daemon_options().arg("--docker-host=unix:///run/docker.sock"))?;
    let up = |log: &str| log.contains("assuming roles as");
    stage.daemon.wait_for("its identity", Duration::from_secs(20), up).await?;

    // What the image brings counts as little as it does when the engine tells.
    for (pid, expected) in pids.iter().zip(["web", "agent", ""]) {
        let begin = Instant::now();
        let answer = stage.role_list_of(*pid, 1)?;
        ensure!(
            answer == expected || expected.is_empty() && answer.contains("404"),
            "{expected:?} was answered {answer:?} after {:?}",
            begin.elapsed()
        );
    }
    for pid in &pids[3..] {
        ensure!(stage.role_list_of(*pid, 1)?.is_empty(), "what cannot be believed was believed");
    }
    let calls = |role: &str| stage.sts.assume_role_calls(&role_arn(role));
    ensure!(calls("web") == before + 1 && calls("brought") == 0, "{} {}", calls("web"), calls("brought"));

    stage.engine().go_on().await?;
    let ready = |log: &str| log.contains("ready: following");
    stage.daemon.wait_for("the engine", Duration::from_secs(30), ready).await?;
    ensure!(stage.role_list_of(pids[0], 5)? == "web");
    ensure!(calls("web") == before + 1, "the engine told nothing new, and the role was assumed anew");
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_that_an_engine_starts_anew_are_served_at_their_first_try() -> Result<()> {
    // One try of a second, as boto3 does.
    const ASK: &str = "trap exit TERM; curl -s --max-time 1 -w ' %{http_code}\\n' \
        http://169.254.169.254/latest/meta-data/iam/security-credentials/; sleep 600 & wait";
    let stage = Stage::start().await?;
    let always = async |name: &str, runtime: Option<&str>| {
        let mut spec = ContainerSpec::on_host(name, ["/usr/bin/sh", "-c", ASK]).label(ROLE, &role_arn(name));
        let policy = Some(RestartPolicyNameEnum::ALWAYS);
        spec.host_config.restart_policy = Some(RestartPolicy { name: policy, maximum_retry_count: None });
        spec.host_config.runtime = runtime.map(str::to_owned);
        stage.run(spec).await
    };
    // The API waits for it, and the others with that.
    let _slow = always("slow", Some(SLOW_RUNTIME)).await?;
    let mut containers = Vec::new();
    for name in ["web", "api", "job"] {
        let container = always(name, None).await?;
        container.says("200", Duration::from_secs(10)).await?;
        containers.push(container);
    }
    stage.engine().restart().await?;
    for container in &containers {
        let expected = format!("{} 200\n", container.name()).repeat(2);
        let said = container.says(&expected, Duration::from_secs(10)).await;
        said.with_context(|| stage.daemon.log().unwrap_or_default())?;
    }
    stage.assert_no_leak()
}
