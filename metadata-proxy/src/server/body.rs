//! The body of an answer: at hand, or on its way from the real service.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body_util::{Either, Full, channel::Channel};
use hyper::body::{Frame, Incoming, SizeHint};

use super::shares::Entered;
use crate::upstream::Cut;

pub(super) struct Body {
    content: Either<Full<Bytes>, Either<Channel<Bytes, Cut>, Incoming>>,
    /// The request is in flight until its answer is taken.
    _request: Option<Entered>,
}

impl Body {
    pub(super) fn streamed(stream: Channel<Bytes, Cut>) -> Self {
        Self { content: Either::Right(Either::Left(stream)), _request: None }
    }

    pub(super) fn passed(body: Incoming) -> Self {
        Self { content: Either::Right(Either::Right(body)), _request: None }
    }

    pub(super) fn of(self, request: Entered) -> Self {
        Self { _request: Some(request), ..self }
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Self { content: Either::Left(Full::new(bytes)), _request: None }
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Pin::new(&mut self.content).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.content.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.content.size_hint()
    }
}
