use super::*;

fn row(expect: Expect, outcome: &str, detail: &str) -> Row {
    let report = Report {
        way: "connect".into(),
        outcome: outcome.into(),
        detail: detail.into(),
        ms: 1.0,
        peername: "169.254.169.254:80".into(),
    };
    Row {
        way: "connect".into(),
        place: "plain".into(),
        expect,
        report,
        seen: Seen::default(),
        before: None,
        leads_there: true,
    }
}

fn arrived() -> Seen {
    Seen { requests: 0, packets: "1 UDP".into() }
}

#[test]
fn what_must_be_is_no_difference() {
    assert!(row(Expect::Ours("web"), "served", "web").differences().is_empty());
    assert!(row(Expect::Nobody, "served", "HTTP 404").differences().is_empty());
    assert!(row(Expect::Refused, "timeout", "no datagram").differences().is_empty());
    assert!(row(Expect::Host, "served", HOST_ROLE).differences().is_empty());
    assert!(Row { seen: arrived(), ..row(Expect::Known("why"), "timeout", "") }.differences().is_empty());
}

#[test]
fn a_packet_that_arrives_is_a_difference_however_it_was_answered() {
    for expect in [Expect::Ours("web"), Expect::Refused, Expect::Nobody] {
        let differences = Row { seen: arrived(), ..row(expect, "served", "web") }.differences();
        assert!(differences.iter().any(|difference| difference.starts_with("LEAK")), "{expect:?}");
    }
}

#[test]
fn another_answer_is_a_difference() {
    assert!(!row(Expect::Ours("web"), "served", "api").differences().is_empty());
    assert!(!row(Expect::Ours("web"), "refused", "web").differences().is_empty());
    assert!(!row(Expect::Refused, "served", HOST_ROLE).differences().is_empty());
    assert!(!row(Expect::Known("stopped by now"), "timeout", "").differences().is_empty());
}

#[test]
fn a_way_that_leads_nowhere_proves_nothing() {
    let vain = Row { before: Some(Seen::default()), ..row(Expect::Refused, "timeout", "") };
    assert!(!vain.differences().is_empty());
    assert!(Row { leads_there: false, ..vain }.differences().is_empty());
}
