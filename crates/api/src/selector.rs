//! Label and field selectors of list, watch and deletecollection requests, and label selectors inside objects.
//!
//! The grammar and the texts of its errors are those of the API machinery: clients show them to people. A field
//! selector names fields by labels that a kind chooses to offer; which ones is data here, too.

use serde_json::Value;
use std::collections::BTreeSet;

use crate::kinds::Kind;
use crate::meta;
use crate::status::{FieldError, Status};

/// A conjunction of requirements on labels; without any it matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSelector {
    requirements: Vec<Requirement>,
}

/// One requirement on one label.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    test: Test,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    Exists,
    DoesNotExist,
    In(BTreeSet<String>),
    /// Also met by objects that lack the label.
    NotIn(BTreeSet<String>),
    GreaterThan(i64),
    LessThan(i64),
}

impl LabelSelector {
    /// Parses the `labelSelector` query parameter, such as `app in (a,b),!tier`.
    ///
    /// The error is a 400 with the text clients know.
    pub fn parse(text: &str) -> Result<LabelSelector, Status> {
        Parser { tokens: tokens(text), next: 0 }.selector().map_err(Status::bad_request)
    }

    /// Reads a LabelSelector object (`matchLabels`, `matchExpressions`). Null matches nothing in the API; that is the
    /// caller's decision, because what "no selector" means differs by field. Malformed parts give `None`.
    pub fn from_object(selector: &Value) -> Option<LabelSelector> {
        let mut requirements = Vec::new();
        if let Some(labels) = selector.get("matchLabels").and_then(Value::as_object) {
            for (key, value) in labels {
                let one = BTreeSet::from([value.as_str()?.to_owned()]);
                requirements.push(Requirement { key: key.clone(), test: Test::In(one) });
            }
        }
        for expression in meta::list(selector, &["matchExpressions"]) {
            let values: BTreeSet<String> = meta::list(expression, &["values"])
                .iter()
                .map(|v| v.as_str().map(str::to_owned))
                .collect::<Option<_>>()?;
            let test = match meta::text(expression, &["operator"]) {
                "In" => Test::In(values),
                "NotIn" => Test::NotIn(values),
                "Exists" => Test::Exists,
                "DoesNotExist" => Test::DoesNotExist,
                _ => return None,
            };
            requirements.push(Requirement { key: meta::text(expression, &["key"]).to_owned(), test });
        }
        Some(LabelSelector { requirements })
    }

    /// A selector from a plain map, as Services and ReplicationControllers have it.
    pub fn from_map(labels: &Value) -> LabelSelector {
        let requirements = labels
            .as_object()
            .into_iter()
            .flatten()
            .map(|(key, value)| Requirement {
                key: key.clone(),
                test: Test::In(BTreeSet::from([value.as_str().unwrap_or_default().to_owned()])),
            })
            .collect();
        LabelSelector { requirements }
    }

