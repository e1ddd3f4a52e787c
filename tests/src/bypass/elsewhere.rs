//! The table's ways on a machine that is not of our making, such as the guest of `cargo xtask vm`: where its own loopback has
//! the service and nobody listens beyond an uplink, what the stand-in records is what there is to see.

use anyhow::Result;

use super::{
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
            let (way, place, expect) = (way.words.to_owned(), place.name().to_owned(), way.expect);
            let report = report(finished)?;
            rows.push(Row { way, place, expect, report, seen, before: None, leads_there: false });
        }
        container.remove().await?;
    }
    Ok(rows)
}
