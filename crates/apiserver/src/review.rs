//! Requests that are answered and not stored: who am I, may I, is this token good.

use http::Response;
use portolan_api::meta;
use portolan_api::status::Status;
use portolan_api::strict;
use serde_json::{Value, json};

use crate::auth::{Attributes, User};
use crate::negotiate;
use crate::rbac;
use crate::response::Body;
use crate::verbs::{Call, answer_value, write_options};

/// Answers a `POST` to one of the virtual kinds.
pub async fn run(call: &Call) -> Result<Response<Body>, Status> {
    let kind = &call.entry.kind;
    if kind.is("", "Binding") {
        return crate::verbs::binding(call).await;
    }
    let options = write_options(call)?;
    let ty = call.entry.ty.as_ref().ok_or_else(Status::unknown_resource)?;
    let format = negotiate::body_format(call.content_type(), false)?;
    let admitted = strict::decode(ty, format, &call.body, options.validation)?;
    let mut review = admitted.value;
    let status = match kind.kind.as_str() {
        "SelfSubjectReview" => json!({"userInfo": call.user.to_value()}),
        "TokenReview" => token_review(call, &review["spec"])?,
        "SelfSubjectAccessReview" => access(call, &call.user, &review["spec"])?,
        "SubjectAccessReview" => access(call, &subject(&review["spec"])?, &review["spec"])?,
        "LocalSubjectAccessReview" => {
            let namespace = meta::text(&review, &["spec", "resourceAttributes", "namespace"]);
            if namespace != call.target.namespace.as_deref().unwrap_or_default() {
                return Err(Status::bad_request(format!(
                    "spec.resourceAttributes.namespace must match namespace: {}",
                    call.target.namespace.as_deref().unwrap_or_default()
                )));
            }
            access(call, &subject(&review["spec"])?, &review["spec"])?
        }
        "SelfSubjectRulesReview" => {
            let namespace = meta::text(&review, &["spec", "namespace"]);
            if namespace.is_empty() {
                return Err(Status::bad_request("no namespace on request"));
            }
            rbac::rules_review(&call.server.store.snapshot(), &call.user, namespace)
        }
        _ => return Err(Status::method_not_allowed()),
    };
    meta::set(&mut review, &["metadata", "creationTimestamp"], Value::Null);
    review["status"] = status;
    answer_value(call, 201, &review, &admitted.warnings)
}

fn subject(spec: &Value) -> Result<User, Status> {
    let name = meta::text(spec, &["user"]);
    let groups: Vec<&str> = meta::list(spec, &["groups"]).iter().filter_map(Value::as_str).collect();
    if name.is_empty() && groups.is_empty() {
        return Err(Status::bad_request("at least one of user or group must be specified"));
    }
    Ok(User { name: name.to_owned(), groups: groups.into_iter().map(str::to_owned).collect(), ..User::default() })
}

fn access(call: &Call, user: &User, spec: &Value) -> Result<Value, Status> {
    let resource = &spec["resourceAttributes"];
    let path = &spec["nonResourceAttributes"];
    if resource.is_null() == path.is_null() {
        return Err(Status::bad_request(
            "exactly one of nonResourceAttributes or resourceAttributes must be specified",
        ));
    }
    let text = |value, field| meta::text(value, &[field]);
    let full_resource = match (text(resource, "resource"), text(resource, "subresource")) {
        (resource, "") => resource.to_owned(),
        (resource, subresource) => format!("{resource}/{subresource}"),
    };
    let attributes = if path.is_null() {
        Attributes {
            verb: text(resource, "verb"),
            group: text(resource, "group"),
            resource: &full_resource,
            namespace: text(resource, "namespace"),
            name: text(resource, "name"),
            path: "",
        }
    } else {
        Attributes {
            verb: text(path, "verb"),
            group: "",
            resource: "",
            namespace: "",
            name: "",
            path: text(path, "path"),
        }
    };
    let decision = rbac::decide(&call.server.store.snapshot(), user, &attributes);
    let mut status = json!({"allowed": decision.allowed});
    if !decision.reason.is_empty() {
        status["reason"] = json!(decision.reason);
    }
    Ok(status)
}

fn token_review(call: &Call, spec: &Value) -> Result<Value, Status> {
    let token = meta::text(spec, &["token"]);
    if token.is_empty() {
        return Err(Status::bad_request("token is required for TokenReview in authentication"));
    }
    let audiences: Vec<String> =
        meta::list(spec, &["audiences"]).iter().filter_map(|a| a.as_str().map(str::to_owned)).collect();
    let state = call.server.store.snapshot();
    Ok(match call.server.authenticator.bearer(token, &audiences, &state, call.now.as_second()) {
        Some((user, good_for)) => json!({"authenticated": true, "user": user.to_value(), "audiences": good_for}),
        None => json!({"user": {}, "error": "invalid bearer token"}),
    })
}
