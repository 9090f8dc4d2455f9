#!/usr/bin/env bash
# The crate `object` reads an ELF object file that LLVM wrote, but cannot write it back, even unchanged:
# ".shstrtab section is needed but not present".
#
# Seen with object 0.39.1 (features build, elf, std) and rustc 1.95.0 (LLVM 22): LLVM puts the names of sections into
# `.strtab`, beside those of symbols, and so there is no `.shstrtab`. `object::build::elf::Builder::read` accepts the file,
# and `write` fails. An object file of GNU as, which has both tables, is written back. A section with the name `.shstrtab`
# and the data `SectionData::SectionString`, added by the caller, makes the first one work.
#
# Needs cargo with rustc, and gcc. Exits with 0 if the behaviour is as described.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
mkdir -p rewrite/src
cat > rewrite/Cargo.toml << 'END'
[package]
name = "rewrite"
version = "0.0.0"
edition = "2024"
[dependencies]
object = { version = "=0.39.1", default-features = false, features = ["build", "elf", "std"] }
[workspace]
END
cat > rewrite/src/main.rs << 'END'
use object::{build::elf::{Builder, SectionData}, elf::SHT_STRTAB};

fn main() {
    let path = std::env::args().nth(1).unwrap();
    let bytes = std::fs::read(path).unwrap();
    for adds_table in [false, true] {
        let mut elf = Builder::read(bytes.as_slice()).unwrap();
        if adds_table {
            let names = elf.sections.add();
            names.name = b".shstrtab".as_slice().into();
            names.sh_type = SHT_STRTAB;
            names.data = SectionData::SectionString;
        }
        let mut out = Vec::new();
        match elf.write(&mut out) {
            Ok(()) => println!("written, {} bytes", out.len()),
            Err(error) => println!("{error}"),
        }
    }
}
END
echo 'pub fn answer() -> u32 { 42 }' > llvm.rs
rustc --crate-type=lib --emit=obj -o llvm.o llvm.rs
echo 'int answer(void) { return 42; }' > gnu.c
gcc -c -o gnu.o gnu.c
cargo build --quiet --manifest-path rewrite/Cargo.toml --target-dir target
program=$(find target -name rewrite -type f -perm -u+x | head -n 1)

echo "object 0.39.1, $(rustc --version), $(rustc --version --verbose | grep LLVM), $(gcc --version | head -n 1)"
llvm=$("$program" llvm.o)
gnu=$("$program" gnu.o | head -n 1)
echo "LLVM's file, unchanged, then with a section .shstrtab:"
echo "$llvm"
echo "GNU's file, unchanged:"
echo "$gnu"
if [ "$(head -n 1 <<< "$llvm")" != ".shstrtab section is needed but not present" ]; then
  echo "the behaviour has changed: LLVM's file" >&2
  exit 1
fi
if [[ "$(tail -n 1 <<< "$llvm")" != written* || "$gnu" != written* ]]; then
  echo "the behaviour has changed: the other two" >&2
  exit 1
fi
echo "as described"
