//! STS in trouble and STS at ease: what containers get, when, and what it costs in calls.

use std::{
    io::ErrorKind,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use jiff::{SignedDuration, Timestamp};
use metadata_proxy_tests::{
    host::{Container, ContainerSpec, DaemonOptions, TestHost, program},
    imds::HOST_IDENTITY,
    stage::{STS_ENDPOINT, Stage, daemon_options, role_arn, start_imds, start_sts},
    sts::{BASE_IDENTITY, BASE_SECRET_KEY, Call, Fault, Outcome},
    talk::{self, Plan},
};
use tokio::time::sleep;

const ROLE_LABEL: &str = "metadata-proxy.role";
/// What comes by itself comes by then, also on a busy machine.
const SOON: Duration = Duration::from_secs(30);
const ROLE_LIST: &str = "http://169.254.169.254/latest/meta-data/iam/security-credentials/";

/// What a container was answered.
#[derive(Debug)]
struct Answer {
    status: u16,
    took: Duration,
    body: String,
}

/// What curl is told to write behind each body.
const FORMAT: &str = "\n%{http_code} %{time_total}\n";

impl Answer {
    fn parse(output: &str) -> Result<Self> {
        let shown = || format!("curl printed {output:?}");
        let (body, numbers) = output.trim_end().rsplit_once('\n').with_context(shown)?;
        let (status, seconds) = numbers.split_once(' ').with_context(shown)?;
        let took = Duration::from_secs_f64(seconds.parse().with_context(shown)?);
        Ok(Self { status: status.parse().with_context(shown)?, took, body: body.to_owned() })
    }

    fn field(&self, name: &str) -> Result<String> {
        let document: serde_json::Value =
            serde_json::from_str(&self.body).with_context(|| format!("not credentials: {self:?}"))?;
        Ok(document[name].as_str().with_context(|| format!("no {name}: {self:?}"))?.to_owned())
    }

    fn access_key(&self) -> Result<String> {
        self.field("AccessKeyId")
    }
}

/// A container of this name, with the role of this name, that does nothing by itself.
async fn idle(stage: &Stage, name: &str, role: &str) -> Result<Container> {
    stage.run(ContainerSpec::resident(name).label(ROLE_LABEL, &role_arn(role))).await
}

/// One request of a container.
async fn ask(container: &Container, path: &str) -> Result<Answer> {
    let url = format!("{ROLE_LIST}{path}");
    let finished = container.exec(["/usr/bin/curl", "-s", "--max-time", "20", "-w", FORMAT, &url]).await?;
    Answer::parse(&finished.stdout).with_context(|| format!("{finished:?}"))
}

async fn ask_until(container: &Container, path: &str, status: u16, limit: Duration) -> Result<Answer> {
    let deadline = Instant::now() + limit;
    loop {
        let answer = ask(container, path).await?;
        if answer.status == status {
            return Ok(answer);
        }
        ensure!(Instant::now() < deadline, "after {limit:?} still {answer:?}");
        sleep(Duration::from_millis(100)).await;
    }
}

async fn calls_reach(stage: &Stage, role: &str, count: usize, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    while stage.sts.assume_role_calls(&role_arn(role)) < count {
        ensure!(Instant::now() < deadline, "{role} was not assumed {count} times within {limit:?}");
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// The one AssumeRole for this role.
fn only_call(stage: &Stage, role: &str) -> Result<Call> {
    let arn = role_arn(role);
    let mut calls: Vec<Call> =
        stage.sts.calls().into_iter().filter(|call| call.parameters.get("RoleArn") == Some(&arn)).collect();
    ensure!(calls.len() == 1, "not one call for {role}: {calls:#?}");
    Ok(calls.remove(0))
}

#[tokio::test(flavor = "multi_thread")]
async fn while_sts_is_down_the_role_list_says_503_at_once_and_afterwards_all_is_well_by_itself() -> Result<()> {
    let stage = Stage::start().await?;
    stage.sts.stop_listening()?;
    let container = idle(&stage, "patient", "patient").await?;
    for path in ["", "patient"] {
        let answer = ask(&container, path).await?;
        ensure!(answer.status == 503 && answer.body.is_empty(), "{path:?}: {answer:?}");
        // The SDK's own second attempt comes after up to a second.
        ensure!(answer.took < Duration::from_secs(3), "{path:?}: {answer:?}");
    }
    // Crawlers such as cloud-init give up at the first thing that is listed and not to be had.
    let listed = ["/latest/meta-data/", "/latest/meta-data/iam/"].map(Plan::get);
    let answers = talk::ask(&container, &listed).await?;
    ensure!(answers[0].status == 200 && !answers[0].body.contains("iam") && answers[1].status == 404, "{answers:?}");
    stage.sts.listen_again()?;
    let answer = ask_until(&container, "", 200, SOON).await?;
    ensure!(answer.body == "patient", "{answer:?}");
    let key = ask(&container, "patient").await?.access_key()?;
    ensure!(stage.role_of(&key).as_deref() == Some("patient"), "{key} is not the role's");
    let answers = talk::ask(&container, &listed).await?;
    ensure!(answers[0].body.contains("iam/") && answers[1].status == 200, "{answers:?}");
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_that_a_slow_sts_was_asked_for_ahead_are_there_when_they_are_needed() -> Result<()> {
    let stage = Stage::start().await?;
    stage.sts.set_fault(Some(Fault::Delay(Duration::from_secs(2))));
    let container = idle(&stage, "slow", "slow").await?;
    let first = ask(&container, "slow").await?;
    ensure!(matches!(first.status, 200 | 503) && first.took < Duration::from_secs(8), "{first:?}");
    calls_reach(&stage, "slow", 1, SOON).await?;
    ask_until(&container, "", 200, SOON).await?;
    let later = ask(&container, "slow").await?;
    ensure!(later.status == 200 && later.took < Duration::from_secs(1), "{later:?}");
    only_call(&stage, "slow")?;

    stage.sts.set_fault(Some(Fault::Delay(Duration::from_secs(2))));
    let script = format!("sleep 4; curl -s --max-time 20 -w '{FORMAT}' {ROLE_LIST}ahead");
    let spec = ContainerSpec::on_host("ahead", ["/usr/bin/sh", "-c", &script]).label(ROLE_LABEL, &role_arn("ahead"));
    let container = stage.run(spec).await?;
    calls_reach(&stage, "ahead", 1, Duration::from_secs(3)).await?;
    let answer = Answer::parse(&stage.finish(&container).await?)?;
    ensure!(answer.status == 200 && answer.took < Duration::from_secs(1), "the first request: {answer:?}");
    only_call(&stage, "ahead")?;
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_sts_that_hangs_for_one_role_costs_others_nothing() -> Result<()> {
    let stage = Stage::start().await?;
    stage.sts.set_role_fault(&role_arn("stuck"), Some(Fault::Hang));
    let stuck = idle(&stage, "stuck", "stuck").await?;
    let lively = idle(&stage, "lively", "lively").await?;
    // Crawlers do not stumble over what is not to be had yet, and do not wait for it.
    let begin = Instant::now();
    let listed = talk::ask(&stuck, &["/latest/meta-data/", "/latest/meta-data/iam"].map(Plan::get)).await?;
    ensure!(listed[0].status == 200 && !listed[0].body.contains("iam") && listed[1].status == 404, "{listed:?}");
    ensure!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    let (waiting, served) = tokio::join!(ask(&stuck, ""), async {
        sleep(Duration::from_millis(300)).await;
        ask(&lively, "lively").await
    });
    let (waiting, served) = (waiting?, served?);
    ensure!(served.status == 200 && served.took < Duration::from_secs(2), "{served:?}");
    ensure!(waiting.status == 503 && waiting.body.is_empty(), "{waiting:?}");
    ensure!(waiting.took < Duration::from_secs(8), "{waiting:?}");
    let fresh = idle(&stage, "fresh", "fresh").await?;
    let served = ask(&fresh, "").await?;
    ensure!(served.status == 200 && served.took < Duration::from_secs(2), "{served:?}");

    stage.sts.set_role_fault(&role_arn("stuck"), None);
    ask_until(&stuck, "", 200, SOON).await?;
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_sts_refuses_is_no_role_and_is_not_asked_for_again_and_again() -> Result<()> {
    let stage = Stage::start().await?;
    let refused_role = role_arn("forbidden");
    stage.sts.set_role_fault(&refused_role, Some(Fault::Refuse));
    let refused = idle(&stage, "refused", "forbidden").await?;
    let other = idle(&stage, "other", "allowed").await?;
    let answer = ask(&refused, "").await?;
    ensure!(answer.status == 404 && answer.took < Duration::from_secs(3), "{answer:?}");
    ensure!(ask(&other, "").await?.body == "allowed", "another container suffers");

    // Who lists what there is, as cloud-init does, is not led there either.
    ensure!(ask(&refused, "../").await?.status == 404, "its iam is listed");
    for (container, has_iam) in [(&refused, false), (&other, true)] {
        let listing = ask(container, "../../").await?;
        ensure!(listing.status == 200 && listing.body.contains("instance-id"), "{listing:?}");
        ensure!(listing.body.lines().any(|entry| entry == "iam/") == has_iam, "{listing:?}");
    }

    let script = format!("for i in $(seq 100); do curl -s -o /dev/null -w '%{{http_code}}\\n' {ROLE_LIST}; done");
    let finished = refused.exec(["/usr/bin/sh", "-c", &script]).await?;
    let statuses: Vec<&str> = finished.stdout.lines().collect();
    ensure!(statuses == ["404"; 100], "{statuses:?}");
    // The second after two seconds, the third after four more.
    let calls = stage.sts.assume_role_calls(&refused_role);
    ensure!(calls <= 3, "101 requests of a refused container made {calls} calls of STS");

    let log = stage.daemon.log()?;
    let line = log.lines().find(|line| line.contains(" WARN ") && line.contains(&refused_role));
    let line = line.with_context(|| format!("nothing about {refused_role} in the log:\n{log}"))?;
    ensure!(line.contains("AccessDenied") && line.contains("trust policy"), "no remedy in {line}");
    ensure!(line.contains("arn:aws:iam::111122223333:user/metadata-proxy"), "who is refused? {line}");
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_was_just_made_is_had_soon_after_sts_knows_it() -> Result<()> {
    let stage = Stage::start().await?;
    let role = role_arn("fresh");
    stage.sts.set_role_fault(&role, Some(Fault::Refuse));
    let container = idle(&stage, "fresh", "fresh").await?;
    ensure!(ask(&container, "").await?.status == 404, "it is not refused");
    sleep(Duration::from_secs(5)).await;
    stage.sts.set_role_fault(&role, None);
    let granted = Instant::now();
    ask_until(&container, "", 200, Duration::from_secs(10)).await?;
    ensure!(granted.elapsed() < Duration::from_secs(9), "it took {:?}", granted.elapsed());
    stage.assert_no_leak()
}

/// Each is an action of its own, which a policy that only knows `sts:AssumeRole` does not allow.
#[tokio::test(flavor = "multi_thread")]
async fn tags_and_source_identities_that_no_policy_allows_are_named_as_such() -> Result<()> {
    let stage = Stage::start().await?;
    let spec = |name: &str, label: &str, value: &str| {
        ContainerSpec::resident(name)
            .label(ROLE_LABEL, &role_arn(name))
            .label(&format!("metadata-proxy.{label}"), value)
    };
    stage.sts.set_fault(Some(Fault::Allow(&["sts:AssumeRole"])));
    for (name, label, value, action) in [
        ("tagged", "session-tags", "team=web", "sts:TagSession"),
        ("sourced", "source-identity", "alice", "sts:SetSourceIdentity"),
    ] {
        let container = stage.run(spec(name, label, value)).await?;
        ask_until(&container, "", 404, Duration::from_secs(10)).await?;
        let explained = stage.command(program()?).args(["explain", name]).output()?;
        let explained = String::from_utf8(explained.stdout)?;
        let remedy = format!("must allow sts:AssumeRole and {action} (");
        ensure!(explained.contains(&remedy), "no {remedy:?} in {explained}");
    }
    let plain = idle(&stage, "plain", "plain").await?;
    ask_until(&plain, "", 200, Duration::from_secs(10)).await?;

    stage.sts.set_fault(Some(Fault::Allow(&["sts:AssumeRole", "sts:TagSession", "sts:SetSourceIdentity"])));
    let spec = spec("both", "session-tags", "team=web").label("metadata-proxy.source-identity", "alice");
    let both = stage.run(spec).await?;
    ask_until(&both, "", 200, Duration::from_secs(10)).await?;
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn throttling_and_errors_of_sts_are_tried_again() -> Result<()> {
    for fault in [Fault::Throttle, Fault::ServerError] {
        let stage = Stage::start().await?;
        stage.sts.set_fault(Some(fault.clone()));
        let container = idle(&stage, "unlucky", "unlucky").await?;
        let answer = ask(&container, "").await?;
        ensure!(answer.status == 503 && answer.body.is_empty(), "{fault:?}: {answer:?}");
        // Nobody asks meanwhile.
        calls_reach(&stage, "unlucky", 4, SOON).await?;
        stage.sts.set_fault(None);
        let answer = ask_until(&container, "", 200, SOON).await?;
        ensure!(answer.body == "unlucky", "{fault:?}: {answer:?}");
        let calls = stage.sts.assume_role_calls(&role_arn("unlucky"));
        ensure!(calls < 12, "{fault:?}: {calls} calls are no way to treat a service in trouble");
        stage.assert_no_leak()?;
    }
    Ok(())
}

/// One lost answer is repeated by the SDK, within the same turn; all other patience is the daemon's.
#[tokio::test(flavor = "multi_thread")]
async fn one_error_of_sts_is_nobodys_failure() -> Result<()> {
    let stage = Stage::start().await?;
    stage.sts.set_role_fault(&role_arn("lucky"), Some(Fault::ServerErrorOnce));
    let container = idle(&stage, "lucky", "lucky").await?;
    let answer = ask(&container, "lucky").await?;
    ensure!(answer.status == 200, "{answer:?}");
    let calls = stage.sts.assume_role_calls(&role_arn("lucky"));
    let log = stage.daemon.log()?;
    ensure!(calls == 2 && !log.contains("InternalFailure"), "{calls} calls, {log}");
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_region_without_sts_clients_are_told_to_try_again_and_the_operator_what_to_look_at() -> Result<()> {
    let host = TestHost::start().await?;
    let (imds, sts) = (start_imds(&host)?, start_sts(&host)?);
    let mut options = daemon_options().env("AWS_REGION", "eu-nowhere-1");
    options.env.retain(|(name, _)| name != "AWS_ENDPOINT_URL_STS");
    let mut daemon = host.daemon(options)?;
    daemon.wait_ready(Duration::from_secs(20)).await?;
    let stage = Stage { daemon, sts, imds, host };
    let container = idle(&stage, "lost", "lost").await?;
    let answer = ask_until(&container, "", 503, SOON).await?;
    ensure!(answer.body.is_empty(), "{answer:?}");
    let output = stage.command(program()?).args(["explain", "lost"]).output()?;
    let explained = String::from_utf8(output.stdout)?;
    ensure!(explained.contains("check the network path to STS and AWS_ENDPOINT_URL_STS"), "{explained}");
    ensure!(stage.sts.calls().is_empty(), "{:?}", stage.sts.calls());
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_requests_at_once_are_one_call_of_sts() -> Result<()> {
    let stage = Stage::start().await?;
    stage.sts.set_fault(Some(Fault::Delay(Duration::from_millis(500))));
    // What follows `#` is not sent, so that these are fifty times the same.
    let url = format!("{ROLE_LIST}crowd#[1-50]");
    let curl = ["/usr/bin/curl", "-s", "-Z", "--parallel-immediate", "--parallel-max", "50", "--max-time", "20", &url];
    let container = stage.run(ContainerSpec::on_host("crowd", curl).label(ROLE_LABEL, &role_arn("crowd"))).await?;
    let output = stage.finish(&container).await?;
    let key =
        Answer { status: 200, took: Duration::ZERO, body: output.split_inclusive('}').next().unwrap_or("").into() }
            .access_key()?;
    let answers = output.matches("\"Code\" : \"Success\"").count();
    let same = output.matches(&key).count();
    ensure!((answers, same) == (50, 50), "{answers} answers, {same} with the first one's key: {output}");
    let session = only_call(&stage, "crowd")?.parameters.remove("RoleSessionName");
    ensure!(stage.sts.issued(&key).map(|issued| issued.session_name) == session, "{key} is not of that session");
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_container_is_a_session_of_its_own_even_of_the_same_role() -> Result<()> {
    let stage = Stage::start().await?;
    let mut keys = Vec::new();
    for name in ["twin-a", "twin_b.2"] {
        let container = idle(&stage, name, "twins").await?;
        let key = ask(&container, "twins").await?.access_key()?;
        let session = format!("{name}-{}", &container.id()[..12]);
        let issued = stage.sts.issued(&key).context("a key from nowhere")?;
        ensure!(issued.session_name == session, "{} is not {session}", issued.session_name);
        let calls = stage.sts.calls();
        let call = calls.iter().find(|call| call.parameters.get("RoleSessionName") == Some(&session));
        let call = call.with_context(|| format!("no call for {session}: {calls:#?}"))?;
        ensure!(call.parameters.get("DurationSeconds").is_some_and(|seconds| seconds == "3600"), "{call:?}");
        ensure!(call.parameters.get("RoleArn") == Some(&role_arn("twins")), "{call:?}");
        keys.push(key);
    }
    ensure!(keys[0] != keys[1], "two containers have the same key");
    ensure!(stage.sts.assume_role_calls(&role_arn("twins")) == 2, "more calls than containers");
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_lived_container_always_has_valid_credentials_until_sts_is_gone_for_too_long() -> Result<()> {
    const LIFETIME: Duration = Duration::from_secs(8);
    let stage = Stage::start().await?;
    stage.sts.set_lifetime(Some(LIFETIME));
    let container = idle(&stage, "steady", "steady").await?;

    let mut keys = Vec::new();
    let end = Instant::now() + 2 * LIFETIME;
    while Instant::now() < end {
        let (key, expiration) = valid_credentials(&container).await?;
        let left = Duration::try_from(expiration.duration_since(Timestamp::now()))?;
        ensure!(left > LIFETIME / 4, "{key} is served with only {left:?} left, although STS is well");
        if keys.last() != Some(&key) {
            keys.push(key);
        }
        sleep(Duration::from_millis(150)).await;
    }
    let calls = stage.sts.assume_role_calls(&role_arn("steady"));
    ensure!(keys.len() >= 4 && calls <= keys.len() + 1, "{calls} calls, and in {:?} these: {keys:?}", 2 * LIFETIME);

    stage.sts.stop_listening()?;
    let (mut last, mut expiration) = valid_credentials(&container).await?;
    let failed = loop {
        // The list tells as well, and first, as some clients crash on a document that is not there.
        let answer = ask(&container, "").await?;
        if answer.status != 200 {
            break answer;
        }
        let answer = ask(&container, "steady").await?;
        if answer.status == 200 {
            (last, expiration) = (answer.access_key()?, answer.field("Expiration")?.parse::<Timestamp>()?);
        }
        ensure!(Timestamp::now().duration_since(expiration).as_secs() < 2, "{last} has expired at {expiration}");
        sleep(Duration::from_millis(100)).await;
    };
    ensure!(failed.status == 503 && failed.body.is_empty(), "{failed:?}");
    let early = expiration.duration_since(Timestamp::now());
    // Written in whole seconds.
    ensure!(early.as_secs() < 2, "{last}, good until {expiration}, was withheld {early:?} too early");
    ensure!(ask(&container, "steady").await?.status == 503, "the document outlives its credentials");

    stage.sts.listen_again()?;
    ask_until(&container, "", 200, SOON).await?;
    let (key, _) = valid_credentials(&container).await?;
    ensure!(key != last, "expired credentials are back");
    stage.assert_no_leak()
}

/// The key and its end, which is not yet.
async fn valid_credentials(container: &Container) -> Result<(String, Timestamp)> {
    let answer = ask(container, "steady").await?;
    ensure!(answer.status == 200, "{answer:?}");
    let expiration: Timestamp = answer.field("Expiration")?.parse()?;
    let key = answer.access_key()?;
    if expiration <= Timestamp::now() - Duration::from_secs(1) {
        bail!("{key} has expired at {expiration}");
    }
    Ok((key, expiration))
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_of_a_container_that_has_stopped_are_no_longer_renewed() -> Result<()> {
    const LIFETIME: Duration = Duration::from_secs(4);
    let stage = Stage::start().await?;
    stage.sts.set_lifetime(Some(LIFETIME));
    let stopping = idle(&stage, "stopping", "stopping").await?;
    let staying = idle(&stage, "staying", "staying").await?;
    ensure!(ask(&stopping, "stopping").await?.status == 200, "not served");
    // Renewed without anybody asking.
    for role in ["stopping", "staying"] {
        calls_reach(&stage, role, 2, LIFETIME).await?;
    }
    stopping.stop().await?;
    sleep(Duration::from_millis(500)).await;
    let calls = |role| stage.sts.assume_role_calls(&role_arn(role));
    let (stopped, stayed) = (calls("stopping"), calls("staying"));
    sleep(2 * LIFETIME).await;
    ensure!(calls("stopping") == stopped, "{} calls for a container that is gone", calls("stopping") - stopped);
    ensure!(calls("staying") >= stayed + 3, "the other's renewal has ended with it");
    ensure!(staying.pid().await? != 0, "the other has ended");
    stage.assert_no_leak()
}

/// As a login tool renews a profile, or somebody a key.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_credential_that_is_replaced_in_its_profile_is_taken_without_a_restart() -> Result<()> {
    let host = TestHost::start().await?;
    let file = host.directory().join("credentials");
    let write = |key: &str| {
        let profile = format!("[default]\naws_access_key_id = {key}\naws_secret_access_key = {BASE_SECRET_KEY}\n");
        std::fs::write(&file, profile)
    };
    write("AKIAOLD")?;
    let options = DaemonOptions::default()
        .env("AWS_ENDPOINT_URL_STS", STS_ENDPOINT)
        .env("AWS_REGION", "eu-west-1")
        .env("AWS_SHARED_CREDENTIALS_FILE", file.display().to_string())
        .env("METADATA_PROXY_LOG", "info,metadata_proxy=debug");
    let (imds, sts) = (start_imds(&host)?, start_sts(&host)?);
    sts.add_identity("AKIAOLD", BASE_IDENTITY);
    let mut daemon = host.daemon(options)?;
    daemon.wait_ready(Duration::from_secs(20)).await?;
    let stage = Stage { daemon, sts, imds, host };
    let before = idle(&stage, "before", "before").await?;
    ask_until(&before, "", 200, SOON).await?;

    stage.sts.remove_identity("AKIAOLD");
    let between = idle(&stage, "between", "between").await?;
    // Nobody has said no to its role.
    let told = ask(&between, "").await?;
    ensure!(told.status == 503 && told.body.is_empty(), "{told:?}");
    ensure!(ask(&before, "before").await?.status == 200, "what was fetched is no longer served");
    let log = stage.daemon.log()?;
    ensure!(
        log.contains("InvalidClientTokenId") && log.contains("renew the credentials that the daemon itself uses"),
        "{log}"
    );

    stage.sts.add_identity("AKIANEW", BASE_IDENTITY);
    write("AKIANEW")?;
    let after = idle(&stage, "after", "after").await?;
    ask_until(&after, "", 200, SOON).await?;
    let calls = stage.sts.calls();
    let call = calls.iter().rev().find(|call| call.action == "AssumeRole").context("no call")?;
    ensure!(call.access_key.as_deref() == Some("AKIANEW"), "{call:?}");
    // By itself.
    ask_until(&between, "", 200, Duration::from_secs(35)).await?;
    stage.assert_no_leak()
}

/// STS then refuses what the daemon signs, and tells the time in the same answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_ten_minutes_off_costs_one_more_request() -> Result<()> {
    for (ahead, words) in [(10, "ahead"), (-10, "behind")] {
        let stage = Stage::start().await?;
        stage.sts.set_fault(Some(Fault::Clock(SignedDuration::from_mins(ahead))));
        let first = idle(&stage, "first", "first").await?;
        let answer = ask_until(&first, "first", 200, Duration::from_secs(10)).await?;
        ensure!(stage.role_of(&answer.access_key()?).as_deref() == Some("first"), "{answer:?}");
        let outcomes: Vec<_> =
            stage.sts.calls().into_iter().filter(|call| call.action == "AssumeRole").map(|call| call.outcome).collect();
        let [Outcome::Refused("SignatureDoesNotMatch"), Outcome::Issued(_)] = outcomes.as_slice() else {
            bail!("STS {words}: {outcomes:?}");
        };
        let log = stage.daemon.log()?;
        ensure!(!log.contains("no new credentials"), "not within one turn: {log}");
        // What was learned is kept.
        let second = idle(&stage, "second", "second").await?;
        ask_until(&second, "second", 200, Duration::from_secs(10)).await?;
        only_call(&stage, "second")?;
        stage.assert_no_leak()?;
    }
    Ok(())
}

/// As those of an instance role, every few hours.
#[tokio::test(flavor = "multi_thread")]
async fn source_credentials_of_the_instance_role_are_replaced_before_they_end() -> Result<()> {
    const OLD: &str = "ASIAHOSTSECRET000007";
    const NEW: &str = "ASIAHOSTSECRET000008";
    let host = TestHost::start().await?;
    let (imds, sts) = (start_imds(&host)?, start_sts(&host)?);
    for key in [OLD, NEW] {
        sts.add_identity(key, HOST_IDENTITY);
    }
    let end = Timestamp::now() + Duration::from_secs(20);
    imds.set_host_key(OLD, end);
    let options = DaemonOptions::default().env("AWS_ENDPOINT_URL_STS", STS_ENDPOINT).env("AWS_REGION", "eu-west-1");
    let mut daemon = host.daemon(options)?;
    daemon.wait_ready(Duration::from_secs(20)).await?;
    let stage = Stage { daemon, sts, imds, host };
    let first = idle(&stage, "first", "first").await?;
    ask_until(&first, "", 200, SOON).await?;
    let signer = |role: &str| only_call(&stage, role).map(|call| call.access_key);
    ensure!(signer("first")?.as_deref() == Some(OLD), "{:?}", signer("first"));

    stage.imds.set_host_key(NEW, end + Duration::from_secs(6 * 3600));
    sleep(Duration::try_from(end.duration_since(Timestamp::now())).unwrap_or_default()).await;
    stage.sts.remove_identity(OLD);
    let second = idle(&stage, "second", "second").await?;
    ask_until(&second, "", 200, SOON).await?;
    ensure!(signer("second")?.as_deref() == Some(NEW), "{:?}", signer("second"));
    ensure!(ask(&first, "first").await?.status == 200, "what was fetched is no longer served");
    Ok(())
}

/// A proxy is for the network beyond, and would tell of another instance.
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_in_the_environment_does_not_catch_the_daemons_own_calls_of_the_metadata_service() -> Result<()> {
    const PROXY: &str = "http://127.0.0.1:3128";
    let host = TestHost::start().await?;
    let proxy = host.bind_tcp("127.0.0.1:3128")?;
    proxy.set_nonblocking(true)?;
    let (imds, sts) = (start_imds(&host)?, start_sts(&host)?);
    const KEY: &str = "ASIAHOSTSECRET000009";
    sts.add_identity(KEY, HOST_IDENTITY);
    imds.set_host_key(KEY, Timestamp::now() + Duration::from_secs(3600));
    let mut options = DaemonOptions::default().env("AWS_ENDPOINT_URL_STS", STS_ENDPOINT).env("NO_PROXY", "192.0.2.1");
    for variable in ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"] {
        options = options.env(variable, PROXY);
    }
    // Neither keys nor a region but the instance's.
    let mut daemon = host.daemon(options)?;
    daemon.wait_ready(Duration::from_secs(30)).await?;
    let stage = Stage { daemon, sts, imds, host };
    let web = idle(&stage, "web", "web").await?;
    ask_until(&web, "", 200, SOON).await?;
    ensure!(only_call(&stage, "web")?.access_key.as_deref() == Some(KEY));
    // Nor does it catch what the daemon asks on a container's behalf.
    let answer = talk::ask(&web, &[Plan::get("/latest/meta-data/instance-id")]).await?;
    ensure!(answer[0].status == 200, "{answer:?}");
    let caught = proxy.accept();
    ensure!(caught.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "{caught:?}");
    Ok(())
}
