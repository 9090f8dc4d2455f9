//! The caller's access to the API server.

use std::path::Path;

use anyhow::{Context as _, Result};
use breaker_api::crd::CircuitBreaker;
use kube::{
    Api, Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
    core::NamespaceResourceScope,
};

use super::args::ConnectionArgs;

/// A client, and the namespace that is meant.
pub(super) struct Connection {
    /// The client.
    pub client: Client,
    /// The namespace; `None` = all.
    pub namespace: Option<String>,
    /// Name of the cluster: the kubeconfig's context, otherwise the API server's host.
    pub cluster: String,
    /// The namespace of the context, for commands about one object.
    default_namespace: String,
}

impl Connection {
    pub async fn new(args: &ConnectionArgs) -> Result<Self> {
        let mut config = config(args.kubeconfig.as_deref(), args.context.as_deref()).await?;
        if args.user.is_some() {
            config.auth_info.impersonate.clone_from(&args.user);
            config.auth_info.impersonate_groups = Some(args.groups.clone()).filter(|groups| !groups.is_empty());
        }
        let default_namespace = args.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let namespace = (!args.all_namespaces).then(|| default_namespace.clone());
        let cluster = args.context.clone().or_else(|| current_context(args.kubeconfig.as_deref()));
        let cluster = cluster.unwrap_or_else(|| config.cluster_url.host().unwrap_or_default().to_owned());
        let client = Client::try_from(config).context("make a client for the API server")?;
        Ok(Self { client, namespace, cluster, default_namespace })
    }

    /// The objects of the namespace that is meant.
    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        match &self.namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        }
    }

    /// Reads one CircuitBreaker. `name` may be `NAMESPACE/NAME`.
    pub async fn breaker(&self, name: &str) -> Result<CircuitBreaker> {
        let (api, namespace, name) = self.one(name);
        api.get(name).await.map_err(|error| explain(error, &format!("read {namespace}/{name}")))
    }

    /// The CircuitBreakers of one namespace, for commands about one of them. `name` may be `NAMESPACE/NAME`. Returns the
    /// name without the namespace.
    pub fn one<'a>(&self, name: &'a str) -> (Api<CircuitBreaker>, String, &'a str) {
        let (namespace, name) = name.split_once('/').unwrap_or((&self.default_namespace, name));
        (Api::namespaced(self.client.clone(), namespace), namespace.to_owned(), name)
    }
}

/// The current context of a kubeconfig.
fn current_context(kubeconfig: Option<&Path>) -> Option<String> {
    let kubeconfig = match kubeconfig {
        Some(path) => Kubeconfig::read_from(path),
        None => Kubeconfig::read(),
    };
    kubeconfig.ok()?.current_context
}

/// Reads the configuration of a client from a kubeconfig file. Without a file, searches it like kubectl and like a
/// pod: KUBECONFIG, ~/.kube/config, the pod's service account. `context`: the kubeconfig's current one if `None`.
///
/// # Errors
/// No kubeconfig and no service account; a kubeconfig or a context that cannot be used.
pub async fn config(kubeconfig: Option<&Path>, context: Option<&str>) -> Result<Config> {
    crate::install_crypto();
    let options = KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
    match (kubeconfig, context) {
        (Some(path), _) => {
            let file = Kubeconfig::read_from(path).with_context(|| format!("read {}", path.display()))?;
            let config = Config::from_custom_kubeconfig(file, &options).await;
            config.with_context(|| format!("use {}", path.display()))
        }
        (None, Some(context)) => {
            Config::from_kubeconfig(&options).await.with_context(|| format!("use the context {context}"))
        }
        (None, None) => {
            Config::infer().await.context("find the API server: neither a kubeconfig nor a pod's service account")
        }
    }
}

/// Explains an error of the API server.
pub(super) fn explain(error: kube::Error, what: &str) -> anyhow::Error {
    let remedy = match &error {
        // A policy of k8s/admission names the role itself.
        kube::Error::Api(status) if status.code == 403 && !status.message.contains("ask for the role") => {
            "; ask for the role breaker-view or breaker-edit in the namespace, see docs/KUBERNETES.md"
        }
        kube::Error::Api(status) if status.code == 404 && status.details.as_ref().is_none_or(|d| d.name.is_empty()) => {
            "; is breaker installed? kubectl breaker check says more"
        }
        _ => "",
    };
    match error {
        // The client's own text repeats the message three times.
        kube::Error::Api(status) => anyhow::anyhow!("{what}: {}{remedy}", status.message),
        error => anyhow::Error::new(error).context(format!("{what}{remedy}")),
    }
}
