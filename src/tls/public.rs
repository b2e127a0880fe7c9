//! Certificates for clients outside the mesh: files that somebody else makes and renews.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use ring::digest::{SHA256, digest};
use rustls::crypto::ring::default_provider;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ServerConfig, version};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::TlsError;

/// A certificate with its chain, and its key: two PEM files, or twice the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateFiles {
    /// The certificate first, then those that vouch for it.
    pub cert: PathBuf,
    /// PKCS#8, PKCS#1 or SEC1; ECDSA, RSA or Ed25519.
    pub key: PathBuf,
}

/// Files that are no certificate with its key. Fault: whoever wrote them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {fault}", path.display())]
pub struct PublicError {
    /// Which file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub fault: String,
}

/// One certificate and what it says.
#[derive(Clone, Debug)]
pub struct PublicCertificate {
    /// Where it is from.
    pub files: CertificateFiles,
    /// The DNS names in it; the first label may be `*`.
    pub names: Vec<String>,
    /// In hexadecimal digits.
    pub serial: String,
    /// The name of who signed it.
    pub issuer: String,
    /// Seconds since 1970.
    pub not_before: u64,
    /// Seconds since 1970.
    pub not_after: u64,
    /// The first half of the SHA-256 of its key, in hexadecimal digits.
    pub key_hash: String,
    key: Arc<CertifiedKey>,
}

/// As the files were when they were read.
#[derive(Clone, Debug, Default)]
pub struct Loaded {
    /// In the order of the configuration.
    pub certificates: Vec<PublicCertificate>,
    stamps: Vec<Stamp>,
}

/// Tells one state of a file from another: when it changed, or what is said of it, in seconds and nanoseconds,
/// and which file it is. A change of its rights alone may make it readable.
type Stamp = Option<(i64, i64, u64)>;

/// The certificates in use, replaced when their files change; by which one a client is greeted says
/// the name that it asks for (SNI): that which has it, else the one with a wildcard for it. A client
/// that names nobody, as a check by address does, gets the first. A name that none has is refused.
#[derive(Debug, Default)]
pub struct PublicCertificates {
    used: ArcSwap<Loaded>,
    /// Why files are not in use as they are.
    fault: Mutex<Option<PublicError>>,
}

/// What came of a look at the files.
#[derive(Debug)]
pub enum Look {
    /// They are as they were.
    Same,
    /// They were being written a moment ago: look again.
    Changing,
    /// They were read.
    Read(News),
}

/// What came of reading the files. Told once for each state of them.
#[derive(Debug)]
pub struct News {
    /// In use from now on; they were not before, or were refused.
    pub renewed: Vec<PublicCertificate>,
    /// Broken. What the same files said before stays in use.
    pub refused: Vec<PublicError>,
}

impl PublicCertificates {
    /// What is in use.
    pub fn used(&self) -> Arc<Loaded> {
        self.used.load_full()
    }

    /// Why files that have changed are not in use.
    pub fn fault(&self) -> Option<PublicError> {
        self.fault.lock().clone()
    }

    /// From now on these are in use.
    pub fn replace(&self, loaded: Loaded) {
        self.used.store(Arc::new(loaded));
        *self.fault.lock() = None;
    }

    /// Looks at the files again, and reads them when they have changed and rest: `before` is how they
    /// were at the last look. Blocks for the disk.
    pub fn look(&self, files: &[CertificateFiles], before: &mut Option<Stamps>) -> Look {
        let now = stamps(files);
        let is_settled = before.replace(Stamps(now.clone())).is_some_and(|last| last.0 == now);
        if now == self.used.load().stamps {
            return Look::Same;
        }
        if !is_settled {
            return Look::Changing;
        }
        Look::Read(self.read(files))
    }

    /// From now on those of `files` are in use that are sound; for one that is broken what its files said
    /// before, if they did. Blocks for the disk.
    pub fn read(&self, files: &[CertificateFiles]) -> News {
        let stamps = stamps(files); // before: what changes meanwhile is read again
        let (before, fault) = (self.used(), self.fault());
        let was_refused = |files: &CertificateFiles| {
            fault.as_ref().is_some_and(|fault| [&files.cert, &files.key].contains(&&fault.path))
        };
        let (mut certificates, mut renewed, mut refused) = (Vec::new(), Vec::new(), Vec::new());
        for files in files {
            let last = before.certificates.iter().find(|one| one.files == *files);
            match PublicCertificate::read(files) {
                Ok(now) => {
                    let is_same = last.is_some_and(|last| last.key.cert == now.key.cert);
                    if !is_same || was_refused(files) {
                        renewed.push(now.clone());
                    }
                    certificates.push(now);
                }
                Err(fault) => {
                    certificates.extend(last.cloned());
                    refused.push(fault);
                }
            }
        }
        self.used.store(Arc::new(Loaded { certificates, stamps }));
        *self.fault.lock() = refused.first().cloned();
        News { renewed, refused }
    }

