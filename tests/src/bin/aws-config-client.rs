//! A program with the AWS SDK for Rust as people write it; nothing is configured but the region. When to ask and what
//! to print is in `tests/clients/README.md`.
#![expect(clippy::print_stdout, reason = "its report is its standard output")]

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use aws_config::{BehaviorVersion, SdkConfig};
use aws_sdk_sts::{
    Client,
    config::{
        ConfigBag, Intercept, ProvideCredentials as _, RuntimeComponents,
        interceptors::BeforeTransmitInterceptorContextRef,
    },
    error::BoxError,
};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    println!("version {}", aws_sdk_sts::meta::PKG_VERSION);
    let word = std::env::args().nth(1).context("say how many loads, or `watch`")?;
    if word == "watch" {
        return watch().await;
    }
    for _ in 0..word.parse().context("the number of loads is a number")? {
        // A chain of its own for each, so that nothing comes from a cache.
        let config = aws_config::load_defaults(BehaviorVersion::latest()).await;
        let begin = Instant::now();
        match load(&config).await {
            Ok(key) => tell_key(&key, begin),
            Err(error) => {
                println!("error {}", one_line(&error));
                continue;
            }
        }
        if let Some(sts) = client(&config) {
            match sts.get_caller_identity().send().await {
                Ok(identity) => println!("identity {}", identity.arn().unwrap_or_default()),
                Err(error) => println!("identity-error {}", one_line(&error.into())),
            }
        }
    }
    Ok(())
}

/// One client of a service, which renews its credentials as it sees fit.
async fn watch() -> Result<()> {
    let config = aws_config::load_defaults(BehaviorVersion::latest()).await;
    let sts = client(&config).context("STS_ENDPOINT is not set")?;
    let (signer, mut last) = (Signer::default(), String::new());
    loop {
        let begin = Instant::now();
        let asked = sts.get_caller_identity().customize().interceptor(signer.clone()).send().await;
        match asked {
            Ok(identity) => {
                let key = signer.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
                if key != last {
                    tell_key(&key, begin);
                    println!("identity {}", identity.arn().unwrap_or_default());
                }
                last = key;
            }
            Err(error) => println!("error {}", one_line(&error.into())),
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

async fn load(config: &SdkConfig) -> Result<String> {
    let provider = config.credentials_provider().context("the default chain has no provider")?;
    Ok(provider.provide_credentials().await?.access_key_id().to_owned())
}

fn client(config: &SdkConfig) -> Option<Client> {
    let endpoint = std::env::var("STS_ENDPOINT").ok()?;
    Some(Client::from_conf(aws_sdk_sts::config::Builder::from(config).endpoint_url(endpoint).build()))
}

/// The access key that the last request was signed with.
#[derive(Clone, Debug, Default)]
struct Signer(Arc<Mutex<String>>);

impl Intercept for Signer {
    fn name(&self) -> &'static str {
        "Signer"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let signature = context.request().headers().get("authorization").unwrap_or_default();
        let key = signature.split_once("Credential=").and_then(|(_, rest)| rest.split_once('/'));
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        key.unwrap_or_default().0.clone_into(&mut last);
        Ok(())
    }
}

fn tell_key(key: &str, begin: Instant) {
    println!("key {key} {:.1}", begin.elapsed().as_secs_f64() * 1000.0);
}

/// The error with its causes, which is what helps.
fn one_line(error: &anyhow::Error) -> String {
    format!("{error:#}").split_whitespace().collect::<Vec<_>>().join(" ")
}
