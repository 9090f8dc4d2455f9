//! Test support: the lab (nodes like those of k3s, in network namespaces, with the real agent and the real programs in
//! the running kernel), packet tests, and the model of the datapath.
//!
//! | module | one concern |
//! |---|---|
//! | [`lab::netns`] | network namespaces; running commands and threads in them |
//! | [`lab::world`] | nodes, bridges and pods, and their removal |
//! | [`lab::kubeproxy`] | Services in iptables, as kube-proxy writes them |
//! | [`lab::service`] | pods that run the dummy service, and faults to inject into them |
//! | [`lab::agent`] | the agent under test |
//! | [`lab::client`] | clients that send requests, and the outcomes that they record |
//! | [`lab::stage`] | the complete lab: node, primary, backup, client and agent |
//! | [`model`] | the rules of the datapath in plain Rust; tests compare the programs with them |
//! | [`tables`] | the content of the flow tables, as plain values |
//! | [`process`] | processes that end with the test |
//! | [`prometheus`] | promtool and the server of Prometheus |
//! | [`packets`] | packets that are built independently of the product's code, and the programs to run on them |

pub mod lab;
pub mod model;
pub mod packets;
pub mod process;
pub mod prometheus;
pub mod tables;