    /// The server's side of TLS 1.2 and 1.3 with these certificates, for HTTP/2 and HTTP/1.1.
    pub fn server_config(self: Arc<Self>) -> Result<Arc<ServerConfig>, TlsError> {
        let builder = ServerConfig::builder_with_provider(Arc::new(default_provider()));
        let builder = builder.with_protocol_versions(&[&version::TLS13, &version::TLS12])?;
        let mut config = builder.with_no_client_auth().with_cert_resolver(self);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

impl ResolvesServerCert for PublicCertificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let used = self.used.load();
        // One name may have certificates of several kinds of keys.
        let can_verify = |certificate: &&PublicCertificate| {
            certificate.key.key.choose_scheme(hello.signature_schemes()).is_some()
        };
        let usable = || used.certificates.iter().filter(can_verify);
        let chosen = match hello.server_name() {
            None => usable().next(),
            Some(name) => {
                let with = |wanted: &str| usable().find(|certificate| certificate.has(wanted));
                let wildcard =
                    || name.split_once('.').and_then(|(_, rest)| with(&format!("*.{rest}")));
                with(name).or_else(wildcard)
            }
        };
        chosen.map(|certificate| Arc::clone(&certificate.key))
    }
}

impl PublicCertificate {
    fn has(&self, name: &str) -> bool {
        self.names.iter().any(|own| own.eq_ignore_ascii_case(name))
    }

    fn read(files: &CertificateFiles) -> Result<Self, PublicError> {
        let cert = |fault: &dyn ToString| error(&files.cert, fault);
        let pem = |error: rustls_pki_types::pem::Error| match error {
            rustls_pki_types::pem::Error::Io(error) => error.to_string(),
            rustls_pki_types::pem::Error::NoItemsFound => "no such PEM block is in it".to_owned(),
            other => other.to_string(),
        };
        let chain = CertificateDer::pem_file_iter(&files.cert).and_then(Iterator::collect);
        let chain: Vec<CertificateDer<'static>> = chain.map_err(|error| cert(&pem(error)))?;
        let first = chain.first().ok_or_else(|| cert(&"no certificate in PEM is in it"))?.clone();
        let key = PrivateKeyDer::from_pem_file(&files.key);
        let key = key.map_err(|fault| error(&files.key, &pem(fault)))?;
        let key = CertifiedKey::from_der(chain, key, &default_provider()).map_err(|fault| {
            let cert = files.cert.display();
            error(
                &files.key,
                &match fault {
                    rustls::Error::InconsistentKeys(_) => format!("is not the key of {cert}"),
                    other => format!("no key for {cert}: {other}"),
                },
            )
        })?;
        let (_, parsed) = X509Certificate::from_der(&first).map_err(|error| cert(&error))?;
        let names = parsed.subject_alternative_name().ok().flatten();
        let names = names.map_or(&[][..], |names| names.value.general_names.as_slice());
        let dns = |name: &GeneralName<'_>| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            _ => None,
        };
        let (seconds, validity) = (|at: i64| u64::try_from(at).unwrap_or(0), parsed.validity());
        let key_hash = digest(&SHA256, parsed.public_key().raw);
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self {
            files: files.clone(),
            names: names.iter().filter_map(dns).collect(),
            serial: format!("{:x}", parsed.tbs_certificate.serial),
            issuer: parsed.issuer().to_string(),
            not_before: seconds(validity.not_before.timestamp()),
            not_after: seconds(validity.not_after.timestamp()),
            key_hash: hex(&key_hash.as_ref()[..16]),
            key: Arc::new(key),
        })
    }
}

/// How files were at a look.
#[derive(Clone, Debug)]
pub struct Stamps(Vec<Stamp>);

/// Reads all of them, or says what is wrong with the first that is. Blocks for the disk.
pub fn load(files: &[CertificateFiles]) -> Result<Loaded, PublicError> {
    let stamps = stamps(files); // before: what changes meanwhile is read again
    let certificates = files.iter().map(PublicCertificate::read).collect::<Result<_, _>>()?;
    Ok(Loaded { certificates, stamps })
}

impl Loaded {
    /// Whether a client that asks for `host` is shown a certificate.
    pub fn has(&self, host: &str) -> bool {
        let wildcard = host.split_once('.').map(|(_, rest)| format!("*.{rest}"));
        let has = |name: &str| self.certificates.iter().any(|certificate| certificate.has(name));
        has(host) || wildcard.is_some_and(|name| has(&name))
    }
}

fn stamps(files: &[CertificateFiles]) -> Vec<Stamp> {
    let stamp = |path: &PathBuf| {
        let about = fs::metadata(path)?;
        io::Result::Ok((about.ctime(), about.ctime_nsec(), about.ino()))
    };
    files.iter().flat_map(|files| [&files.cert, &files.key]).map(|path| stamp(path).ok()).collect()
}

fn error(path: &Path, fault: &dyn ToString) -> PublicError {
    PublicError { path: path.to_owned(), fault: fault.to_string() }
}
