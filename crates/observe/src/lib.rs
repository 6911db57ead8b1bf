//! Logging, metrics and the admin endpoints shared by all components.
