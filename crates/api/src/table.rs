//! Server-side tables (`Accept: application/json;as=Table`): columns and cells of each kind.

use jiff::Timestamp;
use serde_json::Value;

use crate::kinds::Kind;

/// One column of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Heading.
    pub name: String,
    /// `string`, `integer`, `number`, `boolean` or `date`.
    pub type_: String,
    /// `name` marks the column that names the object.
    pub format: String,
    /// Text for people.
    pub description: String,
    /// 0 is always shown, greater only with `-o wide`.
    pub priority: i32,
}

/// One row of a table, without the object that goes with it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// One value for each column.
    pub cells: Vec<Value>,
    /// Row conditions, such as `Completed`.
    pub conditions: Vec<Value>,
}

/// The columns of a kind.
pub fn columns(kind: &Kind) -> Vec<Column> {
    let _ = kind;
    todo!()
}

/// The row of an object.
pub fn row(kind: &Kind, object: &Value, now: Timestamp) -> Row {
    let _ = (kind, object, now);
    todo!()
}
