//! The embedded, Kubernetes-compatible API server of the standalone cluster.
//!
//! Requests come from kubectl and other clients over TLS, from pods over the fabric, and from the cluster's own
//! components in process ([`Server::local_service`]); objects go to a durable store with one global revision
//! ([`store`]). What can be decided about one object without I/O (schemas, defaults, validation, patches, tables) is in
//! `portolan-api`; this crate adds revisions, transactions, watches, HTTP, identity and streams.
//!
//! # Life of a request
//!
//! `server` accepts a connection and knows the client's certificate; `auth` turns that or a token into a user and asks
//! whether the user may do this; `path` reads the URL; `verbs` carries it out in one store transaction; `negotiate`
//! chooses the representation of the answer.
//!
//! # What authenticated users may do
//!
//! Members of `system:masters`, and with them the cluster's own components, may do everything. Everybody else may do
//! what the Roles and ClusterRoles bound to them allow (module `rbac`); anonymous requests reach only `/healthz`, `/livez`,
//! `/readyz` and `/version`.

mod admission;
mod auth;
mod bootstrap;
mod catalog;
mod config;
mod convert;
mod crd;
mod discovery;
mod headers;
mod html;
mod metrics;
mod negotiate;
mod openapi;
mod path;
mod pki;
mod proxy;
mod rbac;
mod response;
mod review;
mod server;
mod services;
pub mod store;
mod stream;
mod token;
mod verbs;

pub use auth::User;
pub use config::{BoxedIo, ClusterDialer, Durability, Error, Io, NoDialer, ServerConfig};
pub use response::{Body, BoxError};
pub use server::{LocalService, Server};
