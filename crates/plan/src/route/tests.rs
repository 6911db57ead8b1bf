//! Tables for hosts, paths, precedence, rewrites, redirects and conflicts.

use std::sync::Arc;

use k8s_openapi::api::networking::v1::{Ingress, IngressClass};
use serde_json::{Value, json};

use super::*;

fn class(name: &str, controller: &str) -> Arc<IngressClass> {
    Arc::new(
        serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"controller": controller}})).expect("class"),
    )
}

fn classes() -> Vec<Arc<IngressClass>> {
    vec![class("nginx", "k8s.io/ingress-nginx"), class("portolan", "portolan.dev/ingress"), class("other", "acme.io/x")]
}

/// An Ingress `shop/NAME` of a class: rules as (host, path, type, service), annotations without their prefix.
fn ingress(name: &str, class: &str, rules: &[(&str, &str, &str, &str)], annotations: &[(&str, &str)]) -> Ingress {
    let rules: Vec<Value> = rules
        .iter()
        .map(|(host, path, path_type, service)| {
            let mut rule = json!({"http": {"paths": [{
                "path": path, "pathType": path_type,
                "backend": {"service": {"name": service, "port": {"number": 80}}}}]}});
            if !host.is_empty() {
                rule["host"] = json!(host);
            }
            rule
        })
        .collect();
    let annotations: BTreeMap<String, &str> =
        annotations.iter().map(|(k, v)| (format!("{}{k}", annotations::PREFIX), *v)).collect();
    serde_json::from_value(json!({
        "metadata": {"namespace": "shop", "name": name, "uid": name, "annotations": annotations},
        "spec": {"ingressClassName": class, "rules": rules}}))
    .expect("an Ingress")
}

fn with(mut ingress: Ingress, patch: Value) -> Ingress {
    let mut value = serde_json::to_value(&ingress).expect("serializes");
    merge(&mut value, &patch);
    ingress = serde_json::from_value(value).expect("an Ingress");
    ingress
}

