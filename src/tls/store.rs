//! The data directory: keys, certificates, the durable epoch, and the lock that keeps two processes
//! from being one member.
//!
//! Secrets are 0600, the directory 0700. Every file is written beside its place, synced and renamed,
//! so that a crash leaves the old or the new one, never half.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use rustix::fs::{FlockOperation, flock};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use super::{Authority, FoundedMesh, NodeCredentials, SecretKey, TlsError, found_mesh};
use crate::mesh::EPOCH_RESERVE;
use crate::model::{Enrolment, Entry, Epoch, Genesis, MemberName, MeshId, Signer, Unlisted};
use crate::runtime::{clock, entropy};
use crate::wire;

const GENESIS: &str = "genesis";
const NODE_KEY: &str = "node.key";
const NODE_CHAIN: &str = "node.crt";
const ISSUER_KEY: &str = "issuer.key";
const ISSUER_CERTIFICATE: &str = "issuer.crt";
const ROOT_KEY: &str = "root.key";
const OPERATOR_KEY: &str = "operator.key";
const ENTRIES: &str = "entries";
const EPOCH: &str = "epoch";
const API_TOKEN: &str = "api.token";
const RESET_SECRET: &str = "reset.secret";
const LOCK: &str = "lock";

/// The data directory cannot be used. Fault: this machine or its operator; each text names the path.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The system refuses. What was there is as it was.
    #[error("cannot {action} {}: {error}", path.display())]
    Io {
        /// A verb: what was tried.
        action: &'static str,
        /// Which file or directory.
        path: PathBuf,
        /// The system's answer.
        error: io::Error,
    },
    /// A file is there and cannot be what was written.
    #[error("{} is damaged: {what}{remedy}", path.display())]
    Damaged {
        /// Which file or directory.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
        /// What may be done about it, after a semicolon; empty where nothing may.
        remedy: &'static str,
    },
    /// A key that others may have read.
    #[error("{} can be read by others (mode {mode:o}); make it private: chmod 600 {}", path.display(), path.display())]
    NotPrivate {
        /// Which file or directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Neither `init` nor `join` has been here.
    #[error("{} holds no identity yet; run 'murmesh init' for a new mesh or 'murmesh join TOKEN'", path.display())]
    Empty {
        /// Which file or directory.
        path: PathBuf,
    },
    /// It holds the identity of a member of another mesh.
    #[error("{} belongs to mesh {found}, not {wanted}; use another --data-dir", path.display())]
    OtherMesh {
        /// Which file or directory.
        path: PathBuf,
        /// The mesh of that identity.
        found: String,
        /// The mesh that was meant.
        wanted: String,
    },
    /// Trying again is safe once that one has ended.
    #[error(
        "another agent is running with {} (its lock is held); one that was told to stop ends when its \
         connections have, within 30 s",
        path.display()
    )]
    Locked {
        /// Which file or directory.
        path: PathBuf,
    },
    /// A key or certificate in it is not usable.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A secret cannot be made.
    #[error(transparent)]
    Entropy(#[from] entropy::EntropyError),
}

impl StoreError {
    /// A file that is there and cannot be what was written. Says what may be done about it.
    pub fn damaged(path: PathBuf, what: impl ToString) -> Self {
        let what = match fs::metadata(&path) {
            Ok(file) if file.len() == 0 => "it is empty".to_owned(),
            _ => what.to_string(),
        };
        let remedy = match path.file_name().and_then(|name| name.to_str()) {
            Some("entries") => {
                "; 'murmesh join TOKEN' writes it anew, or copy it from the data directory of another \
                 member: it is the same everywhere"
            }
            Some("members") => {
                "; it may be deleted: members are then looked for at the seeds and where their \
                 records say"
            }
            Some("node.toml") => {
                "; it may be deleted: seeds, mesh port and advertised address are then those of the \
                 configuration file, or the defaults"
            }
            Some("runtime.toml") => {
                "; it may be deleted: what 'murmesh expose' and 'murmesh upstream' added is then \
                 forgotten"
            }
            Some("epoch") => "; it may be deleted: the other members tell where to go on",
            _ => "",
        };
        Self::Damaged { path, what, remedy }
    }
}