    /// Whether there is nothing to require.
    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }

    /// Whether an object's labels meet every requirement.
    pub fn matches(&self, object: &Value) -> bool {
        self.matches_labels(meta::get(object, &["metadata", "labels"]))
    }

    /// Whether a map of labels meets every requirement; anything but an object counts as no labels.
    pub fn matches_labels(&self, labels: &Value) -> bool {
        self.requirements.iter().all(|requirement| {
            let value = labels.get(&requirement.key).and_then(Value::as_str);
            match &requirement.test {
                Test::Exists => value.is_some(),
                Test::DoesNotExist => value.is_none(),
                Test::In(values) => value.is_some_and(|v| values.contains(v)),
                Test::NotIn(values) => value.is_none_or(|v| !values.contains(v)),
                Test::GreaterThan(bound) => value.and_then(|v| v.parse::<i64>().ok()).is_some_and(|n| n > *bound),
                Test::LessThan(bound) => value.and_then(|v| v.parse::<i64>().ok()).is_some_and(|n| n < *bound),
            }
        })
    }

    /// The text form, keys in order, as the Scale object's `status.selector` and tables have it.
    pub fn to_text(&self) -> String {
        let mut sorted: Vec<&Requirement> = self.requirements.iter().collect();
        sorted.sort_by(|a, b| a.key.cmp(&b.key));
        let joined = |values: &BTreeSet<String>| values.iter().map(String::as_str).collect::<Vec<_>>().join(",");
        sorted
            .iter()
            .map(|Requirement { key, test }| match test {
                Test::Exists => key.clone(),
                Test::DoesNotExist => format!("!{key}"),
                Test::In(values) if values.len() == 1 => format!("{key}={}", joined(values)),
                Test::In(values) => format!("{key} in ({})", joined(values)),
                Test::NotIn(values) => format!("{key} notin ({})", joined(values)),
                Test::GreaterThan(bound) => format!("{key}>{bound}"),
                Test::LessThan(bound) => format!("{key}<{bound}"),
            })
            .collect::<Vec<_>>()
            .join(",")
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    /// An operator or bracket.
    Symbol(&'static str),
    /// A word; `in` and `notin` are operators only where one is expected.
    Word(String),
}

impl Token {
    fn text(&self) -> &str {
        match self {
            Token::Symbol(symbol) => symbol,
            Token::Word(word) => word,
        }
    }
}

/// Symbols, longer ones first.
const SYMBOLS: [&str; 8] = ["==", "!=", "=", "!", "(", ")", ",", ">"];
const LESS: &str = "<";

fn tokens(text: &str) -> Vec<Token> {
    let mut found = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        if let Some(symbol) = SYMBOLS.iter().chain([&LESS]).find(|s| rest.starts_with(**s)) {
            found.push(Token::Symbol(symbol));
            rest = &rest[symbol.len()..];
        } else {
            let end = rest.find([' ', '\t', '\r', '\n', '=', '!', '(', ')', ',', '>', '<']).unwrap_or(rest.len());
            // A word cannot be empty here unless the character is white space of another alphabet.
            let end = if end == 0 { rest.chars().next().map_or(rest.len(), char::len_utf8) } else { end };
            found.push(Token::Word(rest[..end].to_owned()));
            rest = &rest[end..];
        }
        rest = rest.trim_start_matches([' ', '\t', '\r', '\n']);
    }
    found
}

