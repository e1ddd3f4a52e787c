//! The daemon's own log, on standard error: as text or JSON, and in the journal's way where that reads it.

use std::{
    env, fmt,
    io::{IsTerminal as _, stderr},
    os::fd::AsFd as _,
};

use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::filter_fn,
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer, layer},
    layer::SubscriberExt as _,
    registry::LookupSpan,
    util::SubscriberInitExt as _,
};

use crate::cli::LogFormat;

/// `filter` is a right one.
pub(crate) fn start(form: LogFormat, filter: &str) {
    let lines = layer().with_writer(stderr).with_ansi(stderr().is_terminal());
    let lines = match (form, is_journal()) {
        (LogFormat::Text, false) => lines.boxed(),
        (LogFormat::Json, false) => lines.json().boxed(),
        // The journal has the time by itself.
        (LogFormat::Text, true) => lines.without_time().map_event_format(Prioritized).boxed(),
        (LogFormat::Json, true) => lines.json().map_event_format(Prioritized).boxed(),
    };
    let registry = tracing_subscriber::registry().with(EnvFilter::new(filter)).with(filter_fn(has_no_secrets));
    registry.with(lines).init();
}

/// Why the program ends, also where no log has been started.
pub(crate) fn last_words(reason: &str) {
    let priority = if is_journal() { "<3>" } else { "" };
    eprintln!("{priority}metadata-proxy: {reason}");
}

/// The AWS SDK's finest level shows requests with all their headers, in which there are session tokens.
fn has_no_secrets(line: &Metadata<'_>) -> bool {
    *line.level() != Level::TRACE || !line.target().starts_with("aws_")
}

/// Whether systemd has connected standard error to the journal, and nobody has put something else there since: its
/// variable has the device and the inode of the socket (systemd.exec(5)).
fn is_journal() -> bool {
    let own = rustix::fs::fstat(stderr().as_fd()).map(|own| format!("{}:{}", own.st_dev, own.st_ino));
    env::var("JOURNAL_STREAM").ok().is_some_and(|stream| own.is_ok_and(|own| own == stream))
}

/// Lines with their priority in front, which the journal takes off (sd-daemon(3)).
struct Prioritized<F>(F);

impl<S, N, F> FormatEvent<S, N> for Prioritized<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let priority = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        write!(writer, "<{priority}>")?;
        self.0.format_event(context, writer, event)
    }
}
