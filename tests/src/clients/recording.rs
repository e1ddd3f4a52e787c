//! Recordings of what clients send and are answered, to the byte, with what differs from run to run replaced.
//!
//! One line of a file is one line on the wire, with its end written out: `> ` was sent, `< ` was answered.

use std::fmt::Write as _;

use super::sniffer::Connection;

/// One request and its answer, each in the form in which it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    pub request: Vec<u8>,
    pub answer: Vec<u8>,
}

/// What was said on one connection after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recording(pub Vec<Vec<Exchange>>);

impl Recording {
    pub(crate) fn of(connections: &[Connection]) -> Self {
        let exchanges = |connection: &Connection| {
            let (requests, answers) = (messages(&connection.requests()), messages(&connection.answers()));
            let mut answers = answers.iter().map(|answer| kept_answer(answer));
            let pair = |request: &Vec<u8>| Exchange {
                request: kept_request(request),
                answer: answers.next().unwrap_or_default(),
            };
            requests.iter().map(pair).collect::<Vec<_>>()
        };
        Self(connections.iter().map(exchanges).filter(|exchanges| !exchanges.is_empty()).collect())
    }

    /// How many requests were answered with this status.
    pub(crate) fn answered(&self, status: &str) -> usize {
        let line = format!("HTTP/1.1 {status} ");
        self.0.iter().flatten().filter(|exchange| exchange.answer.starts_with(line.as_bytes())).count()
    }

    /// Methods and paths, in order.
    pub(crate) fn summary(&self) -> Vec<String> {
        let line = |exchange: &Exchange| {
            let text = String::from_utf8_lossy(&exchange.request);
            text.split(" HTTP/").next().unwrap_or_default().to_owned()
        };
        self.0.iter().flatten().map(line).collect()
    }

    pub fn write(&self) -> String {
        let mut text = String::new();
        for (number, exchanges) in self.0.iter().enumerate() {
            let _ = writeln!(text, "# connection {}", number + 1);
            for exchange in exchanges {
                for (mark, bytes) in [('>', &exchange.request), ('<', &exchange.answer)] {
                    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
                        let _ = writeln!(text, "{mark} {}", line.escape_ascii());
                    }
                }
            }
        }
        text
    }

    pub fn read(text: &str) -> Self {
        let mut connections: Vec<Vec<Exchange>> = Vec::new();
        let mut last = '<';
        for line in text.lines() {
            let (Some(mark), bytes) = (line.chars().next(), unescape(line.get(2..).unwrap_or_default())) else {
                continue;
            };
            if mark == '#' {
                connections.push(Vec::new());
                last = '<';
            }
            let Some(exchanges) = connections.last_mut() else { continue };
            match (mark, last) {
                ('>', '<') => exchanges.push(Exchange { request: bytes, answer: Vec::new() }),
                ('>', _) => exchanges.last_mut().into_iter().for_each(|exchange| exchange.request.extend(&bytes)),
                ('<', _) => exchanges.last_mut().into_iter().for_each(|exchange| exchange.answer.extend(&bytes)),
                _ => continue,
            }
            last = mark;
        }
        Self(connections)
    }
}

/// The reverse of `escape_ascii`.
fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let (decoded, length) = match (byte, after) {
            (b'\\', [b'r', ..]) => (b'\r', 2),
            (b'\\', [b'n', ..]) => (b'\n', 2),
            (b'\\', [b't', ..]) => (b'\t', 2),
            (b'\\', [b'x', high, low, ..]) => {
                let digits = [*high, *low];
                let digits = std::str::from_utf8(&digits).unwrap_or_default();
                (u8::from_str_radix(digits, 16).unwrap_or_default(), 4)
            }
            (b'\\', [escaped, ..]) => (*escaped, 2),
            _ => (byte, 1),
        };
        bytes.push(decoded);
        rest = rest.get(length..).unwrap_or_default();
    }
    bytes
}

/// Cuts a direction of a connection into its messages: heads, each with the body that its length tells.
pub fn messages(mut bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut messages = Vec::new();
    while let Some(head) = bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4) {
        let text = String::from_utf8_lossy(bytes.get(..head).unwrap_or_default()).to_lowercase();
        let length = text.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
        let end = (head + length.unwrap_or(0)).min(bytes.len());
        let (message, rest) = bytes.split_at(end);
        messages.push(message.to_vec());
        bytes = rest;
    }
    if !bytes.is_empty() {
        messages.push(bytes.to_vec());
    }
    messages
}

/// A request without what differs from run to run: tokens, signatures, and in User-Agent the versions of machines and of what runs there.
fn kept_request(request: &[u8]) -> Vec<u8> {
    each_header(request, |name, value| match name {
        "x-aws-ec2-metadata-token" => "TOKEN".to_owned(),
        "user-agent" => without_numbers(value),
        "amz-sdk-invocation-id" => "UUID".to_owned(),
        "x-amz-date" => "DATE".to_owned(),
        "authorization" => format!("{} SIGNATURE", value.split(' ').next().unwrap_or_default()),
        _ => value.to_owned(),
    })
}

