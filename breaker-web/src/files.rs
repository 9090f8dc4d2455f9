//! The page's files, compressed at build time.

use axum::{
    Router,
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse, Response},
    routing::get,
};

/// One file.
#[derive(Clone, Copy, Debug)]
struct File {
    path: &'static str,
    content_type: &'static str,
    plain: &'static [u8],
    gzip: &'static [u8],
}

macro_rules! files {
    ($($path:literal = $dir:literal $name:literal: $content_type:expr),+ $(,)?) => {
        const FILES: &[File] = &[$(File {
            path: $path,
            content_type: $content_type,
            plain: include_bytes!(concat!("../", $dir, "/", $name)),
            gzip: include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".gz")),
        }),+];
    };
}

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

files! {
    "/" = "page" "index.html": HTML,
    "/page.css" = "page" "page.css": CSS,
    "/icon.svg" = "page" "icon.svg": SVG,
    "/main.js" = "page" "main.js": SCRIPT,
    "/stream.js" = "page" "stream.js": SCRIPT,
    "/store.js" = "page" "store.js": SCRIPT,
    "/words.js" = "page" "words.js": SCRIPT,
    "/parts.js" = "page" "parts.js": SCRIPT,
    "/overview.js" = "page" "overview.js": SCRIPT,
    "/detail.js" = "page" "detail.js": SCRIPT,
    "/nodes.js" = "page" "nodes.js": SCRIPT,
    "/events.js" = "page" "events.js": SCRIPT,
    "/charts.js" = "page" "charts.js": SCRIPT,
    "/preact.js" = "vendor" "preact.js": SCRIPT,
    "/uplot.js" = "vendor" "uplot.js": SCRIPT,
    "/uplot.css" = "vendor" "uplot.css": CSS,
}

/// The routes of the page's files.
pub fn routes() -> Router {
    FILES.iter().fold(Router::new(), |router, file| router.route(file.path, get(move |headers| answer(*file, headers))))
}

async fn answer(file: File, headers: HeaderMap) -> Response {
    let takes_gzip = headers.get(header::ACCEPT_ENCODING).and_then(|value| value.to_str().ok());
    let takes_gzip = takes_gzip.is_some_and(|encodings| encodings.contains("gzip"));
    let mut response = (if takes_gzip { file.gzip } else { file.plain }).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(file.content_type));
    headers.insert(header::VARY, HeaderValue::from_static("accept-encoding"));
    if takes_gzip {
        headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    response
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs};

    use sha2::{Digest as _, Sha256};

    use super::*;

    /// What a browser loads to show the page, at most.
    const BUDGET: usize = 60 * 1024;

    #[test]
    fn the_page_is_small() {
        let sizes: Vec<(&str, usize)> = FILES.iter().map(|file| (file.path, file.gzip.len())).collect();
        let total: usize = sizes.iter().map(|(_, size)| size).sum();
        assert!(total <= BUDGET, "{total} bytes compressed: {sizes:?}");
    }

    #[test]
    fn every_file_of_the_page_is_served_and_names_no_other_origin() {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/page");
        let served: BTreeSet<&[u8]> = FILES.iter().map(|file| file.plain).collect();
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let text = fs::read(&path).unwrap();
            assert!(served.contains(&text[..]), "{} is not in FILES", path.display());
            let text = String::from_utf8(text).unwrap().replace("http://www.w3.org/", "");
            for scheme in ["http://", "https://", "\"//"] {
                assert!(!text.contains(scheme), "{} names another origin", path.display());
            }
        }
    }

    #[test]
    fn the_code_of_others_is_as_it_was_published() {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/vendor");
        let sums = fs::read_to_string(format!("{dir}/SHA256SUMS")).unwrap();
        assert_eq!(sums.lines().count(), fs::read_dir(dir).unwrap().count() - 1, "one line for each other file");
        for line in sums.lines() {
            let (sum, name) = line.split_once("  ").unwrap();
            let digest = Sha256::digest(fs::read(format!("{dir}/{name}")).unwrap());
            let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(digest, sum, "{name}");
        }
    }
}
