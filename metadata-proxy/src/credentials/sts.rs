//! STS through the AWS SDK: the standard chain of source credentials and region, `AssumeRole`, `GetCallerIdentity`.

use std::error::Error;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context as _;
use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_config::imds::credentials::ImdsCredentialsProvider;
use aws_config::imds::region::ImdsRegionProvider;
use aws_config::meta::region::{ProvideRegion as _, RegionProviderChain};
use aws_config::profile::ProfileFileRegionProvider;
use aws_config::provider_config::ProviderConfig;
use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{AppName, BehaviorVersion, Region, environment::EnvironmentVariableRegionProvider, imds};
use aws_credential_types::provider::{ProvideCredentials as _, SharedCredentialsProvider};
use aws_sdk_sts::Client;
use aws_sdk_sts::config::interceptors::InterceptorContext;
use aws_sdk_sts::config::retry::{ClassifyRetry, RetryAction};
use aws_sdk_sts::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_sts::operation::assume_role::{AssumeRoleError, AssumeRoleOutput};
use aws_sdk_sts::operation::get_caller_identity::GetCallerIdentityError;
use aws_sdk_sts::types::{PolicyDescriptorType, Tag};
use jiff::{SignedDuration, Timestamp};
use tokio::sync::RwLock;

use super::clock::Comparison;
use super::failure::{self, Failure, STALE_SOURCE, Subject};
use super::source;
use super::{AssumeFuture, Credentials, RoleSession, Sts};

/// In every partition STS is regional, but the commercial one is what a daemon without any region most likely means.
const FALLBACK_REGION: &str = "us-east-1";

/// Who the daemon itself is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CallerIdentity {
    pub(crate) account: String,
    pub(crate) arn: String,
}

#[derive(Debug, thiserror::Error)]
#[error("{endpoint:?} is no endpoint of a metadata service: {reason}; it looks like http://169.254.169.254")]
pub(crate) struct InvalidEndpoint {
    endpoint: String,
    reason: String,
}

/// The AWS client of the daemon.
pub(crate) struct Aws {
    imds: imds::Client,
    link: RwLock<Arc<Link>>,
}

/// One load of the configuration, and what was learned with it.
struct Link {
    client: Client,
    source: Option<SharedCredentialsProvider>,
    identity: OnceLock<CallerIdentity>,
}

impl Link {
    fn new((client, source): (Client, Option<SharedCredentialsProvider>)) -> Arc<Self> {
        Arc::new(Self { client, source, identity: OnceLock::new() })
    }
}

impl Aws {
    /// Loads the configuration; asks AWS nothing but, without any other source, the host's metadata service for the region.
    ///
    /// `imds_endpoint` is where the host's own role and region are looked up; without it the SDK's rules apply
    /// (`AWS_EC2_METADATA_SERVICE_ENDPOINT`, then 169.254.169.254).
    pub(crate) async fn connect(imds_endpoint: Option<&str>) -> anyhow::Result<Self> {
        let imds = imds_client(imds_endpoint)?;
        let region = region(&imds).await;
        if region.is_none() {
            tracing::warn!(
                "no region in AWS_REGION, the profile or the host's metadata service; using STS in {FALLBACK_REGION}. Set AWS_REGION."
            );
        }
        // A task of its own, because without root certificates the SDK panics.
        let loaded = tokio::spawn({
            let imds = imds.clone();
            async move { load(&imds, region).await }
        });
        let loaded = loaded.await.context(
            "the AWS SDK does not start: are there root certificates? Install ca-certificates, or set SSL_CERT_FILE",
        )?;
        Ok(Self { imds, link: RwLock::new(Link::new(loaded)) })
    }

    /// Who the daemon is to AWS: for the check at start, and for messages about refusals.
    pub(crate) async fn caller_identity(&self) -> Result<CallerIdentity, Failure> {
        let mut link = self.link().await;
        let mut answer = link.client.get_caller_identity().send().await;
        if answer.as_ref().is_err_and(source_is_stale) {
            link = self.reload(&link).await;
            answer = link.client.get_caller_identity().send().await;
        }
        let answer = answer.map_err(|error| failure::from_sdk(&error, Subject::Caller))?;
        let (Some(account), Some(arn)) = (answer.account, answer.arn) else {
            return Err(Failure::unavailable("STS told the daemon's identity without its account or ARN"));
        };
        let identity = CallerIdentity { account, arn };
        // Only names the daemon in later messages, so whoever was first may stay.
        let _ = link.identity.set(identity.clone());
        Ok(identity)
    }

