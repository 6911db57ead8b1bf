//! The node agent of the standalone cluster: pods as OCI containers, probes, logs, exec.
