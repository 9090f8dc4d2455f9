//! Manifest tests: the Helm chart and `k8s/base` must render to the same objects, except for labels. No root, no
//! cluster.
//!
//! If `helm` is on the PATH, it renders the chart. Otherwise gtmpl (Go templates in Rust) renders it, with the two of
//! Helm's functions that the templates use.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::PathBuf,
    process::Command,
};

use gtmpl::{Context, FuncError, Template, Value as Go};
use serde_json::Value;
use sha2::Digest as _;

fn k8s() -> PathBuf {
    ebpf_builder::workspace().join("k8s")
}

/// Parses YAML documents into objects by kind and name, without their labels.
fn objects(text: &str) -> BTreeMap<(String, String), Value> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    documents
        .into_iter()
        .filter(|document| !document.is_null())
        .map(|mut object| {
            object["metadata"].as_object_mut().unwrap().remove("labels");
            // The agent's configuration is YAML in a string: compare its content, not its formatting.
            if let Some(agent) = object["data"]["agent.yaml"].as_str() {
                let agent: Value = serde_saphyr::from_str(agent).unwrap();
                object["data"]["agent.yaml"] = agent;
            }
            let name = |field: &Value| field.as_str().unwrap().to_owned();
            ((name(&object["kind"]), name(&object["metadata"]["name"])), object)
        })
        .collect()
}

/// The objects of `k8s/base` as kustomize renders them (the kustomization only lists files), without the CRDs, which
/// the chart has in a directory of their own.
fn base() -> BTreeMap<(String, String), Value> {
    let kustomization: Value =
        serde_saphyr::from_str(&fs::read_to_string(k8s().join("base/kustomization.yaml")).unwrap()).unwrap();
    let files = kustomization["resources"].as_array().unwrap().iter().map(|file| file.as_str().unwrap());
    files
        .filter(|file| *file != "crds.yaml")
        .flat_map(|file| objects(&fs::read_to_string(k8s().join("base").join(file)).unwrap()))
        .collect()
}

fn by_helm() -> Option<String> {
    let output = Command::new("helm")
        .args(["template", "breaker"])
        .arg(k8s().join("chart"))
        .args(["--namespace", "breaker-system", "--set", "createNamespace=true"])
        .output()
        .ok()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap())
}

fn to_go(value: &Value) -> Go {
    match value {
        Value::Null => Go::Nil,
        Value::Bool(b) => Go::Bool(*b),
        Value::Number(n) => n.as_i64().map_or_else(|| Go::from(n.as_f64().unwrap()), Go::from),
        Value::String(s) => Go::String(s.clone()),
        Value::Array(items) => Go::Array(items.iter().map(to_go).collect()),
        Value::Object(fields) => Go::Map(fields.iter().map(|(k, v)| (k.clone(), to_go(v))).collect::<HashMap<_, _>>()),
    }
}

fn from_go(value: &Go) -> Value {
    match value {
        Go::Bool(b) => Value::Bool(*b),
        Go::Number(n) => n.as_i64().map(Value::from).or_else(|| n.as_f64().map(Value::from)).unwrap(),
        Go::String(s) => Value::String(s.clone()),
        Go::Array(items) => Value::Array(items.iter().map(from_go).collect()),
        Go::Map(fields) | Go::Object(fields) => {
            Value::Object(fields.iter().map(|(k, v)| (k.clone(), from_go(v))).collect())
        }
        _ => Value::Null,
    }
}

fn to_yaml(args: &[Go]) -> Result<Go, FuncError> {
    let text = serde_saphyr::to_string(&from_go(&args[0])).unwrap();
    Ok(Go::String(text.trim_end().to_owned()))
}

fn nindent(args: &[Go]) -> Result<Go, FuncError> {
    let (Go::Number(width), Go::String(text)) = (&args[0], &args[1]) else { panic!("nindent of {args:?}") };
    let pad = " ".repeat(usize::try_from(width.as_i64().unwrap()).unwrap());
    Ok(Go::String(text.lines().map(|line| format!("\n{pad}{line}")).collect()))
}

