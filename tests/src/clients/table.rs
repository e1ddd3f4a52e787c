//! What came of the clients, for people: at the terminal, and as docs/clients.md has it.

use std::fmt::Write as _;

use super::scenarios::{Outcome, Row, Scenario};

/// Client, version, scenario, result.
pub fn print(rows: &[Row]) -> String {
    let mut text = format!("{:<34} {:<22} {:<14} {}\n", "client", "version", "scenario", "result");
    for row in rows {
        for (scenario, outcome) in &row.outcomes {
            let title = format!("{} ({})", row.client.title, row.client.name);
            let _ = write!(text, "{title:<34} {:<22} {scenario:<14} ", row.version);
            let _ = match outcome {
                Outcome::Good(told) => writeln!(text, "{told}"),
                Outcome::NotApplicable(why) => writeln!(text, "- {why}"),
                Outcome::Bad(why) => writeln!(text, "WRONG: {why}"),
            };
        }
    }
    text
}

/// The tables of docs/clients.md.
pub fn markdown(rows: &[Row]) -> String {
    let mut text = "| client | name | version |".to_owned();
    for scenario in Scenario::ALL {
        let _ = write!(text, " {scenario} |");
    }
    let _ = writeln!(text, "\n|{}", "---|".repeat(3 + Scenario::ALL.len()));
    for row in rows {
        let _ = write!(text, "| {} | `{}` | {} |", row.client.title, row.client.name, row.version);
        for scenario in Scenario::ALL {
            let _ = match row.outcomes.get(&scenario) {
                Some(Outcome::Good(told)) => write!(text, " {told} |"),
                Some(Outcome::NotApplicable(_)) | None => write!(text, " – |"),
                Some(Outcome::Bad(_)) => write!(text, " **wrong** |"),
            };
        }
        text.push('\n');
    }
    let _ = writeln!(text, "\n| name | connections | requests of one load |\n|---|---|---|");
    for row in rows {
        let (name, recording) = (row.client.name, &row.recording);
        // The role has the client's name.
        let own = format!("/{name}");
        let requests = recording.summary().into_iter().map(|line| match line.strip_suffix(&own) {
            Some(before) => format!("{before}/ROLE"),
            None => line,
        });
        let requests = requests.collect::<Vec<_>>().join("`, `");
        let _ =
            writeln!(text, "| [`{name}`](../tests/recordings/{name}.http) | {} | `{requests}` |", recording.0.len());
    }
    text
}
