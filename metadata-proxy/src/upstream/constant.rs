//! What stays the same for the life of an instance, and so is asked for once.
//!
//! Only what AWS says never changes, without exception: an instance has one id (EC2 API, `InstanceId`) and lies in one
//! subnet, which is in one zone (VPC User Guide, "Subnets"); launch index and reservation are facts about its launch
//! (EC2 User Guide, "Instance metadata categories"); domain and partition are the region's. All others change while the
//! daemon runs or may do so: addresses, names, security groups, tags, events; group, host and partition of a placement,
//! type and identity document after a stop; the AMI when a root volume is replaced.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};

use super::{Answer, Payload};

const CONSTANT: [&str; 8] = [
    "meta-data/ami-launch-index",
    "meta-data/instance-id",
    "meta-data/placement/availability-zone",
    "meta-data/placement/availability-zone-id",
    "meta-data/placement/region",
    "meta-data/reservation-id",
    "meta-data/services/domain",
    "meta-data/services/partition",
];
/// All of them in all versions that there are; what calls itself the real service may have more.
const LIMIT: usize = 512;

/// Whether a canonical path is one of these, in any version.
pub(super) fn is_constant(path: &str) -> bool {
    let below = path.strip_prefix('/').and_then(|path| path.split_once('/'));
    below.is_some_and(|(_, document)| CONSTANT.contains(&document.trim_end_matches('/')))
}

/// By path, version included: an older one may not have the document.
#[derive(Default)]
pub(super) struct Constants(Mutex<HashMap<String, (HeaderMap, Bytes)>>);

impl Constants {
    pub(super) fn get(&self, path: &str) -> Option<Answer> {
        let (headers, body) = self.lock().get(path)?.clone();
        Some(Answer { status: StatusCode::OK, headers, payload: Payload::Whole(body) })
    }

    pub(super) fn keep(&self, path: &str, answer: &Answer) {
        let Payload::Whole(body) = &answer.payload else { return };
        if answer.status != StatusCode::OK || body.is_empty() || !is_constant(path) {
            return;
        }
        let mut known = self.lock();
        if known.len() < LIMIT {
            known.insert(path.to_owned(), (answer.headers.clone(), body.clone()));
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, (HeaderMap, Bytes)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, body: &'static str) -> Answer {
        let status = StatusCode::from_u16(status).unwrap();
        Answer { status, headers: HeaderMap::new(), payload: Payload::Whole(Bytes::from(body)) }
    }

    #[test]
    fn only_what_never_changes_is_kept() {
        for (path, kept) in [
            ("/latest/meta-data/instance-id", true),
            ("/2009-04-04/meta-data/instance-id/", true),
            ("/latest/meta-data/placement/region", true),
            ("/latest/meta-data/placement/", false),
            ("/latest/meta-data/placement/host-id", false),
            ("/latest/meta-data/local-ipv4", false),
            ("/latest/meta-data/instance-id/x", false),
            ("/latest/dynamic/instance-identity/document", false),
            ("/latest", false),
            ("/", false),
        ] {
            let constants = Constants::default();
            constants.keep(path, &answer(200, "x"));
            assert_eq!(constants.get(path).is_some(), kept, "{path}");
        }
    }

    #[test]
    fn neither_failures_nor_nothing_are_kept() {
        let constants = Constants::default();
        for (status, body) in [(404, "x"), (500, "x"), (200, "")] {
            constants.keep("/latest/meta-data/instance-id", &answer(status, body));
        }
        assert!(constants.get("/latest/meta-data/instance-id").is_none());
    }

    #[test]
    fn a_service_that_says_yes_to_everything_fills_no_memory() {
        let constants = Constants::default();
        for version in 0..2 * LIMIT {
            constants.keep(&format!("/{version}/meta-data/instance-id"), &answer(200, "x"));
        }
        assert_eq!(constants.lock().len(), LIMIT);
    }
}
