//! A program with the AWS SDK for Rust as people write it: asks for credentials, says which it got,
//! in one line of JSON.
//!
//! Usage: `aws-config-client [ATTEMPTS]`. Nothing is configured but the region. With `STS_ENDPOINT`
//! it also asks that STS whose credentials they are. Exits 3 when an attempt got none.
#![expect(clippy::print_stdout, reason = "its report is its standard output")]

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context as _;
use aws_config::BehaviorVersion;
use aws_sdk_sts::config::{Credentials, ProvideCredentials as _};
use serde_json::{Value, json};

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<ExitCode> {
    let attempts: u32 = match std::env::args().nth(1) {
        Some(attempts) => attempts.parse().context("ATTEMPTS is a number")?,
        None => 2,
    };
    let mut report = json!({ "client": "aws-config", "version": aws_sdk_sts::meta::PKG_VERSION });
    let mut list = Vec::new();
    let mut credentials = None;
    for _ in 0..attempts {
        let (attempt, loaded) = load().await;
        list.push(attempt);
        credentials = loaded.or(credentials);
    }
    let failed = list.iter().any(|attempt| !attempt["error"].is_null());
    report["attempts"] = Value::from(list);
    if let (Ok(endpoint), Some(credentials)) = (std::env::var("STS_ENDPOINT"), credentials) {
        match identify(&endpoint, credentials).await {
            Ok(arn) => report["identity"] = Value::from(arn),
            Err(error) => report["identity_error"] = Value::from(error),
        }
    }
    println!("{report}");
    Ok(if failed { ExitCode::from(3) } else { ExitCode::SUCCESS })
}

/// One attempt with a chain of its own, so that nothing comes from a cache.
async fn load() -> (Value, Option<Credentials>) {
    let begin = Instant::now();
    let config = aws_config::load_defaults(BehaviorVersion::latest()).await;
    let result = match config.credentials_provider() {
        Some(provider) => provider.provide_credentials().await.map_err(describe),
        None => Err("the default chain has no provider".to_owned()),
    };
    let ms = begin.elapsed().as_secs_f64() * 1000.0;
    match result {
        Ok(credentials) => (json!({ "access_key": credentials.access_key_id(), "ms": ms }), Some(credentials)),
        Err(error) => (json!({ "error": error, "ms": ms }), None),
    }
}

/// The error with its causes, which is what helps, in one line.
fn describe(error: impl std::error::Error + Send + Sync + 'static) -> String {
    format!("{:#}", anyhow::Error::from(error))
}

async fn identify(endpoint: &str, credentials: Credentials) -> Result<String, String> {
    let config = aws_config::load_defaults(BehaviorVersion::latest()).await;
    let config =
        aws_sdk_sts::config::Builder::from(&config).endpoint_url(endpoint).credentials_provider(credentials).build();
    let identity = aws_sdk_sts::Client::from_conf(config).get_caller_identity().send().await;
    let identity = identity.map_err(describe)?;
    identity.arn.ok_or_else(|| "an identity without an ARN".to_owned())
}
