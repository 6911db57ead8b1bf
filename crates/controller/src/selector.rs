//! Label selectors of workloads (`matchLabels` and `matchExpressions`), evaluated on typed labels.

use std::collections::BTreeMap;

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
