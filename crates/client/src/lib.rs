//! What every component needs to be a Kubernetes client: configuration, event recorder, leader election.
