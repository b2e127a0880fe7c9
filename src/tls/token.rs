//! What a newcomer is handed: a private key, and where to use it.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

use super::{SecretKey, TlsError};
use crate::model::{MeshId, PublicKey};
use crate::wire;

const PREFIX: &str = "murmesh1-";
const TEXT_LEN_MAX: usize = 2_048;
const ISSUERS_MAX: usize = 16;

/// A join token: the private half of an invite, the mesh and its root (so that the newcomer knows
/// whom it joins), and issuers to ask. A secret: [`fmt::Display`] is the only way to print it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// The mesh it leads into.
    pub mesh: MeshId,
    /// The key that every member of that mesh must lead back to.
    pub root: PublicKey,
    /// Issuers to ask, in order; at most 16.
    pub issuers: Vec<SocketAddr>,
    pkcs8: Vec<u8>,
}

impl Token {
    /// A token for the private half of an invite.
    pub fn new(mesh: MeshId, root: PublicKey, issuers: Vec<SocketAddr>, key: &SecretKey) -> Self {
        Self { mesh, root, issuers, pkcs8: key.pkcs8().to_vec() }
    }

    /// The private half of the invite.
    pub fn key(&self) -> Result<SecretKey, TlsError> {
        SecretKey::from_pkcs8(&self.pkcs8)
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.pkcs8);
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = wire::encode(self).map_err(|_| fmt::Error)?;
        write!(f, "{PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(bytes))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token(for {:?})", self.mesh)
    }
}

impl FromStr for Token {
    type Err = TlsError;

    fn from_str(text: &str) -> Result<Self, TlsError> {
        let text = text.trim();
        if text.len() > TEXT_LEN_MAX {
            return Err(TlsError::Token("it is longer than 2048 characters"));
        }
        let encoded = text
            .strip_prefix(PREFIX)
            .ok_or(TlsError::Token("it does not begin with 'murmesh1-', is it whole?"))?;
        let bytes = BASE64_URL_SAFE_NO_PAD
            .decode(encoded)
            .map_err(|_| TlsError::Token("it has characters that no token has, or lost some"))?;
        let token: Self = wire::decode(&bytes)
            .map_err(|_| TlsError::Token("it is damaged or cut short, copy it again"))?;
        if token.issuers.len() > ISSUERS_MAX {
            return Err(TlsError::Token("it names more than 16 issuers"));
        }
        token.key().map_err(|_| TlsError::Token("its key is damaged"))?;
        Ok(token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_survives_a_clipboard_and_damage_is_named() {
        let key = SecretKey::generate().unwrap();
        let issuers = vec!["10.0.0.1:7370".parse().unwrap()];
        let token = Token::new(MeshId([1; 32]), PublicKey([2; 32]), issuers, &key);
        let text = token.to_string();
        assert_eq!(format!(" {text}\n").parse::<Token>().unwrap(), token);
        assert!(!format!("{token:?}").contains(&text[20..40]), "a secret does not print itself");
        for damaged in
            [&text[1..], &text[..text.len() - 8], "murmesh1-", "", &text.replace('-', "!")]
        {
            assert!(damaged.parse::<Token>().is_err(), "{damaged}");
        }
    }
}
