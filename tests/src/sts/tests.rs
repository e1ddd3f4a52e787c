//! The stand-in, asked by a real client.

use std::time::Instant;

use aws_sdk_sts::Client;
use aws_sdk_sts::config::retry::RetryConfig;
use aws_sdk_sts::config::{BehaviorVersion, Config, Credentials, Region};
use aws_sdk_sts::error::ProvideErrorMetadata as _;
use aws_sdk_sts::types::Credentials as Keys;

use super::*;

const WEB: &str = "arn:aws:iam::123456789012:role/path/web";

fn start() -> Sts {
    Sts::start(TcpListener::bind("127.0.0.1:0").unwrap()).unwrap()
}

fn client(sts: &Sts, key: &str, secret: &str, token: Option<String>) -> Client {
    let config = Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("eu-west-1"))
        .endpoint_url(format!("http://{}", sts.address().unwrap()))
        .retry_config(RetryConfig::disabled())
        .credentials_provider(Credentials::new(key, secret, token, None, "test"));
    Client::from_conf(config.build())
}

fn base(sts: &Sts) -> Client {
    client(sts, BASE_ACCESS_KEY, BASE_SECRET_KEY, None)
}

async fn assume(client: &Client, role: &str) -> Result<Keys, String> {
    let request = client.assume_role().role_arn(role).role_session_name("session");
    match request.send().await {
        Ok(output) => Ok(output.credentials.unwrap()),
        Err(error) => Err(error.code().unwrap_or("no answer").to_owned()),
    }
}

#[tokio::test]
async fn an_issued_key_is_known_by_its_role() {
    let sts = start();
    let credentials = assume(&base(&sts), WEB).await.unwrap();
    let issued = sts.issued(credentials.access_key_id()).unwrap();
    assert_eq!(issued.assumed_role_arn, "arn:aws:sts::123456789012:assumed-role/web/session");
    assert_eq!(issued.secret_key, credentials.secret_access_key());
    assert_eq!(issued.session_token, credentials.session_token());
    assert_eq!(issued.expiration.as_second(), credentials.expiration().secs());

    let second = assume(&base(&sts), WEB).await.unwrap();
    assert_ne!(second.access_key_id(), credentials.access_key_id());
    assert_eq!(sts.assume_role_calls(WEB), 2);

    let (key, secret) = (credentials.access_key_id(), credentials.secret_access_key());
    let own = client(&sts, key, secret, Some(credentials.session_token().to_owned()));
    let identity = own.get_caller_identity().send().await.unwrap();
    assert_eq!(identity.arn(), sts.identity_of(key).as_deref());
    for (key, token) in [(key, "another"), ("ASIAUNKNOWN", "")] {
        let stranger = client(&sts, key, secret, Some(token.to_owned()));
        let error = stranger.get_caller_identity().send().await.unwrap_err();
        assert_eq!(error.code(), Some("InvalidClientTokenId"));
    }
}

#[tokio::test]
async fn credentials_expire_when_a_test_wants_them_to() {
    let sts = start();
    sts.set_lifetime(Some(Duration::from_millis(200)));
    let credentials = assume(&base(&sts), WEB).await.unwrap();
    sts.set_role_lifetime(WEB, Duration::from_secs(60));
    let lasting = assume(&base(&sts), WEB).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let (key, secret) = (lasting.access_key_id(), lasting.secret_access_key());
    let own = client(&sts, key, secret, Some(lasting.session_token().to_owned()));
    own.get_caller_identity().send().await.unwrap();
    let (key, secret) = (credentials.access_key_id(), credentials.secret_access_key());
    let own = client(&sts, key, secret, Some(credentials.session_token().to_owned()));
    let error = own.get_caller_identity().send().await.unwrap_err();
    assert_eq!(error.code(), Some("ExpiredToken"));
}

#[tokio::test]
async fn faults_come_and_go() {
    let sts = start();
    let other = "arn:aws:iam::123456789012:role/other";
    for (fault, code) in
        [(Fault::Refuse, "AccessDenied"), (Fault::Throttle, "Throttling"), (Fault::ServerError, "InternalFailure")]
    {
        sts.set_role_fault(WEB, Some(fault));
        assert_eq!(assume(&base(&sts), WEB).await.unwrap_err(), code);
        assume(&base(&sts), other).await.unwrap();
    }
    sts.set_role_fault(WEB, None);
    sts.set_fault(Some(Fault::Delay(Duration::from_millis(150))));
    let begin = Instant::now();
    assume(&base(&sts), WEB).await.unwrap();
    assert!(begin.elapsed() >= Duration::from_millis(150));

    sts.clear();
    sts.set_fault(Some(Fault::Hang));
    let client = base(&sts);
    let hung = assume(&client, WEB);
    assert!(tokio::time::timeout(Duration::from_millis(200), hung).await.is_err());
    assert_eq!(sts.calls()[0].outcome, Outcome::Open);
}

#[tokio::test]
async fn it_goes_down_and_comes_back_on_the_same_address() {
    let sts = start();
    let client = base(&sts);
    assume(&client, WEB).await.unwrap();
    for _ in 0..3 {
        sts.stop_listening().unwrap();
        sts.stop_listening().unwrap();
        // Over the connection of before and over a new one.
        for client in [&client, &base(&sts)] {
            assert_eq!(assume(client, WEB).await.unwrap_err(), "no answer");
        }
        sts.listen_again().unwrap();
        sts.listen_again().unwrap();
        assume(&client, WEB).await.unwrap();
        assume(&base(&sts), WEB).await.unwrap();
    }
    assert_eq!(sts.assume_role_calls(WEB), 7);
}
