//! What an engine says of a container and of its image.

use std::collections::HashMap;

use bollard::models::{ContainerInspectResponse, ContainerStateStatusEnum, ImageInspect};

use super::{Container, Given, UserNamespace, network};

/// What a container is before its cgroup is known.
pub(crate) struct Description {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) pid: u32,
    pub(crate) image: String,
    pub(super) image_id: String,
    /// Where an image is one of several architectures, that of the container.
    pub(super) architecture: Option<String>,
    networks: Vec<String>,
    /// Whether it is to have a user namespace of its own.
    pub(super) remapped: bool,
    /// The user whose engine it is; None: root's.
    pub(super) of_user: Option<u32>,
    pub(super) from_image: Option<Given>,
    pub(super) given: Given,
}

impl Given {
    fn new(labels: Option<HashMap<String, String>>, env: Option<Vec<String>>) -> Self {
        let (mut all, mut repeated) = (HashMap::new(), Vec::new());
        for variable in env.unwrap_or_default() {
            // One without a value is to unset it.
            let (name, value) = pair(&variable).map_or((variable, None), |(name, value)| (name, Some(value)));
            if all.insert(name.clone(), value).is_some() {
                repeated.push(name);
            }
        }
        all.retain(|name, _| !repeated.contains(name));
        let env = all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
        Self { labels: labels.unwrap_or_default(), env, repeated }
    }

    /// Takes out what the image has brought, which the engine shows among the container's own. What the starter has
    /// repeated word for word looks the same.
    pub(super) fn take_out(&mut self, image: &Self) -> Self {
        let (labels, env) = (take_out(&mut self.labels, &image.labels), take_out(&mut self.env, &image.env));
        Self { labels, env, repeated: Vec::new() }
    }
}

fn take_out(own: &mut HashMap<String, String>, image: &HashMap<String, String>) -> HashMap<String, String> {
    own.extract_if(|name, value| image.get(name) == Some(value)).collect()
}

impl Description {
    pub(super) fn at(self, cgroup: u64, user_namespace: UserNamespace, engine: &str) -> Container {
        let Self { id, name, pid, image, networks, from_image, given, of_user, .. } = self;
        let Given { labels, env, repeated } = given;
        let engine = engine.to_owned();
        Container {
            id,
            name,
            engine,
            service: false,
            of_user,
            pid,
            cgroup,
            image,
            networks,
            user_namespace,
            from_image,
            labels,
            env,
            repeated,
        }
    }
}

pub(crate) enum Lookup {
    Running(Box<Description>),
    /// Created, and perhaps about to run.
    Starting,
    /// Not there, or no longer running.
    Unknown,
}

pub(super) fn lookup(response: ContainerInspectResponse) -> Lookup {
    let Some(state) = response.state else { return Lookup::Unknown };
    let pid = state.pid.and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0);
    let (Some(pid), Some(true), Some(id)) = (pid, state.running, response.id) else {
        // An exited container may be starting again, and says so only when it runs.
        return match state.status {
            Some(ContainerStateStatusEnum::REMOVING | ContainerStateStatusEnum::DEAD) => Lookup::Unknown,
            _ => Lookup::Starting,
        };
    };
    let config = response.config.unwrap_or_default();
    let name = response.name.unwrap_or_default();
    let host = response.host_config.unwrap_or_default();
    let connected = response.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
    let connected = connected.into_iter().map(|(name, network)| (name, network.network_id.unwrap_or_default()));
    let given = Given::new(config.labels, config.env);
    let mode = host.network_mode.unwrap_or_default();
    let platform = response.image_manifest_descriptor.and_then(|manifest| manifest.platform);
    Lookup::Running(Box::new(Description {
        name: name.trim_start_matches('/').to_owned(),
        id,
        pid,
        image: config.image.unwrap_or_default(),
        image_id: response.image.unwrap_or_default(),
        architecture: platform.and_then(|platform| platform.architecture),
        remapped: host.userns_mode.as_deref() != Some("host"),
        of_user: None,
        networks: network::names(mode, &given.labels, &connected.collect()),
        from_image: None,
        given,
    }))
}

/// What an image brings; None if that is not told, or of another part than the container's. With the containerd image
/// store an engine answers without a configuration, or with an empty one, where it has nothing of an image for its own
/// platform, and a container can be of another than it shows. An image may name no architecture; of one of which something
/// is told, the layers are.
pub(super) fn settings_of(image: ImageInspect, architecture: Option<&String>) -> Option<Given> {
    let shown = image.architecture.unwrap_or_default();
    let config = image.config?;
    let layers = image.root_fs.and_then(|root| root.layers).unwrap_or_default();
    let told = !shown.is_empty() || !layers.is_empty();
    let same = architecture.is_none_or(|architecture| *architecture == shown);
    (told && same).then(|| Given::new(config.labels, config.env))
}

