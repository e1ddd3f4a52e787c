//! Tries one way to the metadata service, from inside a container, and tells on one line of JSON what came of it.
//!
//! **Only for a hermetic test host**: anywhere else 169.254.169.254 may be somebody's real metadata service.
#![expect(clippy::print_stdout, reason = "what it finds is its standard output")]

mod frames;
mod namespaces;
mod packets;
mod pass;
mod sys;
mod tcp;
mod uring;

use std::{io, time::Instant};

use serde_json::json;

use frames::{Bypass, Packet};

/// What came of a way. An error is told by whoever turns it into one: where it happened matters.
pub(crate) enum Outcome {
    /// Somebody answered, with this.
    Served {
        answer: String,
        peer: String,
    },
    Refused(String),
    Timeout(String),
    Error(String),
}

pub(crate) type Tried = Result<Outcome, Outcome>;

/// The kernel says no at this step.
pub(crate) fn at(step: &'static str) -> impl Fn(io::Error) -> Outcome {
    move |error| {
        let detail = format!("{step}: {}", name_of(&error));
        match error.raw_os_error() {
            Some(libc::ETIMEDOUT | libc::EINPROGRESS) => Outcome::Timeout(detail),
            Some(
                libc::ECONNREFUSED
                | libc::ENETUNREACH
                | libc::EHOSTUNREACH
                | libc::EPERM
                | libc::EACCES
                | libc::EADDRNOTAVAIL
                | libc::ECONNRESET
                | libc::EPIPE
                | libc::EINVAL
                | libc::ENETDOWN
                | libc::ENOBUFS,
            ) => Outcome::Refused(detail),
            _ => Outcome::Error(detail),
        }
    }
}

fn name_of(error: &io::Error) -> String {
    let name = match error.raw_os_error() {
        Some(libc::EPERM) => "EPERM",
        Some(libc::EACCES) => "EACCES",
        Some(libc::EINVAL) => "EINVAL",
        Some(libc::ENETDOWN) => "ENETDOWN",
        Some(libc::ENETUNREACH) => "ENETUNREACH",
        Some(libc::EHOSTUNREACH) => "EHOSTUNREACH",
        Some(libc::ECONNREFUSED) => "ECONNREFUSED",
        Some(libc::ECONNRESET) => "ECONNRESET",
        Some(libc::ECONNABORTED) => "ECONNABORTED",
        Some(libc::ETIMEDOUT | libc::EINPROGRESS) => "ETIMEDOUT",
        Some(libc::ENOBUFS) => "ENOBUFS",
        Some(libc::EPIPE) => "EPIPE",
        Some(libc::EADDRNOTAVAIL) => "EADDRNOTAVAIL",
        Some(libc::EADDRINUSE) => "EADDRINUSE",
        Some(libc::EAFNOSUPPORT) => "EAFNOSUPPORT",
        Some(libc::EPROTONOSUPPORT) => "EPROTONOSUPPORT",
        Some(libc::ESOCKTNOSUPPORT) => "ESOCKTNOSUPPORT",
        Some(libc::ENOSYS) => "ENOSYS",
        _ => return error.to_string(),
    };
    name.to_owned()
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let begin = Instant::now();
    let outcome = run(&words.iter().map(String::as_str).collect::<Vec<_>>()).unwrap_or_else(|failure| failure);
    let ms = begin.elapsed().as_secs_f64() * 1000.0;
    let (outcome, detail, peer) = match outcome {
        Outcome::Served { answer, peer } => ("served", answer, peer),
        Outcome::Refused(detail) => ("refused", detail, String::new()),
        Outcome::Timeout(detail) => ("timeout", detail, String::new()),
        Outcome::Error(detail) => ("error", detail, String::new()),
    };
    println!("{}", json!({"way": words.join(" "), "outcome": outcome, "detail": detail, "ms": ms, "peername": peer}));
}