struct Parser {
    tokens: Vec<Token>,
    next: usize,
}

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.next)
    }

    fn peek_is(&self, symbol: &str) -> bool {
        matches!(self.peek(), Some(Token::Symbol(s)) if *s == symbol)
    }

    fn peek_word(&self) -> bool {
        matches!(self.peek(), Some(Token::Word(_)))
    }

    fn take(&mut self) -> Option<Token> {
        let token = self.tokens.get(self.next).cloned();
        self.next += 1;
        token
    }

    fn selector(mut self) -> Result<LabelSelector, String> {
        let mut requirements = Vec::new();
        loop {
            match self.peek() {
                None => break,
                Some(Token::Word(_)) | Some(Token::Symbol("!")) => {}
                Some(other) => {
                    return Err(format!("found '{}', expected: !, identifier, or 'end of string'", other.text()));
                }
            }
            let requirement = self.requirement().map_err(|e| format!("unable to parse requirement: {e}"))?;
            requirements.push(requirement);
            match self.take() {
                None => break,
                Some(Token::Symbol(",")) => {
                    if !self.peek_word() && !self.peek_is("!") {
                        return Err(format!("found '{}', expected: identifier after ','", shown(self.peek())));
                    }
                }
                Some(other) => return Err(format!("found '{}', expected: ',' or 'end of string'", other.text())),
            }
        }
        Ok(LabelSelector { requirements })
    }

    fn requirement(&mut self) -> Result<Requirement, String> {
        let negated = self.peek_is("!");
        if negated {
            self.take();
        }
        let key = match self.take() {
            Some(Token::Word(word)) => word,
            other => return Err(format!("found '{}', expected: identifier", shown(other.as_ref()))),
        };
        let faults: Vec<String> = meta::qualified_name(&key)
            .into_iter()
            .map(|fault| FieldError::invalid("<nil>", key.as_str(), fault).to_string())
            .collect();
        if !faults.is_empty() {
            return Err(one_or_many(faults));
        }
        if negated {
            return Ok(Requirement { key, test: Test::DoesNotExist });
        }
        if self.peek().is_none() || self.peek_is(",") {
            return Ok(Requirement { key, test: Test::Exists });
        }
        let operator = self.take();
        let operator = shown(operator.as_ref());
        let values = match operator.as_str() {
            "in" | "notin" => self.values()?,
            "=" | "==" | "!=" | ">" | "<" => self.exact_value()?,
            other => return Err(format!("found '{other}', expected: in, notin, =, ==, !=, gt, lt")),
        };
        if matches!(operator.as_str(), ">" | "<") {
            let value = values.first().map(String::as_str).unwrap_or_default();
            let Ok(bound) = value.parse::<i64>() else {
                let why = "for 'Gt', 'Lt' operators, the value must be an integer";
                return Err(FieldError::invalid("values[0]", value, why).to_string());
            };
            let test = if operator == ">" { Test::GreaterThan(bound) } else { Test::LessThan(bound) };
            return Ok(Requirement { key, test });
        }
        let faults: Vec<String> = values
            .iter()
            .enumerate()
            .flat_map(|(i, value)| {
                let field = format!("values[{i}][{key}]");
                meta::label_value(value)
                    .into_iter()
                    .map(move |fault| FieldError::invalid(field.clone(), value.as_str(), fault).to_string())
            })
            .collect();
        if !faults.is_empty() {
            return Err(one_or_many(faults));
        }
        let test = if matches!(operator.as_str(), "notin" | "!=") { Test::NotIn(values) } else { Test::In(values) };
        Ok(Requirement { key, test })
    }

    fn exact_value(&mut self) -> Result<BTreeSet<String>, String> {
        if self.peek().is_none() || self.peek_is(",") {
            return Ok(BTreeSet::from([String::new()]));
        }
        match self.take() {
            Some(Token::Word(word)) => Ok(BTreeSet::from([word])),
            other => Err(format!("found '{}', expected: identifier", shown(other.as_ref()))),
        }
    }

    fn values(&mut self) -> Result<BTreeSet<String>, String> {
        let open = self.take();
        if open != Some(Token::Symbol("(")) {
            return Err(format!("found '{}' expected: '('", shown(open.as_ref())));
        }
        let mut values = BTreeSet::new();
        if self.peek_is(")") {
            self.take();
            values.insert(String::new());
            return Ok(values);
        }
        if !self.peek_word() && !self.peek_is(",") {
            return Err(format!("found '{}', expected: ',', ')' or identifier", shown(self.peek())));
        }
        loop {
            match self.take() {
                Some(Token::Word(word)) => {
                    values.insert(word);
                    match self.peek() {
                        Some(Token::Symbol(",")) => {}
                        Some(Token::Symbol(")")) => break,
                        other => return Err(format!("found '{}', expected: ',' or ')'", shown(other))),
                    }
                }
                Some(Token::Symbol(",")) => {
                    if values.is_empty() || self.peek_is(",") {
                        values.insert(String::new());
                    }
                    if self.peek_is(")") {
                        values.insert(String::new());
                        break;
                    }
                }
                other => return Err(format!("found '{}', expected: ',', or identifier", shown(other.as_ref()))),
            }
        }
        self.take();
        Ok(values)
    }
}

fn shown(token: Option<&Token>) -> String {
    token.map_or_else(String::new, |token| token.text().to_owned())
}

fn one_or_many(faults: Vec<String>) -> String {
    match faults.as_slice() {
        [one] => one.clone(),
        many => format!("[{}]", many.join(", ")),
    }
}

/// A conjunction of comparisons of fields with texts; without any it matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSelector {
    terms: Vec<FieldTerm>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct FieldTerm {
    field: String,
    equal: bool,
    value: String,
}

