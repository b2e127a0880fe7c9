//! SOCKS5 (RFC 1928), as much as `socks5h` needs: no authentication, CONNECT, a domain name. The
//! name decides, the port is ignored. Any other name or address is refused: this is a door to the
//! mesh, not to the world.

use std::io;

use super::dial::DialError;
use super::local::LocalSocket;
use crate::model::{ServiceName, service_of};

const VERSION: u8 = 5;
const NO_AUTHENTICATION: u8 = 0;
const NO_METHOD: u8 = 0xff;
const CONNECT: u8 = 1;
const IPV4: u8 = 1;
const DOMAIN: u8 = 3;
const IPV6: u8 = 4;

/// What follows is the instance's.
pub(super) const SUCCESS: [u8; 10] = reply(0);

/// A client that asked for something else. It has been told.
#[derive(Debug, thiserror::Error)]
pub(super) enum SocksError {
    /// Fault: the client.
    #[error("refused: {0}")]
    Refused(&'static str),
    /// It went away, or speaks something else.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The reply that says why a service could not be reached.
pub(super) fn refusal(error: DialError) -> [u8; 10] {
    reply(match error {
        DialError::Denied => 2,
        DialError::UnknownService => 4,
        DialError::Unreachable | DialError::Refused => 5,
        DialError::Timeout => 6,
        _ => 1,
    })
}

/// Reads what the client asks for. Not cancel safe.
pub(super) async fn negotiate(client: &mut LocalSocket) -> Result<ServiceName, SocksError> {
    greet(client).await?;
    let mut request = [0; 4];
    client.read_exact(&mut request).await?;
    let [version, command, _, address_type] = request;
    if version != VERSION {
        return Err(SocksError::Refused("version"));
    }
    let host = match address_type {
        IPV4 => skip::<6>(client).await?,
        IPV6 => skip::<18>(client).await?,
        DOMAIN => Some(domain(client).await?),
        _ => return refuse(client, 8, "address_type").await,
    };
    if command != CONNECT {
        return refuse(client, 7, "command").await;
    }
    let Some(host) = host else { return refuse(client, 2, "address").await };
    match service_of(&host) {
        Some(service) => Ok(service),
        None => refuse(client, 2, "foreign_name").await,
    }
}

async fn greet(client: &mut LocalSocket) -> Result<(), SocksError> {
    let mut head = [0; 2];
    client.read_exact(&mut head).await?;
    let [version, count] = head;
    if version != VERSION {
        return Err(SocksError::Refused("version"));
    }
    let mut methods = vec![0; usize::from(count)];
    client.read_exact(&mut methods).await?;
    if !methods.contains(&NO_AUTHENTICATION) {
        client.write_all(&[VERSION, NO_METHOD]).await?;
        return Err(SocksError::Refused("authentication"));
    }
    Ok(client.write_all(&[VERSION, NO_AUTHENTICATION]).await?)
}

async fn skip<const N: usize>(client: &mut LocalSocket) -> io::Result<Option<Vec<u8>>> {
    client.read_exact(&mut [0; N]).await?;
    Ok(None)
}

async fn domain(client: &mut LocalSocket) -> io::Result<Vec<u8>> {
    let mut len = [0];
    client.read_exact(&mut len).await?;
    let mut host = vec![0; usize::from(len[0]) + 2]; // and the port
    client.read_exact(&mut host).await?;
    host.truncate(usize::from(len[0]));
    Ok(host)
}

async fn refuse<T>(
    client: &mut LocalSocket,
    code: u8,
    reason: &'static str,
) -> Result<T, SocksError> {
    client.write_all(&reply(code)).await?;
    Err(SocksError::Refused(reason))
}

/// A reply with the address 0.0.0.0:0: where the far end is bound is nobody's business.
const fn reply(code: u8) -> [u8; 10] {
    [VERSION, code, 0, IPV4, 0, 0, 0, 0, 0, 0]
}
