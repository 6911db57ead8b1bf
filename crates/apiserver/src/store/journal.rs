//! The file behind the store: all objects, and the recent events so that watchers resume across a restart.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::{Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition};
use serde_json::Value;

use super::object::{Key, Object};
use super::watch::{Change, Event};

/// (collection, namespace, name) to (revision, document).
const OBJECTS: TableDefinition<'_, (&str, &str, &str), (u64, &[u8])> = TableDefinition::new("objects");

/// Revision to (change, collection, namespace, name, document, document before or empty, revision before).
type HistoryValue = (u8, &'static str, &'static str, &'static str, &'static [u8], &'static [u8], u64);
const HISTORY: TableDefinition<'_, u64, HistoryValue> = TableDefinition::new("history");

/// Name to number: the format's version, the last revision, the oldest revision history is complete from.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

const FORMAT: u64 = 1;

/// Events kept for watchers that come back after a restart; as many as a busy ring holds.
const HISTORY_MAX: u64 = 2048;

/// Why the journal cannot be opened or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process has the file open.
    #[error("{0} is in use by another process")]
    InUse(PathBuf),
    /// The file cannot be read or written.
    #[error("cannot use {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the database says.
        #[source]
        source: Box<redb::Error>,
    },
    /// The file was written by another version of the program.
    #[error("{path} has format {found}, this program reads format {FORMAT}")]
    Format {
        /// The file.
        path: PathBuf,
        /// The format found.
        found: u64,
    },
    /// A document in the file is not JSON.
    #[error("{path}: {resource} {namespace}/{name} is damaged")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The collection.
        resource: String,
        /// The object's namespace.
        namespace: String,
        /// The object's name.
        name: String,
        /// What the parser says.
        #[source]
        source: serde_json::Error,
    },
    /// The thread that writes cannot be started.
    #[error("cannot start the store's thread")]
    Thread(#[source] std::io::Error),
}

/// One change to write.
pub(super) struct Record<'a> {
    event: &'a Event,
}

impl<'a> Record<'a> {
    pub(super) fn of(event: &'a Event) -> Record<'a> {
        Record { event }
    }
}

/// What a journal held when it was opened.
pub(super) struct Loaded {
    pub(super) revision: u64,
    pub(super) floor: u64,
    pub(super) objects: Vec<(Arc<str>, Key, Object)>,
    pub(super) events: Vec<Arc<Event>>,
}

pub(super) struct Journal {
    database: Database,
    path: PathBuf,
    history_len: u64,
}

impl Journal {
    pub(super) fn open(path: &Path) -> Result<(Journal, Loaded), Error> {
        let database = Database::builder().set_cache_size(4 << 20).create(path).map_err(|error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => Error::InUse(path.to_owned()),
            other => Error::File { path: path.to_owned(), source: Box::new(other.into()) },
        })?;
        let mut journal = Journal { database, path: path.to_owned(), history_len: 0 };
        journal.prepare().map_err(|source| journal.failed(source))?;
        let loaded = journal.load()?;
        journal.history_len = loaded.events.len() as u64;
        Ok((journal, loaded))
    }

    fn failed(&self, source: redb::Error) -> Error {
        Error::File { path: self.path.clone(), source: Box::new(source) }
    }

    fn prepare(&self) -> Result<(), redb::Error> {
        let txn = self.database.begin_write()?;
        {
            txn.open_table(OBJECTS)?;
            txn.open_table(HISTORY)?;
            let mut meta = txn.open_table(META)?;
            if meta.get("format")?.is_none() {
                meta.insert("format", FORMAT)?;
            }
        }
        txn.commit()?;
        Ok(())
    }

    fn load(&self) -> Result<Loaded, Error> {
        let format = self.number("format").map_err(|source| self.failed(source))?;
        if format != FORMAT {
            return Err(Error::Format { path: self.path.clone(), found: format });
        }
        let revision = self.number("revision").map_err(|source| self.failed(source))?;
        let floor = self.number("floor").map_err(|source| self.failed(source))?;
        let objects = self.objects()?;
        let events = self.events()?;
        Ok(Loaded { revision, floor, objects, events })
    }

    fn number(&self, name: &str) -> Result<u64, redb::Error> {
        let txn = self.database.begin_read()?;
        let meta = txn.open_table(META)?;
        Ok(meta.get(name)?.map_or(0, |value| value.value()))
    }

