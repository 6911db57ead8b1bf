//! An executor without a kernel that refuses what the kernel refuses.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use crate::object::*;
use crate::{Error, Executor, text};

/// Holds tables in memory and applies transactions wholly or not at all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fake {
    /// Tables by family and name.
    pub tables: BTreeMap<Table, FakeTable>,
    /// How many elements and rules were added or removed since the start; a measure of work.
    pub changes: usize,
}

/// A table of [`Fake`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FakeTable {
    /// Chains with their rules.
    pub chains: BTreeMap<Arc<str>, FakeChain>,
    /// Sets with their elements.
    pub sets: BTreeMap<Arc<str>, FakeSet>,
}

/// A chain of [`Fake`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FakeChain {
    /// Makes it a base chain.
    pub base: Option<Base>,
    /// Rules in order.
    pub rules: Vec<Vec<Statement>>,
}

/// A set or map of [`Fake`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FakeSet {
    /// How it was declared.
    pub set: Arc<Set>,
    /// Elements.
    pub elements: BTreeMap<Vec<Value>, Element>,
}

impl Executor for Fake {
    fn commit(&mut self, transaction: &Transaction) -> Result<(), Error> {
        let mut next = self.clone();
        for op in &transaction.ops {
            next.apply(&transaction.table, op).map_err(|code| Error::Refused {
                operation: text::script(&Transaction { table: transaction.table.clone(), ops: vec![op.clone()] }),
                source: io::Error::from_raw_os_error(code),
            })?;
        }
        *self = next;
        Ok(())
    }

    fn elements(&mut self, table: &Table, set: &Set) -> Result<Option<Vec<Element>>, Error> {
        Ok(self.tables.get(table).and_then(|t| t.sets.get(&set.name)).map(|s| s.elements.values().cloned().collect()))
    }

    fn chains(&mut self, table: &Table) -> Result<Vec<String>, Error> {
        Ok(self.tables.get(table).map(|t| t.chains.keys().map(|k| k.to_string()).collect()).unwrap_or_default())
    }
}

impl Fake {
    fn apply(&mut self, table: &Table, op: &Op) -> Result<(), i32> {
        match op {
            Op::AddTable => {
                self.tables.entry(table.clone()).or_default();
                return Ok(());
            }
            Op::DeleteTable => return self.tables.remove(table).map(|_| ()).ok_or(libc::ENOENT),
            _ => {}
        }
        let t = self.tables.get_mut(table).ok_or(libc::ENOENT)?;
        match op {
            Op::AddTable | Op::DeleteTable => {}
            Op::AddChain { name, base } => {
                let chain =
                    t.chains.entry(name.clone()).or_insert_with(|| FakeChain { base: *base, rules: Vec::new() });
                if base.is_some() && chain.base != *base {
                    return Err(libc::EEXIST);
                }
            }
            Op::FlushChain { name } => {
                let chain = t.chains.get_mut(name).ok_or(libc::ENOENT)?;
                self.changes += chain.rules.len();
                chain.rules.clear();
            }
            Op::DeleteChain { name } => {
                if t.references().contains(name) {
                    return Err(libc::EBUSY);
                }
                t.chains.remove(name).ok_or(libc::ENOENT)?;
            }
            Op::AddRule { chain, statements } => {
                for statement in statements {
                    t.check(statement)?;
                }
                t.chains.get_mut(chain).ok_or(libc::ENOENT)?.rules.push(statements.clone());
                self.changes += 1;
            }
            Op::AddSet(set) => {
                let known = t
                    .sets
                    .entry(set.name.clone())
                    .or_insert_with(|| FakeSet { set: set.clone(), elements: BTreeMap::new() });
                if known.set != *set {
                    return Err(libc::EEXIST);
                }
            }
            Op::AddElements { set, elements } => {
                for element in elements {
                    if let Some(Data::Verdict(Verdict::Goto(chain) | Verdict::Jump(chain))) = &element.data
                        && !t.chains.contains_key(chain)
                    {
                        return Err(libc::ENOENT);
                    }
                    if !shape_fits(set, element) {
                        return Err(libc::EINVAL);
                    }
                }
                let known = t.sets.get_mut(&set.name).ok_or(libc::ENOENT)?;
                for element in elements {
                    match known.elements.get(&element.key) {
                        Some(held) if held.data != element.data => return Err(libc::EEXIST),
                        Some(_) => {}
                        None => {
                            known.elements.insert(element.key.clone(), element.clone());
                            self.changes += 1;
                        }
                    }
                }
            }
            Op::DeleteElements { set, elements } => {
                let known = t.sets.get_mut(&set.name).ok_or(libc::ENOENT)?;
                for element in elements {
                    known.elements.remove(&element.key).ok_or(libc::ENOENT)?;
                    self.changes += 1;
                }
            }
            Op::FlushSet { set } => {
                let known = t.sets.get_mut(&set.name).ok_or(libc::ENOENT)?;
                self.changes += known.elements.len();
                known.elements.clear();
            }
        }
        Ok(())
    }
}