fn sha256sum(args: &[Go]) -> Result<Go, FuncError> {
    let Go::String(text) = &args[0] else { panic!("sha256sum of {args:?}") };
    Ok(Go::String(sha2::Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()))
}

fn render(values: &Value) -> String {
    let data = to_go(&serde_json::json!({
        "Values": values, "Release": { "Namespace": "breaker-system", "Service": "Helm", "Name": "breaker" },
    }));
    let mut text = String::new();
    let mut files: Vec<PathBuf> =
        fs::read_dir(k8s().join("chart/templates")).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    for file in files {
        let mut template = Template::default();
        template.add_func("toYaml", to_yaml);
        template.add_func("nindent", nindent);
        template.add_func("sha256sum", sha256sum);
        template
            .parse(fs::read_to_string(&file).unwrap())
            .unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let rendered =
            template.render(&Context::from(data.clone())).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        text.push_str(&format!("---\n{rendered}\n"));
    }
    text
}

fn values() -> Value {
    serde_saphyr::from_str(&fs::read_to_string(k8s().join("chart/values.yaml")).unwrap()).unwrap()
}

#[test]
fn the_chart_is_base_but_for_labels() {
    let rendered = by_helm().unwrap_or_else(|| {
        let mut values = values();
        values["createNamespace"] = Value::Bool(true);
        render(&values)
    });
    let (mut chart, base) = (objects(&rendered), base());
    // Only the chart knows the whole configuration.
    for object in chart.values_mut() {
        if let Some(metadata) = object.pointer_mut("/spec/template/metadata").and_then(Value::as_object_mut) {
            metadata.remove("annotations");
        }
    }
    assert_eq!(chart.keys().collect::<Vec<_>>(), base.keys().collect::<Vec<_>>());
    for (key, object) in base {
        assert_eq!(chart[&key], object, "{key:?}");
    }
}

/// TRIALS A10: the agents restart when their configuration changes, and only then.
#[test]
fn another_configuration_restarts_the_agents() {
    let pods = |path: &str, value: Value| {
        let mut values = values();
        *values.pointer_mut(path).unwrap() = value;
        let all = objects(&render(&values));
        let (_, set) = all.into_iter().find(|((kind, _), _)| kind == "DaemonSet").unwrap();
        set["spec"]["template"].clone()
    };
    let plain = pods("/labels", serde_json::json!({}));
    assert_ne!(pods("/agent/uplinks", serde_json::json!(false)), plain);
    assert_eq!(pods("/createNamespace", serde_json::json!(true)), plain);
}

#[test]
fn every_value_changes_something() {
    let plain = render(&values());
    let changes = [
        ("/image/repository", serde_json::json!("registry.example.com/breaker")),
        ("/image/tag", serde_json::json!("9.9.9")),
        ("/image/pullPolicy", serde_json::json!("Always")),
        ("/imagePullSecrets", serde_json::json!([{ "name": "secret" }])),
        ("/agent/uplinks", serde_json::json!(false)),
        ("/probePort", serde_json::json!(9999)),
        ("/handover", serde_json::json!("1m")),
        ("/createNamespace", serde_json::json!(true)),
        ("/updateStrategy/rollingUpdate/maxUnavailable", serde_json::json!(1)),
        ("/priorityClassName", serde_json::json!("another")),
        ("/nodeSelector", serde_json::json!({ "breaker": "yes" })),
        ("/tolerations", serde_json::json!([{ "key": "breaker", "operator": "Exists" }])),
        ("/resources/limits/memory", serde_json::json!("1Gi")),
        ("/paths/bpffs", serde_json::json!("/mnt/bpf")),
        ("/paths/run", serde_json::json!("/mnt/run")),
        ("/paths/netns", serde_json::json!("/mnt/netns")),
        ("/paths/cgroup", serde_json::json!("/mnt/cgroup")),
        ("/labels", serde_json::json!({ "team": "network" })),
        ("/podAnnotations", serde_json::json!({ "a": "b" })),
    ];
    for (path, value) in changes {
        let mut values = values();
        *values.pointer_mut(path).unwrap_or_else(|| panic!("there is no value {path}")) = value;
        let changed = render(&values);
        assert_ne!(changed, plain, "{path}");
        objects(&changed);
    }
}
