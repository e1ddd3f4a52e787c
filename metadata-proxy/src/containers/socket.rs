//! Whose an engine is. Whoever owns its socket decides what its containers say of themselves.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Component, Path, PathBuf},
};

use anyhow::{Context as _, bail};
use tokio::net::UnixStream;

/// Who can answer at a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    Root,
    User(u32),
}

const WRITABLE_BY_OTHERS: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// Who answers at a socket.
#[derive(Debug)]
pub(super) struct Answering {
    pub(super) owner: Owner,
    /// It has the files that we have, or the host: those of an engine in a container are others of the same names.
    pub(super) has_our_files: bool,
}

/// The owner by the path, each part of which somebody could have put in place of another, and by who answers there.
pub(super) async fn owner(path: &Path) -> anyhow::Result<Answering> {
    let owner = by_path(path)?;
    let stream = UnixStream::connect(path).await.with_context(|| format!("cannot connect to {}", path.display()))?;
    let peer = stream.peer_cred().context("cannot tell who answers at the socket")?;
    let answering = peer.uid();
    let expected = match owner {
        Owner::Root => 0,
        Owner::User(uid) => uid,
    };
    if answering != expected {
        bail!("{} belongs to user {expected}, and user {answering} answers there", path.display());
    }
    let mounts = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
    let its = peer.pid().and_then(|pid| mounts(&pid.to_string()));
    let has_our_files = its.is_some() && ["self", "1"].map(mounts).contains(&its);
    Ok(Answering { owner, has_our_files })
}

/// All that is walked through on the way, links included.
fn by_path(path: &Path) -> anyhow::Result<Owner> {
    let mut users = Vec::new();
    let mut look = |path: &Path| -> anyhow::Result<()> {
        let metadata = fs::symlink_metadata(path).with_context(|| format!("cannot look at {}", path.display()))?;
        // Who may write to a socket may only connect; links have no mode of their own.
        if metadata.is_dir() && metadata.mode() & WRITABLE_BY_OTHERS != 0 && metadata.mode() & STICKY == 0 {
            bail!(
                "{} is a directory that others than its owner may write to, who could have put another socket there",
                path.display()
            );
        }
        if metadata.uid() != 0 && !users.contains(&metadata.uid()) {
            users.push(metadata.uid());
        }
        Ok(())
    };
    let mut queue = vec![path.to_owned()];
    // As many links as the kernel follows.
    for _ in 0..40 {
        let Some(next) = queue.pop() else { break };
        let mut walked = PathBuf::new();
        for component in next.components() {
            match component {
                Component::ParentDir => drop(walked.pop()),
                other => walked.push(other),
            }
            look(&walked)?;
            if let Ok(target) = fs::read_link(&walked) {
                let rest = next.strip_prefix(&walked).unwrap_or(Path::new(""));
                let parent = walked.parent().unwrap_or(Path::new("/"));
                queue.push(parent.join(target).join(rest));
                break;
            }
        }
    }
    match users.as_slice() {
        _ if !queue.is_empty() => bail!("{} leads through too many links", path.display()),
        [] => Ok(Owner::Root),
        [uid] => Ok(Owner::User(*uid)),
        several => bail!("the way to {} leads through what belongs to several users: {several:?}", path.display()),
    }
}

/// Which socket it is, whatever it is called. None: there is none.
pub(super) fn identity(path: &Path) -> io::Result<Option<(u64, u64)>> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(metadata.file_type().is_socket().then(|| (metadata.dev(), metadata.ino()))),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};

    use super::*;

    /// As root: a directory of each user, in one that is root's.
    fn directory(name: &str) -> PathBuf {
        let directory = std::env::temp_dir().join(format!("metadata-proxy-socket-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        for user in ["0", "1000", "1001"] {
            let own = directory.join(user);
            fs::create_dir_all(&own).unwrap();
            fs::set_permissions(&own, fs::Permissions::from_mode(0o755)).unwrap();
            chown(&own, user.parse().ok(), None).unwrap();
        }
        directory
    }

    #[tokio::test]
    async fn who_could_have_swapped_a_part_of_the_path_owns_the_engine() {
        let directory = directory("swapped");
        let socket = |owner: &str| directory.join(owner).join("engine.sock");
        let _root = tokio::net::UnixListener::bind(socket("0")).unwrap();
        let answering = owner(&socket("0")).await.unwrap();
        assert_eq!((answering.owner, answering.has_our_files), (Owner::Root, true));
        assert_eq!(by_path(&directory.join("1000/../0/engine.sock")).unwrap(), Owner::User(1000));

        // A user's socket that root answers at, by a link or by a file of root's in a user's directory.
        symlink(socket("0"), socket("1000")).unwrap();
        assert_eq!(by_path(&socket("1000")).unwrap(), Owner::User(1000));
        let error = owner(&socket("1000")).await.unwrap_err().to_string();
        assert!(error.ends_with("belongs to user 1000, and user 0 answers there"), "{error}");
        symlink(socket("1000"), socket("1001")).unwrap();
        assert!(by_path(&socket("1001")).unwrap_err().to_string().contains("several users"));

        // A link of root's that leads to what is a user's.
        symlink(directory.join("1000"), directory.join("link")).unwrap();
        assert_eq!(by_path(&directory.join("link/engine.sock")).unwrap(), Owner::User(1000));
        fs::set_permissions(directory.join("0"), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(by_path(&socket("0")).unwrap_err().to_string().contains("may write to"));
        symlink(directory.join("round"), directory.join("round")).unwrap();
        assert!(by_path(&directory.join("round")).is_err());
        assert!(by_path(&directory.join("none")).is_err());
        fs::remove_dir_all(directory).unwrap();
    }
}
