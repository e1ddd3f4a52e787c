//! The stand-in, asked over a bare socket.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Instant;

use super::*;

fn start() -> Imds {
    let listeners = ["127.0.0.1:0", "[::1]:0"].map(|address| TcpListener::bind(address).unwrap());
    Imds::start(listeners.into()).unwrap()
}

/// Sends one request and reads until the server closes, as it does after each.
fn ask(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    write!(stream, "{request}\r\nHost: x\r\nUser-Agent: test\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn get(imds: &Imds, path: &str) -> String {
    ask(imds.addresses()[0], &format!("GET {path} HTTP/1.1"))
}

#[test]
fn a_token_is_asked_for_given_and_checked() {
    let imds = start();
    imds.require_token(true);
    let [v4, v6] = *imds.addresses() else { panic!("two addresses") };
    assert!(get(&imds, "/").starts_with("HTTP/1.1 401 "));
    for (request, status) in [
        ("PUT /latest/api/token HTTP/1.1", 400),
        ("PUT /latest/api/token HTTP/1.1\r\nX-aws-ec2-metadata-token-ttl-seconds: 21601", 400),
        ("PUT /latest/api/token HTTP/1.1\r\nX-Forwarded-For: x", 403),
        ("PUT /2021-07-15/api/token HTTP/1.1", 403),
        ("GET /latest/api/token HTTP/1.1", 405),
        ("GET / HTTP/1.1\r\nX-aws-ec2-metadata-token: mine", 401),
    ] {
        assert!(ask(v4, request).starts_with(&format!("HTTP/1.1 {status} ")), "{request}");
    }
    let answer = ask(v4, "PUT /latest/api/token HTTP/1.1\r\nX-aws-ec2-metadata-token-ttl-seconds: 60");
    let (head, token) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("x-aws-ec2-metadata-token-ttl-seconds: 60"), "{head}");
    assert_eq!(token.len(), 56);
    let answer = ask(v6, &format!("GET //latest/meta-data/mac/ HTTP/1.1\r\nX-aws-ec2-metadata-token: {token}"));
    assert!(answer.contains("x-aws-ec2-metadata-token-ttl-seconds: 59"), "{answer}");
    assert!(answer.ends_with("\r\n\r\n02:00:5e:00:53:01"), "{answer}");
}

#[test]
fn whatever_comes_near_credentials_is_noticed() {
    let imds = start();
    for path in ["/latest/meta-data/ami-id", "/latest/user-data", "/2031-01-01/meta-data/"] {
        get(&imds, path);
    }
    assert!(imds.credential_requests().is_empty());
    let suspicious = [
        "/1.0/meta-data/iam/",
        "/latest/meta-data/%69a%6D/info",
        "/latest/meta-data/%2569%2561%256d/info",
        "/latest/meta-data/IAM",
        "/latest/meta-data/iam-ecs-0123456789abcdef/info",
        "/latest/meta-data/identity-credentials/",
        "/latest/meta-data/managed-ssh-keys/",
        "http://x/latest/meta-data/iam/info",
    ];
    for path in suspicious {
        get(&imds, path);
    }
    let targets: Vec<String> = imds.credential_requests().into_iter().map(|request| request.target).collect();
    assert_eq!(targets, suspicious);
    let answer = get(&imds, &format!("/latest/meta-data/iam/security-credentials/{HOST_ROLE}"));
    assert!(answer.contains(HOST_ACCESS_KEY));
    let requests = imds.requests();
    let last = requests.last().unwrap();
    assert!(last.secret && last.status == Some(200) && last.user_agent() == "test", "{last:?}");
    imds.clear();
    assert!(imds.requests().is_empty());
}

#[test]
fn faults_come_and_go() {
    let imds = start();
    imds.set_fault(Some(Fault::Status(503)));
    assert!(get(&imds, "/").starts_with("HTTP/1.1 503 "));
    imds.set_fault(Some(Fault::Close));
    assert_eq!(get(&imds, "/"), "");
    assert_eq!(imds.requests()[1].status, None);
    imds.set_fault(Some(Fault::Delay(Duration::from_millis(150))));
    let begin = Instant::now();
    assert!(get(&imds, "/").starts_with("HTTP/1.1 200 "));
    assert!(begin.elapsed() >= Duration::from_millis(150));
    imds.set_fault(None);
    imds.stop_listening().unwrap();
    assert!(TcpStream::connect(imds.addresses()[1]).is_err());
    imds.listen_again().unwrap();
    assert!(get(&imds, "/latest/meta-data/nothing").contains("404 - Not Found"));
}
