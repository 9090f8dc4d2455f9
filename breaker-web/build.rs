//! Compresses the files of the page, so that a server need not.

use std::{env, error::Error, fs, io::Write as _, path::Path};

use flate2::{Compression, write::GzEncoder};

fn main() -> Result<(), Box<dyn Error>> {
    let out = env::var("OUT_DIR")?;
    for dir in ["page", "vendor"] {
        println!("cargo::rerun-if-changed={dir}");
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let mut gz = GzEncoder::new(Vec::new(), Compression::best());
            gz.write_all(&fs::read(entry.path())?)?;
            let name = format!("{}.gz", entry.file_name().to_string_lossy());
            fs::write(Path::new(&out).join(name), gz.finish()?)?;
        }
    }
    Ok(())
}
