//! What the tests and the demonstration stand on: a hermetic host, stand-ins for AWS, real clients.

pub mod bpf;
pub mod bypass;
pub mod clients;
pub mod cloud;
pub mod handover;
pub mod host;
pub mod imds;
pub mod stage;
pub mod sts;
pub mod talk;
