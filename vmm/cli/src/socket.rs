//! UNIX sockets that only their owner may use.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::exit::Failure;

/// A listening socket that goes away with its owner.
#[derive(Debug)]
pub(crate) struct PrivateSocket {
    path: PathBuf,
    /// Which file that was when it was made: another process may have put its own in its place since.
    inode: u64,
}

impl PrivateSocket {
    /// Listen at `path`, mode 0600. What a process that crashed left there is replaced; a socket somebody answers at is
    /// not, and neither is anything that is no socket.
    pub(crate) fn bind(path: &Path) -> Result<(Self, UnixListener), Failure> {
        let cannot = |error: &dyn core::fmt::Display| Failure::failed(format!("{}: {error}", path.display()));
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(cannot(&error)),
            Ok(there) if !there.file_type().is_socket() => {
                return Err(cannot(
                    &"expected nothing or a stale socket there, found another kind of file",
                ));
            }
            Ok(_) if UnixStream::connect(path).is_ok() => {
                return Err(cannot(&"another process answers at this socket"));
            }
            Ok(_) => {}
        }
        // Made under another name, given its mode, then renamed: at no instant can somebody else connect to `path`.
        let mut hidden = path.as_os_str().to_owned();
        hidden.push(format!(".{}", std::process::id()));
        let hidden = PathBuf::from(hidden);
        let _ = fs::remove_file(&hidden);
        let listener = UnixListener::bind(&hidden).map_err(|error| cannot(&error))?;
        let made = fs::set_permissions(&hidden, fs::Permissions::from_mode(0o600))
            .and_then(|()| fs::metadata(&hidden))
            .and_then(|metadata| fs::rename(&hidden, path).map(|()| metadata.ino()));
        match made {
            Ok(inode) => Ok((
                Self {
                    path: path.to_owned(),
                    inode,
                },
                listener,
            )),
            Err(error) => {
                let _ = fs::remove_file(&hidden);
                Err(cannot(&error))
            }
        }
    }
}

impl Drop for PrivateSocket {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|there| there.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_owner_may_connect_and_the_socket_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let (socket, listener) = PrivateSocket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no other name is left");
        drop((socket, listener));
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "left behind as by a crash");
        let (_socket, _listener) = PrivateSocket::bind(&path).unwrap();
        let error = PrivateSocket::bind(&path).unwrap_err();
        assert_eq!(
            error.text,
            format!("{}: another process answers at this socket", path.display())
        );
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "data").unwrap();
        let error = PrivateSocket::bind(&path).unwrap_err();
        assert!(error.text.contains("expected nothing or a stale socket"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn a_process_does_not_remove_the_socket_that_replaced_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let (first, listener) = PrivateSocket::bind(&path).unwrap();
        drop(listener);
        let (_second, _listening) = PrivateSocket::bind(&path).unwrap();
        drop(first);
        UnixStream::connect(&path).unwrap();
    }
}
