//! YAML bodies as trees, with the scalars of YAML 1.1 that the reference implementation knows (`yes`, `on`, `0o17`).

use granit_parser::{Event, Parser, ScalarStyle, Span};
use std::collections::HashMap;

use super::tree::{MAX_DEPTH, Node};

/// A YAML document and the complaints about duplicate keys in it.
#[derive(Debug)]
pub(crate) struct Yaml {
    /// The document with members sorted by name, as the reference implementation orders them on the way to JSON.
    pub(crate) node: Node,
    /// `line N: key "k" already set in map`, in order.
    pub(crate) duplicates: Vec<String>,
}

/// Bound on the nodes of a document after aliases are expanded, against bodies that multiply themselves.
const MAX_NODES: usize = 1_000_000;

/// Reads the first document of a YAML stream.
///
/// # Errors
/// The message of the first syntax error, beginning with `yaml: `.
pub(crate) fn parse_yaml(text: &str) -> Result<Yaml, String> {
    let mut builder =
        Builder { parser: Parser::new_from_str(text), anchors: HashMap::new(), duplicates: Vec::new(), nodes: 0 };
    let node = builder.document()?;
    Ok(Yaml { node, duplicates: builder.duplicates })
}

struct Builder<'a> {
    parser: Parser<'a, granit_parser::StrInput<'a>>,
    anchors: HashMap<usize, Node>,
    duplicates: Vec<String>,
    nodes: usize,
}

impl<'a> Builder<'a> {
    fn next(&mut self) -> Result<(Event<'a>, Span), String> {
        loop {
            return match self.parser.next_event() {
                None => Ok((Event::StreamEnd, Span::empty(granit_parser::Marker::default()))),
                Some(Ok((Event::StreamStart | Event::DocumentStart(..), _))) => continue,
                Some(Ok(event)) => Ok(event),
                Some(Err(error)) => Err(describe(error.marker().line(), &error.info())),
            };
        }
    }

    fn document(&mut self) -> Result<Node, String> {
        let (event, span) = self.next()?;
        match event {
            Event::StreamEnd | Event::DocumentEnd => Ok(Node::Null),
            event => {
                let node = self.node(event, span, 0)?;
                // The rest of the document is read for its errors.
                match self.next()?.0 {
                    Event::DocumentEnd | Event::StreamEnd => Ok(node),
                    _ => Err("yaml: did not find expected <document start>".to_owned()),
                }
            }
        }
    }

