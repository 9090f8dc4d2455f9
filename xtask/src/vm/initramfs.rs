//! Builds an initramfs as a cpio archive (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::{
    collections::BTreeSet,
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Component, Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::run::run;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

/// Top-level directories that are symbolic links into `usr`, as on Debian. All programs are in `usr/bin`.
const LINKS: [(&str, &str); 4] = [("bin", "usr/bin"), ("sbin", "usr/bin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")];

/// Mount points. Other directories are created as files need them.
const DIRECTORIES: [&str; 5] = ["proc", "sys", "dev", "run", "tmp"];

/// The files of a guest. They are owned by root, and their modification time is 0.
pub struct Initramfs {
    archive: Vec<u8>,
    /// Paths that the archive contains already.
    paths: BTreeSet<PathBuf>,
}

impl Initramfs {
    /// Makes an initramfs that contains only the mount points and Debian's links into `usr`.
    pub fn new() -> Self {
        let mut new = Self { archive: Vec::new(), paths: BTreeSet::new() };
        for dir in DIRECTORIES {
            new.add_dir(Path::new(dir));
        }
        for (name, to) in LINKS {
            new.add_dir(Path::new(to));
            new.entry(Path::new(name), SYMLINK | 0o777, to.as_bytes());
        }
        new
    }

    /// Adds a program of this machine, found as a shell finds it, and the libraries that it is linked with.
    ///
    /// # Errors
    /// The program is not installed, or a file cannot be read.
    pub fn add_program(&mut self, name: &str) -> Result<()> {
        let path = env::var_os("PATH").unwrap_or_default();
        let dirs = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
        let found = dirs.map(|dir| dir.join(name)).find(|path| path.is_file());
        let found =
            found.with_context(|| format!("the guest needs the program {name}, which this machine does not have"))?;
        self.add_file(&format!("usr/bin/{name}"), &found)?;
        // ldd fails for a static program. Its output is then empty, so no libraries are added.
        let ldd = Command::new("ldd").arg(&found).stderr(Stdio::null()).output().context("start ldd")?;
        for word in String::from_utf8_lossy(&ldd.stdout).split_whitespace().filter(|word| word.starts_with('/')) {
            self.add_file(word, Path::new(word))?;
        }
        Ok(())
    }

    /// Adds a file of this machine. Symbolic links are followed.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn add_file(&mut self, path: &str, from: &Path) -> Result<()> {
        let bytes = fs::read(from).with_context(|| format!("read {}", from.display()))?;
        let mode = fs::metadata(from).with_context(|| format!("get mode of {}", from.display()))?.permissions().mode();
        self.add_bytes(path, &bytes, mode & 0o777);
        Ok(())
    }

    /// Adds the files in a directory of this machine, without its subdirectories. Symbolic links are followed.
    ///
    /// # Errors
    /// The directory or a file cannot be read.
    pub fn add_folder(&mut self, folder: &Path) -> Result<()> {
        for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
            let path = entry?.path();
            if path.is_file() {
                self.add_file(&path.to_string_lossy(), &path)?;
            }
        }
        Ok(())
    }

    /// Adds a file with the given contents. If the path exists already, nothing changes.
    pub fn add_bytes(&mut self, path: &str, bytes: &[u8], mode: u32) {
        let path = merged(Path::new(path));
        if !self.paths.contains(&path) {
            if let Some(dir) = path.parent() {
                self.add_dir(dir);
            }
            self.entry(&path, REGULAR | mode, bytes);
        }
    }

    /// Adds a module, or a directory of modules with all its contents. `path` is relative to `modules`.
    ///
    /// # Errors
    /// A file or directory cannot be read.
    pub fn add_tree(&mut self, modules: &Path, path: &str) -> Result<()> {
        let Some(version) = modules.file_name() else { bail!("{} has no name", modules.display()) };
        let to = Path::new("usr/lib/modules").join(version);
        let from = modules.join(path);
        // Modules may be compressed; their names then end in `.xz`.
        let packed = PathBuf::from(format!("{}.xz", from.display()));
        self.add_all(if from.exists() { &from } else { &packed }, modules, &to)
    }

    fn add_all(&mut self, from: &Path, base: &Path, to: &Path) -> Result<()> {
        if !from.is_dir() {
            let path = to.join(from.strip_prefix(base).context("strip a prefix")?);
            return self.add_file(&path.to_string_lossy(), from);
        }
        for entry in fs::read_dir(from).with_context(|| format!("read {}", from.display()))? {
            self.add_all(&entry?.path(), base, to)?;
        }
        Ok(())
    }

    /// Adds the index by which modprobe finds modules. Debian generates it when a kernel is installed, so depmod
    /// must generate it here.
    ///
    /// # Errors
    /// depmod failed, or a file cannot be read.
    pub fn add_modules_index(&mut self, modules: &Path, base: &Path) -> Result<()> {
        let Some(version) = modules.file_name() else { bail!("{} has no name", modules.display()) };
        run(Command::new("depmod").arg("-b").arg(base.join("root")).arg(version))?;
        for entry in fs::read_dir(modules).with_context(|| format!("read {}", modules.display()))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.starts_with("modules.") {
                self.add_tree(modules, &name)?;
            }
        }
        Ok(())
    }

    /// Completes and returns the archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry(Path::new("TRAILER!!!"), 0, b"");
        self.archive
    }

    /// Adds a directory and, before it, its missing parents.
    fn add_dir(&mut self, path: &Path) {
        let dirs: Vec<&Path> = path.ancestors().filter(|dir| !dir.as_os_str().is_empty()).collect();
        for dir in dirs.into_iter().rev() {
            if !self.paths.contains(dir) {
                self.entry(dir, DIRECTORY | 0o755, b"");
            }
        }
    }

    fn entry(&mut self, path: &Path, mode: u32, bytes: &[u8]) {
        let name = path.to_string_lossy();
        let inode = self.paths.len() + 1;
        let links = 1;
        let (size, name_size) = (bytes.len(), name.len() + 1);
        self.archive.extend_from_slice(b"070701");
        // inode, mode, uid, gid, links, mtime, size, device (major, minor), special device (major, minor), length of
        // the name, checksum
        for number in [inode, mode as usize, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0] {
            self.archive.extend_from_slice(format!("{number:08x}").as_bytes());
        }
        self.archive.extend_from_slice(name.as_bytes());
        self.archive.push(0);
        self.pad();
        self.archive.extend_from_slice(bytes);
        self.pad();
        self.paths.insert(path.to_owned());
    }

    /// Pads to a multiple of four bytes, as the format requires after names and contents.
    fn pad(&mut self) {
        self.archive.resize(self.archive.len().next_multiple_of(4), 0);
    }
}

