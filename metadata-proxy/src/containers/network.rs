//! The names of the networks that a container was created with.

use std::collections::HashMap;

/// Swarm gives its tasks the mode `default`, whatever networks their service has.
const SWARM: &str = "com.docker.swarm.task.id";

/// Of the mode, which names a network by its name, its id, or the beginning of that; and of the networks that the container is
/// connected to, name and id.
pub(super) fn names(
    mode: String,
    labels: &HashMap<String, String>,
    connected: &HashMap<String, String>,
) -> Vec<String> {
    let mut names: Vec<_> = connected.keys().cloned().collect();
    names.sort_unstable();
    match mode.as_str() {
        "default" if labels.contains_key(SWARM) && !names.is_empty() => names,
        // Two names of the same, depending on the client that created the container.
        "" | "default" => vec!["bridge".to_owned()],
        // In the order in which the engine looks for it.
        _ => {
            let whole = names.iter().find(|name| connected.get(*name) == Some(&mode));
            let named = names.iter().find(|name| **name == mode);
            let begun = || names.iter().find(|name| connected.get(*name).is_some_and(|id| id.starts_with(&mode)));
            vec![whole.or(named).or_else(begun).unwrap_or(&mode).clone()]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_told_by_its_name_however_it_was_named() {
        let (shop, other) = ("13b6b64115fada60".repeat(4), "a1".repeat(32));
        // One that is named like another's id, and one like the beginning of it.
        let connected = [("shop", &*shop), ("13b6", &*other), (&*other, "b2")];
        let connected: HashMap<_, _> = connected.into_iter().map(|(name, id)| (name.into(), id.into())).collect();
        for (mode, expected) in [
            ("shop", "shop"),
            (&shop, "shop"),
            (&shop[..12], "shop"),
            (&other, "13b6"),
            ("13b6", "13b6"),
            ("default", "bridge"),
            ("", "bridge"),
            ("host", "host"),
            ("none", "none"),
            ("container:0123", "container:0123"),
            ("gone", "gone"),
        ] {
            assert_eq!(names(mode.to_owned(), &HashMap::new(), &connected), [expected], "{mode}");
        }
    }

    #[test]
    fn a_task_of_swarm_has_all_networks_of_its_service() {
        let labels = HashMap::from([(SWARM.to_owned(), "x".to_owned())]);
        let of = |mode: &str, connected: &[&str]| {
            let connected = connected.iter().map(|name| ((*name).to_owned(), format!("id of {name}"))).collect();
            names(mode.to_owned(), &labels, &connected)
        };
        assert_eq!(of("default", &["over", "only"]), ["only", "over"]);
        assert_eq!(of("default", &["ingress"]), ["ingress"]);
        assert_eq!(of("default", &[]), ["bridge"]);
        assert_eq!(of("host", &["host"]), ["host"]);
    }
}
