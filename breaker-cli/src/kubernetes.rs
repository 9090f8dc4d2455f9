//! Configuration of the client for the Kubernetes API server.

use std::path::Path;

use anyhow::{Context as _, Result};
use kube::{
    Config,
    config::{KubeConfigOptions, Kubeconfig},
};

/// Reads the configuration of a client from a kubeconfig file. Without a file, searches it like kubectl and like a
/// pod: KUBECONFIG, ~/.kube/config, the pod's service account.
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
