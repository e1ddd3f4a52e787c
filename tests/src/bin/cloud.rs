//! The stand-ins beyond a whole host of `cargo xtask host`, and what they were asked.
//!
//! Usage: `cloud STS-ADDRESS IMDS-ADDRESS...`, in the network where these addresses are. Prints a line for each request that has
//! been answered: `imds METHOD TARGET STATUS USER-AGENT`, with `SECRET` at its end if the host's credentials were in the answer, and
//! `sts ACTION ACCESS-KEY ROLE` for credentials that were issued.
#![expect(clippy::print_stdout, reason = "what it was asked is its standard output")]

use std::{env, net::TcpListener, thread, time::Duration};

use anyhow::{Context as _, Result};
use metadata_proxy_tests::{
    imds::Imds,
    sts::{Outcome, Sts},
};

const PAUSE: Duration = Duration::from_millis(50);

fn main() -> Result<()> {
    let bind = |address: String| TcpListener::bind(&address).with_context(|| format!("listen at {address}"));
    let mut addresses = env::args().skip(1);
    let sts = addresses.next().context("usage: cloud STS-ADDRESS IMDS-ADDRESS...")?;
    let imds = Imds::start(addresses.map(bind).collect::<Result<_>>()?)?;
    let sts = Sts::start(bind(sts)?)?;
    let (mut asked, mut called) = (0, 0);
    loop {
        // In order, so a request without an answer holds back those after it.
        for request in imds.requests().iter().skip(asked) {
            let Some(status) = request.status else { break };
            let secret = if request.secret { " SECRET" } else { "" };
            println!("imds {} {} {status} {}{secret}", request.method, request.target, request.user_agent());
            asked += 1;
        }
        for call in sts.calls().iter().skip(called) {
            match &call.outcome {
                Outcome::Open => break,
                Outcome::Issued(key) => {
                    let role = sts.issued(key).map(|issued| issued.role_arn).unwrap_or_default();
                    println!("sts {} {key} {role}", call.action);
                }
                other => println!("sts {} {other:?}", call.action),
            }
            called += 1;
        }
        thread::sleep(PAUSE);
    }
}