fn run(words: &[&str]) -> Tried {
    match words {
        ["port", port] => tcp::to(tcp::IMDS_V4, number(port)?),
        ["to", address, port] => tcp::to(octets(address)?, number(port)?),
        ["squat", address, port] => tcp::squat(octets(address)?, number(port)?),
        ["hammer", ms] => tcp::hammer(number(ms)?),
        ["udp", port] => packets::udp(number(port)?, false),
        ["udp-connected", port] => packets::udp(number(port)?, true),
        ["stream", protocol] => packets::stream(number(protocol)?),
        ["give", path, "connected"] => pass::give(path, true),
        ["give", path, "unconnected"] => pass::give(path, false),
        ["take", path, "ask"] => pass::take(path, false),
        ["take", path, "connect"] => pass::take(path, true),
        ["wait", path, "connect"] => pass::wait(path, true),
        ["wait", path, "ask"] => pass::wait(path, false),
        ["nested-cgroup", name] => namespaces::nested_cgroup(name),
        ["nested-engine", name] => namespaces::nested_engine(name),
        ["host-netns", pid] => namespaces::network_of(pid),
        ["detach-links", cgroup] => namespaces::detach_links(number(cgroup)?),
        ["frame", interface] => frames::packet(interface, Packet::V4, Bypass::No),
        ["frame-direct", interface] => frames::packet(interface, Packet::V4, Bypass::Set),
        ["frame-direct-32", interface] => frames::packet(interface, Packet::V4, Bypass::Set32),
        ["frame6", interface] => frames::packet(interface, Packet::V6, Bypass::No),
        ["frame-blind", interface] => frames::blind(interface),
        ["frame-xdp", interface] => frames::xdp(interface),
        [way] => plain(way),
        _ => Err(Outcome::Error("no such way".into())),
    }
}

fn plain(way: &str) -> Tried {
    match way {
        "connect" => tcp::to(tcp::IMDS_V4, 80),
        "v4-mapped" => tcp::v4_mapped(),
        "v6" => tcp::v6(false),
        "v6only" => tcp::v6(true),
        "addrform" => tcp::addrform(),
        "fastopen-sendto" => tcp::fastopen_sendto(),
        "fastopen-connect" => tcp::fastopen_connect(),
        "mptcp" => tcp::mptcp(),
        "nonblocking" => tcp::nonblocking(),
        "bind-own" => tcp::bound_to_own_address(),
        "bind-listener" => tcp::bound_to_listener(),
        "bind-device" => tcp::bound_to_device(),
        "mark" => tcp::marked(),
        "repair" => tcp::repaired(),
        "disconnect-first" => tcp::disconnected_first(),
        "disconnect-between" => tcp::disconnected_between(),
        "options" => tcp::with_options(),
        "source-route" => tcp::source_routed(),
        "direct" => tcp::to(tcp::LISTENER, tcp::LISTENER_PORT),
        "direct-mapped" => tcp::direct_mapped(),
        "exhausted" => tcp::exhausted(),
        "io-uring" => uring::connect(0),
        "io-uring-polled" => uring::connect(uring::SQPOLL),
        "udp6" => packets::udp6(),
        "ping" => packets::ping(libc::SOCK_DGRAM),
        "ping-raw" => packets::ping(libc::SOCK_RAW),
        "raw-tcp" => packets::raw_tcp(false),
        "raw-tcp-connected" => packets::raw_tcp(true),
        "raw-header" => packets::raw_header(false),
        "raw-source-route" => packets::raw_header(true),
        "raw-after-refused" => packets::raw_to_listener(),
        "raw6" => packets::raw6(false),
        "raw6-header" => packets::raw6(true),
        "smc" => packets::smc(),
        "nested-netns" => namespaces::fresh_network(libc::CLONE_NEWNET),
        "user-netns" => namespaces::fresh_network(libc::CLONE_NEWUSER | libc::CLONE_NEWNET),
        "option" => frames::option(Bypass::Set),
        "option-32" => frames::option(Bypass::Set32),
        "lo-down" => namespaces::without_loopback(),
        _ => Err(Outcome::Error("no such way".into())),
    }
}

fn number<T: std::str::FromStr>(word: &str) -> Result<T, Outcome> {
    word.parse().map_err(|_| Outcome::Error(format!("{word}: not a number")))
}

fn octets(word: &str) -> Result<[u8; 4], Outcome> {
    let address = word.parse::<std::net::Ipv4Addr>().map_err(|_| Outcome::Error(format!("{word}: not an address")))?;
    Ok(address.octets())
}
