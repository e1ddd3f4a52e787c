//! Transparent proxies in a container's own network namespace, as service meshes put them there.

use anyhow::{Result, ensure};
use metadata_proxy_tests::{
    host::ContainerSpec,
    stage::{Stage, role_arn},
};

/// The rules of Consul's transparent proxy (hashicorp/consul, sdk/iptables), which all outgoing connections are redirected by
/// but those to the proxy's own address and to what is excluded.
const RULES: &str = "set -e; rules() { iptables -t nat -A OUTPUT \"$@\"; }; \
    rules -d 127.0.0.1/32 -j RETURN; for address in $EXCLUDED; do rules -d $address -j RETURN; done; \
    rules -p tcp -j REDIRECT --to-ports 15001; \
    curl -s -o /dev/null --max-time 8 -w '%{http_code}' \
        http://169.254.169.254/latest/meta-data/iam/security-credentials/ || true";

#[tokio::test(flavor = "multi_thread")]
async fn a_transparent_proxy_leaves_the_metadata_service_alone_where_our_address_is_excluded() -> Result<()> {
    let stage = Stage::start().await?;
    for (name, excluded, expected) in [
        // To the proxy, which is not there; never to the real service.
        ("meshed", "169.254.169.254/32", "000"),
        ("excluded", "169.254.169.254/32 127.169.254.169/32", "200"),
    ] {
        let spec = ContainerSpec::on_host(name, ["/usr/bin/sh", "-c", RULES]).env("EXCLUDED", excluded);
        let mut spec = spec.env("PATH", "/usr/sbin:/usr/bin").label("metadata-proxy.role", &role_arn(name));
        spec.host_config.cap_add = Some(vec!["NET_ADMIN".to_owned()]);
        let said = stage.finish(&stage.run(spec).await?).await?;
        ensure!(said == expected, "{name}: {said}");
    }
    stage.assert_no_leak()
}