fn merge(into: &mut Value, patch: &Value) {
    match (into, patch) {
        (Value::Object(into), Value::Object(patch)) => {
            for (key, value) in patch {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, patch) => *into = patch.clone(),
    }
}

fn build(ingresses: Vec<Ingress>) -> Compiled {
    let input =
        Input { ingresses: ingresses.into_iter().map(Arc::new).collect(), classes: classes(), ..Default::default() };
    compile(&input, &Options::default())
}

/// What happens to a plain request, in one line: the Service and path, or status and location.
fn outcome(table: &RouteTable, url: &str) -> String {
    let (https, rest) = match url.strip_prefix("https://") {
        Some(rest) => (true, rest),
        None => (false, url.strip_prefix("http://").unwrap_or(url)),
    };
    let (authority, target) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
    let head = Head { https, port: if https { 443 } else { 80 }, authority: Some(authority), target };
    // Also holds the plain order against the lookups.
    let _ = explain(table, &head);
    match decide(table, &head) {
        Decision::Refuse { refusal, .. } => refusal.status().to_string(),
        Decision::Redirect { status, location, .. } => format!("{status} {location}"),
        Decision::Forward(forward) => {
            format!("{} {}", table.upstreams[forward.rule.upstream.0].service.name, forward.target)
        }
    }
}

fn check(table: &RouteTable, rows: &[(&str, &str)]) {
    for (url, expected) in rows {
        assert_eq!(outcome(table, url), *expected, "{url}");
    }
}

fn reasons(compiled: &Compiled) -> Vec<(String, String)> {
    compiled.findings.iter().map(|f| (f.origin.name.clone(), f.reason.clone())).collect()
}

#[test]
fn hosts_are_chosen_by_precedence_without_fall_through() {
    for class in ["nginx", "portolan"] {
        let built = build(vec![ingress(
            "a",
            class,
            &[
                ("*.foo.com", "/", "Prefix", "wildcard"),
                ("foo.bar.com", "/", "Prefix", "exact"),
                ("x.foo.com", "/only", "Prefix", "narrow"),
                ("", "/any", "Prefix", "all"),
            ],
            &[],
        )]);
        check(
            &built.table,
            &[
                ("foo.bar.com/", "exact /"),
                ("FOO.bar.com.:8080/a", "exact /a"),
                ("bar.foo.com/", "wildcard /"),
                ("baz.bar.foo.com/", "404"),
                ("foo.com/", "404"),
                (".foo.com/", "404"),
                ("subdomain.bar.com/", "404"),
                ("subdomain.bar.com/any/x", "all /any/x"),
                ("x.foo.com/only", "narrow /only"),
                // The exact host has no such path; neither the wildcard nor the rules for all hosts are tried.
                ("x.foo.com/", "404"),
                ("x.foo.com/any", "404"),
                ("a b/", "400"),
            ],
        );
        let head = Head { https: false, port: 80, authority: None, target: "/any" };
        assert!(
            matches!(decide(&built.table, &head), Decision::Forward(_)),
            "HTTP/1.0 without Host: the catch-all host"
        );
    }
}

#[test]
fn paths_match_as_the_ingress_api_says() {
    for class in ["nginx", "portolan"] {
        let built = build(vec![ingress(
            "a",
            class,
            &[
                ("exact", "/foo", "Exact", "foo-exact"),
                ("prefix", "/foo", "Prefix", "foo-prefix"),
                ("slash", "/aaa/bbb/", "Prefix", "slash"),
                ("long", "/aaa/bbb", "Prefix", "bbb"),
                ("long", "/aaa", "Prefix", "aaa"),
                ("long", "/", "Prefix", "root"),
                ("mixed", "/foo", "Prefix", "foo-prefix"),
                ("mixed", "/foo", "Exact", "foo-exact"),
                ("impl", "/foo", "ImplementationSpecific", "impl"),
                ("empty", "", "ImplementationSpecific", "impl"),
            ],
            &[],
        )]);
        check(
            &built.table,
            &[
                ("exact/foo", "foo-exact /foo"),
                ("exact/foo?x=/", "foo-exact /foo?x=/"),
                ("exact/foo/", "404"),
                ("exact/FOO", "404"),
                ("exact/bar", "404"),
                ("prefix/foo", "foo-prefix /foo"),
                ("prefix/foo/", "foo-prefix /foo/"),
                ("prefix/FOO", "404"),
                ("prefix/foobar", "404"),
                ("slash/aaa/bbb/", "slash /aaa/bbb/"),
                ("slash/aaa/bbb/ccc", "slash /aaa/bbb/ccc"),
                ("slash/aaa/bbbxyz", "404"),
                ("long/aaa/bbb", "bbb /aaa/bbb"),
                ("long/aaa/bbb/ccc", "bbb /aaa/bbb/ccc"),
                ("long/aaa/bbbxyz", "aaa /aaa/bbbxyz"),
                ("long/aaa/ccc", "aaa /aaa/ccc"),
                ("long/aaaccc", "root /aaaccc"),
                ("long/", "root /"),
                ("mixed/foo", "foo-exact /foo"),
                ("mixed/foo/x", "foo-prefix /foo/x"),
                ("impl/foo/x", "impl /foo/x"),
                ("impl/foox", "404"),
                ("empty/anything", "impl /anything"),
                // Matched in normal form, forwarded as sent.
                ("prefix//foo", "foo-prefix //foo"),
                ("prefix/x/../foo/a%20b?", "foo-prefix /x/../foo/a%20b?"),
                ("prefix/../foo", "400"),
                ("prefix/%zz", "400"),
                ("prefix/foo#frag", "foo-prefix /foo"),
            ],
        );
    }
}

#[test]
fn a_missing_final_slash_redirects_in_ingress_nginx_only() {
    let rules = [
        ("h", "/aaa/", "Prefix", "prefix"),
        ("h", "/bbb/", "Exact", "exact"),
        ("h", "/ccc/", "Prefix", "slash"),
        ("h", "/ccc", "Prefix", "bare"),
        ("h", "/", "Prefix", "root"),
    ];
    check(
        &build(vec![ingress("a", "nginx", &rules, &[])]).table,
        &[
            ("h/aaa?q=1", "301 http://h/aaa/?q=1"),
            ("https://h:8443/bbb", "301 https://h:8443/bbb/"),
            ("h/bbb/", "exact /bbb/"),
            ("h/ccc", "bare /ccc"),
            ("h/ccc/x", "slash /ccc/x"),
        ],
    );
    let strict = build(vec![ingress("a", "portolan", &rules, &[])]);
    check(
        &strict.table,
        &[("h/aaa", "prefix /aaa"), ("h/bbb", "root /bbb"), ("h/ccc", "slash /ccc"), ("h/ccc/x", "slash /ccc/x")],
    );
    assert_eq!(reasons(&strict), [("a".to_string(), "PathConflict".to_string())], "/ccc and /ccc/ are one prefix");
}

#[test]
fn encoded_separators_are_refused_in_strict_when_they_choose_another_rule() {
    let rules = [("h", "/admin", "Prefix", "admin"), ("h", "/", "Prefix", "root")];
    check(
        &build(vec![ingress("a", "nginx", &rules, &[])]).table,
        &[("h/admin%2Fx", "admin /admin%2Fx"), ("h/x%2F..%2Fadmin", "admin /x%2F..%2Fadmin")],
    );
    check(
        &build(vec![ingress("a", "portolan", &rules, &[])]).table,
        &[("h/admin%2Fx", "400"), ("h/x/%2e%2e/admin", "400"), ("h/a%2Fb", "root /a%2Fb")],
    );
}

#[test]
fn rewrites_replace_the_whole_path() {
    let built = build(vec![
        ingress(
            "groups",
            "nginx",
            &[("groups", "/api/v1(/|$)(.*)", "ImplementationSpecific", "users")],
            &[("use-regex", "true"), ("rewrite-target", "/$2")],
        ),
        ingress("plain", "nginx", &[("plain", "/users", "Prefix", "users")], &[("rewrite-target", "/")]),
        ingress("same", "nginx", &[("same", "/", "Prefix", "admin")], &[("rewrite-target", "/")]),
        ingress(
            "bare",
            "nginx",
            &[("bare", "/a/(.*)", "ImplementationSpecific", "svc")],
            &[("rewrite-target", "x$1$3")],
        ),
    ]);
    check(
        &built.table,
        &[
            ("groups/api/v1/users", "users /users"),
            ("groups/api/v1", "users /"),
            ("groups/api/v1/", "users /"),
            ("groups/API/V1/users?a=%20b", "users /users?a=%20b"),
            ("groups/api/v1/a%20b/c%3Fd", "users /a%20b/c%3Fd"),
            ("groups/api/v12", "404"),
            ("plain/users", "users /"),
            ("plain/users/7?x", "users /?x"),
            // The host is in regex mode: prefixes of text match, in any case.
            ("plain/USERSX", "users /"),
            ("same/deep/path", "admin /deep/path"),
            ("bare/a/b", "svc /xb"),
        ],
    );
    assert_eq!(reasons(&built), []);
    let strict = build(vec![
        ingress("s", "portolan", &[("s", "/v1/(.*)", "ImplementationSpecific", "svc")], &[("rewrite-target", "/$1")]),
        ingress("p", "portolan", &[("s", "/v1/Exact", "Exact", "other")], &[]),
    ]);
    check(
        &strict.table,
        &[("s/v1/x/y", "svc /x/y"), ("s/V1/x", "404"), ("s/v1/Exact", "other /v1/Exact"), ("s/v1/exact", "svc /exact")],
    );
}

#[test]
fn one_regex_ingress_changes_all_paths_of_its_host() {
    let built = build(vec![
        ingress("regex", "nginx", &[("h", "/b.r$", "ImplementationSpecific", "regex")], &[("use-regex", "true")]),
        ingress("literal", "nginx", &[("h", "/ba", "Exact", "ba"), ("h", "/banana/x", "Prefix", "long")], &[]),
        ingress("elsewhere", "nginx", &[("i", "/ba", "Exact", "ba")], &[]),
    ]);
    check(
        &built.table,
        &[
            ("h/ba", "ba /ba"),
            // Exact lost its meaning.
            ("h/banana", "ba /banana"),
            ("h/BANANA/xyz", "long /BANANA/xyz"),
            ("h/bar", "regex /bar"),
            ("i/banana", "404"),
        ],
    );
    assert_eq!(reasons(&built), [("literal".to_string(), "CompatQuirk".to_string())]);
    assert!(built.findings[0].message.contains("/ba, /banana/x"));
}

#[test]
fn an_unusable_expression_loses_its_own_path_only() {
    let built = build(vec![
        ingress(
            "a",
            "nginx",
            &[("h", "/a(?=b)", "ImplementationSpecific", "x"), ("h", "/ok(.*)", "ImplementationSpecific", "ok")],
            &[("use-regex", "true")],
        ),
        ingress("b", "nginx", &[("h", "/(a{1000}){1000}", "ImplementationSpecific", "big")], &[]),
    ]);
    check(&built.table, &[("h/okay", "ok /okay"), ("h/ab", "404")]);
    assert!(built.findings.iter().any(|f| f.reason == "Rejected" && f.message.contains("look-around")));
    assert!(built.findings.iter().any(|f| f.origin.name == "b" && f.reason == "Rejected"));
}

#[test]
fn redirects() {
    let tls = json!({"spec": {"tls": [{"hosts": ["tls", "keep", "off", "strict"]}]}});
    let rule = |host: &'static str| [(host, "/", "Prefix", "svc")];
    let built = build(vec![
        with(ingress("tls", "nginx", &rule("tls"), &[]), tls.clone()),
        with(ingress("keep", "nginx", &rule("keep"), &[("preserve-trailing-slash", "true")]), tls.clone()),
        with(ingress("off", "nginx", &rule("off"), &[("ssl-redirect", "false")]), tls.clone()),
        with(ingress("strict", "portolan", &rule("strict"), &[]), tls),
        ingress("acme", "nginx", &[("tls", "/.well-known/acme-challenge/x", "ImplementationSpecific", "solver")], &[]),
        ingress("force", "nginx", &rule("force"), &[("force-ssl-redirect", "true")]),
        ingress("root", "nginx", &rule("root"), &[("app-root", "/app")]),
        ingress("moved", "nginx", &rule("moved"), &[("permanent-redirect", "https://new.example/x")]),
        ingress(
            "here",
            "nginx",
            &rule("here"),
            &[("permanent-redirect", "/there"), ("permanent-redirect-code", "308")],
        ),
        ingress("www", "nginx", &rule("www.site"), &[("from-to-www-redirect", "true")]),
        ingress("alias", "nginx", &rule("real"), &[("server-alias", "Other, tls")]),
    ]);
    check(
        &built.table,
        &[
            ("tls:80/foo/", "308 https://tls/foo"),
            ("tls/", "308 https://tls"),
            ("tls/foo/?a=1", "308 https://tls/foo/?a=1"),
            ("https://tls/foo/", "svc /foo/"),
            ("tls/.well-known/acme-challenge/x", "solver /.well-known/acme-challenge/x"),
            ("keep/foo/", "308 https://keep/foo/"),
            ("strict/foo/", "308 https://strict/foo/"),
            ("off/foo", "svc /foo"),
            ("force/x", "308 https://force/x"),
            ("root/", "302 http://root/app"),
            ("https://root:8443/?x", "302 https://root:8443/app"),
            ("root/other", "svc /other"),
            ("moved/any?q", "301 https://new.example/x"),
            ("here:81/any", "308 http://here:81/there"),
            ("site/a/?b", "308 http://www.site/a?b"),
            ("www.site/a", "svc /a"),
            ("other/a", "svc /a"),
            ("real/a", "svc /a"),
        ],
    );
    assert_eq!(reasons(&built), [("alias".to_string(), "HostOptionConflict".to_string())], "a real host is no alias");
}

#[test]
fn the_default_backend_is_found_in_order() {
    let catch_all = |name: &str, created: &str| {
        with(
            ingress(name, "nginx", &[], &[("permanent-redirect", "https://ignored/")]),
            json!({"metadata": {"creationTimestamp": created},
                   "spec": {"rules": null, "defaultBackend": {"service": {"name": name, "port": {"name": "http"}}}}}),
        )
    };
    let built = build(vec![
        catch_all("young", "2026-01-02T00:00:00Z"),
        catch_all("old", "2026-01-01T00:00:00Z"),
        ingress("plain", "nginx", &[("plain", "/a", "Prefix", "svc")], &[]),
        with(
            ingress("own", "nginx", &[("own", "/a", "Prefix", "svc")], &[]),
            json!({"spec": {"defaultBackend": {"service": {"name": "own", "port": {"number": 1}}}}}),
        ),
        with(
            ingress("nohttp", "nginx", &[], &[]),
            json!({"spec": {"rules": [{"host": "nohttp"}], "defaultBackend": {"service": {"name": "nohttp", "port": {"number": 1}}}}}),
        ),
        with(
            ingress("resource", "nginx", &[], &[]),
            json!({"spec": {"rules": [{"host": "resource", "http": {"paths": [{"path": "/", "pathType": "Prefix",
                "backend": {"resource": {"kind": "Bucket", "name": "b"}}}]}}]}}),
        ),
    ]);
    check(
        &built.table,
        &[
            ("unknown/x", "old /x"),
            ("plain/b", "404"),
            ("own/b", "own /b"),
            ("nohttp/b", "nohttp /b"),
            ("resource/", "404"),
        ],
    );
    assert_eq!(
        reasons(&built),
        [
            ("resource".to_string(), "UnsupportedResourceBackend".to_string()),
            ("young".to_string(), "PathConflict".to_string())
        ]
    );
    let options = Options { default_backend_service: Some(ObjectKey::new("ops", "error-pages")), ..Default::default() };
    let input = Input {
        ingresses: vec![Arc::new(ingress("p", "nginx", &[("h", "/a", "Prefix", "svc")], &[]))],
        classes: classes(),
        ..Default::default()
    };
    let built = compile(&input, &options);
    check(&built.table, &[("h/b", "error-pages /b"), ("other/", "error-pages /"), ("h/a", "svc /a")]);
    assert_eq!(compile(&Input::default(), &Options::default()).table.hosts.len(), 1, "an empty cluster answers 404");
    check(&compile(&Input::default(), &Options::default()).table, &[("h/", "404")]);
}

#[test]
fn the_older_ingress_wins_a_path() {
    let at = |name: &str, class: &str, created: &str| {
        with(
            ingress(name, class, &[("h", "/a", "Prefix", name)], &[]),
            json!({"metadata": {"creationTimestamp": created}}),
        )
    };
    let (early, late) = ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z");
    let built = build(vec![at("b", "nginx", late), at("c", "nginx", early)]);
    check(&built.table, &[("h/a", "c /a")]);
    assert_eq!(reasons(&built), [("b".to_string(), "PathConflict".to_string())]);
    assert!(built.findings[0].message.contains("host \"h\" and path \"/a\" is already defined in ingress shop/c"));
    // Equal age: ingress-nginx takes the last by name, strict the first.
    check(&build(vec![at("a", "nginx", early), at("b", "nginx", early)]).table, &[("h/a", "b /a")]);
    check(&build(vec![at("a", "portolan", early), at("b", "portolan", early)]).table, &[("h/a", "a /a")]);
}

#[test]
fn only_our_classes_are_compiled() {
    let legacy = |value: &str| {
        with(
            ingress("legacy", "x", &[("h", "/", "Prefix", "svc")], &[]),
            json!({"metadata": {"annotations": {"kubernetes.io/ingress.class": value}}, "spec": {"ingressClassName": null}}),
        )
    };
    let table: Vec<(&str, Ingress, Option<Profile>)> = vec![
        ("our class", ingress("a", "nginx", &[], &[]), Some(Profile::NginxCompat)),
        ("our other class", ingress("a", "portolan", &[], &[]), Some(Profile::Strict)),
        ("a foreign class", ingress("a", "other", &[], &[]), None),
        ("a class that does not exist", ingress("a", "some-invalid-class-name", &[], &[]), None),
        ("the legacy annotation", legacy("nginx"), Some(Profile::NginxCompat)),
        ("a foreign legacy annotation", legacy("traefik"), None),
        ("an empty legacy annotation", legacy(""), None),
        ("no class", with(ingress("a", "x", &[], &[]), json!({"spec": {"ingressClassName": null}})), None),
        (
            "the field decides alone",
            with(
                ingress("a", "other", &[], &[]),
                json!({"metadata": {"annotations": {"kubernetes.io/ingress.class": "nginx"}}}),
            ),
            None,
        ),
    ];
    let classes = classes();
    let find = |name: &str| classes.iter().find(|c| c.metadata.name.as_deref() == Some(name)).map(Arc::as_ref);
    for (name, ingress, expected) in &table {
        assert_eq!(class_of(ingress, find, &Options::default()), *expected, "{name}");
    }
    let without = Options { watch_ingress_without_class: true, ..Default::default() };
    assert_eq!(class_of(&table[7].1, find, &without), Some(Profile::NginxCompat));
    let by_name = Options { ingress_class_by_name: true, ..Default::default() };
    let foreign = class("nginx", "acme.io/x");
    assert_eq!(class_of(&table[0].1, |_| Some(foreign.as_ref()), &by_name), Some(Profile::NginxCompat));
}

#[test]
fn closed_ingresses_answer_503_and_get_no_address() {
    let rule = [("h", "/a", "Prefix", "svc")];
    let built = build(vec![
        ingress("auth", "nginx", &rule, &[("auth-url", "http://auth/")]),
        ingress("open", "nginx", &[("h", "/b", "Prefix", "svc")], &[]),
        ingress("prefix", "nginx", &[("i", "/x(.*)", "Prefix", "svc")], &[]),
        ingress("mtls", "nginx", &[("j", "/a", "Prefix", "svc")], &[("auth-tls-secret", "shop/ca")]),
        ingress("same-host", "nginx", &[("j", "/b", "Prefix", "svc")], &[]),
        ingress("canary", "nginx", &[("k", "/b", "Prefix", "svc")], &[("canary", "true")]),
    ]);
    check(
        &built.table,
        &[("h/a", "503"), ("h/b", "svc /b"), ("i/x1", "404"), ("j/a", "403"), ("j/b", "403"), ("k/b", "404")],
    );
    check(&built.table, &[("i/x(.*)", "503")]);
    let accepted: Vec<&str> = built.accepted.iter().map(|k| k.name.as_str()).collect();
    assert_eq!(accepted, ["canary", "open", "same-host"]);
    let rejected = built.findings.iter().find(|f| f.origin.name == "prefix").expect("a finding");
    assert_eq!(rejected.reason, "Rejected");
    assert!(
        rejected.message.starts_with("ingress contains invalid paths: path /x(.*) cannot be used with pathType Prefix")
    );
}

#[test]
fn certificates_are_chosen_per_host() {
    let certificate = |names: &[&str], common_name: Option<&str>, not_after: i64| {
        Ok(Certificate {
            dns_names: names.iter().map(|n| n.to_string()).collect(),
            common_name: common_name.map(Into::into),
            not_after,
        })
    };
    let year = 365 * 24 * 3600;
    let certificates = BTreeMap::from([
        (ObjectKey::new("shop", "good"), certificate(&["a.com", "*.b.com"], None, year)),
        (ObjectKey::new("shop", "san"), certificate(&["c.com"], None, year)),
        (ObjectKey::new("shop", "cn"), certificate(&[], Some("d.com"), year)),
        (ObjectKey::new("shop", "old"), certificate(&["e.com"], None, 1)),
        (ObjectKey::new("shop", "soon"), certificate(&["f.com"], None, 5000)),
        (ObjectKey::new("shop", "broken"), Err("no key tls.key".into())),
    ]);
    let tls = |name: &str, host: &'static str, hosts: &[&str], secret: &str| {
        let secret = (!secret.is_empty()).then_some(secret);
        with(
            ingress(name, "nginx", &[(host, "/", "Prefix", "svc")], &[]),
            json!({"spec": {"tls": [{"hosts": hosts, "secretName": secret}]}}),
        )
    };
    let ingresses = vec![
        tls("exact", "a.com", &["A.com"], "good"),
        tls("wildcard", "*.b.com", &["*.b.com"], "good"),
        tls("by-san", "c.com", &["unrelated"], "san"),
        tls("by-cn", "d.com", &["d.com"], "cn"),
        tls("expired", "e.com", &["e.com"], "old"),
        tls("expiring", "f.com", &["f.com"], "soon"),
        tls("broken", "g.com", &["g.com"], "broken"),
        tls("missing", "h.com", &["h.com"], "nothing"),
        tls("mismatch", "i.com", &["i.com"], "san"),
        tls("default", "j.com", &["j.com"], ""),
        ingress("plain", "nginx", &[("k.com", "/", "Prefix", "svc")], &[]),
    ];
    let input = Input { ingresses: ingresses.into_iter().map(Arc::new).collect(), classes: classes(), certificates };
    let built = compile(&input, &Options { now: 4000, ..Default::default() });
    let secret = |host: &str| {
        let host = built.table.host_by_server_name(Some(host)).expect("a host");
        host.tls.as_ref().map(|t| t.secret.as_ref().map_or("default", |s| s.name.as_str()))
    };
    for (host, expected) in [
        ("a.com", Some("good")),
        ("x.b.com", Some("good")),
        ("c.com", Some("san")),
        ("d.com", Some("cn")),
        ("e.com", Some("old")),
        ("f.com", Some("soon")),
        ("g.com", Some("default")),
        ("h.com", Some("default")),
        ("i.com", Some("default")),
        ("j.com", Some("default")),
        ("k.com", None),
        ("unknown.com", None),
    ] {
        assert_eq!(secret(host), expected, "{host}");
    }
    let expected = [
        ("broken", "TLSSecretInvalid"),
        ("expired", "TLSCertificateExpired"),
        ("expiring", "TLSCertificateExpiring"),
        ("mismatch", "TLSCertificateMismatch"),
        ("missing", "TLSSecretInvalid"),
    ];
    assert_eq!(reasons(&built), expected.map(|(a, b)| (a.to_string(), b.to_string())));
    check(&built.table, &[("g.com/x", "308 https://g.com/x"), ("k.com/x", "svc /x")]);
    let named: Vec<&str> = built.secrets.iter().map(|k| k.name.as_str()).collect();
    assert_eq!(named, ["broken", "cn", "good", "nothing", "old", "san", "soon"]);
}

