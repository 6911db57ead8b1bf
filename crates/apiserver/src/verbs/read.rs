//! Get and list.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::alphabet::URL_SAFE;
use base64::engine::general_purpose::{GeneralPurpose, NO_PAD, URL_SAFE_NO_PAD};
use http::Response;
use portolan_api::status::Status;
use serde_json::{Value, json};

use super::options::{ListOptions, revision};
use super::{Call, render};
use crate::response::Body;
use crate::store::{Collection, Expired, Key, Object};

/// How long a read waits for a revision that has not been reached.
const REVISION_WAIT: Duration = Duration::from_secs(3);

/// Version of continue tokens; those of the reference implementation look the same.
const TOKEN_VERSION: &str = "meta.k8s.io/v1";

fn bad_revision(text: String, given: &str) -> String {
    format!("resourceVersion: Invalid value: {}: {text}", portolan_api::status::quoted(given))
}

/// Waits until a wanted revision is there.
pub async fn wait_for(call: &Call, wanted: u64) -> Result<(), Status> {
    let store = &call.server.store;
    if wanted <= store.snapshot().revision || store.reached(wanted, REVISION_WAIT).await {
        return Ok(());
    }
    Err(Status::too_large_resource_version(wanted, store.snapshot().revision))
}

/// `GET` of one object.
pub fn get(call: &Call) -> Result<Response<Body>, Status> {
    let given = call.query.get("resourceVersion");
    if !given.is_empty() {
        revision(given).map_err(|text| Status::plain_error(bad_revision(text, given)))?;
    }
    let snapshot = call.server.store.snapshot();
    let object = snapshot
        .get(&call.entry.collection, &call.key())
        .ok_or_else(|| Status::not_found(&call.entry.kind, call.name()))?;
    render::object(call, 200, object)
}

/// Reads tokens as leniently as Go does.
const LENIENT: GeneralPurpose = GeneralPurpose::new(&URL_SAFE, NO_PAD.with_decode_allow_trailing_bits(true));

/// Where a page begins.
struct Continue {
    /// Revision of the list; 0 for "whatever is there now".
    revision: u64,
    /// First key that is not before the page.
    start: Key,
}

fn encode_token(revision: u64, last: &Key) -> String {
    let start = if last.namespace.is_empty() {
        format!("{}\u{0}", last.name)
    } else {
        format!("{}/{}\u{0}", last.namespace, last.name)
    };
    let revision = i64::try_from(revision).unwrap_or(i64::MAX);
    let revision = if revision == 0 { -1 } else { revision };
    URL_SAFE_NO_PAD.encode(json!({"v": TOKEN_VERSION, "rv": revision, "start": start}).to_string())
}

fn decode_token(token: &str, namespaced: bool) -> Result<Continue, Status> {
    let bad = |why: &str| Status::bad_request(format!("invalid continue token: continue key is not valid: {why}"));
    let bytes = LENIENT.decode(token.trim_end_matches('=')).map_err(|error| bad(&error.to_string()))?;
    let value: Value = serde_json::from_slice(&bytes).map_err(|error| match bytes.first() {
        Some(first) if !first.is_ascii() => {
            bad(&format!("invalid character '\\u{:04x}' looking for beginning of value", first))
        }
        _ => bad(&error.to_string()),
    })?;
    if value["v"] != TOKEN_VERSION {
        return Err(bad(&format!(
            "server does not recognize this encoded version {}",
            value["v"].as_str().unwrap_or_default()
        )));
    }
    let revision = value["rv"].as_i64().ok_or_else(|| bad("no resource version"))?;
    let start = value["start"].as_str().filter(|start| !start.is_empty()).ok_or_else(|| bad("no start"))?;
    let (namespace, name) = start.split_once('/').unwrap_or(("", start));
    if namespaced == namespace.is_empty() {
        return Err(bad("it belongs to another list"));
    }
    Ok(Continue { revision: u64::try_from(revision).unwrap_or(0), start: Key::new(namespace, name) })
}

