//! The Ingress controller's L7 proxy.