#[test]
fn the_order_of_the_input_does_not_matter() {
    let mut ingresses: Vec<Arc<Ingress>> = (0..20)
        .map(|n| {
            let class = if n % 3 == 0 { "portolan" } else { "nginx" };
            Arc::new(ingress(
                &format!("i{n}"),
                class,
                &[("h", "/a", "Prefix", "svc"), ("i", "/b", "Exact", "svc")],
                &[("app-root", "/x")],
            ))
        })
        .collect();
    let dump = |ingresses: &[Arc<Ingress>]| {
        let built = compile(
            &Input { ingresses: ingresses.to_vec(), classes: classes(), ..Default::default() },
            &Options::default(),
        );
        (serde_json::to_string(&(&built.table.hosts, &built.table.rules)).expect("serializes"), built.findings)
    };
    let first = dump(&ingresses);
    ingresses.reverse();
    assert_eq!(dump(&ingresses), first);
}

#[test]
fn explanations_name_winners_and_losers() {
    let built =
        build(vec![ingress("a", "nginx", &[("h", "/foo", "Exact", "exact"), ("h", "/foo", "Prefix", "prefix")], &[])]);
    let explained = explain(&built.table, &Head { https: false, port: 80, authority: Some("h"), target: "/foo" });
    assert_eq!(explained.candidates.len(), 2);
    assert!(
        explained.candidates[0].chosen
            && explained.candidates[0].origin == "Ingress shop/a spec.rules[0].http.paths[0]"
    );
    assert!(explained.candidates[1].why.contains("precedence"));
    assert_eq!(explained.upstream, Some(("shop/exact:80".to_string(), "/foo".to_string())));
}