impl FakeTable {
    /// Chains that a rule or element leads to.
    fn references(&self) -> BTreeSet<Arc<str>> {
        let target = |v: &Verdict| match v {
            Verdict::Jump(chain) | Verdict::Goto(chain) => Some(chain.clone()),
            Verdict::Accept | Verdict::Drop | Verdict::Return => None,
        };
        let rules = self.chains.values().flat_map(|c| c.rules.iter().flatten()).filter_map(|s| match s {
            Statement::Verdict(v) => target(v),
            _ => None,
        });
        let elements = self.sets.values().flat_map(|s| s.elements.values()).filter_map(|e| match &e.data {
            Some(Data::Verdict(v)) => target(v),
            _ => None,
        });
        rules.chain(elements).collect()
    }

    fn check(&self, statement: &Statement) -> Result<(), i32> {
        let set = |name: &Arc<str>| self.sets.get(name).map(|s| &s.set).ok_or(libc::ENOENT);
        let fits = |name: &Arc<str>, key: &[Field], data: Option<DataType>| {
            let set = set(name)?;
            let matches = set.key.len() == key.len()
                && key.iter().zip(&set.key).all(|(field, wanted)| field_type(field) == *wanted);
            if matches && set.data == data { Ok(()) } else { Err(libc::EINVAL) }
        };
        match statement {
            Statement::InSet { key, set, .. } => fits(set, key, None),
            Statement::VerdictMap { key, map } => fits(map, key, Some(DataType::Verdict)),
            Statement::SetMarkFromMap { key, map } => fits(map, key, Some(DataType::Values(vec![FieldType::Mark]))),
            Statement::TranslateDestination { key, map } => {
                fits(map, key, Some(DataType::Values(vec![FieldType::Addr, FieldType::Port])))
            }
            Statement::Update { map, key, data, .. } | Statement::Forget { map, key, data } => {
                if set(map)?.dynamic.is_none() {
                    return Err(libc::EOPNOTSUPP);
                }
                fits(map, key, Some(DataType::Values(vec![field_type(data)])))
            }
            Statement::Verdict(Verdict::Jump(chain) | Verdict::Goto(chain)) if !self.chains.contains_key(chain) => {
                Err(libc::ENOENT)
            }
            _ => Ok(()),
        }
    }
}

fn field_type(field: &Field) -> FieldType {
    match field {
        Field::SourceAddr | Field::DestinationAddr => FieldType::Addr,
        Field::Proto => FieldType::Proto,
        Field::DestinationPort => FieldType::Port,
        Field::Mark { .. } => FieldType::Mark,
        Field::Random { .. } => FieldType::Index,
    }
}

fn shape_fits(set: &Set, element: &Element) -> bool {
    let fits = |types: &[FieldType], values: &[Value]| {
        types.len() == values.len()
            && types.iter().zip(values).all(|(t, v)| {
                matches!(
                    (t, v),
                    (FieldType::Addr, Value::V4(_) | Value::V6(_))
                        | (FieldType::Proto, Value::Proto(_))
                        | (FieldType::Port, Value::Port(_))
                        | (FieldType::Mark, Value::Mark(_))
                        | (FieldType::Index, Value::Index(_))
                ) || (set.interval && matches!((t, v), (FieldType::Addr, Value::Net(_))))
            })
    };
    fits(&set.key, &element.key)
        && match (&set.data, &element.data) {
            (None, None) => true,
            (Some(DataType::Verdict), Some(Data::Verdict(_))) => true,
            (Some(DataType::Values(types)), Some(Data::Values(values))) => fits(types, values),
            _ => false,
        }
}
