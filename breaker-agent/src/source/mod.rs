//! Where services come from. Every source ends in [`crate::model`].

pub mod file;
pub mod kube;
