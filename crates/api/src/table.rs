//! (module header to be written by its owner)
