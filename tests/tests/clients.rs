//! Clients that others wrote: what they get, what they send, and what that is answered.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use metadata_proxy_tests::{
    clients::{
        Client, Programs,
        recording::{Recording, kept_answer},
        scenarios::{self, Row},
        table,
    },
    host::ContainerSpec,
    stage::{Stage, aws_config_client, role_arn},
};

/// Sends what it is given, one connection after the other, and prints what came back. A token that it was given takes the
/// place of those in the recording.
const REPLAY: &str = r#"
import json, re, socket, sys

def answer(sock, data=b""):
    while True:
        head, end, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if end and len(body) >= int(length[1] if length else 0):
            return data
        part = sock.recv(65536)
        if not part:
            return data
        data += part

token, result = b"", []
for requests in json.loads(sys.argv[1]):
    sock = socket.create_connection(("169.254.169.254", 80), 10)
    answers = []
    for request in requests:
        sock.sendall(request.encode("latin-1").replace(b": TOKEN\r\n", b": " + token + b"\r\n"))
        answers.append(answer(sock))
        if request.startswith("PUT "):
            token = answers[-1].partition(b"\r\n\r\n")[2]
    sock.close()
    result.append([answer.decode("latin-1") for answer in answers])
print(json.dumps(result))
"#;

fn recordings() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("recordings")
}

fn kept(client: &str) -> Result<String> {
    let file = recordings().join(format!("{client}.http"));
    std::fs::read_to_string(&file)
        .with_context(|| format!("read {}; make it: cargo xtask clients --record", file.display()))
}

/// Which of its connections a client takes is for its pool to say.
fn same(one: &str, other: &str) -> bool {
    let said = |text: &str| {
        text.lines().filter(|line| !line.starts_with("# connection")).map(str::to_owned).collect::<Vec<_>>()
    };
    said(one) == said(other)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_client_gets_its_own_role_in_every_scenario_and_sends_what_it_always_sent() -> Result<()> {
    let programs = Programs::from_env(aws_config_client()?)?;
    let clients: Vec<Client> = Client::every().collect();
    let mut rows = scenarios::run(&programs, &clients).await?;
    // Clients have their own clocks and pools: on a busy machine one may time out, or take a second connection. Whoever
    // does so twice has changed.
    let doubtful =
        |row: &Row| !row.good() || kept(row.client.name).map_or(true, |kept| !same(&kept, &row.recording.write()));
    let again: Vec<Client> = rows.iter().filter(|row| doubtful(row)).map(|row| row.client).collect();
    if !again.is_empty() {
        eprint!("tried again: {}", table::print(&rows));
        rows.retain(|row| !doubtful(row));
        rows.extend(scenarios::run(&programs, &again).await?);
    }
    let text = table::print(&rows);
    eprint!("{text}");
    ensure!(rows.iter().all(Row::good), "{text}");
    for row in &rows {
        let (kept, sent) = (kept(row.client.name)?, row.recording.write());
        ensure!(
            same(&kept, &sent),
            "{} no longer says or hears what is kept; if that is right: cargo xtask clients --record {0}\nkept:\n{kept}\nnow:\n{sent}",
            row.client.name
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_clients_have_sent_is_answered_as_it_always_was() -> Result<()> {
    let stage = Stage::start().await?;
    let mut replayed = 0;
    for client in Client::every() {
        let Recording(kept) = Recording::read(&kept(client.name)?);
        let spec = ContainerSpec::resident(client.name);
        let container = stage.run(spec.label("metadata-proxy.role", &role_arn(client.name))).await?;
        let latin = |bytes: &[u8]| bytes.iter().map(|byte| char::from(*byte)).collect::<String>();
        let requests: Vec<Vec<String>> =
            kept.iter().map(|exchanges| exchanges.iter().map(|exchange| latin(&exchange.request)).collect()).collect();
        let plan = serde_json::to_string(&requests)?;
        let output = container.exec(["/usr/bin/python3", "-c", REPLAY, &plan]).await?.success()?;
        let answers: Vec<Vec<String>> = serde_json::from_str(&output)?;
        container.remove().await?;
        for (exchange, answer) in kept.iter().flatten().zip(answers.iter().flatten()) {
            let answer: Vec<u8> = answer.chars().map(|character| character as u8).collect();
            let answer = kept_answer(&answer);
            ensure!(
                answer == exchange.answer,
                "{}: {}\nwas answered:\n{}\nand now:\n{}",
                client.name,
                String::from_utf8_lossy(&exchange.request),
                String::from_utf8_lossy(&exchange.answer),
                String::from_utf8_lossy(&answer)
            );
            replayed += 1;
        }
        ensure!(
            answers.iter().flatten().count() == kept.iter().flatten().count(),
            "{}: an answer is missing",
            client.name
        );
    }
    ensure!(replayed >= 2 * Client::every().count(), "only {replayed} requests in all recordings");
    stage.assert_no_leak()
}
