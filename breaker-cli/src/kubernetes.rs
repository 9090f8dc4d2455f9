//! The way to the API server.

use std::path::Path;

use anyhow::{Context as _, Result};
use kube::{
    Config,
    config::{KubeConfigOptions, Kubeconfig},
};

/// The configuration of a client: of a kubeconfig file, or as kubectl and a pod find theirs (KUBECONFIG, ~/.kube/config, the
/// service account).
///
/// # Errors
/// No kubeconfig and no service account; a kubeconfig that cannot be used.
pub async fn config(kubeconfig: Option<&Path>) -> Result<Config> {
    crate::install_crypto();
    match kubeconfig {
        Some(path) => {
            let file = Kubeconfig::read_from(path).with_context(|| format!("read {}", path.display()))?;
            let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
            config.with_context(|| format!("use {}", path.display()))
        }
        None => Config::infer().await.context("find the API server: neither a kubeconfig nor a pod's service account"),
    }
}
