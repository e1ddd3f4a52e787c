//! The SDK's client against the wire protocol of STS, on loopback.

use std::sync::atomic::{AtomicUsize, Ordering};

use aws_sdk_sts::config::{Config, Credentials as Source};
use secrecy::ExposeSecret;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

/// Answers every request with one response, and hands back the body of the last.
async fn sts_that_says(status: u16, body: &'static str) -> (Aws, tokio::sync::watch::Receiver<String>) {
    let (aws, last, _) = sts_that_is_asked(status, body, RetryConfig::disabled()).await;
    (aws, last)
}

/// The same, asked with retries; how often, too.
async fn sts_that_is_asked(
    status: u16,
    body: &'static str,
    retries: RetryConfig,
) -> (Aws, tokio::sync::watch::Receiver<String>, Arc<AtomicUsize>) {
    let requests = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&requests);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (seen, last) = tokio::sync::watch::channel(String::new());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = vec![0; 16384];
            let mut length = 0;
            // The body follows the headers at once, and ends with the duration that we always send or the version.
            while !request[..length].windows(11).any(|window| window == b"Version=201") {
                length += stream.read(&mut request[length..]).await.unwrap();
            }
            count.fetch_add(1, Ordering::Relaxed);
            seen.send_replace(String::from_utf8_lossy(&request[..length]).into_owned());
            let head = format!(
                "HTTP/1.1 {status} X\r\ncontent-type: text/xml\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                body.len()
            );
            stream.write_all(head.as_bytes()).await.unwrap();
            stream.write_all(body.as_bytes()).await.unwrap();
        }
    });
    let config = Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::from_static("eu-west-1"))
        .endpoint_url(endpoint)
        .retry_config(retries)
        .credentials_provider(Source::new("AKIA", "source-secret", None, None, "test"));
    let link = RwLock::new(Link::new((client(config), None)));
    (Aws { imds: imds_client(None).unwrap(), link }, last, requests)
}

fn web() -> RoleSession {
    RoleSession {
        external_id: Some("x:1".into()),
        policy: Some("{}".into()),
        policy_arns: vec!["arn:aws:iam::aws:policy/x".into()],
        tags: vec![("team".into(), "a".into())],
        source_identity: Some("alice".into()),
        duration: Duration::from_secs(900),
        ..RoleSession::plain("arn:aws:iam::123456789012:role/web", "web-1")
    }
}

#[tokio::test]
async fn a_grant_is_read_from_the_wire() {
    let (aws, last) = sts_that_says(
        200,
        "<AssumeRoleResponse><AssumeRoleResult><Credentials><AccessKeyId>ASIAX</AccessKeyId>\
         <SecretAccessKey>wire-secret</SecretAccessKey><SessionToken>wire-token</SessionToken>\
         <Expiration>2035-01-02T03:04:05Z</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>",
    )
    .await;
    let credentials = aws.assume(&web()).await.unwrap();
    assert_eq!(credentials.access_key_id, "ASIAX");
    assert_eq!(credentials.secret_access_key.expose_secret(), "wire-secret");
    assert_eq!(credentials.session_token.expose_secret(), "wire-token");
    assert_eq!(credentials.expiration.to_string(), "2035-01-02T03:04:05Z");
    let request = last.borrow().clone();
    for part in [
        "Action=AssumeRole",
        "RoleArn=arn%3Aaws%3Aiam%3A%3A123456789012%3Arole%2Fweb",
        "RoleSessionName=web-1",
        "ExternalId=x%3A1",
        "DurationSeconds=900",
        "Policy=%7B%7D",
        "PolicyArns.member.1.arn=arn%3Aaws%3Aiam%3A%3Aaws%3Apolicy%2Fx",
        "Tags.member.1.Key=team&Tags.member.1.Value=a",
        "SourceIdentity=alice",
    ] {
        assert!(request.contains(part), "{part} in {request}");
    }
}

#[tokio::test]
async fn a_refusal_is_read_from_the_wire() {
    let (aws, _) = sts_that_says(
        403,
        "<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code>\
         <Message>User: arn:aws:iam::1:user/me is not authorized</Message></Error></ErrorResponse>",
    )
    .await;
    let Failure::Refused { code, message } = aws.assume(&web()).await.unwrap_err() else { panic!("refused") };
    assert_eq!(code, "AccessDenied");
    assert!(message.contains("the trust policy of arn:aws:iam::123456789012:role/web"), "{message}");
}

#[tokio::test]
async fn throttling_and_strangers_are_unavailable() {
    let throttled =
        "<ErrorResponse><Error><Code>Throttling</Code><Message>Rate exceeded</Message></Error></ErrorResponse>";
    for (status, body) in
        [(400, throttled), (503, ""), (200, "<html>login</html>"), (403, "<html>proxy</html>"), (404, "")]
    {
        let (aws, _) = sts_that_says(status, body).await;
        let failure = aws.assume(&web()).await.unwrap_err();
        assert!(matches!(failure, Failure::Unavailable { .. }), "{status}: {failure}");
    }
}

#[tokio::test]
async fn whoever_is_throttled_makes_no_second_attempt() {
    let says = |code: &str| -> &'static str {
        format!("<ErrorResponse><Error><Code>{code}</Code><Message>no</Message></Error></ErrorResponse>").leak()
    };
    for (status, code, attempts) in [
        (400, "Throttling", 1),
        (400, "ThrottlingException", 1),
        (503, "RequestLimitExceeded", 1),
        (500, "InternalFailure", 2),
        (403, "AccessDenied", 1),
    ] {
        let (aws, _, requests) = sts_that_is_asked(status, says(code), retries()).await;
        aws.link().await.client.get_caller_identity().send().await.unwrap_err();
        assert_eq!(requests.swap(0, Ordering::Relaxed), attempts, "GetCallerIdentity: {status} {code}");
        let link = aws.link().await;
        assume_role(&link.client, &web()).await.unwrap_err();
        assert_eq!(requests.load(Ordering::Relaxed), attempts, "AssumeRole: {status} {code}");
    }
}

#[tokio::test]
async fn the_identity_is_read_and_kept_for_refusals() {
    let (aws, _) = sts_that_says(
        200,
        "<GetCallerIdentityResponse><GetCallerIdentityResult><Arn>arn:aws-cn:sts::123456789012:assumed-role/host/i-1</Arn>\
         <UserId>U</UserId><Account>123456789012</Account></GetCallerIdentityResult></GetCallerIdentityResponse>",
    )
    .await;
    let identity = aws.caller_identity().await.unwrap();
    assert_eq!(identity.account, "123456789012");
    assert_eq!(identity.arn, "arn:aws-cn:sts::123456789012:assumed-role/host/i-1");
    assert_eq!(aws.link().await.identity.get(), Some(&identity));
}

#[tokio::test]
async fn a_wrong_endpoint_of_the_metadata_service_is_named() {
    let error = Aws::connect(Some("not a url")).await.err().unwrap();
    assert!(error.to_string().contains("\"not a url\""), "{error}");
}