    fn node(&mut self, event: Event<'a>, span: Span, depth: usize) -> Result<Node, String> {
        self.nodes += 1;
        if depth > MAX_DEPTH || self.nodes > MAX_NODES {
            return Err("yaml: exceeded max depth of 10000".to_owned());
        }
        let (node, anchor) = match event {
            Event::Scalar(text, style, anchor, tag) => {
                let tag = tag.as_ref().and_then(|tag| tag.core_suffix().map(str::to_owned));
                (scalar(&text, style, tag.as_deref()), anchor)
            }
            Event::SequenceStart(_, anchor, _) => {
                let mut items = Vec::new();
                loop {
                    let (event, span) = self.next()?;
                    if matches!(event, Event::SequenceEnd) {
                        break;
                    }
                    items.push(self.node(event, span, depth + 1)?);
                }
                (Node::Array(items), anchor)
            }
            Event::MappingStart(_, anchor, _) => (self.mapping(depth)?, anchor),
            Event::Alias(id) => {
                let node = self.anchors.get(&id).cloned();
                let node = node.ok_or_else(|| describe(span.start.line(), "anchor contains itself"))?;
                self.nodes += count(&node);
                if self.nodes > MAX_NODES {
                    return Err("yaml: document contains excessive aliasing".to_owned());
                }
                (node, 0)
            }
            _ => return Err(describe(span.start.line(), "did not find expected node content")),
        };
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn mapping(&mut self, depth: usize) -> Result<Node, String> {
        let mut members: Vec<(String, Node)> = Vec::new();
        let mut merged: Vec<(String, Node)> = Vec::new();
        loop {
            let (event, span) = self.next()?;
            if matches!(event, Event::MappingEnd) {
                break;
            }
            let line = span.start.line();
            let plain = matches!(&event, Event::Scalar(_, ScalarStyle::Plain, ..));
            let key = match self.node(event, span, depth + 1)? {
                Node::String(text) => text,
                Node::Number(text) => text,
                Node::Bool(value) => value.to_string(),
                Node::Null => return Err("yaml: unsupported map key of type: %!s(<nil>), key: <nil>".to_owned()),
                Node::Array(_) | Node::Object(_) => {
                    return Err(describe(line, "invalid map key"));
                }
            };
            let (event, span) = self.next()?;
            let value = self.node(event, span, depth + 1)?;
            if key == "<<" && plain {
                merge(value, &mut merged).map_err(|message| describe(line, message))?;
                continue;
            }
            match members.iter_mut().find(|(name, _)| *name == key) {
                Some(member) => {
                    self.duplicates
                        .push(format!("line {line}: key {} already set in map", super::tree::go_quote(&key)));
                    member.1 = value;
                }
                None => members.push((key, value)),
            }
        }
        for (key, value) in merged {
            if !members.iter().any(|(name, _)| *name == key) {
                members.push((key, value));
            }
        }
        members.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(Node::Object(members))
    }
}

fn merge(value: Node, into: &mut Vec<(String, Node)>) -> Result<(), &'static str> {
    match value {
        Node::Object(members) => into.extend(members),
        Node::Array(maps) => {
            for map in maps {
                match map {
                    Node::Object(members) => into.extend(members),
                    _ => return Err("map merge requires map or sequence of maps as the value"),
                }
            }
        }
        _ => return Err("map merge requires map or sequence of maps as the value"),
    }
    Ok(())
}

fn count(node: &Node) -> usize {
    match node {
        Node::Array(items) => 1 + items.iter().map(count).sum::<usize>(),
        Node::Object(members) => 1 + members.iter().map(|(_, value)| count(value)).sum::<usize>(),
        _ => 1,
    }
}

fn describe(line: usize, message: &str) -> String {
    let message = message.trim_end_matches('.');
    // The reference parser reports this one, the most frequent, without a position on the first line.
    if message.contains("mapping values are not allowed in this context") {
        let text = "mapping values are not allowed in this context";
        return if line > 1 { format!("yaml: line {line}: {text}") } else { format!("yaml: {text}") };
    }
    if line > 0 { format!("yaml: line {line}: {message}") } else { format!("yaml: {message}") }
}

fn scalar(text: &str, style: ScalarStyle, tag: Option<&str>) -> Node {
    match tag {
        Some("str" | "binary") => return Node::String(text.to_owned()),
        Some("null") => return Node::Null,
        _ => {}
    }
    if style != ScalarStyle::Plain && tag.is_none() {
        return Node::String(text.to_owned());
    }
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Node::Null,
        "y" | "Y" | "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => return Node::Bool(true),
        "n" | "N" | "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => {
            return Node::Bool(false);
        }
        _ => {}
    }
    match number_text(text) {
        Some(number) => Node::Number(number),
        None => Node::String(text.to_owned()),
    }
}

