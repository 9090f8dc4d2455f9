//! The lab: a node as k3s lays it out, in network namespaces of its own, with real programs in the real kernel.
//!
//! | module | one concern |
//! |---|---|
//! | [`lab::netns`] | network namespaces, and commands and threads in them |
//! | [`lab::world`] | nodes, bridge, pods, and that all of it goes away |
//! | [`lab::kubeproxy`] | Services in iptables as kube-proxy writes them |
//! | [`lab::service`] | pods that run the dummy service, and what can go wrong with them |
//! | [`lab::agent`] | the agent under test |
//! | [`lab::client`] | clients that keep asking, and what they were told |
//! | [`lab::stage`] | all of it put together: the lab that the story is about |
//! | [`model`] | the datapath's rules as plain Rust, to hold the programs against |
//! | [`tables`] | what is in the flow tables, as plain values |
//! | [`packets`] | packets built independently of our own code, and the programs to put them through |

pub mod lab;
pub mod model;
pub mod packets;
pub mod tables;
