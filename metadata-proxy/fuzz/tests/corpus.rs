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
