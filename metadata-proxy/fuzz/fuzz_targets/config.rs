#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| metadata_proxy_fuzz::config(input));