    /// Where the daemon's own credentials come from, in the words of the SDK's settings; None if it has none.
    pub(crate) async fn source(&self) -> Option<String> {
        let provider = self.link().await.source.clone()?;
        let credentials = provider.provide_credentials().await.ok()?;
        Some(source::in_words(credentials.get_property()))
    }

    /// How much this host's clock is ahead of that of STS; None without an answer.
    pub(crate) async fn clock_ahead(&self) -> Option<SignedDuration> {
        let comparison = Comparison::default();
        let call = self.link().await.client.get_caller_identity().customize().interceptor(comparison.clone());
        // It has been given the date also where it refuses.
        let _ = call.send().await;
        comparison.ahead()
    }

    async fn assume(&self, session: &RoleSession) -> Result<Credentials, Failure> {
        let mut link = self.link().await;
        let mut answer = assume_role(&link.client, session).await;
        if answer.as_ref().is_err_and(source_is_stale) {
            link = self.reload(&link).await;
            answer = assume_role(&link.client, session).await;
        }
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                // Whoever has to mend a trust policy needs to know for whom. Asking needs no permission.
                if is_denied(&error) && link.identity.get().is_none() {
                    let _ = self.caller_identity().await;
                }
                let caller = link.identity.get().map(|identity| identity.arn.as_str());
                return Err(failure::from_sdk(&error, Subject::Role { session, caller }));
            }
        };
        credentials(answer).ok_or_else(|| {
            Failure::unavailable(format!("STS answered for {} without usable credentials", session.role_arn))
        })
    }

    async fn link(&self) -> Arc<Link> {
        self.link.read().await.clone()
    }

    /// The SDK reads the shared files once. Where somebody renews them (a login tool, a rotated key), what it holds becomes
    /// stale, so the whole chain is loaded anew; once, however many calls have noticed.
    async fn reload(&self, stale: &Arc<Link>) -> Arc<Link> {
        let mut link = self.link.write().await;
        if Arc::ptr_eq(&link, stale) {
            tracing::debug!("the daemon's own credentials are missing or no longer valid; loading them anew");
            // A metadata service that happens to be silent now does not move the daemon to another region.
            let region = region(&self.imds).await.or_else(|| stale.client.config().region().cloned());
            *link = Link::new(load(&self.imds, region).await);
        }
        Arc::clone(&link)
    }
}

impl Sts for Aws {
    fn assume<'a>(&'a self, session: &'a RoleSession) -> AssumeFuture<'a> {
        Box::pin(self.assume(session))
    }
}

/// Whether another load of the source credentials could mend it: STS knows ours no longer, or there were none.
fn source_is_stale<E: ProvideErrorMetadata + Error + 'static>(error: &SdkError<E>) -> bool {
    let code = error.as_service_error().and_then(ProvideErrorMetadata::code);
    code.is_some_and(|code| STALE_SOURCE.contains(&code)) || failure::lacks_source(error)
}

fn is_denied(error: &SdkError<AssumeRoleError>) -> bool {
    error.as_service_error().and_then(ProvideErrorMetadata::code) == Some("AccessDenied")
}

async fn assume_role(client: &Client, session: &RoleSession) -> Result<AssumeRoleOutput, SdkError<AssumeRoleError>> {
    let mut call = client.assume_role();
    for arn in &session.policy_arns {
        call = call.policy_arns(PolicyDescriptorType::builder().arn(arn).build());
    }
    for (key, value) in &session.tags {
        let tag = Tag::builder().key(key).value(value).build().map_err(SdkError::construction_failure)?;
        call = call.tags(tag);
    }
    call.role_arn(&session.role_arn)
        .role_session_name(&session.session_name)
        .set_external_id(session.external_id.clone())
        .set_policy(session.policy.clone())
        .set_source_identity(session.source_identity.clone())
        .duration_seconds(i32::try_from(session.duration.as_secs()).unwrap_or(i32::MAX))
        .send()
        .await
}

