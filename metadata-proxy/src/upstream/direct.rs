//! A request of a container that has the real service itself, passed on as it is.

use std::time::Duration;

use http::{
    Request, Response, Uri,
    header::{CONNECTION, TRANSFER_ENCODING},
};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

use super::{Error, TIMEOUT, failed};

/// Where those connect that have it. A simulated instance or another endpoint is ours alone.
const SERVICE: &str = "169.254.169.254:80";
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);

/// The container has connected before the kernel knew that it has the service itself: its next connection leads there.
pub(crate) async fn pass(mut request: Request<Incoming>) -> Result<Response<Incoming>, Error> {
    let uri = Uri::from_static("http://169.254.169.254/");
    request.headers_mut().remove(CONNECTION);
    let asked = async {
        let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(SERVICE)).await;
        let stream = stream.map_err(|_| failed(&uri, format!("no connection within {CONNECT_TIMEOUT:?}")))?;
        let stream = stream.map_err(|error| failed(&uri, error))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| failed(&uri, error))?;
        tokio::spawn(async { drop(connection.await) });
        sender.send_request(request).await.map_err(|error| failed(&uri, error))
    };
    let answer = timeout(TIMEOUT, asked).await;
    let mut answer = answer.unwrap_or_else(|_| Err(Error::Timeout(uri.clone())))?;
    // Of the connection that it came by.
    for name in [CONNECTION, TRANSFER_ENCODING] {
        answer.headers_mut().remove(name);
    }
    Ok(answer)
}
