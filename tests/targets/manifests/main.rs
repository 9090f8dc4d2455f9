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
            let metadata = object["metadata"].as_object_mut().unwrap();
            // Roles that belong to others do so by labels.
            if let Some(labels) = metadata.get_mut("labels").and_then(Value::as_object_mut) {
                labels.retain(|label, _| label.contains("aggregate"));
            }
            if metadata.get("labels").and_then(Value::as_object).is_some_and(serde_json::Map::is_empty) {
                metadata.remove("labels");
            }
            if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
                annotations.remove("helm.sh/resource-policy");
                if annotations.is_empty() {
                    metadata.remove("annotations");
                }
            }
            let name = |field: &Value| field.as_str().unwrap().to_owned();
            ((name(&object["kind"]), name(&object["metadata"]["name"])), object)
        })
        .collect()
}

/// The objects of `k8s/base` as kustomize renders them (the kustomization only lists files), without the namespace, which
/// is Helm's to make.
fn base() -> BTreeMap<(String, String), Value> {
    let kustomization: Value =
        serde_saphyr::from_str(&fs::read_to_string(k8s().join("base/kustomization.yaml")).unwrap()).unwrap();
    let files = kustomization["resources"].as_array().unwrap().iter().map(|file| file.as_str().unwrap());
    files
        .filter(|file| *file != "namespace.yaml")
        .flat_map(|file| objects(&fs::read_to_string(k8s().join("base").join(file)).unwrap()))
        .collect()
}

fn by_helm() -> Option<String> {
    let output = Command::new("helm")
        .args(["template", "breaker"])
        .arg(k8s().join("chart"))
        .args(["--namespace", "breaker-system"])
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

fn split_list(args: &[Go]) -> Result<Go, FuncError> {
    let (Go::String(separator), Go::String(text)) = (&args[0], &args[1]) else { panic!("splitList of {args:?}") };
    Ok(Go::Array(text.split(separator.as_str()).map(|part| Go::String(part.to_owned())).collect()))
}

fn last(args: &[Go]) -> Result<Go, FuncError> {
    let Go::Array(items) = &args[0] else { panic!("last of {args:?}") };
    Ok(items.last().cloned().unwrap_or(Go::Nil))
}

/// A function that only branches call which are off by default.
fn not_here(args: &[Go]) -> Result<Go, FuncError> {
    panic!("not a function of this renderer: {args:?}")
}

fn render(values: &Value) -> String {
    let data = to_go(&serde_json::json!({
        "Values": values, "Release": { "Namespace": "breaker-system", "Service": "Helm", "Name": "breaker" },
    }));
    let mut text = String::new();
    let mut files: Vec<PathBuf> =
        fs::read_dir(k8s().join("chart/templates")).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    for file in files {
        let mut template = Template::default();
        template.add_func("toYaml", to_yaml);
        template.add_func("nindent", nindent);
        template.add_func("sha256sum", sha256sum);
        template.add_func("splitList", split_list);
        template.add_func("last", last);
        for name in ["replace", "list"] {
            template.add_func(name, not_here);
        }
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
    let rendered = rendered();
    let (mut chart, base) = (objects(&rendered), base());
    // Hooks are no objects of the installation.
    chart.retain(|_, object| object["metadata"]["annotations"].get("helm.sh/hook").is_none());
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
    assert_eq!(pods("/admission/enabled", serde_json::json!(true)), plain);
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
        ("/agent/listen", serde_json::json!("127.0.0.1:9999")),
        ("/image/digest", serde_json::json!(format!("sha256:{:064x}", 7))),
        ("/crds/install", serde_json::json!(false)),
        ("/cleanup/enabled", serde_json::json!(false)),
        ("/cleanup/timeout", serde_json::json!("5m")),
        ("/metrics/enabled", serde_json::json!(true)),
        ("/metrics/podMonitor/enabled", serde_json::json!(true)),
        ("/admission/enabled", serde_json::json!(true)),
        ("/handover", serde_json::json!("1m")),
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

/// The text of a file, without the lines of comments.
fn content(file: &str) -> String {
    let text = fs::read_to_string(k8s().join(file)).unwrap();
    text.lines().filter(|line| !line.trim_start().starts_with('#')).map(|line| format!("{line}\n")).collect()
}

/// Helm takes over what kubectl applied only if nothing differs. A text is compared as it is, and not as YAML.
#[test]
fn the_configuration_is_the_same_text_in_base_and_chart() {
    let render =
        |text: &str| objects(text)[&("ConfigMap".into(), "breaker-agent".into())]["data"]["agent.yaml"].clone();
    assert_eq!(render(&fs::read_to_string(k8s().join("base/config.yaml")).unwrap()), render(&rendered()));
}

fn rendered() -> String {
    by_helm().unwrap_or_else(|| render(&values()))
}

/// The chart has copies, because Helm reads no files outside of it.
#[test]
fn the_chart_has_the_rules_dashboards_and_policies_of_the_repository() {
    let files = ["rules.yaml", "dashboards/overview.json", "dashboards/breaker.json", "dashboards/nodes.json"];
    for file in files {
        let (own, copy) = (format!("monitoring/{file}"), format!("chart/files/{file}"));
        assert!(content(&own) == content(&copy), "{copy} is not {own}: copy it");
    }
    let mut values = values();
    values["admission"]["enabled"] = Value::Bool(true);
    let policies = objects(&fs::read_to_string(k8s().join("admission/policies.yaml")).unwrap());
    let chart = objects(&render(&values));
    for (key, policy) in policies {
        assert_eq!(chart.get(&key), Some(&policy), "{key:?}");
    }
}

/// A typo in a value is refused by Helm only if the schema knows every value.
#[test]
fn the_schema_knows_every_value_and_every_field_of_the_agent() {
    let schema: Value =
        serde_json::from_str(&fs::read_to_string(k8s().join("chart/values.schema.json")).unwrap()).unwrap();
    fn compare(path: &str, values: &Value, schema: &Value) {
        let Some(properties) = schema["properties"].as_object() else { return };
        assert_eq!(schema["additionalProperties"], Value::Bool(false), "{path}");
        for (name, value) in values.as_object().unwrap() {
            let known = properties.get(name).unwrap_or_else(|| panic!("{path}.{name} is not in the schema"));
            compare(&format!("{path}.{name}"), value, known);
        }
    }
    compare("", &values(), &schema);
    let documents = include_str!("../../../docs/CONFIGURATION.md");
    let fields = documents.lines().filter_map(|line| line.strip_prefix("| `agent.")?.split('`').next());
    let agent = &schema["properties"]["agent"];
    let mut count = 0;
    for field in fields {
        let at = format!("/properties/{}", field.replace('.', "/properties/"));
        assert!(agent.pointer(&at).is_some(), "agent.{field} is not in the schema");
        count += 1;
    }
    assert!(count > 15, "{count}");
}
