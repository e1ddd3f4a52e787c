//! The table's ways on a machine that is not of our making, such as the guest of `cargo xtask vm`: where its own loopback has
//! the service and nobody listens beyond an uplink, what the stand-in records is what there is to see.

use anyhow::Result;

use super::{
    Expect::Refused,
    Row, Seen,
    scene::{PROBE, probe, report, spec},
    table::{Place, TABLE},
};
use crate::stage::Stage;

/// Those that need neither a network that is made for them nor another user namespace.
const PLACES: [Place; 6] =
    [Place::Plain, Place::Unconfined, Place::NetAdmin, Place::Host, Place::None, Place::Privileged];

pub async fn run_on(stage: &Stage) -> Result<Vec<Row>> {
    let probe = probe()?;
    let mut rows = Vec::new();
    for place in PLACES {
        let container = stage.run(place.furnish(spec(&probe, place.name(), ["sleep", "3600"]))).await?;
        // Frames go to an uplink, and its far end would have to tell.
        for way in TABLE.iter().filter(|way| way.place == place && !way.words.starts_with("frame")) {
            let finished = container.exec([PROBE].into_iter().chain(way.words.split(' '))).await?;
            let seen = Seen { requests: stage.imds.requests().len(), packets: String::new() };
            stage.imds.clear();
            rows.push(Row { seen, ..Row::of(way.words, place.name(), way.expect, report(finished)?) });
        }
        if place == Place::Host {
            // These kernels take the program that refuses it to 32-bit programs, too.
            let report = report(container.exec([PROBE, "option-32"]).await?)?;
            rows.push(Row::of("option-32", place.name(), Refused, report));
        }
        container.remove().await?;
    }
    Ok(rows)
}