/// Path in the archive: relative to its root, and with Debian's links into `usr` resolved.
fn merged(path: &Path) -> PathBuf {
    let path: PathBuf = path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
    let link = LINKS.iter().find_map(|(name, to)| Some(Path::new(to).join(path.strip_prefix(name).ok()?)));
    link.unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parses an archive into the name, mode and contents of every entry.
    fn entries(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries: Vec<(String, u32, Vec<u8>)> = Vec::new();
        let mut take = |length: usize| {
            let (taken, rest) = archive.split_at(length);
            archive = rest;
            taken.to_vec()
        };
        while entries.last().is_none_or(|(name, ..)| name != "TRAILER!!!") {
            let header = String::from_utf8(take(110)).unwrap();
            assert!(header.starts_with("070701"));
            let field = |n: usize| usize::from_str_radix(&header[6 + n * 8..14 + n * 8], 16).unwrap();
            // The header (110 bytes) and the name together are padded to a multiple of four.
            let name = take((field(11) + 110).next_multiple_of(4) - 110);
            let contents = take(field(6).next_multiple_of(4));
            let name = String::from_utf8(name[..field(11) - 1].to_vec()).unwrap();
            entries.push((name, u32::try_from(field(1)).unwrap(), contents[..field(6)].to_vec()));
        }
        entries
    }

    #[test]
    fn directories_come_before_what_is_in_them_and_once() {
        let mut files = Initramfs::new();
        files.add_bytes("/lib/a/one", b"1", 0o644);
        files.add_bytes("usr/lib/a/two", b"22222", 0o755);
        files.add_bytes("usr/lib/a/one", b"again", 0o644);
        let entries = entries(&files.finish());
        let names: Vec<&str> = entries.iter().map(|(name, ..)| name.as_str()).collect();
        let at = |name: &str| names.iter().position(|n| *n == name).unwrap();
        assert!(at("usr") < at("usr/lib") && at("usr/lib") < at("usr/lib/a") && at("usr/lib/a") < at("usr/lib/a/one"));
        assert_eq!(names.iter().filter(|name| name.starts_with("usr/lib/a")).count(), 3, "{names:?}");
        assert_eq!(entries[at("usr/lib/a/one")].2, b"1");
        assert_eq!(entries[at("usr/lib/a/two")], ("usr/lib/a/two".to_owned(), 0o100_755, b"22222".to_vec()));
        assert_eq!(entries[at("sbin")], ("sbin".to_owned(), 0o120_777, b"usr/bin".to_vec()));
    }
}
