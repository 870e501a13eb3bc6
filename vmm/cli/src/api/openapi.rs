//! `docs/openapi.json` is what the server does: the file is the server's own description, and what the server answers is
//! as described.

use serde_json::{Value, json};

use super::server;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi.json");

/// The server's description, as the file has it.
pub(crate) fn description() -> Value {
    serde_json::to_value(server::description()).unwrap()
}

/// The schema of what `method path` answers with `status`, fit for a validator.
pub(crate) fn schema(method: &str, path: &str, status: u16) -> Value {
    let all = description();
    let place = format!("/paths/{}/{method}/responses/{status}/content", path.replace('/', "~1"));
    let content = all
        .pointer(&place)
        .unwrap_or_else(|| panic!("no {place} in the description"));
    let schema = content.as_object().unwrap().values().next().unwrap()["schema"].clone();
    // Its `$ref`s point into the components of the whole.
    json!({ "allOf": [schema], "components": all["components"] })
}

/// Panics with every difference between `answer` and what is described.
#[track_caller]
pub(crate) fn assert_described(method: &str, path: &str, status: u16, answer: &Value) {
    let validator = jsonschema::validator_for(&schema(method, path, status)).unwrap();
    let wrong: Vec<_> = validator
        .iter_errors(answer)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    assert!(
        wrong.is_empty(),
        "{method} {path} answered what is not described: {wrong:#?}"
    );
}

#[test]
fn the_file_is_the_servers_own_description() {
    let mut described = serde_json::to_string_pretty(&server::description()).unwrap();
    described.push('\n');
    if std::env::var_os("UMBRA_BLESS").is_some() {
        std::fs::write(FILE, &described).unwrap();
    }
    let file = std::fs::read_to_string(FILE).unwrap();
    assert!(
        file == described,
        "docs/openapi.json is not what the server does: run this test with UMBRA_BLESS=1 and read the difference"
    );
}

#[test]
fn every_field_and_every_method_is_explained() {
    let all = description();
    for (path, methods) in all["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            assert!(operation["summary"].is_string(), "{method} {path}");
        }
    }
    for (name, schema) in all["components"]["schemas"].as_object().unwrap() {
        for (field, schema) in schema["properties"].as_object().into_iter().flatten() {
            let explained =
                schema["description"].is_string() || schema["oneOf"].is_array() || schema["$ref"].is_string();
            assert!(explained, "{name}.{field}");
        }
    }
}

#[test]
fn an_answer_that_is_not_as_described_is_noticed() {
    let validator = jsonschema::validator_for(&schema("get", "/api/v1/ping", 200)).unwrap();
    assert!(validator.is_valid(&json!({ "version": "1", "pid": 1, "name": "web" })));
    assert!(!validator.is_valid(&json!({ "version": "1", "pid": "1", "name": "web" })));
    assert!(!validator.is_valid(&json!({ "version": "1", "pid": 1 })));
}