fn pair(variable: &str) -> Option<(String, String)> {
    let (name, value) = variable.split_once('=')?;
    Some((name.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use bollard::models::{ContainerConfig, ContainerState, HostConfig, ImageConfig, ImageInspectRootFs};

    use super::*;

    #[test]
    fn an_environment_variable_is_split_at_its_first_equals_sign() {
        assert_eq!(pair("IAM_ROLE=a=b"), Some(("IAM_ROLE".into(), "a=b".into())));
        assert_eq!(pair("EMPTY="), Some(("EMPTY".into(), String::new())));
        assert_eq!(pair("NOTHING"), None);
    }

    #[test]
    fn a_variable_that_is_there_twice_is_none() {
        let given = |env: &[&str]| Given::new(None, Some(env.iter().map(|&variable| variable.to_owned()).collect()));
        let twice = given(&["IAM_ROLE=a", "PATH=/bin", "IAM_ROLE=b", "IAM_POLICY", "IAM_ROLE=a"]);
        assert_eq!(twice.env.keys().collect::<Vec<_>>(), ["PATH"]);
        assert_eq!(twice.repeated[0], "IAM_ROLE");
        assert!(!twice.repeated.contains(&"IAM_POLICY".to_owned()));
        assert_eq!(given(&["IAM_ROLE", "IAM_ROLE=a"]).repeated, ["IAM_ROLE"]);
    }

    #[test]
    fn a_container_without_a_process_is_only_starting() {
        let state = ContainerState { running: Some(false), pid: Some(0), ..Default::default() };
        let response = ContainerInspectResponse { id: Some("id".into()), state: Some(state), ..Default::default() };
        assert!(matches!(lookup(response), Lookup::Starting));
    }

    #[test]
    fn a_running_container_is_described() {
        let state = ContainerState { running: Some(true), pid: Some(7), ..Default::default() };
        let config = ContainerConfig { env: Some(vec!["IAM_ROLE=r".into()]), ..Default::default() };
        let response = ContainerInspectResponse {
            id: Some("id".into()),
            name: Some("/web".into()),
            state: Some(state),
            config: Some(config),
            ..Default::default()
        };
        let Lookup::Running(description) = lookup(response) else { panic!("not running") };
        assert_eq!((description.name.as_str(), description.pid), ("web", 7));
        assert_eq!(description.given.env.get("IAM_ROLE").map(String::as_str), Some("r"));
    }

    #[test]
    fn what_the_image_brings_is_taken_out_and_what_the_starter_changes_stays() {
        let settings = |role: &str, path: &str| {
            let labels = HashMap::from([("metadata-proxy.role".to_owned(), role.to_owned())]);
            Given::new(Some(labels), Some(vec![format!("IAM_ROLE={role}"), format!("PATH={path}")]))
        };
        let image = settings("admin", "/bin");
        let mut own = settings("admin", "/usr/bin");
        let taken = own.take_out(&image);
        assert_eq!(taken.labels, image.labels);
        assert_eq!(taken.env.into_iter().collect::<Vec<_>>(), [("IAM_ROLE".to_owned(), "admin".to_owned())]);
        assert!(own.labels.is_empty());
        assert_eq!(own.env.keys().collect::<Vec<_>>(), ["PATH"]);
        let mut own = settings("web", "/usr/bin");
        assert_eq!(own.take_out(&image), Given::default());
        assert_eq!((own.labels.len(), own.env.len()), (1, 2));
    }

    #[test]
    fn an_image_of_which_nothing_is_told_is_not_taken_for_one_that_brings_nothing() {
        let role = || HashMap::from([("metadata-proxy.role".to_owned(), "admin".to_owned())]);
        let image = |architecture: &str, config: Option<ImageConfig>| ImageInspect {
            architecture: Some(architecture.to_owned()),
            config,
            ..Default::default()
        };
        let config = || Some(ImageConfig { labels: Some(role()), ..Default::default() });
        let (own, other) = ("amd64".to_owned(), "arm64".to_owned());
        for architecture in [None, Some(&own)] {
            let settings = settings_of(image("amd64", config()), architecture).unwrap();
            assert_eq!(settings.labels, role());
        }
        assert!(settings_of(image("amd64", config()), Some(&other)).is_none());
        assert!(settings_of(image("amd64", None), None).is_none());
        assert!(settings_of(image("", Some(ImageConfig::default())), None).is_none());
        assert!(settings_of(ImageInspect { config: config(), ..Default::default() }, None).is_none());
        // One that names no architecture, and is there.
        let layers = ImageInspectRootFs { layers: Some(vec!["sha256:0".into()]), ..Default::default() };
        let unnamed = || ImageInspect { root_fs: Some(layers.clone()), ..image("", config()) };
        assert_eq!(settings_of(unnamed(), None).unwrap().labels, role());
        assert!(settings_of(unnamed(), Some(&own)).is_none());
    }

    #[test]
    fn a_container_is_remapped_unless_it_says_otherwise() {
        let lookup_with = |mode: Option<&str>| {
            let state = ContainerState { running: Some(true), pid: Some(7), ..Default::default() };
            let host = HostConfig { userns_mode: mode.map(str::to_owned), ..Default::default() };
            let (id, state, host_config) = (Some("id".to_owned()), Some(state), Some(host));
            match lookup(ContainerInspectResponse { id, state, host_config, ..Default::default() }) {
                Lookup::Running(description) => description.remapped,
                _ => panic!("not running"),
            }
        };
        assert_eq!([None, Some(""), Some("host")].map(lookup_with), [true, true, false]);
    }
}
