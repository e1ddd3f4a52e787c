//! Every target over its kept corpus.

use std::{fs, path::Path};

use metadata_proxy_fuzz::TARGETS;

#[test]
fn no_input_of_the_corpus_breaks_a_rule() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (name, target) in TARGETS {
        let files = fs::read_dir(corpus.join(name)).expect("a corpus for each target");
        let mut count = 0;
        for file in files {
            let file = file.expect("an entry of the corpus").path();
            // A panic names the rule; this, the input.
            eprintln!("{}", file.display());
            target(&fs::read(&file).expect("an input"));
            count += 1;
        }
        assert!(count >= 10, "{name} has only {count} inputs");
    }
}

/// Or the corpus proves nothing.
#[test]
fn a_request_is_answered_also_where_nothing_follows_it() {
    use metadata_proxy::fuzz::{SECRET, Setting, request};
    let input = b"GET /latest/meta-data/iam/security-credentials/app-1 HTTP/1.1\r\nHost: x\r\n\r\n";
    for setting in Setting::ALL {
        let exchange = request(input, setting);
        let answer = String::from_utf8_lossy(&exchange.answers);
        let granted = setting.role && !setting.token_required;
        assert_eq!(
            (answer.contains(SECRET), exchange.handed_out.len()),
            (granted, usize::from(granted)),
            "{setting:?}"
        );
        assert!(answer.starts_with("HTTP/1.1 "), "{setting:?}: {answer:?}");
    }
}