    fn objects(&self) -> Result<Vec<(Arc<str>, Key, Object)>, Error> {
        type Row = (Arc<str>, Key, u64, Vec<u8>);
        let rows = || -> Result<Vec<Row>, redb::Error> {
            let txn = self.database.begin_read()?;
            let table = txn.open_table(OBJECTS)?;
            let mut rows = Vec::with_capacity(usize::try_from(table.len()?).unwrap_or(0));
            for row in table.iter()? {
                let (key, value) = row?;
                let (resource, namespace, name) = key.value();
                let (revision, document) = value.value();
                rows.push((Arc::from(resource), Key::new(namespace, name), revision, document.to_vec()));
            }
            Ok(rows)
        };
        rows()
            .map_err(|source| self.failed(source))?
            .into_iter()
            .map(|(resource, key, revision, document)| {
                let value = self.parse(&document, &resource, &key)?;
                Ok((resource, key, Object::new(value, revision)))
            })
            .collect()
    }

    fn parse(&self, document: &[u8], resource: &str, key: &Key) -> Result<Value, Error> {
        serde_json::from_slice(document).map_err(|source| Error::Damaged {
            path: self.path.clone(),
            resource: resource.to_owned(),
            namespace: key.namespace.to_string(),
            name: key.name.to_string(),
            source,
        })
    }

    fn events(&self) -> Result<Vec<Arc<Event>>, Error> {
        type Row = (u64, u8, Arc<str>, Key, Vec<u8>, Vec<u8>, u64);
        let rows = || -> Result<Vec<Row>, redb::Error> {
            let txn = self.database.begin_read()?;
            let table = txn.open_table(HISTORY)?;
            let mut rows = Vec::new();
            for row in table.iter()? {
                let (revision, value) = row?;
                let (change, resource, namespace, name, document, before, revision_before) = value.value();
                let key = Key::new(namespace, name);
                let resource = Arc::from(resource);
                rows.push((
                    revision.value(),
                    change,
                    resource,
                    key,
                    document.to_vec(),
                    before.to_vec(),
                    revision_before,
                ));
            }
            Ok(rows)
        };
        rows()
            .map_err(|source| self.failed(source))?
            .into_iter()
            .map(|(revision, change, resource, key, document, before, revision_before)| {
                let object = Arc::new(Object::new(self.parse(&document, &resource, &key)?, revision));
                let previous = if before.is_empty() {
                    None
                } else {
                    Some(Arc::new(Object::new(self.parse(&before, &resource, &key)?, revision_before)))
                };
                let change = match change {
                    0 => Change::Added,
                    1 => Change::Modified,
                    _ => Change::Deleted,
                };
                Ok(Arc::new(Event::new(resource, key, change, object, previous)))
            })
            .collect()
    }

    /// Writes a batch in one transaction; when it returns the batch is as durable as promised.
    pub(super) fn append<'a>(
        &mut self,
        revision: u64,
        records: impl Iterator<Item = Record<'a>>,
    ) -> Result<(), redb::Error> {
        let txn = self.database.begin_write()?;
        {
            let mut objects = txn.open_table(OBJECTS)?;
            let mut history = txn.open_table(HISTORY)?;
            let mut meta = txn.open_table(META)?;
            for Record { event } in records {
                let (namespace, name) = (&*event.key.namespace, &*event.key.name);
                let document = serde_json::to_vec(&event.object.value).unwrap_or_default();
                let before = event.previous.as_ref().map(|p| serde_json::to_vec(&p.value).unwrap_or_default());
                let place = (&*event.resource, namespace, name);
                if event.change == Change::Deleted {
                    objects.remove(place)?;
                } else {
                    objects.insert(place, (event.object.revision, document.as_slice()))?;
                }
                let row = (
                    event.change as u8,
                    &*event.resource,
                    namespace,
                    name,
                    document.as_slice(),
                    before.as_deref().unwrap_or_default(),
                    event.previous.as_ref().map_or(0, |previous| previous.revision),
                );
                history.insert(event.object.revision, row)?;
                self.history_len += 1;
            }
            // Trimmed in larger pieces: a tree is cheaper to cut once than a thousand times.
            if self.history_len > HISTORY_MAX + HISTORY_MAX / 4 {
                let surplus = self.history_len - HISTORY_MAX;
                let last = history
                    .iter()?
                    .nth(usize::try_from(surplus - 1).unwrap_or(0))
                    .transpose()?
                    .map(|(revision, _)| revision.value());
                if let Some(last) = last {
                    history.retain(|revision, _| revision > last)?;
                    meta.insert("floor", last)?;
                    self.history_len = HISTORY_MAX;
                }
            }
            meta.insert("revision", revision)?;
        }
        txn.commit()?;
        Ok(())
    }
}