impl FieldSelector {
    /// Parses the `fieldSelector` query parameter for a kind; `custom` holds further field paths of a custom kind.
    ///
    /// The error is a 400: unreadable, or a field this kind does not offer.
    pub fn parse(text: &str, kind: &Kind, custom: &[String]) -> Result<FieldSelector, Status> {
        let mut terms = Vec::new();
        for part in split_terms(text) {
            if part.is_empty() {
                continue;
            }
            let term = parse_term(&part)
                .ok_or_else(|| Status::bad_request(format!("invalid selector: '{text}'; can't understand '{part}'")))?;
            terms.push(term);
        }
        for term in &mut terms {
            term.field = supported_field(kind, &term.field, custom)?;
        }
        Ok(FieldSelector { terms })
    }

    /// Whether there is nothing to require.
    pub fn is_empty(&self) -> bool {
        self.terms.is_empty()
    }

    /// The name, if objects must have exactly one.
    pub fn required_name(&self) -> Option<&str> {
        self.required("metadata.name")
    }

    /// The value a field must have, if the selector fixes it.
    pub fn required(&self, field: &str) -> Option<&str> {
        self.terms.iter().find(|t| t.equal && t.field == field).map(|t| t.value.as_str())
    }

    /// Whether an object of this kind meets every comparison. Missing values compare as the empty text.
    pub fn matches(&self, kind: &Kind, object: &Value) -> bool {
        self.terms.iter().all(|term| (field_value(kind, object, &term.field) == term.value) == term.equal)
    }
}

/// Splits at commas that are not escaped; escapes stay in the parts.
fn split_terms(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut escaped = false;
    for c in text.chars() {
        if c == ',' && !escaped {
            parts.push(String::new());
            continue;
        }
        escaped = c == '\\' && !escaped;
        if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    parts
}

fn parse_term(part: &str) -> Option<FieldTerm> {
    let mut escaped = false;
    for (i, c) in part.char_indices() {
        if escaped {
            escaped = false;
            continue;
        }
        let rest = &part[i..];
        let (equal, operator) = match c {
            '\\' => {
                escaped = true;
                continue;
            }
            '!' if rest.starts_with("!=") => (false, "!="),
            '=' if rest.starts_with("==") => (true, "=="),
            '=' => (true, "="),
            _ => continue,
        };
        let value = unescape(&rest[operator.len()..])?;
        return Some(FieldTerm { field: part[..i].to_owned(), equal, value });
    }
    None
}

/// Undoes `\\`, `\,` and `\=`; any other escape, and a bare operator, is a mistake.
fn unescape(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => out.push(chars.next().filter(|c| matches!(c, '\\' | ',' | '='))?),
            ',' | '=' => return None,
            c => out.push(c),
        }
    }
    Some(out)
}

const POD_FIELDS: &[&str] = &[
    "spec.nodeName",
    "spec.restartPolicy",
    "spec.schedulerName",
    "spec.serviceAccountName",
    "spec.hostNetwork",
    "status.phase",
    "status.podIP",
    "status.podIPs",
    "status.nominatedNodeName",
];

const EVENT_FIELDS: &[&str] = &[
    "involvedObject.kind",
    "involvedObject.namespace",
    "involvedObject.name",
    "involvedObject.uid",
    "involvedObject.apiVersion",
    "involvedObject.resourceVersion",
    "involvedObject.fieldPath",
    "reason",
    "reportingComponent",
    "source",
    "type",
];

/// Fields that built-in kinds offer besides name and namespace.
fn extra_fields(kind: &Kind) -> Option<&'static [&'static str]> {
    Some(match (kind.group.as_str(), kind.kind.as_str()) {
        ("", "Pod") => POD_FIELDS,
        ("", "Node") => &["spec.unschedulable"],
        ("", "Namespace") => &["status.phase"],
        ("", "Service") => &["spec.clusterIP", "spec.type"],
        ("", "Secret") => &["type"],
        ("", "ReplicationController") => &["status.replicas"],
        ("", "Event") | ("events.k8s.io", "Event") => EVENT_FIELDS,
        ("batch", "Job") => &["status.successful"],
        _ => return None,
    })
}

