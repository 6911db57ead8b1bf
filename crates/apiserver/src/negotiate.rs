//! Which representation a client gets, and in which one its body arrives.

use portolan_api::status::Status;
use portolan_api::strict::Format;

/// How an answer is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// `application/json`.
    Json,
    /// `application/yaml`.
    Yaml,
}

/// What an answer shows of the objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// The objects themselves.
    Object,
    /// A table, of `meta.k8s.io/v1` or `v1beta1`.
    Table {
        /// Whether the older version is wanted.
        beta: bool,
    },
    /// Metadata of one object.
    Partial {
        /// Whether the older version is wanted.
        beta: bool,
    },
    /// Metadata of a list.
    PartialList {
        /// Whether the older version is wanted.
        beta: bool,
    },
}

/// The representation chosen for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Representation {
    /// How it is written.
    pub encoding: Encoding,
    /// What it shows.
    pub shape: Shape,
}

impl Representation {
    /// The objects in JSON.
    pub const DEFAULT: Representation = Representation { encoding: Encoding::Json, shape: Shape::Object };
}

const AVAILABLE: &[&str] = &[
    "application/json",
    "application/yaml",
    "application/vnd.kubernetes.protobuf",
    "application/json;stream=watch",
    "application/vnd.kubernetes.protobuf;stream=watch",
];

/// Media types of request bodies.
pub const BODY_TYPES: &[&str] = &["application/json", "application/yaml", "application/vnd.kubernetes.protobuf"];

/// One clause of an Accept header.
struct Clause<'a> {
    media_type: &'a str,
    parameters: Vec<(&'a str, &'a str)>,
    quality: f32,
}

fn clauses(accept: &str) -> Vec<Clause<'_>> {
    let mut clauses: Vec<Clause<'_>> = accept
        .split(',')
        .map(|clause| {
            let mut parts = clause.split(';').map(str::trim);
            let media_type = parts.next().unwrap_or_default();
            let mut parameters: Vec<(&str, &str)> = parts.filter_map(|p| p.split_once('=')).collect();
            let quality = parameters.iter().find(|(k, _)| *k == "q").and_then(|(_, v)| v.parse().ok()).unwrap_or(1.0);
            parameters.retain(|(k, _)| *k != "q");
            Clause { media_type, parameters, quality }
        })
        .filter(|clause| !clause.media_type.is_empty())
        .collect();
    // Stable: equal qualities keep the client's order.
    clauses.sort_by(|a, b| b.quality.total_cmp(&a.quality));
    clauses
}

/// Chooses the representation of objects. `tables` says whether the resource has a table form at all.
///
/// A clause for protobuf is passed over as long as another one can be met, and answered in JSON otherwise: every client
/// that asks for it also reads JSON, and decides by the Content-Type of the answer.
pub fn representation(accept: &str) -> Result<Representation, Status> {
    if accept.trim().is_empty() {
        return Ok(Representation::DEFAULT);
    }
    let mut protobuf = false;
    let mut unfit = false;
    for clause in clauses(accept) {
        let encoding = match clause.media_type {
            "application/json" | "*/*" => Encoding::Json,
            "application/yaml" => Encoding::Yaml,
            "application/vnd.kubernetes.protobuf" => {
                protobuf |= !clause.parameters.iter().any(|(k, _)| *k == "as");
                continue;
            }
            _ => continue,
        };
        let parameter = |key: &str| clause.parameters.iter().find(|(k, _)| *k == key).map_or("", |(_, value)| *value);
        let beta = match parameter("v") {
            "v1beta1" => true,
            "v1" | "" => false,
            _ => {
                unfit = true;
                continue;
            }
        };
        let shape = match (parameter("as"), parameter("g")) {
            ("", _) => Shape::Object,
            ("Table", "meta.k8s.io") => Shape::Table { beta },
            ("PartialObjectMetadata", "meta.k8s.io") => Shape::Partial { beta },
            ("PartialObjectMetadataList", "meta.k8s.io") => Shape::PartialList { beta },
            _ => {
                unfit = true;
                continue;
            }
        };
        return Ok(Representation { encoding, shape });
    }
    if protobuf {
        return Ok(Representation::DEFAULT);
    }
    if unfit {
        let message = format!("only the following media types are accepted: {}", BODY_TYPES.join(", "));
        return Err(Status::new(406, "NotAcceptable", message));
    }
    Err(Status::not_acceptable(AVAILABLE))
}

/// Whether a clause asks for a document of the aggregated discovery; the version if so.
pub fn aggregated_discovery(accept: &str) -> Option<&'static str> {
    clauses(accept).into_iter().find_map(|clause| {
        let is = |key: &str, value: &str| clause.parameters.iter().any(|(k, v)| *k == key && *v == value);
        if clause.media_type != "application/json"
            || !is("g", "apidiscovery.k8s.io")
            || !is("as", "APIGroupDiscoveryList")
        {
            return None;
        }
        if is("v", "v2") {
            Some("v2")
        } else if is("v", "v2beta1") {
            Some("v2beta1")
        } else {
            None
        }
    })
}

/// The media type of a header value, without parameters.
pub fn media_type(header: &str) -> &str {
    header.split(';').next().unwrap_or_default().trim()
}

/// How a request body is written.
pub fn body_format(content_type: &str, custom: bool) -> Result<Format, Status> {
    match media_type(content_type) {
        "" | "application/json" => Ok(Format::Json),
        "application/yaml" => Ok(Format::Yaml),
        "application/vnd.kubernetes.protobuf" if !custom => Ok(Format::Protobuf),
        _ if custom => Err(Status::unsupported_media_type(&BODY_TYPES[..2])),
        _ => Err(Status::unsupported_media_type(BODY_TYPES)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_clause_that_can_be_met_wins() {
        let table = Shape::Table { beta: false };
        let rows = [
            ("", Some((Encoding::Json, Shape::Object))),
            ("*/*", Some((Encoding::Json, Shape::Object))),
            ("application/*", None),
            ("text/html, */*", Some((Encoding::Json, Shape::Object))),
            ("application/yaml", Some((Encoding::Yaml, Shape::Object))),
            ("application/json;as=Table;v=v1;g=meta.k8s.io,application/json", Some((Encoding::Json, table))),
            ("application/json;as=Table;v=v9;g=meta.k8s.io,application/json", Some((Encoding::Json, Shape::Object))),
            ("application/json;as=Table;v=v9;g=meta.k8s.io", None),
            ("application/vnd.kubernetes.protobuf,application/json", Some((Encoding::Json, Shape::Object))),
            ("application/vnd.kubernetes.protobuf", Some((Encoding::Json, Shape::Object))),
            ("application/json;q=0.5,application/yaml", Some((Encoding::Yaml, Shape::Object))),
            ("application/json;stream=watch", Some((Encoding::Json, Shape::Object))),
        ];
        for (accept, want) in rows {
            let got = representation(accept).ok().map(|r| (r.encoding, r.shape));
            assert_eq!(got, want, "{accept}");
        }
    }

    #[test]
    fn discovery_versions_are_recognised() {
        let accept = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json";
        assert_eq!(aggregated_discovery(accept), Some("v2"));
        assert_eq!(aggregated_discovery("application/json"), None);
    }
}