/// The JSON literal of a YAML 1.1 number, `None` if the text is not one.
fn number_text(text: &str) -> Option<String> {
    let first = text.chars().next()?;
    if !(first.is_ascii_digit() || matches!(first, '+' | '-' | '.')) {
        return None;
    }
    let plain = text.replace('_', "");
    let (sign, digits) = match plain.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", plain.strip_prefix('+').unwrap_or(&plain)),
    };
    let based = |digits: &str, radix: u32| u64::from_str_radix(digits, radix).ok().map(|n| format!("{sign}{n}"));
    if let Some(rest) = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        return based(rest, 16);
    }
    if let Some(rest) = digits.strip_prefix("0b").or_else(|| digits.strip_prefix("0B")) {
        return based(rest, 2);
    }
    if let Some(rest) = digits.strip_prefix("0o").or_else(|| digits.strip_prefix("0O")) {
        return based(rest, 8);
    }
    if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) {
        if digits.len() > 1 && digits.starts_with('0') {
            // A leading zero means octal; with other digits the text is a float.
            return based(digits, 8).or_else(|| digits.parse::<f64>().ok().map(|value| format!("{sign}{value}")));
        }
        return Some(format!("{sign}{digits}"));
    }
    let (mantissa, exponent) = match digits.find(['e', 'E']) {
        Some(at) => (&digits[..at], Some(&digits[at + 1..])),
        None => (digits, None),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let all_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let exponent_ok = exponent.is_none_or(|text| {
        let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
        !digits.is_empty() && all_digits(digits)
    });
    if !exponent_ok || !all_digits(whole) || !all_digits(fraction) || (whole.is_empty() && fraction.is_empty()) {
        return None;
    }
    let value: f64 = format!("{sign}{digits}").parse().ok()?;
    serde_json::Number::from_f64(value).map(|number| {
        // A float without a fraction is written as an integer, as Go's encoder does.
        if value == value.trunc() && value.abs() < 1e15 { format!("{value:.0}") } else { number.to_string() }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(text: &str) -> Value {
        parse_yaml(text).unwrap().node.into_value()
    }

    #[test]
    fn scalars_follow_yaml_1_1() {
        let text = "a: yes\nb: off\nc: 0o17\nd: 017\ne: 0x1f\nf: '1'\ng: 1e3\nh: ~\ni: 1_000\nj: 1.5\nk: .5\nl: 2020-01-01\nm: \
                    -3\nq: 10.0.0.1\no: !!str 5\np: 08\n";
        assert_eq!(
            read(text),
            json!({"a": true, "b": false, "c": 15, "d": 15, "e": 31, "f": "1", "g": 1000, "h": null, "i": 1000, "j": 1.5,
                "k": 0.5, "l": "2020-01-01", "m": -3, "q": "10.0.0.1", "o": "5", "p": 8}),
        );
    }

    #[test]
    fn anchors_and_merge_keys_are_resolved() {
        let text = "base: &b {x: 1, z: 2}\nuse:\n  <<: *b\n  z: 3\nlist: [*b]\n";
        assert_eq!(read(text), json!({"base": {"x": 1, "z": 2}, "use": {"x": 1, "z": 3}, "list": [{"x": 1, "z": 2}]}),);
    }

    #[test]
    fn duplicate_keys_carry_their_line() {
        let yaml = parse_yaml("a: 1\nb:\n  k: '1'\n  k: '2'\n").unwrap();
        assert_eq!(yaml.duplicates, ["line 4: key \"k\" already set in map"]);
        assert_eq!(yaml.node.into_value(), json!({"a": 1, "b": {"k": "2"}}));
    }

    #[test]
    fn errors_are_errors() {
        assert_eq!(parse_yaml("a: b: c").unwrap_err(), "yaml: mapping values are not allowed in this context");
        for text in ["a: [", "*nope", "{a", "a: &x [*x]"] {
            assert!(parse_yaml(text).is_err(), "{text}");
        }
        let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n".to_owned()
            + &('b'..='j')
                .map(|c| {
                    let p = char::from_u32(u32::from(c) - 1).unwrap();
                    format!("{c}: &{c} [*{p},*{p},*{p},*{p},*{p},*{p},*{p},*{p},*{p}]\n")
                })
                .collect::<String>();
        assert!(parse_yaml(&bomb).unwrap_err().contains("excessive aliasing"));
    }
}