/// The field a selector's label stands for, or the 400 that says it is not offered.
fn supported_field(kind: &Kind, label: &str, custom: &[String]) -> Result<String, Status> {
    if matches!(label, "metadata.name" | "metadata.namespace") || custom.iter().any(|field| field == label) {
        return Ok(label.to_owned());
    }
    let unknown = || Status::bad_request(format!("field label not supported: {label}"));
    if kind.custom {
        return Err(unknown());
    }
    let Some(fields) = extra_fields(kind) else {
        return Err(Status::bad_request(format!(
            "\"{label}\" is not a known field selector: only \"metadata.name\", \"metadata.namespace\""
        )));
    };
    if kind.is("", "Pod") && label == "spec.host" {
        return Ok("spec.nodeName".to_owned());
    }
    if kind.is("events.k8s.io", "Event") {
        let core = match label {
            "reason" | "type" => label.to_owned(),
            "reportingController" => "reportingComponent".to_owned(),
            "deprecatedSource.component" => "source".to_owned(),
            other => match other.strip_prefix("regarding.") {
                Some(rest) => format!("involvedObject.{rest}"),
                None => return Err(unknown()),
            },
        };
        return if fields.contains(&core.as_str()) { Ok(core) } else { Err(unknown()) };
    }
    if fields.contains(&label) { Ok(label.to_owned()) } else { Err(unknown()) }
}