/// The collection a list reads and its revision.
async fn source(call: &Call, options: &ListOptions, page: Option<&Continue>) -> Result<(Collection, u64), Status> {
    let store = &call.server.store;
    let resource = &call.entry.collection;
    let now = || {
        let snapshot = store.snapshot();
        (snapshot.collection(resource), snapshot.revision)
    };
    if let Some(page) = page {
        if page.revision == 0 {
            return Ok(now());
        }
        return match store.collection_at(resource, page.revision) {
            Ok(collection) => Ok((collection, page.revision)),
            Err(Expired { .. }) => {
                let mut status = Status::expired(
                    "The provided continue parameter is too old to display a consistent list result. You can start a new \
                     list without the continue parameter, or use the continue token in this response to retrieve the \
                     remainder of the results. Continuing with the provided token results in an inconsistent list - \
                     objects that were created, modified, or deleted between the time the first chunk was returned and \
                     now may show up in the list.",
                );
                let name = page.start.name.trim_end_matches('\u{0}');
                status.continue_token = Some(encode_token(0, &Key::new(&page.start.namespace, name)));
                Err(status)
            }
        };
    }
    let given = options.resource_version.as_str();
    if given.is_empty() {
        return Ok(now());
    }
    let wanted = revision(given)
        .map_err(|text| Status::bad_request(format!("invalid resource version: {}", bad_revision(text, given))))?;
    wait_for(call, wanted).await?;
    let exact = match options.resource_version_match.as_str() {
        "Exact" => true,
        "NotOlderThan" => false,
        _ => options.limit > 0 && wanted != 0,
    };
    if !exact {
        return Ok(now());
    }
    let collection = store.collection_at(resource, wanted).map_err(|Expired { floor }| {
        Status::expired(format!("The resourceVersion for the provided list is too old: {wanted} ({floor})"))
    })?;
    Ok((collection, wanted))
}

/// The objects a list selects, its revision, where the next page begins and how many objects are left.
pub struct Page {
    /// The objects.
    pub objects: Vec<Arc<Object>>,
    /// The revision.
    pub revision: u64,
    next: Option<String>,
    remaining: Option<usize>,
}

/// Carries out a list.
pub async fn page(call: &Call, options: &ListOptions) -> Result<Page, Status> {
    let token = options.continue_token.as_str();
    let start = if token.is_empty() { None } else { Some(decode_token(token, call.entry.kind.namespaced)?) };
    if start.is_some() && !matches!(options.resource_version.as_str(), "" | "0") {
        return Err(Status::bad_request("specifying resource version is not allowed when using continue"));
    }
    let (collection, revision) = source(call, options, start.as_ref()).await?;
    let namespace = call.target.namespace.as_deref();
    let from = match (&start, namespace) {
        (Some(start), _) => start.start.clone(),
        (None, Some(namespace)) => Key::new(namespace, ""),
        (None, None) => Key::new("", ""),
    };
    let in_scope = |key: &Key| namespace.is_none_or(|namespace| &*key.namespace == namespace);
    let mut objects: Vec<Arc<Object>> = Vec::new();
    let mut last: Option<Key> = None;
    let mut next = None;
    let mut remaining = None;
    // One object can be found without looking at the others.
    let single = options.fields.required_name().filter(|_| namespace.is_some() || !call.entry.kind.namespaced);
    if let Some(name) = single {
        let key = Key::new(namespace.unwrap_or_default(), name);
        let found = collection.get(&key).filter(|_| key >= from);
        objects.extend(found.filter(|object| options.matches(&call.entry.kind, &object.value)).cloned());
        return Ok(Page { objects, revision, next, remaining });
    }
    for (key, object) in collection.range(from..).take_while(|(key, _)| in_scope(key)) {
        if !options.matches(&call.entry.kind, &object.value) {
            continue;
        }
        if options.limit > 0 && objects.len() == options.limit {
            next = last.as_ref().map(|last| encode_token(revision, last));
            if options.selects_all() {
                let rest = collection.range(key.clone()..).take_while(|(key, _)| in_scope(key)).count();
                remaining = Some(rest);
            }
            break;
        }
        objects.push(object.clone());
        last = Some(key.clone());
    }
    Ok(Page { objects, revision, next, remaining })
}

/// `GET` of a collection.
pub async fn list(call: &Call) -> Result<Response<Body>, Status> {
    let representation = call.representation()?;
    render::check_shape(&call.entry, representation.shape, true)?;
    let options = ListOptions::parse(&call.query, &call.entry.kind, call.selectable_fields(), None)?;
    options.check(false)?;
    let Page { objects, revision, next, remaining } = page(call, &options).await?;
    render::list(call, &objects, render::list_metadata(revision, next, remaining))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn continue_tokens_come_back_as_they_went() {
        let token = encode_token(7, &Key::new("ns", "a"));
        let page = decode_token(&token, true).expect("valid");
        assert_eq!(page.revision, 7);
        assert!(page.start > Key::new("ns", "a") && page.start < Key::new("ns", "a0"));
        assert!(decode_token(&token, false).is_err());
        assert!(decode_token("garbage", true).is_err());
        assert!(decode_token("e30", true).is_err());
        assert_eq!(decode_token(&encode_token(0, &Key::new("", "a")), false).map(|p| p.revision).ok(), Some(0));
    }
}
