//! Converts a whole file from its format to domain types, and checks the rules between services: unique names and
//! frontends, and no backup that is another service's frontend. The modules `agent` and `service` convert the parts,
//! with every default and limit. All problems are reported at once, each with its line, field, value and what is
//! allowed.

use std::{collections::BTreeMap, net::SocketAddr, path::Path};

use breaker_core::model::{Frontend, Protocol, Service};
use serde_saphyr::Location;

use super::{
    AgentConfig, Config, ConfigError,
    agent::{MOST_SERVICES, agent},
    format,
    problems::Problems,
    service::service,
};

pub(super) fn validate(file: &Path, raw: format::File) -> Result<Config, Vec<ConfigError>> {
    let mut problems = Problems::new(file);
    let agent = agent(&mut problems, raw.agent);
    let most = agent.max_services.unwrap_or(MOST_SERVICES);
    if raw.services.value.len() > most as usize {
        let count = raw.services.value.len();
        problems.add(raw.services.referenced, "services", format!("{count} are too many; allowed: up to {most}"));
    }
    let mut names = BTreeMap::new();
    let mut frontends = BTreeMap::new();
    let mut backups = Vec::new();
    let mut services = Vec::new();
    for (index, raw) in raw.services.value.into_iter().enumerate() {
        let path = format!("services[{index}]");
        let name = raw.name.clone();
        if let Some(first) = names.insert(name.value.clone(), name.referenced.line()) {
            let problem =
                format!("{:?} is already the name of the service in line {first}; allowed: a unique name", name.value);
            problems.add(name.referenced, &format!("{path}.name"), problem);
        }
        for (i, tier) in raw.backups.value.iter().enumerate() {
            for (j, backend) in tier.backends.value.iter().enumerate() {
                let field = format!("{path}.backups[{i}].backends[{j}]");
                let (Ok(ip), Ok(port)) = (backend.address.value.parse(), u16::try_from(backend.port.value)) else {
                    continue;
                };
                backups.push((name.value.clone(), field, SocketAddr::new(ip, port), backend.address.referenced));
            }
        }
        let locations: Vec<Location> = raw.frontends.value.iter().map(|f| f.address.referenced).collect();
        let service = service(&mut problems, &path, raw, true);
        for (i, (frontend, at)) in service.frontends.iter().zip(locations).enumerate() {
            if frontend.address.ip().is_loopback() && !agent.node_sockets {
                let problem = format!(
                    "{} is reached by this node's own processes only, and agent.nodeSockets is false; allowed: an address \
                     that packets carry, or agent.nodeSockets: true",
                    frontend.address.ip()
                );
                problems.add(at, &format!("{path}.frontends[{i}].address"), problem);
            }
            if let Some(first) = frontends.insert(*frontend, (service.name.clone(), at.line())) {
                let problem = format!(
                    "{frontend} is already a frontend of {} (line {}); allowed: each frontend in one service, once",
                    first.0, first.1
                );
                problems.add(at, &format!("{path}.frontends[{i}]"), problem);
            }
        }
        services.push(service);
    }
    // A backup that is another service's frontend would be translated twice, and two connections of one client
    // could then have the same addresses and ports.
    for (service, field, address, at) in backups {
        let taken = [Protocol::Tcp, Protocol::Udp]
            .iter()
            .filter_map(|protocol| frontends.get_key_value(&Frontend { address, protocol: *protocol }))
            .find(|(_, (owner, _))| owner.as_str() != service);
        if let Some((frontend, (owner, _))) = taken {
            let problem = format!("{address} is {owner}'s frontend {frontend}; allowed: a pod's or host's own address");
            problems.add(at, &field, problem);
        }
    }
    problems.result(Config { agent, services })
}

/// Validates a file without services, for an agent whose services come from another source.
pub(super) fn validate_agent(file: &Path, raw: format::Agent) -> Result<AgentConfig, Vec<ConfigError>> {
    let mut problems = Problems::new(file);
    let agent = agent(&mut problems, raw);
    problems.result(agent)
}

/// Validates a service without its addresses.
pub(super) fn validate_policies(raw: format::Service) -> Result<Service, Vec<ConfigError>> {
    let mut problems = Problems::new(Path::new(""));
    let service = service(&mut problems, "spec", raw, false);
    problems.result(service)
}
