//! The body of an answer on its way to the container.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::channel::{Channel, Sender};
use tokio::time::timeout;
use tracing::debug;

use super::{pool::Exchange, slots::Slot};

/// The real service's longest pause within a body.
const STALL: Duration = Duration::from_secs(2);
/// For all of a body. A container that takes it more slowly loses it: it keeps a connection, and one of the slots of its
/// own share, no longer than that.
const WHOLE: Duration = Duration::from_secs(10);
/// Of a body, so many pieces are read ahead of the container.
const AHEAD: usize = 4;

#[derive(Debug)]
pub(crate) enum Payload {
    Whole(Bytes),
    /// With its length. A stream that fails ends before that, and the container's connection with it: no client takes
    /// the part for the whole.
    Stream(Channel<Bytes, Cut>, u64),
}

/// Why a stream has ended before its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Cut {
    #[error("the real metadata service pauses for {STALL:?} in the middle of an answer")]
    Stalled,
    #[error("the answer was not passed on within {WHOLE:?}")]
    Slow,
    #[error("the real metadata service breaks off: {0}")]
    Broken(#[from] hyper::Error),
}

/// In a task of its own, which ends also where the container does not read.
pub(super) fn start(exchange: Exchange, length: u64, slot: Slot) -> Payload {
    let (mut sender, channel) = Channel::new(AHEAD);
    tokio::spawn(async move {
        let passed = timeout(WHOLE, pass_on(exchange, &mut sender)).await;
        if let Err(cut) = passed.unwrap_or(Err(Cut::Slow)) {
            debug!("{cut}");
            sender.abort(cut);
        }
        drop(slot);
    });
    Payload::Stream(channel, length)
}

async fn pass_on(mut exchange: Exchange, sender: &mut Sender<Bytes, Cut>) -> Result<(), Cut> {
    while let Some(frame) = timeout(STALL, exchange.frame()).await.map_err(|_| Cut::Stalled)? {
        let Ok(data) = frame?.into_data() else { continue };
        if sender.send_data(data).await.is_err() {
            return Ok(()); // nobody wants it any more
        }
    }
    exchange.done();
    Ok(())
}