/// An answer without its dates, credentials and tokens.
pub fn kept_answer(answer: &[u8]) -> Vec<u8> {
    let kept = each_header(answer, |name, value| match name {
        "date" | "last-modified" => "DATE".to_owned(),
        "x-aws-ec2-metadata-token-ttl-seconds" => "SECONDS".to_owned(),
        _ => value.to_owned(),
    });
    let Some(at) = kept.windows(4).position(|window| window == b"\r\n\r\n") else {
        return kept;
    };
    let (head, body) = kept.split_at(at + 4);
    let text = String::from_utf8_lossy(body);
    let is_token = text.len() == 56 && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    let body = if is_token { "TOKEN".to_owned() } else { text.split_inclusive('\n').map(kept_line).collect() };
    [head, body.as_bytes()].concat()
}

/// A line of a JSON document whose value is another each time.
fn kept_line(line: &str) -> String {
    const CHANGING: [&str; 5] = ["LastUpdated", "AccessKeyId", "SecretAccessKey", "Token", "Expiration"];
    let name = CHANGING.iter().find(|name| line.trim_start().starts_with(&format!("\"{name}\" : \"")));
    let value = name.and_then(|name| Some((name, line.split_once(" : \"")?, line.rfind('"')?)));
    match value {
        Some((name, (before, _), end)) => {
            format!("{before} : \"{}{}", name.to_uppercase(), line.get(end..).unwrap_or_default())
        }
        None => line.to_owned(),
    }
}

fn each_header(message: &[u8], value: impl Fn(&str, &str) -> String) -> Vec<u8> {
    let Some(end) = message.windows(4).position(|window| window == b"\r\n\r\n") else {
        return message.to_vec();
    };
    let (head, body) = message.split_at(end);
    // Each byte is one character, so that nothing is lost.
    let head: String = head.iter().map(|byte| char::from(*byte)).collect();
    let lines = head.split("\r\n").map(|line| match line.split_once(':') {
        Some((name, rest)) if !name.contains(' ') => {
            let text = rest.trim_start();
            let spaces = rest.get(..rest.len() - text.len()).unwrap_or_default();
            format!("{name}:{spaces}{}", value(&name.to_lowercase(), text))
        }
        _ => line.to_owned(),
    });
    let head = lines.collect::<Vec<_>>().join("\r\n");
    head.chars().map(|character| character as u8).chain(body.iter().copied()).collect()
}

/// Each number, with the dots in it, as one `N`.
fn without_numbers(text: &str) -> String {
    let mut kept = String::new();
    for character in text.chars() {
        match character {
            '0'..='9' if kept.ends_with('N') => {}
            '0'..='9' => kept.push('N'),
            '.' if kept.ends_with('N') => {}
            _ => kept.push(character),
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recording_survives_its_file() {
        let exchange = |request: &str, answer: &[u8]| Exchange { request: request.into(), answer: answer.into() };
        let recording = Recording(vec![
            vec![exchange("GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n\"a\\b\"\n\xff"), exchange("x", b"y")],
            vec![exchange("GET //a HTTP/1.0\n\n", b"")],
        ]);
        let text = recording.write();
        assert_eq!(Recording::read(&text), recording, "{text}");
    }

    #[test]
    fn messages_end_where_they_say() {
        let bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nabHTTP/1.1 404 Not Found\r\n\r\n";
        let cut = messages(bytes);
        assert_eq!(cut.len(), 2);
        assert!(cut[0].ends_with(b"\r\n\r\nab"));
    }

    #[test]
    fn what_differs_from_run_to_run_is_not_kept() {
        let request =
            b"GET /a HTTP/1.1\r\nuser-agent: x/1.20.3 os/6.18\r\nX-aws-ec2-metadata-token: abc\r\nHost: 1.2\r\n\r\n";
        let kept = b"GET /a HTTP/1.1\r\nuser-agent: x/N os/N\r\nX-aws-ec2-metadata-token: TOKEN\r\nHost: 1.2\r\n\r\n";
        assert_eq!(kept_request(request), kept);
        let answer = b"HTTP/1.1 200 OK\r\nDate: now\r\n\r\n{\n  \"Code\" : \"Success\",\n  \"Token\" : \"a:b\",\n}";
        let kept = b"HTTP/1.1 200 OK\r\nDate: DATE\r\n\r\n{\n  \"Code\" : \"Success\",\n  \"Token\" : \"TOKEN\",\n}";
        assert_eq!(kept_answer(answer), kept);
    }
}
