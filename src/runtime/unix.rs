//! Unix sockets to listen on: a file that lives as long as its listener.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};

/// Where this machine's groups are listed (group(5)). Groups that only a directory service knows are
/// not found.
const GROUPS: &str = "/etc/group";

/// A unix stream socket that accepts, 0660. Its file goes with it.
#[derive(Debug)]
pub struct UnixSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl UnixSocket {
    /// Listens at `path`. A socket's file that nobody answers behind is taken over; one that lives
    /// (`AddrInUse`) and a file that is no socket (`AlreadyExists`) stay.
    pub async fn bind(path: &Path) -> io::Result<Self> {
        remove_stale(path).await?;
        let socket = Self { listener: UnixListener::bind(path)?, path: path.to_owned() };
        fs::set_permissions(path, Permissions::from_mode(0o660))?;
        Ok(socket)
    }

    /// Lets `group` connect, and pass the directory that the file is in, where this machine has such
    /// a group. Whether it has.
    pub fn admit_group(&self, group: &str) -> io::Result<bool> {
        let Some(id) = group_id(&fs::read_to_string(GROUPS)?, group) else { return Ok(false) };
        chown(&self.path, None, Some(id))?;
        if let Some(directory) = self.path.parent() {
            let mode = fs::metadata(directory)?.permissions().mode();
            if mode & 0o001 == 0 {
                chown(directory, None, Some(id))?;
                fs::set_permissions(directory, Permissions::from_mode(mode | 0o010))?;
            }
        }
        Ok(true)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next client. Cancel safe.
    pub async fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path); // gone already: fine
    }
}

async fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    match UnixStream::connect(path).await {
        Ok(_) => Err(io::ErrorKind::AddrInUse.into()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) => Err(error),
    }
}

/// The id of a group: `name:password:id:members`, one a line.
fn group_id(groups: &str, name: &str) -> Option<u32> {
    let mut fields = groups.lines().map(|line| line.split(':'));
    fields.find_map(|mut line| (line.next()? == name).then(|| line.nth(1)?.parse().ok())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_file_of_a_dead_listener_is_taken_over_and_that_of_a_live_one_never() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap()); // as a killed process leaves it
        let socket = UnixSocket::bind(&path).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        let second = UnixSocket::bind(&path).await.unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::AddrInUse);
        UnixStream::connect(&path).await.unwrap();
        drop(socket);
        assert!(!path.exists(), "the file goes with its listener");

        fs::write(&path, "mine").unwrap();
        let refused = UnixSocket::bind(&path).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    }

    #[test]
    fn groups_are_found_by_their_whole_name() {
        let groups = "root:x:0:\nmurmesh-ops:x:7:a\nmurmesh:x:412:anna,bert\nodd\n";
        assert_eq!(group_id(groups, "murmesh"), Some(412));
        assert_eq!(group_id(groups, "murm"), None);
        assert_eq!(group_id(groups, "odd"), None);
    }
}
