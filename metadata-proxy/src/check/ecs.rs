//! Whether an agent of ECS runs here that would lose its role: it is a container in the host's network.

use anyhow::bail;

use crate::{
    config::Config,
    containers::{Container, cgroup, docker::Engine},
    identity::{self, Verdict},
};

/// None: there is none.
pub(super) async fn agent(config: &Config) -> Option<anyhow::Result<String>> {
    for at in &config.engines {
        let engine = Engine::new(at.clone(), config.trust_image_metadata);
        // One that cannot be asked has a line of its own.
        if let Ok(Some(agent)) = engine.find(is_agent).await {
            return Some(keeps_its_role(config, &agent));
        }
    }
    None
}

/// As ecs-init starts it, and as others do by hand.
fn is_agent(container: &Container) -> bool {
    let repository = container.image.split([':', '@']).next().unwrap_or_default();
    container.name == "ecs-agent" || repository.ends_with("amazon/amazon-ecs-agent")
}

fn keeps_its_role(config: &Config, agent: &Container) -> anyhow::Result<String> {
    let path = cgroup::path_of(agent.pid).unwrap_or_default();
    let by_cgroup =
        config.exempt_cgroups.iter().any(|exempt| path.starts_with(exempt.strip_prefix("/").unwrap_or(exempt)));
    if by_cgroup || identity::decide(agent, &config.identity, None).verdict == Verdict::Instance {
        return Ok(format!("{} keeps the host's role", agent.name));
    }
    bail!(
        "container {0} gets no role of the host's: it loses its connection to ECS, and the host gets no more tasks. Add to the configuration file (examples/ecs/config.toml): [exempt] containers = [{0:?}]",
        agent.name
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::tests::container;

    #[test]
    fn an_agent_is_told_by_its_name_or_its_image() {
        let agent = |name: &str, image: &str| is_agent(&Container { image: image.into(), ..container(name, &[], &[]) });
        assert!(agent("ecs-agent", "anything"));
        assert!(agent("other", "public.ecr.aws/ecs/amazon/amazon-ecs-agent:latest"));
        assert!(agent("other", "amazon/amazon-ecs-agent"));
        assert!(!agent("my-ecs-agent-exporter", "exporter:1"));
    }
}