fn credentials(answer: AssumeRoleOutput) -> Option<Credentials> {
    let granted = answer.credentials?;
    Some(Credentials {
        access_key_id: granted.access_key_id,
        secret_access_key: granted.secret_access_key.into(),
        session_token: granted.session_token.into(),
        last_updated: Timestamp::now(),
        expiration: Timestamp::from_second(granted.expiration.secs()).ok()?,
    })
}

/// Never by a proxy, which `HTTP_PROXY` means for the network, and which would answer with a metadata service of its own.
fn imds_client(endpoint: Option<&str>) -> Result<imds::Client, InvalidEndpoint> {
    let direct = ProviderConfig::without_region().with_http_client(aws_smithy_http_client::Builder::new().build_http());
    let mut builder = imds::Client::builder().configure(&direct);
    if let Some(endpoint) = endpoint {
        let invalid = |reason: String| InvalidEndpoint { endpoint: endpoint.to_owned(), reason };
        builder = builder.endpoint(endpoint).map_err(|error| invalid(error.to_string()))?;
    }
    Ok(builder.build())
}

async fn load(imds: &imds::Client, region: Option<Region>) -> (Client, Option<SharedCredentialsProvider>) {
    let region = region.unwrap_or(Region::from_static(FALLBACK_REGION));
    let mut loader = aws_config::defaults(BehaviorVersion::latest())
        .region(region.clone())
        // An attempt includes loading the source credentials, for which the SDK allows 5 s (a `credential_process`, SSO).
        .timeout_config(
            TimeoutConfig::builder()
                .connect_timeout(Duration::from_secs(2))
                .operation_attempt_timeout(Duration::from_secs(5))
                .operation_timeout(Duration::from_secs(10))
                .build(),
        )
        .retry_config(retries());
    if let Ok(name) = AppName::new("metadata-proxy") {
        loader = loader.app_name(name);
    }
    let instance = ImdsCredentialsProvider::builder().imds_client(imds.clone()).build();
    let chain = DefaultCredentialsChain::builder()
        .region(region)
        .imds_client(imds.clone())
        // For profiles that say `credential_source = Ec2InstanceMetadata`.
        .with_custom_credential_source("Ec2InstanceMetadata", instance);
    loader = loader.credentials_provider(chain.build().await);
    let loaded = loader.load().await;
    (client(aws_sdk_sts::config::Builder::from(&loaded)), loaded.credentials_provider())
}

/// One retry mends a broken connection, a 5xx or a wrong clock at once; the patient retries are the keeper's.
fn retries() -> RetryConfig {
    RetryConfig::standard().with_max_attempts(2)
}

fn client(config: aws_sdk_sts::config::Builder) -> Client {
    Client::from_conf(config.retry_classifier(NotWhenThrottled).build())
}

/// Whoever is throttled asks less: when to ask again is for `turns` to say, and a second attempt at once would double the
/// calls just when they are too many.
#[derive(Debug)]
struct NotWhenThrottled;

impl ClassifyRetry for NotWhenThrottled {
    fn name(&self) -> &'static str {
        "no second attempt when throttled"
    }

    fn classify_retry(&self, context: &InterceptorContext) -> RetryAction {
        let status = context.response().map(|response| response.status().as_u16()).unwrap_or_default();
        let error = context.output_or_error().and_then(|outcome| outcome.as_ref().err()?.as_operation_error());
        let code = error.and_then(|error| {
            let assume = error.downcast_ref::<AssumeRoleError>().map(ProvideErrorMetadata::meta);
            let identity = || error.downcast_ref::<GetCallerIdentityError>().map(ProvideErrorMetadata::meta);
            assume.or_else(identity)?.code()
        });
        match failure::throttles(code.unwrap_or_default(), status) {
            true => RetryAction::RetryForbidden,
            false => RetryAction::NoActionIndicated,
        }
    }
}

async fn region(imds: &imds::Client) -> Option<Region> {
    // An empty variable is as good as unset, which the SDK takes for the name of a region.
    let given = EnvironmentVariableRegionProvider::new().region().await.filter(|region| !region.as_ref().is_empty());
    let instance = ImdsRegionProvider::builder().imds_client(imds.clone());
    let chain = RegionProviderChain::first_try(given).or_else(ProfileFileRegionProvider::new());
    chain.or_else(instance.build()).region().await
}

#[cfg(test)]
mod tests;
