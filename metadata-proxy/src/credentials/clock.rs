//! How far this host's clock is from AWS's, which signs and ends credentials by its own.

use std::sync::{Arc, OnceLock};

use aws_sdk_sts::{
    config::{ConfigBag, Intercept, RuntimeComponents, interceptors::BeforeDeserializationInterceptorContextRef},
    error::BoxError,
};
use jiff::{SignedDuration, Timestamp, fmt::rfc2822};

/// Beyond this STS refuses a signature, and the SDK corrects it
/// (<https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-troubleshooting.html>).
pub(crate) const TOLERANCE: SignedDuration = SignedDuration::from_mins(5);

/// Notes the `Date` of the first answer to the call that it is given to.
#[derive(Debug, Clone, Default)]
pub(super) struct Comparison(Arc<OnceLock<SignedDuration>>);

impl Comparison {
    /// How much this host's clock is ahead; to the second, and as much less as the answer took.
    pub(super) fn ahead(&self) -> Option<SignedDuration> {
        self.0.get().copied()
    }
}

impl Intercept for Comparison {
    fn name(&self) -> &'static str {
        "Comparison"
    }

    fn read_after_transmit(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let date = context.response().headers().get("date");
        if let Some(Ok(date)) = date.map(|date| rfc2822::DateTimeParser::new().parse_timestamp(date)) {
            let _ = self.0.set(Timestamp::now().duration_since(date));
        }
        Ok(())
    }
}
