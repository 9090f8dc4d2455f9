//! Sources of the services to protect: a configuration file, or Kubernetes. Each source produces [`crate::model`]
//! values.

pub mod file;
pub mod kube;
