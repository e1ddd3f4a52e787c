//! The end of a connection. A socket that is closed while the client still sends answers with a reset, which can also take
//! from the client what it has not read yet (RFC 9112, section 9.6): after a pause that ends a connection, clients that
//! send their next request at that moment would not try again.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::TcpStream,
    runtime::Handle,
    time::timeout,
};

use super::shares::Entered;

/// How long what comes after the end is taken.
const LINGER: Duration = Duration::from_secs(1);

/// A connection that ends in order when it is dropped, and has its share until then.
pub(super) struct Lingering(Option<(TcpStream, Entered)>);

impl Lingering {
    pub(super) fn new(stream: TcpStream, connected: Entered) -> Self {
        Self(Some((stream, connected)))
    }

    fn stream(&mut self) -> io::Result<Pin<&mut TcpStream>> {
        let stream = self.0.as_mut().map(|(stream, _)| Pin::new(stream));
        stream.ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl AsyncRead for Lingering {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.stream()?.poll_read(context, buffer)
    }
}

impl AsyncWrite for Lingering {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        self.stream()?.poll_write(context, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream()?.poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_shutdown(context)
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        let (Some((mut stream, connected)), Ok(runtime)) = (self.0.take(), Handle::try_current()) else { return };
        runtime.spawn(async move {
            let taken = async {
                stream.shutdown().await?;
                let mut buffer = [0; 1024];
                while stream.read(&mut buffer).await? > 0 {}
                Ok::<_, io::Error>(())
            };
            // Whatever comes of it, this is the end.
            let _ = timeout(LINGER, taken).await;
            drop((stream, connected));
        });
    }
}
