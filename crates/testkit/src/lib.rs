//! Test helpers: clusters in namespaces, waiting with a deadline, recorded conversations.