/// Where an agent keeps what must outlive it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataDir {
    path: PathBuf,
}

impl DataDir {
    /// The directory at `path`; it need not exist yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of a file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Makes the directory, 0700, if it is missing.
    pub fn create(&self) -> Result<(), StoreError> {
        if self.path.is_dir() {
            return Ok(());
        }
        fs::create_dir_all(&self.path)
            .and_then(|()| fs::set_permissions(&self.path, Permissions::from_mode(0o700)))
            .map_err(|error| StoreError::Io { action: "create", path: self.path.clone(), error })
    }

    /// Reads a file; `None` when there is none.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        match fs::read(self.file(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.failed("read", name, error)),
        }
    }

    /// Writes a file that others may read.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.replace(name, bytes, 0o644)
    }

    /// Writes a file that only this user may read.
    pub fn write_secret(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.replace(name, bytes, 0o600)
    }

    fn replace(&self, name: &str, bytes: &[u8], mode: u32) -> Result<(), StoreError> {
        let beside = self.file(&format!(".{name}.new"));
        let write = || {
            // One left by a crash may have another mode.
            match fs::remove_file(&beside) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file =
                OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&beside, self.file(name))?;
            File::open(&self.path)?.sync_all()
        };
        write().map_err(|error| self.failed("write", name, error))
    }

    fn failed(&self, action: &'static str, name: &str, error: io::Error) -> StoreError {
        StoreError::Io { action, path: self.file(name), error }
    }

    fn damaged(&self, name: &str, what: impl ToString) -> StoreError {
        StoreError::damaged(self.file(name), what)
    }

    /// Whatever is wrong with the replicated entries.
    pub fn damaged_entries(&self, what: impl ToString) -> StoreError {
        self.damaged(ENTRIES, what)
    }

    /// A secret key, which must be private.
    fn read_key(&self, name: &str) -> Result<Option<SecretKey>, StoreError> {
        read_key(&self.file(name))
    }

    fn write_key(&self, name: &str, key: &SecretKey) -> Result<(), StoreError> {
        self.write_secret(name, key.to_pem()?.as_bytes())
    }

    /// The encoded genesis, exactly as hashed.
    pub fn genesis_bytes(&self) -> Result<Vec<u8>, StoreError> {
        self.read(GENESIS)?.ok_or_else(|| StoreError::Empty { path: self.path.clone() })
    }

    /// How the mesh of this directory began; `None` before `init` or `join`.
    pub fn genesis(&self) -> Result<Option<(MeshId, Genesis)>, StoreError> {
        let Some(bytes) = self.read(GENESIS)? else { return Ok(None) };
        let genesis = wire::decode_payload(&bytes).map_err(|error| self.damaged(GENESIS, error))?;
        Ok(Some((MeshId::of_genesis(&bytes), genesis)))
    }

    /// Whether there is a whole identity: the chain is written last.
    pub fn has_identity(&self) -> bool {
        self.file(NODE_CHAIN).exists()
    }

    /// This member's credentials.
    pub fn credentials(&self) -> Result<NodeCredentials, StoreError> {
        let empty = || StoreError::Empty { path: self.path.clone() };
        let (mesh, genesis) = self.genesis()?.ok_or_else(empty)?;
        let key = self.read_key(NODE_KEY)?.ok_or_else(empty)?;
        let pem = self.read(NODE_CHAIN)?.ok_or_else(empty)?;
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
        let chain = chain.map_err(|error| self.damaged(NODE_CHAIN, error))?;
        NodeCredentials::new(mesh, genesis, key, chain)
            .map_err(|error| self.damaged(NODE_CHAIN, error))
    }

    /// The issuing key and certificate, on members that have them.
    pub fn authority(&self) -> Result<Option<Authority>, StoreError> {
        let (Some((mesh, genesis)), Some(key)) = (self.genesis()?, self.read_key(ISSUER_KEY)?)
        else {
            return Ok(None);
        };
        let Some(certificate) = self.read(ISSUER_CERTIFICATE)? else {
            return Ok(None); // the root has not made it an issuer yet
        };
        let authority = Authority::new(mesh, &genesis, key, &certificate)
            .map_err(|error| self.damaged(ISSUER_CERTIFICATE, error))?;
        Ok(Some(authority))
    }

    /// The issuing key, made now if there is none: until the root makes it an issuer it signs
    /// nothing that anybody believes.
    pub fn issuing_key(&self) -> Result<SecretKey, StoreError> {
        self.key_or_new(ISSUER_KEY)
    }

    /// Another issuing key in the place of the one that there is, whose certificate goes first: a crash
    /// in between leaves a key that nobody has appointed.
    pub fn new_issuing_key(&self) -> Result<SecretKey, StoreError> {
        match fs::remove_file(self.file(ISSUER_CERTIFICATE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(self.failed("remove", ISSUER_CERTIFICATE, error));
            }
            _ => {}
        }
        let key = SecretKey::generate()?;
        self.write_key(ISSUER_KEY, &key)?;
        Ok(key)
    }

    /// Stores the certificate of [`DataDir::issuing_key`].
    pub fn store_issuer_certificate(&self, certificate: &[u8]) -> Result<(), StoreError> {
        self.write(ISSUER_CERTIFICATE, certificate)
    }

    /// The node key, made now if there is none: a join that is tried again keeps its key.
    pub fn node_key(&self) -> Result<SecretKey, StoreError> {
        self.key_or_new(NODE_KEY)
    }

    fn key_or_new(&self, name: &str) -> Result<SecretKey, StoreError> {
        if let Some(key) = self.read_key(name)? {
            return Ok(key);
        }
        let key = SecretKey::generate()?;
        self.write_key(name, &key)?;
        Ok(key)
    }

    /// Stores what a newcomer was given; the chain goes last and makes it whole.
    pub fn store_identity(
        &self,
        genesis: &[u8],
        entries: &[Entry],
        chain: &[CertificateDer<'_>],
    ) -> Result<(), StoreError> {
        self.write(GENESIS, genesis)?;
        self.store_entries(entries)?;
        self.api_token()?;
        self.store_chain(chain)
    }

    /// Stores this member's chain: its leaf and the enrolment inside it, in one atomic step.
    pub fn store_chain(&self, chain: &[CertificateDer<'_>]) -> Result<(), StoreError> {
        let pem: String = chain.iter().map(|certificate| pem("CERTIFICATE", certificate)).collect();
        self.write_secret(NODE_CHAIN, pem.as_bytes())
    }

    /// The replicated entries that were known when the agent last wrote them. A part of them is not
    /// enough: what is missing may be the word that somebody lost a right.
    pub fn entries(&self) -> Result<Vec<Entry>, StoreError> {
        let bytes = self.read(ENTRIES)?.ok_or_else(|| self.damaged_entries("it is missing"))?;
        let (mut rest, mut entries) = (Bytes::from(bytes), Vec::new());
        while !rest.is_empty() {
            let entry = Entry::decode_from(&mut rest);
            entries.push(entry.map_err(|error| self.damaged_entries(error))?);
        }
        match entries.is_empty() {
            true => Err(self.damaged_entries("it is empty")),
            false => Ok(entries),
        }
    }

    /// Stores replicated entries.
    pub fn store_entries<'a>(
        &self,
        entries: impl IntoIterator<Item = &'a Entry>,
    ) -> Result<(), StoreError> {
        let bytes: Vec<u8> =
            entries.into_iter().flat_map(|entry| entry.bytes().iter().copied()).collect();
        self.write(ENTRIES, &bytes)
    }

    /// Takes the epochs of this run: this one and [`EPOCH_RESERVE`] after it are ours, which is on
    /// disk before the first is used.
    pub fn claim_epochs(&self) -> Result<Epoch, StoreError> {
        let epoch = Epoch(clock::unix_seconds().max(self.next_epoch()?));
        self.extend_epochs(epoch)?;
        Ok(epoch)
    }

    /// Takes more epochs for this run: `from` and [`EPOCH_RESERVE`] after it. Returns the last.
    pub fn extend_epochs(&self, from: Epoch) -> Result<Epoch, StoreError> {
        let last = from.0.saturating_add(EPOCH_RESERVE);
        let next = last.saturating_add(1).max(self.next_epoch()?);
        self.write(EPOCH, next.to_string().as_bytes())?;
        Ok(Epoch(last))
    }

    /// The first epoch that no run has taken.
    fn next_epoch(&self) -> Result<u64, StoreError> {
        let Some(text) = self.read(EPOCH)? else { return Ok(0) };
        let text = String::from_utf8_lossy(&text);
        text.trim().parse().map_err(|error| self.damaged(EPOCH, error))
    }

    /// The token that opens the local API's mutations; made now if there is none.
    pub fn api_token(&self) -> Result<String, StoreError> {
        if let Some(token) = self.read(API_TOKEN)? {
            let token = String::from_utf8_lossy(&token).trim().to_owned();
            if token.len() >= 32 {
                return Ok(token);
            }
        }
        let token = MeshId(entropy::random_bytes()?).to_string();
        self.write_secret(API_TOKEN, token.as_bytes())?;
        Ok(token)
    }

    /// What lets a restarted agent tell peers that connections of its former self are gone; made now
    /// if there is none.
    pub fn reset_secret(&self) -> Result<[u8; 32], StoreError> {
        if let Some(Ok(secret)) = self.read(RESET_SECRET)?.map(<[u8; 32]>::try_from) {
            return Ok(secret);
        }
        let secret = entropy::random_bytes()?;
        self.write_secret(RESET_SECRET, &secret)?;
        Ok(secret)
    }

    /// Whether an agent runs with this directory, as far as this user may know. Changes nothing.
    pub fn is_locked(&self) -> bool {
        let Ok(file) = File::open(self.file(LOCK)) else { return false };
        let tried = DataDirLock { file };
        let shared = FlockOperation::NonBlockingLockShared;
        flock(&tried.file, shared) == Err(rustix::io::Errno::WOULDBLOCK)
    }

    /// Keeps every other agent away from this directory for as long as the lock lives.
    pub fn lock(&self) -> Result<DataDirLock, StoreError> {
        let path = self.file(LOCK);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|error| self.failed("open", LOCK, error))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(DataDirLock { file }),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                Err(StoreError::Locked { path: self.path.clone() })
            }
            Err(error) => Err(self.failed("lock", LOCK, error.into())),
        }
    }
}

