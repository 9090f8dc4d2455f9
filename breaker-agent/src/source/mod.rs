//! Sources of the services to protect: a configuration file, or Kubernetes. Each source produces
//! [`breaker_core::model`] values.

pub mod file;
pub mod kube;
