//! The table of built-in kinds.

use super::{Generation, Kind, NameRule, Propagation, Storage, Subresource};

/// Named groups in the order in which discovery lists them; others follow by name.
pub(super) const GROUP_ORDER: &[&str] = &[
    "",
    "events.k8s.io",
    "authentication.k8s.io",
    "authorization.k8s.io",
    "autoscaling",
    "batch",
    "networking.k8s.io",
    "policy",
    "rbac.authorization.k8s.io",
    "storage.k8s.io",
    "apiextensions.k8s.io",
    "scheduling.k8s.io",
    "coordination.k8s.io",
    "node.k8s.io",
    "discovery.k8s.io",
    "apps",
];

/// Group versions that exist for the kind of a subresource only.
pub(super) const EXTRA_VERSIONS: &[(&str, &str)] = &[("autoscaling", "v1")];

const ALL_VERBS: &str = "create delete deletecollection get list patch update watch";
const CREATE: &str = "create";
const STATUS: &str = "get patch update";
const SCALE: (&str, &str, &str, &str) = ("scale", "autoscaling/v1", "Scale", STATUS);
const PROXY: &str = "create delete get patch update";

/// One line of the table; each method changes one of its defaults.
struct Entry {
    kind: Kind,
}

/// Starts an entry with the defaults of an ordinary namespaced kind.
fn entry(api_version: &str, plural: &str, kind: &str) -> Entry {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    Entry {
        kind: Kind {
            group: group.to_owned(),
            version: version.to_owned(),
            plural: plural.to_owned(),
            singular: kind.to_lowercase(),
            kind: kind.to_owned(),
            list_kind: format!("{kind}List"),
            namespaced: true,
            short_names: Vec::new(),
            categories: Vec::new(),
            verbs: words(ALL_VERBS),
            subresources: Vec::new(),
            name_rule: NameRule::Subdomain,
            generation: Generation::None,
            create_on_update: false,
            unconditional_update: true,
            delete_returns_object: false,
            default_propagation: Propagation::Background,
            storage: Storage::Own,
            custom: false,
        },
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

impl Entry {
    fn cluster(mut self) -> Self {
        self.kind.namespaced = false;
        self
    }

    fn short(mut self, names: &str) -> Self {
        self.kind.short_names = words(names);
        self
    }

    fn category(mut self, names: &str) -> Self {
        self.kind.categories = words(names);
        self
    }

    fn verbs(mut self, verbs: &str) -> Self {
        self.kind.verbs = words(verbs);
        self
    }

    fn status(self) -> Self {
        let kind = self.kind.kind.clone();
        self.sub("status", &kind, STATUS)
    }

    fn scale(self) -> Self {
        let (name, api_version, kind, verbs) = SCALE;
        self.sub_of(name, api_version, kind, verbs)
    }

    fn sub(mut self, name: &str, kind: &str, verbs: &str) -> Self {
        self.push(Subresource {
            name: name.to_owned(),
            kind: kind.to_owned(),
            group_version: None,
            verbs: words(verbs),
        });
        self
    }

    fn sub_of(mut self, name: &str, api_version: &str, kind: &str, verbs: &str) -> Self {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        self.push(Subresource {
            name: name.to_owned(),
            kind: kind.to_owned(),
            group_version: Some((group.to_owned(), version.to_owned())),
            verbs: words(verbs),
        });
        self
    }

    fn push(&mut self, subresource: Subresource) {
        self.kind.subresources.push(subresource);
        self.kind.subresources.sort_by(|a, b| a.name.cmp(&b.name));
    }

    fn named(mut self, rule: NameRule) -> Self {
        self.kind.name_rule = rule;
        self
    }

    fn generation(mut self, rule: Generation) -> Self {
        self.kind.generation = rule;
        self
    }

    fn create_on_update(mut self) -> Self {
        self.kind.create_on_update = true;
        self
    }

    fn conditional_update(mut self) -> Self {
        self.kind.unconditional_update = false;
        self
    }

    fn delete_returns_object(mut self) -> Self {
        self.kind.delete_returns_object = true;
        self
    }

    fn orphans(mut self) -> Self {
        self.kind.default_propagation = Propagation::Orphan;
        self
    }

    fn review(mut self) -> Self {
        self.kind.storage = Storage::Virtual;
        self.verbs(CREATE)
    }

    fn stored_as(mut self, api_version: &str, plural: &str) -> Self {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        self.kind.storage =
            Storage::SharedWith { group: group.to_owned(), version: version.to_owned(), plural: plural.to_owned() };
        self
    }
}

/// The built-in kinds.
pub(super) fn kinds() -> impl Iterator<Item = Kind> {
    use Generation::{Spec, SpecAndLabels};
    let entries = [
        // core
        entry("v1", "bindings", "Binding").review(),
        entry("v1", "configmaps", "ConfigMap").short("cm"),
        entry("v1", "endpoints", "Endpoints").short("ep").create_on_update(),
        entry("v1", "events", "Event").short("ev").create_on_update(),
        entry("v1", "limitranges", "LimitRange").short("limits").create_on_update(),
        entry("v1", "namespaces", "Namespace")
            .cluster()
            .short("ns")
            .verbs("create delete get list patch update watch")
            .sub("finalize", "Namespace", "update")
            .status()
            .named(NameRule::Label)
            .delete_returns_object(),
        entry("v1", "nodes", "Node").cluster().short("no").sub("proxy", "NodeProxyOptions", PROXY).status(),
        entry("v1", "persistentvolumeclaims", "PersistentVolumeClaim").short("pvc").status().delete_returns_object(),
        entry("v1", "persistentvolumes", "PersistentVolume").cluster().short("pv").status().delete_returns_object(),
        entry("v1", "pods", "Pod")
            .short("po")
            .category("all")
            .sub("attach", "PodAttachOptions", "create get")
            .sub("binding", "Binding", CREATE)
            .sub_of("eviction", "policy/v1", "Eviction", CREATE)
            .sub("ephemeralcontainers", "Pod", STATUS)
            .sub("exec", "PodExecOptions", "create get")
            .sub("log", "Pod", "get")
            .sub("portforward", "PodPortForwardOptions", "create get")
            .sub("proxy", "PodProxyOptions", PROXY)
            .status()
            .generation(Spec)
            .delete_returns_object(),
        entry("v1", "podtemplates", "PodTemplate").generation(Spec).delete_returns_object(),
        entry("v1", "replicationcontrollers", "ReplicationController")
            .short("rc")
            .category("all")
            .scale()
            .status()
            .generation(Spec)
            .orphans(),
        entry("v1", "resourcequotas", "ResourceQuota").short("quota").status().delete_returns_object(),
        entry("v1", "secrets", "Secret"),
        entry("v1", "serviceaccounts", "ServiceAccount")
            .short("sa")
            .sub_of("token", "authentication.k8s.io/v1", "TokenRequest", CREATE)
            .delete_returns_object(),
        entry("v1", "services", "Service")
            .short("svc")
            .category("all")
            .sub("proxy", "ServiceProxyOptions", PROXY)
            .status()
            .named(NameRule::Label)
            .create_on_update()
            .delete_returns_object(),
        // apps
        entry("apps/v1", "controllerrevisions", "ControllerRevision"),
        entry("apps/v1", "daemonsets", "DaemonSet").short("ds").category("all").status().generation(Spec),
        entry("apps/v1", "deployments", "Deployment").short("deploy").category("all").scale().status().generation(Spec),
        entry("apps/v1", "replicasets", "ReplicaSet").short("rs").category("all").scale().status().generation(Spec),
        entry("apps/v1", "statefulsets", "StatefulSet").short("sts").category("all").scale().status().generation(Spec),
        // discovery and networking
        entry("discovery.k8s.io/v1", "endpointslices", "EndpointSlice").generation(SpecAndLabels),
        entry("networking.k8s.io/v1", "ingressclasses", "IngressClass").cluster().generation(Spec),
        entry("networking.k8s.io/v1", "ingresses", "Ingress").short("ing").status().generation(Spec),
        entry("networking.k8s.io/v1", "ipaddresses", "IPAddress").cluster().short("ip").named(NameRule::IpAddress),
        entry("networking.k8s.io/v1", "networkpolicies", "NetworkPolicy").short("netpol").generation(Spec),
        entry("networking.k8s.io/v1", "servicecidrs", "ServiceCIDR").cluster().status(),
        // coordination and events
        entry("coordination.k8s.io/v1", "leases", "Lease").create_on_update().conditional_update(),
        entry("events.k8s.io/v1", "events", "Event").short("ev").create_on_update().stored_as("v1", "events"),
        // extension
        entry("apiextensions.k8s.io/v1", "customresourcedefinitions", "CustomResourceDefinition")
            .cluster()
            .short("crd crds")
            .category("api-extensions")
            .status()
            .generation(Spec)
            .conditional_update(),
        // access control
        entry("rbac.authorization.k8s.io/v1", "clusterrolebindings", "ClusterRoleBinding")
            .cluster()
            .named(NameRule::PathSegment)
            .create_on_update(),
        entry("rbac.authorization.k8s.io/v1", "clusterroles", "ClusterRole")
            .cluster()
            .named(NameRule::PathSegment)
            .create_on_update(),
        entry("rbac.authorization.k8s.io/v1", "rolebindings", "RoleBinding")
            .named(NameRule::PathSegment)
            .create_on_update(),
        entry("rbac.authorization.k8s.io/v1", "roles", "Role").named(NameRule::PathSegment).create_on_update(),
        entry("authentication.k8s.io/v1", "selfsubjectreviews", "SelfSubjectReview").cluster().review(),
        entry("authentication.k8s.io/v1", "tokenreviews", "TokenReview").cluster().review(),
        entry("authorization.k8s.io/v1", "localsubjectaccessreviews", "LocalSubjectAccessReview").review(),
        entry("authorization.k8s.io/v1", "selfsubjectaccessreviews", "SelfSubjectAccessReview").cluster().review(),
        entry("authorization.k8s.io/v1", "selfsubjectrulesreviews", "SelfSubjectRulesReview").cluster().review(),
        entry("authorization.k8s.io/v1", "subjectaccessreviews", "SubjectAccessReview").cluster().review(),
        // kinds that are kept for clients; no controller of the standalone cluster acts on them
        entry("policy/v1", "poddisruptionbudgets", "PodDisruptionBudget").short("pdb").status().generation(Spec),
        entry("autoscaling/v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler")
            .short("hpa")
            .category("all")
            .status(),
        entry("batch/v1", "cronjobs", "CronJob").short("cj").category("all").status().generation(Spec),
        entry("batch/v1", "jobs", "Job").category("all").status().generation(Spec).orphans(),
        entry("scheduling.k8s.io/v1", "priorityclasses", "PriorityClass").cluster().short("pc").generation(Spec),
        entry("node.k8s.io/v1", "runtimeclasses", "RuntimeClass").cluster(),
        entry("storage.k8s.io/v1", "storageclasses", "StorageClass").cluster().short("sc"),
    ];
    entries.into_iter().map(|entry| entry.kind)
}
