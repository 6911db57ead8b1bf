//! Controllers: EndpointSlices, Endpoints, workloads, scheduling, garbage collection, namespaces, service accounts.
