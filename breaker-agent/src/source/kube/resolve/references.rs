//! Resolves the references of a spec: the Service's ports, the backups, and the ReferenceGrants that they need.

use breaker_api::crd::{Backup, GROUP, Port};
use breaker_core::model::Protocol;
use kube::ResourceExt as _;

use super::{Refusal, Resolver, refuse};
use crate::source::kube::{
    intent::Key,
    objects::{Service, ServicePort},
};

/// A backup Service that exists and may be used.
pub(super) struct ResolvedBackup<'a> {
    pub(super) intent: &'a Backup,
    pub(super) key: Key,
    pub(super) priority: i32,
    pub(super) service: &'a Service,
}

impl<'a> Resolver<'a> {
    /// The ports to protect: those that the spec names or, if it names none, all TCP and UDP ports.
    pub(super) fn ports(&mut self, service: &'a Service) -> Result<Vec<&'a ServicePort>, Refusal> {
        let key = &self.result.service;
        let spec = &service.spec;
        if spec.r#type == "ExternalName" {
            let message = format!(
                "Service {key} is an ExternalName: its clients connect to another host, so no address can be redirected"
            );
            return refuse("ExternalName", message);
        }
        if spec.cluster_ip.is_empty() || spec.cluster_ip == "None" {
            let message = format!(
                "Service {key} is headless: its clients connect to the pods directly, so no address can be redirected"
            );
            return refuse("Headless", message);
        }
        let all = spec.ports.as_slice();
        let Some(wanted) = &self.spec.service.ports else {
            let others: Vec<String> = all
                .iter()
                .filter(|port| protocol_of(port).is_none())
                .map(|port| format!("{}/{}", port.port, port.protocol()))
                .collect();
            if !others.is_empty() {
                self.result.notes.push(format!("not protected (neither TCP nor UDP): {}", others.join(", ")));
            }
            let ports: Vec<_> = all.iter().filter(|port| protocol_of(port).is_some()).collect();
            if ports.is_empty() {
                return refuse("ProtocolNotSupported", format!("Service {key} has no TCP or UDP port"));
            }
            return Ok(ports);
        };
        let mut chosen = Vec::new();
        for wanted in wanted {
            let named: Vec<_> = all.iter().filter(|port| is_named(port, wanted)).collect();
            if named.is_empty() {
                let message = format!("Service {key} has no port {wanted}; it has {}", names_of(all));
                return refuse("PortNotFound", message);
            }
            // One number can be both a TCP and a UDP port.
            let known: Vec<_> = named.iter().filter(|port| protocol_of(port).is_some()).copied().collect();
            if known.is_empty() {
                let message = format!(
                    "port {wanted} of Service {key} is {}; allowed: TCP, UDP",
                    named.first().map_or("", |port| port.protocol())
                );
                return refuse("ProtocolNotSupported", message);
            }
            chosen.extend(known);
        }
        Ok(chosen)
    }

    /// The backups that exist and may be used, by priority. If others cannot be used, `resolved` is set to the refusal
    /// of the last of them.
    pub(super) fn backups(&mut self) -> Vec<ResolvedBackup<'a>> {
        let from = self.result.owner.key.namespace.clone();
        let mut found = Vec::new();
        for (position, intent) in self.spec.backups.iter().enumerate() {
            let namespace = intent.namespace.as_deref().unwrap_or(&from);
            let key = Key::new(namespace, &intent.name);
            let outcome = if namespace != from && !self.is_granted(&from, &key) {
                refuse(
                    "RefNotPermitted",
                    format!(
                        "no ReferenceGrant in namespace {namespace} allows namespace {from} to use Service {}",
                        key.name
                    ),
                )
            } else if key == self.result.service {
                refuse("BackupIsPrimary", format!("Service {key} cannot be its own backup"))
            } else {
                match self.world.services.get(&key) {
                    None => refuse("BackupNotFound", format!("there is no Service {key}")),
                    Some(service) if service.spec.r#type == "ExternalName" => refuse(
                        "ExternalName",
                        format!("Service {key} is an ExternalName: it has no endpoints that traffic could be sent to"),
                    ),
                    Some(service) => Ok(service),
                }
            };
            match outcome {
                Ok(service) => {
                    let priority = intent.priority.unwrap_or_else(|| i32::try_from(position).unwrap_or(i32::MAX));
                    found.push(ResolvedBackup { intent, key, priority, service });
                }
                Err(refusal) => self.result.resolved = Err(refusal),
            }
        }
        found.sort_by_key(|found| found.priority);
        found
    }

    fn is_granted(&self, from: &str, to: &Key) -> bool {
        self.world.grants.iter().filter(|grant| grant.namespace().as_deref() == Some(&to.namespace)).any(|grant| {
            let who =
                grant.spec.from.iter().any(|f| f.group == GROUP && f.kind == "CircuitBreaker" && f.namespace == from);
            let what = grant.spec.to.iter().any(|t| {
                t.group.is_empty() && t.kind == "Service" && t.name.as_ref().is_none_or(|name| *name == to.name)
            });
            who && what
        })
    }
}

pub(super) fn is_named(port: &ServicePort, wanted: &Port) -> bool {
    match wanted {
        Port::Number(number) => i64::from(port.port) == *number,
        Port::Name(name) => port.name.as_ref() == Some(name),
    }
}

pub(super) fn protocol_of(port: &ServicePort) -> Option<Protocol> {
    match port.protocol() {
        "TCP" => Some(Protocol::Tcp),
        "UDP" => Some(Protocol::Udp),
        _ => None,
    }
}

fn names_of(ports: &[ServicePort]) -> String {
    let name = |port: &ServicePort| match &port.name {
        Some(name) => format!("{name} ({})", port.port),
        None => port.port.to_string(),
    };
    ports.iter().map(name).collect::<Vec<_>>().join(", ")
}
