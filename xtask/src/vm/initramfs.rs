//! Builds an initramfs as a cpio archive (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::{
    collections::BTreeSet,
    env, fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Component, Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};
use cpio::newc::{self, ModeFileType};

use crate::run::run;

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
    ///
    /// # Errors
    /// An entry does not fit the format.
    pub fn new() -> Result<Self> {
        let mut new = Self { archive: Vec::new(), paths: BTreeSet::new() };
        for dir in DIRECTORIES {
            new.add_dir(Path::new(dir))?;
        }
        for (name, to) in LINKS {
            new.add_dir(Path::new(to))?;
            new.entry(Path::new(name), ModeFileType::Symlink, 0o777, to.as_bytes())?;
        }
        Ok(new)
    }

    /// Adds a program of this machine, found as a shell finds it, and the libraries that it is linked with.
    ///
    /// # Errors
    /// The program is not installed, or a file cannot be read.
    pub fn add_program(&mut self, name: &str) -> Result<()> {
        let path = env::var_os("PATH").unwrap_or_default();
        let dirs = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into(), "/usr/lib/cni".into()]);
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
        self.add_bytes(path, &bytes, mode & 0o777)
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

    /// Adds a file with the given contents and permissions. If the path exists already, nothing changes.
    ///
    /// # Errors
    /// The file does not fit the format, whose sizes have 32 bits.
    pub fn add_bytes(&mut self, path: &str, bytes: &[u8], permissions: u32) -> Result<()> {
        let path = merged(Path::new(path));
        if self.paths.contains(&path) {
            return Ok(());
        }
        if let Some(dir) = path.parent() {
            self.add_dir(dir)?;
        }
        self.entry(&path, ModeFileType::Regular, permissions, bytes)
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
    ///
    /// # Errors
    /// None in practice: memory accepts every write.
    pub fn finish(self) -> Result<Vec<u8>> {
        newc::trailer(self.archive).context("end the archive")
    }

    /// Adds a directory and, before it, its missing parents.
    fn add_dir(&mut self, path: &Path) -> Result<()> {
        let dirs: Vec<&Path> = path.ancestors().filter(|dir| !dir.as_os_str().is_empty()).collect();
        for dir in dirs.into_iter().rev() {
            if !self.paths.contains(dir) {
                self.entry(dir, ModeFileType::Directory, 0o755, b"")?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, kind: ModeFileType, permissions: u32, bytes: &[u8]) -> Result<()> {
        let inode = u32::try_from(self.paths.len() + 1)?;
        let entry = newc::Builder::new(&path.to_string_lossy()).ino(inode).mode(permissions).set_mode_file_type(kind);
        let size = u32::try_from(bytes.len()).with_context(|| format!("size of {}", path.display()))?;
        let mut writer = entry.write(&mut self.archive, size);
        writer.write_all(bytes).and_then(|()| writer.finish()).with_context(|| format!("add {}", path.display()))?;
        self.paths.insert(path.to_owned());
        Ok(())
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
    use std::io::Read as _;

    /// Parses an archive into the name, mode and contents of every entry.
    fn entries(archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        let mut rest = archive;
        loop {
            let mut entry = newc::Reader::new(rest).unwrap();
            if entry.entry().is_trailer() {
                return entries;
            }
            let mut contents = Vec::new();
            entry.read_to_end(&mut contents).unwrap();
            entries.push((entry.entry().name().to_owned(), entry.entry().mode(), contents));
            rest = entry.finish().unwrap();
        }
    }

    #[test]
    fn directories_come_before_what_is_in_them_and_once() {
        let mut files = Initramfs::new().unwrap();
        files.add_bytes("/lib/a/one", b"1", 0o644).unwrap();
        files.add_bytes("usr/lib/a/two", b"22222", 0o755).unwrap();
        files.add_bytes("usr/lib/a/one", b"again", 0o644).unwrap();
        let entries = entries(&files.finish().unwrap());
        let names: Vec<&str> = entries.iter().map(|(name, ..)| name.as_str()).collect();
        let at = |name: &str| names.iter().position(|n| *n == name).unwrap();
        assert!(at("usr") < at("usr/lib") && at("usr/lib") < at("usr/lib/a") && at("usr/lib/a") < at("usr/lib/a/one"));
        assert_eq!(names.iter().filter(|name| name.starts_with("usr/lib/a")).count(), 3, "{names:?}");
        assert_eq!(entries[at("usr/lib/a/one")].2, b"1");
        assert_eq!(entries[at("usr/lib/a/two")], ("usr/lib/a/two".to_owned(), 0o100_755, b"22222".to_vec()));
        assert_eq!(entries[at("sbin")], ("sbin".to_owned(), 0o120_777, b"usr/bin".to_vec()));
    }
}
