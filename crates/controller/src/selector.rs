//! Label selectors of workloads (`matchLabels` and `matchExpressions`), evaluated on typed labels.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};

/// Whether the selector matches. An empty selector matches everything; an operator that the API does not know matches nothing.
pub fn matches(selector: &LabelSelector, labels: Option<&BTreeMap<String, String>>) -> bool {
    let value = |key: &str| labels.and_then(|l| l.get(key));
    selector.match_labels.iter().flatten().all(|(k, v)| value(k) == Some(v))
        && selector.match_expressions.iter().flatten().all(|r| requirement(r, value(&r.key)))
}

/// Whether the selector has no requirement at all.
pub fn is_empty(selector: &LabelSelector) -> bool {
    selector.match_labels.as_ref().is_none_or(BTreeMap::is_empty)
        && selector.match_expressions.as_ref().is_none_or(Vec::is_empty)
}

/// Which selectors may match given labels, without trying all of them: each is filed under one of the labels that it asks for.
#[derive(Debug, Default)]
pub struct SelectorIndex {
    /// By namespace, label key and label value: names of the selecting objects.
    filed: HashMap<String, HashMap<String, HashMap<String, BTreeSet<String>>>>,
}

impl SelectorIndex {
    /// Files an object under its selector. One without labels is not filed.
    pub fn insert(&mut self, namespace: &str, name: &str, labels: Option<&BTreeMap<String, String>>) {
        let Some((key, value)) = labels.and_then(BTreeMap::first_key_value) else { return };
        let by_value = self.filed.entry(namespace.into()).or_default().entry(key.clone()).or_default();
        by_value.entry(value.clone()).or_default().insert(name.into());
    }

    /// Takes an object out that was filed with this selector.
    pub fn remove(&mut self, namespace: &str, name: &str, labels: Option<&BTreeMap<String, String>>) {
        let Some((key, value)) = labels.and_then(BTreeMap::first_key_value) else { return };
        let Some(by_key) = self.filed.get_mut(namespace) else { return };
        if let Some(by_value) = by_key.get_mut(key) {
            if let Some(names) = by_value.get_mut(value) {
                names.remove(name);
                if names.is_empty() {
                    by_value.remove(value);
                }
            }
            if by_value.is_empty() {
                by_key.remove(key);
            }
        }
        if by_key.is_empty() {
            self.filed.remove(namespace);
        }
    }

    /// The objects whose selectors may match the labels, each once. Costs a look-up for each label.
    pub fn candidates(&self, namespace: &str, labels: Option<&BTreeMap<String, String>>) -> BTreeSet<String> {
        let Some(by_key) = self.filed.get(namespace) else { return BTreeSet::new() };
        let filed = |(key, value): (&String, &String)| by_key.get(key).and_then(|by_value| by_value.get(value));
        labels.into_iter().flatten().filter_map(filed).flatten().cloned().collect()
    }
}

fn requirement(requirement: &LabelSelectorRequirement, value: Option<&String>) -> bool {
    let listed = value.is_some_and(|v| requirement.values.iter().flatten().any(|w| w == v));
    match requirement.operator.as_str() {
        "In" => listed,
        "NotIn" => !listed,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_finds_all_selectors_that_match_and_forgets_those_removed() {
        let labels = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
        };
        let selectors = [
            ("a", labels(&[("app", "x")])),
            ("b", labels(&[("app", "x"), ("tier", "web")])),
            ("c", labels(&[("tier", "web")])),
        ];
        let mut index = SelectorIndex::default();
        for (name, selector) in &selectors {
            index.insert("ns", name, Some(selector));
        }
        index.insert("ns", "empty", Some(&BTreeMap::new()));
        let found = |index: &SelectorIndex, pairs: &[(&str, &str)]| -> Vec<String> {
            index.candidates("ns", Some(&labels(pairs))).into_iter().collect()
        };
        assert_eq!(found(&index, &[("app", "x"), ("tier", "web"), ("z", "z")]), ["a", "b", "c"]);
        assert_eq!(found(&index, &[("app", "y"), ("tier", "web")]), ["c"]);
        assert!(index.candidates("other", Some(&labels(&[("app", "x")]))).is_empty());
        for (name, selector) in &selectors {
            index.remove("ns", name, Some(selector));
        }
        assert!(index.filed.is_empty());
    }

    #[test]
    fn requirements() {
        let selector = |operator: &str| LabelSelector {
            match_labels: None,
            match_expressions: Some(vec![LabelSelectorRequirement {
                key: "tier".into(),
                operator: operator.into(),
                values: Some(vec!["a".into(), "b".into()]),
            }]),
        };
        let with = BTreeMap::from([("tier".to_string(), "a".to_string())]);
        let other = BTreeMap::from([("tier".to_string(), "c".to_string())]);
        for (operator, listed, unlisted, absent) in [
            ("In", true, false, false),
            ("NotIn", false, true, true),
            ("Exists", true, true, false),
            ("DoesNotExist", false, false, true),
            ("Near", false, false, false),
        ] {
            let selector = selector(operator);
            assert_eq!(matches(&selector, Some(&with)), listed, "{operator} listed");
            assert_eq!(matches(&selector, Some(&other)), unlisted, "{operator} unlisted");
            assert_eq!(matches(&selector, None), absent, "{operator} absent");
        }
        assert!(matches(&LabelSelector::default(), None));
    }
}