mod upstreams {
    use super::super::upstream::*;
    use super::*;

    fn service(spec: Value) -> BackendService {
        let service = json!({"metadata": {"namespace": "shop", "name": "web"}, "spec": spec});
        BackendService::parse(&serde_json::from_value(service).expect("a Service"))
    }

    fn slice(ports: Value, endpoints: Value) -> BackendSlice {
        let slice = json!({"metadata": {"namespace": "shop", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "ports": ports, "endpoints": endpoints});
        BackendSlice::parse(&serde_json::from_value(slice).expect("a slice")).expect("belongs to a Service")
    }

    fn key(port: PortRef, profile: Profile) -> UpstreamKey {
        UpstreamKey { service: ObjectKey::new("shop", "web"), port, profile }
    }

    #[test]
    fn ports_are_found_by_number_name_and_habit() {
        let service = service(json!({"ports": [
            {"name": "dns", "port": 53, "protocol": "UDP"},
            {"name": "http", "port": 80, "targetPort": "web"},
            {"name": "admin", "port": 8080, "targetPort": 9090}]}));
        let slice = slice(
            json!([{"name": "http", "port": 8000}, {"name": "admin", "port": 9090}]),
            json!([{"addresses": ["10.0.0.2"]}, {"addresses": ["10.0.0.1"]}]),
        );
        let endpoints = |port: u16| {
            Upstream::Endpoints(vec![
                format!("10.0.0.1:{port}").parse().expect("address"),
                format!("10.0.0.2:{port}").parse().expect("address"),
            ])
        };
        let missing = Upstream::None(Absence::PortNotFound);
        let table = [
            (PortRef::Number(80), endpoints(8000), endpoints(8000)),
            (PortRef::Name("http".into()), endpoints(8000), endpoints(8000)),
            (PortRef::First, endpoints(8000), endpoints(8000)),
            (PortRef::Number(9090), endpoints(9090), missing.clone()),
            (PortRef::Name("web".into()), endpoints(8000), missing.clone()),
            (PortRef::Number(53), missing.clone(), missing.clone()),
            (PortRef::Name("nothing".into()), missing.clone(), missing),
        ];
        for (port, compat, strict) in table {
            assert_eq!(resolve(&key(port.clone(), Profile::NginxCompat), Some(&service), [&slice]), compat, "{port}");
            assert_eq!(resolve(&key(port.clone(), Profile::Strict), Some(&service), [&slice]), strict, "{port}");
        }
        assert!(service.matches_target_port_only(&key(PortRef::Number(9090), Profile::NginxCompat)));
        assert!(!service.matches_target_port_only(&key(PortRef::Number(8080), Profile::NginxCompat)));
    }

    #[test]
    fn only_ready_endpoints_are_used_and_draining_ones_when_none_is() {
        let service = service(json!({"ports": [{"port": 80}]}));
        let ports = json!([{"name": "", "port": 8000}]);
        let resolved = |endpoints: Value| {
            resolve(&key(PortRef::Number(80), Profile::Strict), Some(&service), [&slice(ports.clone(), endpoints)])
        };
        let ready = json!({"addresses": ["10.0.0.1"], "conditions": {"ready": true}});
        let unready = json!({"addresses": ["10.0.0.2"], "conditions": {"ready": false, "serving": false}});
        let draining =
            json!({"addresses": ["10.0.0.3"], "conditions": {"ready": false, "serving": true, "terminating": true}});
        let one = |address: &str| Upstream::Endpoints(vec![format!("{address}:8000").parse().expect("address")]);
        assert_eq!(resolved(json!([ready, unready, draining])), one("10.0.0.1"));
        assert_eq!(resolved(json!([unready, draining])), one("10.0.0.3"));
        assert_eq!(resolved(json!([unready])), Upstream::None(Absence::NoEndpoints));
        assert_eq!(resolved(json!([])), Upstream::None(Absence::NoEndpoints));
        assert_eq!(
            resolve(&key(PortRef::Number(80), Profile::Strict), None, []),
            Upstream::None(Absence::ServiceNotFound)
        );
        let findings = Upstream::None(Absence::NoEndpoints)
            .findings(&key(PortRef::Number(80), Profile::Strict), &[Origin::default()]);
        assert_eq!(findings[0].reason, "NoEndpoints");
    }

    #[test]
    fn external_names_keep_their_port() {
        let external = service(json!({"type": "ExternalName", "externalName": "db.example.com."}));
        assert_eq!(
            resolve(&key(PortRef::Number(8443), Profile::Strict), Some(&external), []),
            Upstream::External { name: "db.example.com".into(), port: 8443 }
        );
        assert_eq!(
            resolve(&key(PortRef::Name("x".into()), Profile::Strict), Some(&external), []),
            Upstream::None(Absence::PortNotFound)
        );
    }

    #[test]
    fn a_slice_without_ports_means_the_target_port() {
        let numeric = service(json!({"ports": [{"port": 80, "targetPort": 9000}]}));
        let slice = slice(Value::Null, json!([{"addresses": ["10.0.0.1"]}]));
        assert_eq!(
            resolve(&key(PortRef::Number(80), Profile::Strict), Some(&numeric), [&slice]),
            Upstream::Endpoints(vec!["10.0.0.1:9000".parse().expect("address")])
        );
    }
}