/// The text a field compares as.
fn field_value(kind: &Kind, object: &Value, field: &str) -> String {
    let flag = |path: &[&str]| meta::get(object, path).as_bool().unwrap_or(false).to_string();
    match field {
        "spec.unschedulable" if kind.is("", "Node") => flag(&["spec", "unschedulable"]),
        "spec.hostNetwork" if kind.is("", "Pod") => flag(&["spec", "hostNetwork"]),
        "status.podIPs" if kind.is("", "Pod") => meta::text(object, &["status", "podIP"]).to_owned(),
        "status.replicas" if kind.is("", "ReplicationController") => {
            meta::get(object, &["status", "replicas"]).as_i64().unwrap_or(0).to_string()
        }
        "status.successful" if kind.is("batch", "Job") => {
            meta::get(object, &["status", "succeeded"]).as_i64().unwrap_or(0).to_string()
        }
        "source" if kind.kind == "Event" && !kind.custom => {
            let component = meta::text(object, &["source", "component"]);
            if component.is_empty() { meta::text(object, &["reportingComponent"]) } else { component }.to_owned()
        }
        path => {
            let keys: Vec<&str> = path.trim_start_matches('.').split('.').collect();
            match meta::get(object, &keys) {
                Value::String(text) => text.clone(),
                Value::Bool(flag) => flag.to_string(),
                Value::Number(number) => number.to_string(),
                Value::Null | Value::Array(_) | Value::Object(_) => String::new(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::Registry;
    use serde_json::json;

    #[test]
    fn label_selectors_match_as_documented() {
        let object = json!({"metadata": {"labels": {"app": "web", "n": "3", "empty": ""}}});
        let rows = [
            ("equality", "app=web", true),
            ("double_equals", "app==db", false),
            ("inequality_takes_objects_without_the_key", "tier!=x", true),
            ("inequality", "app!=web", false),
            ("set", "app in (web,db)", true),
            ("set_without_blanks", "app in(db,web)", true),
            ("outside_a_set", "app notin (web)", false),
            ("outside_a_set_takes_objects_without_the_key", "tier notin (web)", true),
            ("presence", "app", true),
            ("absence", "!tier", true),
            ("and", "app=web,!tier,n>2", true),
            ("greater", "n>3", false),
            ("less", "n<4", true),
            ("less_needs_a_number", "app<4", false),
            ("nothing_matches_everything", "", true),
            ("an_empty_set_is_the_empty_value", "empty in ()", true),
            ("an_empty_value", "empty=", true),
            ("in_may_be_a_key", "in!=x", true),
            ("notin_may_be_a_value", "app=notin", false),
        ];
        for (name, text, want) in rows {
            assert_eq!(LabelSelector::parse(text).expect(name).matches(&object), want, "{name}");
        }
    }

    #[test]
    fn label_selector_errors_have_the_known_texts() {
        let rows = [
            ("a===b", "unable to parse requirement: found '=', expected: identifier"),
            ("a in", "unable to parse requirement: found '' expected: '('"),
            ("a in x", "unable to parse requirement: found 'x' expected: '('"),
            ("!", "unable to parse requirement: found '', expected: identifier"),
            ("a=b c", "found 'c', expected: ',' or 'end of string'"),
            (",a", "found ',', expected: !, identifier, or 'end of string'"),
            ("a,", "found '', expected: identifier after ','"),
            ("a b=c", "unable to parse requirement: found 'b', expected: in, notin, =, ==, !=, gt, lt"),
            (
                "n>x",
                "unable to parse requirement: values[0]: Invalid value: \"x\": for 'Gt', 'Lt' operators, the value must \
                 be an integer",
            ),
        ];
        for (text, message) in rows {
            let error = LabelSelector::parse(text).expect_err(text);
            assert_eq!((error.code, error.message.as_str()), (400, message), "{text}");
        }
        for (text, part) in [
            ("a=b/c", "unable to parse requirement: values[0][a]: Invalid value: \"b/c\": a valid label must be"),
            ("-a", "unable to parse requirement: <nil>: Invalid value: \"-a\": name part must consist of"),
        ] {
            let error = LabelSelector::parse(text).expect_err(text);
            assert!(error.message.starts_with(part), "{}", error.message);
        }
    }

    #[test]
    fn selector_objects_match_like_their_text() {
        let selector = LabelSelector::from_object(&json!({
            "matchLabels": {"app": "web"},
            "matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["x", "y"]}, {"key": "n", "operator": "Exists"}],
        }))
        .expect("well formed");
        assert!(selector.matches_labels(&json!({"app": "web", "n": ""})));
        assert!(!selector.matches_labels(&json!({"app": "web", "n": "", "tier": "x"})));
        assert_eq!(selector.to_text(), "app=web,n,tier notin (x,y)");
        assert_eq!(LabelSelector::from_object(&json!({"matchExpressions": [{"operator": "Like"}]})), None);
    }

    #[test]
    fn field_selectors_compare_what_a_kind_offers() {
        let registry = Registry::builtin();
        let pod = registry.by_gvr("", "v1", "pods").expect("built in");
        let event = registry.by_gvr("events.k8s.io", "v1", "events").expect("built in");
        let config = registry.by_gvr("", "v1", "configmaps").expect("built in");
        let object = json!({"metadata": {"name": "a"}, "spec": {"nodeName": "n1"}, "involvedObject": {"name": "p"}});
        let rows = [
            ("by_name", pod, "metadata.name=a", true),
            ("by_other_name", pod, "metadata.name!=a", false),
            ("by_node", pod, "spec.nodeName==n1,metadata.name=a", true),
            ("by_the_old_alias", pod, "spec.host=n1", true),
            ("a_missing_value_is_empty", pod, "status.phase=", true),
            ("host_network_defaults_to_false", pod, "spec.hostNetwork=false", true),
            ("a_newer_event_name", event, "regarding.name=p", true),
        ];
        for (name, kind, text, want) in rows {
            let selector = FieldSelector::parse(text, kind, &[]).expect(name);
            assert_eq!(selector.matches(kind, &object), want, "{name}");
        }
        let error = |kind: &Kind, text: &str| FieldSelector::parse(text, kind, &[]).expect_err(text).message;
        assert_eq!(
            error(pod, "metadata.name>a"),
            "invalid selector: 'metadata.name>a'; can't understand 'metadata.name>a'"
        );
        assert_eq!(error(pod, "spec.x=1"), "field label not supported: spec.x");
        assert_eq!(
            error(config, "data=1"),
            "\"data\" is not a known field selector: only \"metadata.name\", \"metadata.namespace\""
        );
        let one = FieldSelector::parse("metadata.name=a", pod, &[]).expect("valid");
        assert_eq!(one.required_name(), Some("a"));
    }
}
