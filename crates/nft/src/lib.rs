//! An nf_tables object model with transactions, a netlink and a text executor, and a fake.
//!
//! Callers describe tables, chains, sets, maps and rules as values ([`Op`], [`Statement`]) and give them to an [`Executor`]
//! in a [`Transaction`], which takes effect wholly or not at all. The expression language is small on purpose: it has what
//! Portolan's data plane uses, and everything in it can be written as nft text, so that rules can be read, checked and
//! compared. Nothing here decides anything about Services.

mod fake;
pub mod netlink;
mod object;
pub mod text;

pub use fake::Fake;
pub use netlink::NetlinkExecutor;
pub use object::*;
pub use text::TextExecutor;

use std::io;

/// What goes wrong when talking to nf_tables.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel or the `nft` program refused a transaction; nothing of it took effect.
    #[error("nf_tables refused {operation}: {source}")]
    Refused {
        /// The refused operation in nft syntax, shortened.
        operation: String,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The `nft` program refused a transaction.
    #[error("nft refused the transaction: {message}")]
    Text {
        /// What it printed.
        message: String,
    },
    /// The socket or the program failed; whether the transaction took effect is unknown.
    #[error("cannot talk to nf_tables")]
    Io(#[from] io::Error),
    /// The kernel's answer cannot be understood.
    #[error("unexpected answer of nf_tables: {what}")]
    Protocol {
        /// What was unexpected.
        what: &'static str,
    },
}

impl Error {
    /// Whether the object that was named does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Error::Refused { source, .. } if source.raw_os_error() == Some(libc::ENOENT))
    }
}

/// Runs transactions and reads back what is in the kernel. Blocks; used from one thread.
pub trait Executor: Send {
    /// Applies a transaction wholly or not at all.
    ///
    /// # Errors
    /// [`Error::Refused`] and [`Error::Text`]: nothing took effect, the caller's idea of the kernel's state is wrong.
    fn commit(&mut self, transaction: &Transaction) -> Result<(), Error>;

    /// The elements of one set or map of ours, in no particular order; `None` when it or its table does not exist.
    fn elements(&mut self, table: &Table, set: &Set) -> Result<Option<Vec<Element>>, Error>;

    /// The names of the chains of one table; empty when the table does not exist.
    fn chains(&mut self, table: &Table) -> Result<Vec<String>, Error>;
}