/// Reads a secret key in PEM, which must be private; `None` when there is no such file.
pub fn read_key(path: &Path) -> Result<Option<SecretKey>, StoreError> {
    let failed = |action, error| StoreError::Io { action, path: path.to_owned(), error };
    let pem = match fs::read(path) {
        Ok(pem) => zeroize::Zeroizing::new(pem),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("read", error)),
    };
    let metadata = fs::metadata(path).map_err(|error| failed("inspect", error))?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(StoreError::NotPrivate { path: path.to_owned(), mode });
    }
    SecretKey::from_pem(&pem).map(Some).map_err(|error| StoreError::damaged(path.to_owned(), error))
}

/// Held while an agent runs.
#[derive(Debug)]
pub struct DataDirLock {
    file: File,
}

impl Drop for DataDirLock {
    /// The file's end would not do: a child that another thread is about to start has it open, too, for
    /// as long as it takes to run the child's own program.
    fn drop(&mut self) {
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

/// What `init` was asked for.
#[derive(Clone, Debug)]
pub struct InitOptions {
    /// The first member's name.
    pub name: MemberName,
    /// What services without a rule allow.
    pub unlisted: Unlisted,
    /// How long leaf certificates live.
    pub cert_ttl: std::time::Duration,
}

/// What `init` did.
#[derive(Clone, Debug)]
pub struct InitReport {
    /// The new mesh, or the one that was there.
    pub mesh: MeshId,
    /// This member's name.
    pub name: MemberName,
    /// To be moved offline.
    pub root_key: PathBuf,
    /// For the person who runs the mesh.
    pub operator_key: PathBuf,
    /// True when there was an identity already and nothing changed.
    pub was_there: bool,
}

/// Founds a mesh in `dir`, with its first member as the first issuer. Repeated: unchanged.
pub fn init(dir: &DataDir, options: &InitOptions) -> Result<InitReport, StoreError> {
    let report = |mesh, name, was_there| InitReport {
        mesh,
        name,
        root_key: dir.file(ROOT_KEY),
        operator_key: dir.file(OPERATOR_KEY),
        was_there,
    };
    if dir.has_identity() {
        let credentials = dir.credentials()?;
        return Ok(report(*credentials.mesh(), credentials.name().clone(), true));
    }
    dir.create()?;
    let node = dir.node_key()?;
    let ttl_secs = options.cert_ttl.as_secs().max(1);
    let founded = found_mesh(&node.public_key(), options.unlisted, ttl_secs)?;
    let FoundedMesh { mesh, genesis, genesis_bytes, root, operator, issuer, .. } = &founded;
    dir.write_key(ROOT_KEY, root)?;
    dir.write_key(OPERATOR_KEY, operator)?;
    dir.write_key(ISSUER_KEY, issuer)?;
    dir.write(ISSUER_CERTIFICATE, &founded.issuer_certificate)?;
    let authority =
        Authority::new(*mesh, genesis, issuer.duplicate()?, &founded.issuer_certificate)?;
    let (enrolment, chain) = authority.enrol(&Enrolment {
        key: node.public_key(),
        name: options.name.clone(),
        serial: 1,
        services: None,
        issued_at: clock::unix_seconds(),
        invite: None,
        replaces: Vec::new(),
        let_in_by: None,
    })?;
    let entries = [&founded.entries[..], &[enrolment]].concat();
    dir.store_identity(genesis_bytes, &entries, &chain)?;
    Ok(report(*mesh, options.name.clone(), false))
}

fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine;
    let text = base64::prelude::BASE64_STANDARD.encode(der);
    let lines = text.as_bytes().chunks(64).map(|line| String::from_utf8_lossy(line));
    let body: Vec<_> = lines.collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", body.join("\n"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn options() -> InitOptions {
        InitOptions {
            name: "first".parse().unwrap(),
            unlisted: Unlisted::Allow,
            cert_ttl: Duration::from_secs(3_600),
        }
    }

