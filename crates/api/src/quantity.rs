//! Resource quantities (`500m`, `1Gi`) and their canonical form.

/// The canonical text of a quantity, `None` if the text is not a quantity.
pub fn canonical(text: &str) -> Option<String> {
    let _ = text;
    todo!()
}
