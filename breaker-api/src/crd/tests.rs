use std::{fs, path::Path};

use super::*;

fn repository() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[test]
fn the_definitions_in_the_repository_are_those_of_the_types() {
    let made = definitions().unwrap();
    let kept = fs::read_to_string(repository().join("k8s/base/crds.yaml")).unwrap();
    assert!(kept == made, "k8s/base/crds.yaml is out of date: run cargo xtask crdgen");
}

/// TRIALS A3: server-side apply of what was applied client-side.
#[test]
fn lists_of_one_manager_have_no_defaults() {
    let made = definitions().unwrap();
    let crd: serde_json::Value = serde_saphyr::from_str(made.split("---\n").nth(1).unwrap()).unwrap();
    let spec = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
    let defaults = |schema: &serde_json::Value| schema.to_string().matches("\"default\":").count();
    assert_eq!(defaults(&spec["backups"]), 0);
    assert!(defaults(&spec["check"]) > 3 && defaults(&spec["breaker"]) > 3);
}

#[test]
fn every_field_has_a_description() {
    fn look(path: &str, schema: &serde_json::Value, missing: &mut Vec<String>) {
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            let path = format!("{path}.{name}");
            if field["description"].as_str().is_none_or(str::is_empty) {
                missing.push(path.clone());
            }
            look(&path, field, missing);
            look(&path, &field["items"], missing);
        }
    }
    let mut missing = Vec::new();
    for crd in [CircuitBreaker::crd(), NodeReport::crd(), ReferenceGrant::crd()] {
        let crd = serde_json::to_value(crd).unwrap();
        let kind = crd["spec"]["names"]["kind"].as_str().unwrap();
        let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"];
        look(&format!("{kind}.spec"), &schema["spec"], &mut missing);
        look(&format!("{kind}.status"), &schema["status"], &mut missing);
    }
    // The fields of the API's own type Condition have no descriptions.
    missing.retain(|path| !path.contains(".conditions."));
    assert!(missing.is_empty(), "{missing:?}");
}

/// docs/KUBERNETES.md names every field of the spec.
#[test]
fn the_documents_name_every_field() {
    let text = fs::read_to_string(repository().join("docs/KUBERNETES.md")).unwrap();
    let crd = serde_json::to_value(CircuitBreaker::crd()).unwrap();
    let spec = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    for name in spec["properties"].as_object().unwrap().keys() {
        assert!(text.contains(&format!("`{name}")), "spec.{name} is not in docs/KUBERNETES.md");
    }
}
