//! Patterns in which `*` stands for any run of characters and `?` for one.

/// Whether the pattern matches the whole text. It goes back to the last star only, so that none takes longer than pattern
/// times text.
pub(crate) fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    let mut star = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(c) if *c == b'?' || *c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    (p, t) = (at + 1, from + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_the_whole_text() {
        for (pattern, text, expected) in [
            ("web", "web", true),
            ("web", "web2", false),
            ("web*", "web", true),
            ("*-web", "team/a-web", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-b-b", false),
            ("w?b", "web", true),
            ("w?b", "wb", false),
            ("*", "", true),
            ("", "", true),
            ("", "x", false),
            ("[a]", "a", false),
            ("iam", "iam", true),
            ("iam", "iam-ecs-1", false),
            ("iam", "IAM", false),
            ("*", "anything", true),
            ("iam-ecs-*", "iam-ecs-", true),
            ("iam-ecs-*", "iam-ecs-agent", true),
            ("iam-ecs-*", "iam", false),
            ("*-hostname", "local-hostname", true),
            ("*-hostname", "hostname", false),
            ("a*a", "a", false),
            ("a*a", "aa", true),
            ("a*b*c", "aXbYc", true),
            ("a*b*c", "abc", true),
            ("a*b*c", "acb", false),
            ("*b*b*", "b", false),
            ("*b*b*", "xbxbx", true),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
        assert!(!matches(&"*a".repeat(40), &"a".repeat(39)));
    }
}
