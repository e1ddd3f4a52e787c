//! The program as an operator meets it: its help, its configuration, what it says when it cannot run, and its log.

use std::{
    fs::{self, File},
    process::{Command, ExitStatus, Output},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use metadata_proxy_tests::{
    host::{Container, ContainerSpec, DaemonOptions, Machine, TestHost, program},
    imds::HOST_ROLE,
    stage::{STS_ENDPOINT, Stage, daemon_options, role_arn, with_config},
    sts::BASE_SECRET_KEY,
};

/// As a host process where there is no container engine.
///
/// What it attaches, it attaches to the machine's cgroup, whatever it is told: the root's belongs to the tester.
fn command(machine: &Machine, args: &[&str], variables: &[(&str, &str)]) -> Result<Command> {
    let mut command = machine.command(program()?);
    command.args(args).env("METADATA_PROXY_CGROUP", machine.inner_cgroup()).envs(variables.iter().copied());
    Ok(command)
}

/// Runs it to its own end.
fn run(machine: &Machine, args: &[&str], variables: &[(&str, &str)]) -> Result<Output> {
    Ok(command(machine, args, variables)?.output()?)
}

/// Runs it until it has said in one line of its log what it lacks, and then ends it.
fn run_until_warned(
    machine: &Machine,
    args: &[&str],
    variables: &[(&str, &str)],
    words: &[&str],
) -> Result<ExitStatus> {
    let log = machine.directory().join("warned.log");
    let mut daemon = command(machine, args, variables)?.stderr(File::create(&log)?).spawn()?;
    let warned = |line: &str| line.contains(" WARN ") && words.iter().all(|word| line.contains(word));
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut warnings = 0;
    while warnings == 0 && Instant::now() < deadline && daemon.try_wait()?.is_none() {
        thread::sleep(Duration::from_millis(50));
        warnings = fs::read_to_string(&log)?.lines().filter(|line| warned(line)).count();
    }
    let ended = machine.command("kill").arg(daemon.id().to_string()).status()?;
    let status = daemon.wait()?;
    ensure!(warnings == 1 && ended.success(), "{words:?} in:\n{}", fs::read_to_string(&log)?);
    Ok(status)
}

/// The one line that it said, apart from its log.
fn only_line(output: &Output) -> Result<String> {
    let said = String::from_utf8(output.stderr.clone())?;
    let said: String = said.split_inclusive('\n').filter(|line| !line.contains("  INFO metadata_proxy::")).collect();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(output.stdout.is_empty(), "{output:?}");
    Ok(said.trim_end().to_owned())
}

/// Arguments, environment, and words of the answer.
type BadCase = (&'static [&'static str], &'static [(&'static str, &'static str)], &'static [&'static str]);

fn assert_says(line: &str, words: &[&str]) {
    assert!(line.starts_with("metadata-proxy: "), "{line}");
    for word in words {
        assert!(line.contains(word), "no {word:?} in: {line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn help_shows_every_flag_with_its_environment_variable() -> Result<()> {
    let machine = Machine::start()?;
    let help = run(&machine, &["run", "--help"], &[])?;
    assert_eq!(help.status.code(), Some(0), "{help:?}");
    assert!(help.stderr.is_empty());
    let help = String::from_utf8(help.stdout)?;
    for (flag, variable) in [
        ("--docker-host <URL>", "DOCKER_HOST"),
        ("--cgroup <PATH>", "METADATA_PROXY_CGROUP"),
        ("--default-role <ROLE>", "DEFAULT_IAM_ROLE"),
        ("--role-base <ARN>", "METADATA_PROXY_ROLE_BASE"),
        ("--session-name <TEMPLATE>", "METADATA_PROXY_SESSION_NAME"),
        ("--trust-image-metadata", "METADATA_PROXY_TRUST_IMAGE_METADATA"),
        ("--imds-endpoint <URL>", "METADATA_PROXY_IMDS_ENDPOINT"),
        ("--disable-upstream", "METADATA_PROXY_DISABLE_UPSTREAM"),
        ("--simulate", "METADATA_PROXY_SIMULATE"),
        ("--require-imdsv2", "METADATA_PROXY_REQUIRE_IMDSV2"),
        ("--allow-user-data", "METADATA_PROXY_ALLOW_USER_DATA"),
        ("--config <FILE.toml>", "METADATA_PROXY_CONFIG"),
        ("--bpffs <PATH>", "METADATA_PROXY_BPFFS"),
        ("--log-format <LOG_FORMAT>", "METADATA_PROXY_LOG_FORMAT"),
        ("--log <FILTER>", "METADATA_PROXY_LOG"),
    ] {
        let (_, rest) = help.split_once(&format!("{flag}\n")).with_context(|| format!("no {flag} in {help}"))?;
        // Up to the next flag.
        let text = rest.split("\n      --").next().unwrap_or(rest);
        assert!(text.trim_start().starts_with(char::is_uppercase), "{flag} is not explained: {text}");
        assert!(text.contains(&format!("[env: {variable}=")), "no {variable} with {flag}: {text}");
    }
    for word in ["metadata-proxy.role", "com.swipely.iam-docker.iam-profile", "IAM_PROFILE", "AWS_PROFILE", "64"] {
        assert!(help.contains(word), "{word}");
    }
    for value in ["text", "json"] {
        assert!(help.contains(value), "{value}");
    }
    let version = run(&machine, &["--version"], &[])?;
    assert_eq!(version.status.code(), Some(0));
    assert!(String::from_utf8(version.stdout)?.starts_with("metadata-proxy 0."));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_configuration_is_one_line_that_says_what_and_where() -> Result<()> {
    let machine = Machine::start()?;
    let cases: &[BadCase] = &[
        (&["--docker-host", "/var/run/docker.sock"], &[], &["--docker-host", "/var/run/docker.sock", "unix:///"]),
        (&[], &[("DOCKER_HOST", "ssh://somewhere")], &["--docker-host", "ssh://somewhere"]),
        (&["--default-role", "we b"], &[], &["--default-role", "\"we b\"", "arn:PARTITION:iam::ACCOUNT:role/NAME"]),
        (&["--role-base", "arn:aws:iam::123456789012:role/x"], &[], &["--role-base", "role/PATH/"]),
        (&[], &[("METADATA_PROXY_SESSION_NAME", "{name}")], &["--session-name", "{name}", "{container.name}"]),
        (&["--default-role", "arn:aws:iam::12:role/x"], &[], &["--default-role", "12 digits"]),
        (&[], &[("DEFAULT_IAM_ROLE", "arn:aws:s3:::bucket")], &["--default-role", "not iam"]),
        (&["--imds-endpoint", "https://169.254.169.254"], &[], &["--imds-endpoint", "http://HOST"]),
        (&["--imds-endpoint", "http://10.0.0.1/latest"], &[], &["--imds-endpoint", "path"]),
        (&["--imds-endpoint", "10.0.0.1"], &[], &["--imds-endpoint", "10.0.0.1"]),
        (&[], &[("METADATA_PROXY_IMDS_ENDPOINT", "ftp://x")], &["--imds-endpoint", "ftp://x"]),
        (&["--imds-endpoint", "http://x", "--disable-upstream"], &[], &["--imds-endpoint", "--disable-upstream"]),
        (&["--simulate", "--disable-upstream"], &[], &["--disable-upstream", "--simulate"]),
        (&["--imds-endpoint", "http://x"], &[("METADATA_PROXY_SIMULATE", "1")], &["--imds-endpoint", "--simulate"]),
        (&[], &[("METADATA_PROXY_DISABLE_UPSTREAM", "perhaps")], &["--disable-upstream", "perhaps"]),
        (&[], &[("METADATA_PROXY_REQUIRE_IMDSV2", "perhaps")], &["--require-imdsv2", "perhaps"]),
        (&[], &[("METADATA_PROXY_ALLOW_USER_DATA", "2")], &["--allow-user-data", "'2'"]),
        (&["--log-format", "xml"], &[], &["--log-format", "xml", "text", "json"]),
        (&[], &[("METADATA_PROXY_LOG_FORMAT", "xml")], &["--log-format", "xml"]),
        (&["--log", "metadata_proxy=loud"], &[], &["--log", "metadata_proxy=loud"]),
        (&[], &[("METADATA_PROXY_LOG", "a=b=c")], &["--log", "a=b=c"]),
        (&["--config", "/nowhere.toml"], &[], &["--config", "/nowhere.toml", "No such file"]),
        (&["--config", "/"], &[], &["--config", "directory"]),
        (&[], &[("METADATA_PROXY_CONFIG", "/nowhere.toml")], &["--config", "/nowhere.toml"]),
        (&["--default-rule", "x"], &[], &["--default-rule", "--default-role"]),
        (&["--cgroup"], &[], &["--cgroup"]),
        (&["more"], &[], &["more"]),
    ];
    for (args, variables, words) in cases {
        let args = [&["run"], *args].concat();
        let output = run(&machine, &args, variables)?;
        assert_eq!(output.status.code(), Some(64), "{args:?} {variables:?}: {output:?}");
        assert_says(&only_line(&output)?, words);
    }
    for args in [&[] as &[&str], &["start"], &["--run"]] {
        let output = run(&machine, args, &[])?;
        assert_eq!(output.status.code(), Some(64), "{args:?}: {output:?}");
        assert!(!only_line(&output)?.is_empty());
    }

    let file = machine.directory().join("config.toml").display().to_string();
    for (text, words) in [
        ("docker-host = 'unix:///x'\nrole = 'x'\n", &["config.toml:2", "unknown field `role`"][..]),
        ("[upstream]\nallowed = []\n", &["config.toml:2", "`allowed`"]),
        ("docker-host = \n", &["config.toml:1"]),
        ("log = 'info'\nlog = 'debug'\n", &["config.toml:2", "duplicate"]),
        ("[simulate]\nregion = 'Ireland'\n", &["config.toml: [simulate]: region", "eu-west-1"]),
        ("[simulate]\n\nregoin = 'x'\n", &["config.toml:3", "regoin"]),
        ("disable-upstream = 'yes'\n", &["config.toml:1", "boolean"]),
        ("log-format = 'xml'\n", &["config.toml:1", "xml", "json"]),
        ("default-role = 'we b'\n", &["config.toml: default-role", "\"we b\""]),
        ("[session-tags]\n'aws:x' = 'y'\n", &["config.toml: [session-tags]", "aws:"]),
        ("docker-host = '/x'\n", &["config.toml: docker-host", "\"/x\""]),
        ("imds-endpoint = 'https://x'\n", &["config.toml: imds-endpoint", "https://x"]),
        ("imds-endpoint = 'http://x'\ndisable-upstream = true\n", &["config.toml: imds-endpoint", "disable-upstream"]),
        ("log = 'a=b=c'\n", &["config.toml: log", "a=b=c"]),
        ("[upstream]\nallow = ['meta-data/iam/**']\n", &["config.toml: [upstream]", "meta-data/iam/**", "credentials"]),
        ("[upstream]\nallow = ['meta-data/nonsense']\n", &["config.toml: [upstream]", "meta-data/nonsense"]),
        ("[upstream]\ndeny = ['nonsense']\n", &["config.toml: [upstream]", "nonsense"]),
        ("\u{1}", &["config.toml:1"]),
    ] {
        fs::write(&file, text)?;
        let output = run(&machine, &["run", "--config", &file], &[])?;
        assert_eq!(output.status.code(), Some(64), "{text:?}: {output:?}");
        assert_says(&only_line(&output)?, words);
    }
    fs::write(&file, b"log = '\xff'\n")?;
    let output = run(&machine, &["run", "--config", &file], &[])?;
    assert_eq!(output.status.code(), Some(64), "{output:?}");
    assert_says(&only_line(&output)?, &["config.toml", "UTF-8"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn empty_variables_count_as_unset() -> Result<()> {
    let machine = Machine::start()?;
    let names = [
        "DOCKER_HOST",
        "DEFAULT_IAM_ROLE",
        "METADATA_PROXY_IMDS_ENDPOINT",
        "METADATA_PROXY_DISABLE_UPSTREAM",
        "METADATA_PROXY_REQUIRE_IMDSV2",
        "METADATA_PROXY_ALLOW_USER_DATA",
        "METADATA_PROXY_CONFIG",
        "METADATA_PROXY_BPFFS",
        "METADATA_PROXY_LOG",
    ];
    // All is well with the configuration; it is only that there is no engine here.
    let status = run_until_warned(&machine, &["run"], &names.map(|name| (name, "")), &["unix:///var/run/docker.sock"])?;
    assert_eq!(status.code(), Some(0));
    // The two exclude each other.
    for (disable, wrong) in [("true", true), ("1", true), ("YES", true), ("false", false), ("0", false), ("off", false)]
    {
        let variables = [("METADATA_PROXY_DISABLE_UPSTREAM", disable)];
        let output = run(&machine, &["check", "--imds-endpoint", "http://192.0.2.1"], &variables)?;
        assert_eq!(output.status.code() == Some(64), wrong, "{disable}: {output:?}");
    }
    Ok(())
}

async fn role_of(container: &Container) -> Result<String> {
    let url = "http://169.254.169.254/latest/meta-data/iam/security-credentials/";
    container.exec(["/usr/bin/curl", "-sS", "--max-time", "5", url]).await?.success()
}

#[tokio::test(flavor = "multi_thread")]
async fn flags_win_over_the_environment_and_that_over_the_file() -> Result<()> {
    let mut stage = Stage::start().await?;
    let plain = stage.run(ContainerSpec::resident("plain")).await?;
    let config = format!("default-role = '{}'\nlog = 'error'\nlog-format = 'json'\n", role_arn("from-file"));
    // `ready` is said at the level info.
    let options = with_config(&stage, daemon_options().env("METADATA_PROXY_LOG", "info"), &config)?;
    let with_file = || options.clone();
    stage.replace_daemon(with_file()).await?;
    assert_eq!(role_of(&plain).await?, "from-file");
    assert!(stage.daemon.log()?.starts_with('{'));

    let with_variable = || with_file().env("DEFAULT_IAM_ROLE", role_arn("from-env"));
    stage.replace_daemon(with_variable().env("METADATA_PROXY_LOG_FORMAT", "text")).await?;
    assert_eq!(role_of(&plain).await?, "from-env");
    assert!(!stage.daemon.log()?.starts_with('{'));

    stage.replace_daemon(with_variable().arg("--default-role").arg(role_arn("from-flag"))).await?;
    assert_eq!(role_of(&plain).await?, "from-flag");
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_it_from_running_is_named_with_its_remedy() -> Result<()> {
    let machine = Machine::start()?;
    let cgroup = machine.inner_cgroup().display().to_string();
    let file = machine.directory().join("file");
    fs::write(&file, "")?;
    let file = file.display().to_string();
    // An engine may come later: containers are cut off from the real service until then.
    let engines: &[(&[&str], &[&str])] = &[
        (&["--cgroup", &cgroup], &["Docker engine", "unix:///var/run/docker.sock", "is it running", "--docker-host"]),
        (&["--cgroup", &cgroup, "--docker-host", "unix:///nowhere.sock"], &["unix:///nowhere.sock", "DOCKER_HOST"]),
        (&["--cgroup", &cgroup, "--docker-host", "tcp://127.0.0.1:1"], &["tcp://127.0.0.1:1", "--docker-host"]),
    ];
    for (args, words) in engines {
        let status = run_until_warned(&machine, &[&["run"], *args].concat(), &[], words)?;
        assert_eq!(status.code(), Some(0), "{args:?}");
    }
    let cases: &[(&[&str], &[&str])] = &[
        (&["--cgroup", "/tmp"], &["--cgroup /tmp", "cgroup2", "findmnt"]),
        (&["--cgroup", "/nowhere"], &["--cgroup /nowhere", "no such directory"]),
        (&["--cgroup", &cgroup, "--bpffs", "/nowhere"], &["--bpffs /nowhere", "no such directory"]),
        (&["--cgroup", &cgroup, "--bpffs", &file], &[&file, "not a bpffs", "mount -t bpf"]),
    ];
    for (args, words) in cases {
        let output = run(&machine, &[&["run"], *args].concat(), &[])?;
        assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
        assert_says(&only_line(&output)?, words);
    }

    let program = program()?.display().to_string();
    let shell = |script: &str| machine.command("timeout").args(["10", "sh", "-c", script, &program, &cgroup]).output();
    for capability in ["sys_admin", "net_admin", "sys_ptrace"] {
        let output = shell(&format!(r#"exec setpriv --bounding-set -{capability} "$0" run --cgroup "$1""#))?;
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let name = format!("CAP_{} is missing", capability.to_uppercase());
        assert_says(&only_line(&output)?, &[&name, "needs it to", "root", "--privileged"]);
    }
    let output = shell(r#"exec setpriv --reuid 65534 --clear-groups "$0" run --cgroup "$1""#)?;
    assert_says(&only_line(&output)?, &["is missing", "root"]);
    for (script, words) in [
        (r#"umount -R /sys/fs/cgroup && exec "$0" run"#, &["cgroup2", "mount -t cgroup2"][..]),
        (
            r#"umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec "$0" run"#,
            &["not the host's root cgroup", "--cgroupns=host", "--cgroup"],
        ),
    ] {
        let output = shell(&format!("exec unshare --mount --cgroup sh -c '{script}' \"$0\""))?;
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert_says(&only_line(&output)?, words);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bpffs_is_mounted_where_there_is_none() -> Result<()> {
    let host = TestHost::start().await?;
    let bpffs = host.directory().join("bpf");
    fs::create_dir(&bpffs)?;
    let bpffs = bpffs.display().to_string();
    let stage = Stage::on(host, daemon_options().arg("--bpffs").arg(&bpffs)).await?;
    let listed = stage.command("ls").arg(format!("{bpffs}/metadata-proxy")).output()?;
    assert!(String::from_utf8(listed.stdout)?.starts_with('v'));
    let mounted = stage.command("findmnt").args(["-no", "FSTYPE", &bpffs]).output()?;
    assert_eq!(String::from_utf8(mounted.stdout)?.trim(), "bpf");
    let plain = stage.run(ContainerSpec::resident("plain")).await?;
    assert!(role_of(&plain).await?.contains("404"));
    stage.assert_no_leak()?;

    let output = stage.command(program()?).args(["detach", "--bpffs", &bpffs]).output()?;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(String::from_utf8(output.stderr)?.contains(&format!("removed {bpffs}/metadata-proxy/v")));
    assert_eq!(role_of(&plain).await?, HOST_ROLE);
    Ok(())
}

async fn told(stage: &mut Stage, what: &str) -> Result<()> {
    stage.daemon.wait_for(what, Duration::from_secs(20), |log| log.contains(what)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_json_where_asked_and_has_the_programs_own_lines() -> Result<()> {
    let options = |level: &str| daemon_options().arg("--log-format").arg("json").env("METADATA_PROXY_LOG", level);
    let mut stage = Stage::start_with(options("debug")).await?;
    let spec = ContainerSpec::resident("web");
    let web = stage.run(spec.label("metadata-proxy.role", &role_arn("web"))).await?;
    assert_eq!(role_of(&web).await?, "web");
    told(&mut stage, "redirected cgroup").await?;
    let mut levels = Vec::new();
    for line in stage.daemon.log()?.lines() {
        let line: serde_json::Value = serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))?;
        for member in ["timestamp", "level", "target"] {
            assert!(line[member].is_string(), "no {member} in {line}");
        }
        let message = line["fields"]["message"].as_str().unwrap_or_default().to_owned();
        levels.push((line["level"].as_str().unwrap_or_default().to_owned(), message));
    }
    let redirected = levels.iter().find(|(_, message)| message.starts_with("redirected cgroup"));
    assert_eq!(redirected.map(|(level, _)| level.as_str()), Some("DEBUG"), "{levels:#?}");

    // Not at the default level.
    stage.replace_daemon(options("info")).await?;
    assert_eq!(role_of(&web).await?, "web");
    tokio::time::sleep(Duration::from_millis(300)).await;
    let log = stage.daemon.log()?;
    assert!(!log.contains("redirected cgroup") && !log.contains("DEBUG"), "{log}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_ever_logged() -> Result<()> {
    for static_keys in [true, false] {
        // Without keys the daemon acts under the host's own role, whose secrets come from the stand-in.
        let options = if static_keys {
            daemon_options()
        } else {
            DaemonOptions::default().env("AWS_ENDPOINT_URL_STS", STS_ENDPOINT).env("AWS_REGION", "eu-west-1")
        };
        let mut stage = Stage::start_with(options.env("METADATA_PROXY_LOG", "trace")).await?;
        let spec = ContainerSpec::resident("web");
        let web = stage.run(spec.label("metadata-proxy.role", &role_arn("web"))).await?;
        let script = r#"
            set -eu
            url=http://169.254.169.254/latest
            get() { /usr/bin/curl -sS --fail --max-time 8 -H "X-aws-ec2-metadata-token: $token" "$url/$1"; echo; }
            token=$(/usr/bin/curl -sS -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" $url/api/token)
            echo "$token"
            get meta-data/instance-id
            get meta-data/iam/security-credentials/web"#;
        let output = web.exec(["/usr/bin/sh", "-c", script]).await?.success()?;
        let (token, rest) = output.split_once('\n').context("no token")?;
        let (_, document) = rest.split_once('\n').context("no document")?;
        let document: serde_json::Value = serde_json::from_str(document)?;
        let value = |name: &str| document[name].as_str().unwrap_or_default().to_owned();
        told(&mut stage, "handed out").await?;
        let log = stage.daemon.log()?;
        assert!(log.contains(&value("AccessKeyId")), "the log does not tell what was handed out");
        assert!(log.contains("TRACE"), "not at the level trace");
        let mut secrets = vec![
            ("the secret key", value("SecretAccessKey")),
            ("the session token", value("Token")),
            ("the container's IMDS token", token.to_owned()),
            ("the host's secrets", "SIMULATED-HOST-SECRET".to_owned()),
            ("the daemon's IMDS token", "AQAAASIMULATED-".to_owned()),
        ];
        if static_keys {
            secrets.push(("the daemon's secret key", BASE_SECRET_KEY.to_owned()));
        }
        for (name, secret) in secrets {
            assert!(secret.len() > 10, "{name}: {secret:?}");
            let found = log.lines().find(|line| line.contains(&secret));
            assert_eq!(found, None, "{name} is in the log (static keys: {static_keys})");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_without_root_certificates_is_told_to_install_them() -> Result<()> {
    let host = TestHost::start().await?;
    let options = daemon_options().env("SSL_CERT_FILE", "/dev/null").env("SSL_CERT_DIR", "/nowhere");
    let mut daemon = host.daemon(options)?;
    let status = daemon.wait(Duration::from_secs(10)).await?;
    let log = daemon.log()?;
    ensure!(status.code() == Some(1) && log.contains("Install ca-certificates"), "{status}: {log}");
    Ok(())
}
