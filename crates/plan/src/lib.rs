//! Pure compilers from API objects to tables, and the evaluator that is the oracle for every back end.
//!
//! Input comes from informer caches; output goes to the kernel, the proxy, DNS and the load balancer. Nothing here does I/O,
//! reads a clock or is `async`.

pub mod announce;
pub mod delta;
pub mod endpoint;
pub mod eval;
pub mod finding;
pub mod origin;
pub mod route;
pub mod service;
pub mod slices;
pub mod world;
pub mod zone;