    #[test]
    fn init_repeated_changes_nothing_and_keys_are_private() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = DataDir::new(temporary.path().join("data"));
        let first = init(&dir, &options()).unwrap();
        let again = init(&dir, &options()).unwrap();
        assert!(!first.was_there && again.was_there);
        assert_eq!(first.mesh, again.mesh);
        for name in [NODE_KEY, ISSUER_KEY, ROOT_KEY, OPERATOR_KEY, API_TOKEN] {
            let mode = fs::metadata(dir.file(name)).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, 0o600, "{name}");
        }
        assert_eq!(dir.entries().unwrap().len(), 3, "issuer, operator, own enrolment");
        assert!(dir.authority().unwrap().is_some());
    }

    #[test]
    fn a_key_that_others_can_read_is_refused_by_name() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = DataDir::new(temporary.path());
        init(&dir, &options()).unwrap();
        fs::set_permissions(dir.file(NODE_KEY), Permissions::from_mode(0o644)).unwrap();
        let refused = dir.credentials().unwrap_err().to_string();
        assert!(refused.contains("node.key") && refused.contains("644"), "{refused}");
    }

    #[test]
    fn epochs_never_repeat_over_restarts() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = DataDir::new(temporary.path());
        let first = dir.claim_epochs().unwrap();
        let second = dir.claim_epochs().unwrap();
        assert!(second.0 > first.0 + EPOCH_RESERVE, "the reserve of the first run is not reused");
    }

    #[test]
    fn two_agents_cannot_share_a_directory() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = DataDir::new(temporary.path());
        let held = dir.lock().unwrap();
        assert!(matches!(dir.lock(), Err(StoreError::Locked { .. })));
        assert!(dir.is_locked() && !DataDir::new(temporary.path().join("other")).is_locked());
        drop(held);
        assert!(!dir.is_locked());
        dir.lock().unwrap();
    }

    #[test]
    fn directory_is_free_at_once_although_a_child_was_just_made() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = DataDir::new(temporary.path());
        let held = dir.lock().unwrap();
        let inherited = held.file.try_clone().unwrap(); // as a child has it until it runs its program
        drop(held);
        dir.lock().unwrap();
        drop(inherited);
    }
}
