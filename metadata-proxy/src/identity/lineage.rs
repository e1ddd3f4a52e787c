//! What earlier containers of the same name had from their images.
//!
//! A program that updates containers makes another of a newer image, with the whole configuration of the old one: also with
//! what that had from its image, which looks as if the starter had said it. Known are containers since the daemon's start.

use std::collections::HashMap;

use crate::containers::{Container, Given};

/// Compose starts a container anew with another mark where somebody has changed what it is to be.
const COMPOSE: &str = "com.docker.compose.config-hash";

/// Names that are remembered; a host has some hundreds.
const NAMES: usize = 4096;

#[derive(Debug, Default)]
pub(crate) struct Lineage(HashMap<String, Latest>);

/// The last container of a name.
#[derive(Debug)]
struct Latest {
    id: String,
    compose: Option<String>,
    /// What those before it had from their images.
    before: Given,
    own: Given,
}

impl Lineage {
    /// Adds to what a container has from its image what it has from those of its predecessors.
    pub(crate) fn trace(&mut self, container: &mut Container) {
        let Some(from_image) = &mut container.from_image else { return };
        let compose = container.labels.get(COMPOSE).cloned();
        let own = from_image.clone();
        let before = match self.0.remove(&container.name) {
            Some(latest) if latest.id == container.id => latest.before,
            Some(latest) if compose.is_none() || latest.compose == compose => {
                let Latest { mut before, own, .. } = latest;
                before.labels.extend(own.labels);
                before.env.extend(own.env);
                before
            }
            _ => Given::default(),
        };
        inherit(&mut container.labels, &mut from_image.labels, &before.labels);
        inherit(&mut container.env, &mut from_image.env, &before.env);
        if self.0.len() >= NAMES {
            self.0.clear();
        }
        let id = container.id.clone();
        self.0.insert(container.name.clone(), Latest { id, compose, before, own });
    }
}

type Pairs = HashMap<String, String>;

/// A program that copies does so with all that was there; somebody who says one thing again has meant it.
fn inherit(own: &mut Pairs, image: &mut Pairs, before: &Pairs) {
    let copied = before.iter().all(|(name, value)| own.get(name).or(image.get(name)) == Some(value));
    if copied {
        image.extend(own.extract_if(|name, value| before.get(name) == Some(value)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::tests::{container, map};

    const ROLE: (&str, &str) = ("IAM_ROLE", "admin");
    const VERSION: (&str, &str) = ("VERSION", "1");

    fn traced(lineage: &mut Lineage, id: &str, own: &[(&str, &str)], image: &[(&str, &str)], hash: &str) -> Container {
        let labels = [(COMPOSE, hash)];
        let labels = if hash.is_empty() { &[] } else { &labels[..] };
        let from_image = Some(Given { env: map(image), ..Given::default() });
        let mut container = Container { id: id.into(), from_image, ..container("web", labels, own) };
        lineage.trace(&mut container);
        container
    }

    #[test]
    fn what_an_updater_copies_of_an_old_image_stays_the_images() {
        for hash in ["", "0123"] {
            let mut lineage = Lineage::default();
            let old = traced(&mut lineage, "1", &[], &[ROLE, VERSION], hash);
            assert_eq!(old.from_image.unwrap().env, map(&[ROLE, VERSION]));
            // A newer image has another version and names no role. Its container again, and one of a newer image still.
            for id in ["2", "2", "3"] {
                let new = traced(&mut lineage, id, &[ROLE, VERSION, ("TEAM", "a")], &[("LANG", "C")], hash);
                assert_eq!(new.env, map(&[("TEAM", "a")]), "{id}");
                assert_eq!(new.from_image.unwrap().env, map(&[ROLE, VERSION, ("LANG", "C")]), "{id}");
            }
        }
    }

    #[test]
    fn what_somebody_says_anew_is_his() {
        let mut lineage = Lineage::default();
        traced(&mut lineage, "1", &[], &[ROLE, VERSION], "0123");
        // Another configuration, or another value, or not the whole.
        assert_eq!(traced(&mut lineage, "2", &[ROLE, VERSION], &[], "4567").env.len(), 2);
        let mut lineage = Lineage::default();
        traced(&mut lineage, "1", &[], &[ROLE, VERSION], "");
        assert_eq!(traced(&mut lineage, "2", &[("IAM_ROLE", "web"), VERSION], &[], "").env.len(), 2);
        assert_eq!(traced(&mut lineage, "3", &[ROLE], &[("VERSION", "2")], "").env, map(&[ROLE]));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut lineage = Lineage::default();
        for number in 0..=NAMES {
            lineage.trace(&mut container(&number.to_string(), &[], &[]));
        }
        assert_eq!(lineage.0.len(), 1);
    }
}
